// csrc/common/launch.cuh for the emulator.
#pragma once

#include "device.h"

namespace moca {

template <typename Params>
void launch(const std::string&, void (*kernel)(Params), int64_t blocks, int threads, int shared,
            void*, const std::decay_t<Params>& params) {
  emulator::launch(kernel, blocks, threads, shared, params);
}

}  // namespace moca

// csrc/common/cuda.h for the emulator: what attention's sources use of it.
#pragma once

#include <initializer_list>
#include <utility>

#include "common/dtype.h"
#include "common/queue.h"
#include "device.h"

namespace moca {

using Shape = std::initializer_list<std::pair<const char*, int64_t>>;

struct Launch {
  const char* kernel;
  Shape shape;
  Queue queue;
  dim3 grid, block;
  size_t shared = 0;
};

template <typename... Wanted, typename... Given>
void launch(const Launch& at, void (*kernel)(Wanted...), const Given&... arguments) {
  emulator::launch(at.grid, at.block, at.shared, [&] { kernel(arguments...); });
}

}  // namespace moca

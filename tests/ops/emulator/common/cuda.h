// csrc/common/cuda.h for the emulator: what attention's sources use of it.
#pragma once

#include <initializer_list>
#include <utility>

#include "common/dtype.h"
#include "common/queue.h"
#include "device.h"

namespace moca {

constexpr int64_t ceil_div(int64_t value, int64_t by) { return (value + by - 1) / by; }

using Shape = std::initializer_list<std::pair<const char*, int64_t>>;

// The device: a Hopper of few multiprocessors, so that blocks have several tiles in turn.
enum Attribute {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor
};

inline void cudaDeviceGetAttribute(int* value, Attribute attribute, int) {
  const int values[] = {3, 9, 0};
  *value = values[attribute];
}

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

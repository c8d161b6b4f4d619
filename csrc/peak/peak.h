// peak: the processor's own limit, for the benchmarks: multiply-adds that never leave registers.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace moca {

struct PeakParams {
  int64_t steps;  // of each thread
  bool bfloat16;  // the bfloat16 dot product in place of the float32 multiply-add
  double* flops;  // (threads,) how many were done; 0 where the set has no such instruction
  int threads;
};

}  // namespace moca

MOCA_KERNEL(peak, PeakParams)

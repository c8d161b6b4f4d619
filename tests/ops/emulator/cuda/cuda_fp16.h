// CUDA's float16 for the emulator.
#pragma once

#include "common/dtype.h"

struct __half {
  moca::float16 value;
  __half() = default;
  explicit __half(float x) : value(moca::from_float<moca::float16>(x)) {}
};

inline float __half2float(__half x) { return moca::to_float(x.value); }

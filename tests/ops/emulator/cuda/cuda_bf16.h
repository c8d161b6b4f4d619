// CUDA's bfloat16 for the emulator.
#pragma once

#include "common/dtype.h"

struct __nv_bfloat16 {
  moca::bfloat16 value;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float x) : value(moca::from_float<moca::bfloat16>(x)) {}
};

inline float __bfloat162float(__nv_bfloat16 x) { return moca::to_float(x.value); }

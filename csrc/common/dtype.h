// Element types of kernel arguments, and their conversion to and from float32.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>

namespace moca {

enum class DType : int { float32, bfloat16, float16 };

struct bfloat16 {
  uint16_t bits;
};

inline float to_float(float value) { return value; }

inline float to_float(bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

template <typename T>
T from_float(float value);

template <>
inline float from_float<float>(float value) {
  return value;
}

// Round to nearest, ties to even; NaN stays NaN.
template <>
inline bfloat16 from_float<bfloat16>(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return {static_cast<uint16_t>(is_nan ? (bits >> 16) | 0x40u : rounded)};
}

#ifdef __FLT16_MAX__
using float16 = _Float16;

inline float to_float(float16 value) { return static_cast<float>(value); }

template <>
inline float16 from_float<float16>(float value) {
  return static_cast<float16>(value);
}
#else
struct float16 {
  uint16_t bits;
};

inline float to_float(float16 value) {
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  uint32_t bits = magnitude;
  float out;
  if ((value.bits & 0x7c00u) == 0x7c00u) {
    bits |= 0x7f800000u;
    bits |= sign;
    std::memcpy(&out, &bits, sizeof out);
    return out;
  }
  // Scaling by 2^112 moves the exponent bias and makes subnormals right at the same time.
  std::memcpy(&out, &bits, sizeof out);
  out *= 0x1p112f;
  return sign ? -out : out;
}

// Round to nearest, ties to even.
template <>
inline float16 from_float<float16>(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (bits >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};
  if (bits < 0x38800000u) {  // subnormal: let the float adder do the rounding
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof magnitude);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, sizeof bits);
    return {static_cast<uint16_t>(sign | (bits - 0x3f000000u))};
  }
  const uint32_t rounded = bits + 0xfffu + ((bits >> 13) & 1u) - 0x38000000u;
  return {static_cast<uint16_t>(sign | (rounded >> 13))};
}
#endif

// Calls `body` with a null pointer of the element type: visit(dtype, [&](auto* type) {...}).
template <typename Body>
void visit(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::float32: return body(static_cast<float*>(nullptr));
    case DType::bfloat16: return body(static_cast<bfloat16*>(nullptr));
    case DType::float16: return body(static_cast<float16*>(nullptr));
  }
  throw std::invalid_argument("moca_fast: unknown dtype");
}

}  // namespace moca

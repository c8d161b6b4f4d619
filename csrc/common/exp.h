// Exponentials and logarithms of vectors.
#pragma once

#ifdef __AVX512DQ__
#include <immintrin.h>
#endif

#include "common/simd.h"

namespace moca::MOCA_ISA {

// 2^n * y for a whole n of at most 127 for which that is no subnormal number (those are slow).
inline Lanes times_power_of_2(Lanes y, Lanes n) {
#ifdef __AVX512F__
  // The plain forms read an undefined register in the headers of GCC 12, which then warns.
  return reinterpret_cast<Lanes>(
      _mm512_maskz_scalef_ps(0xffff, reinterpret_cast<__m512>(y), reinterpret_cast<__m512>(n)));
#else
  const IntLanes exponent = __builtin_convertvector(n, IntLanes) + 127;
  return y * reinterpret_cast<Lanes>(exponent << 23);
#endif
}

// exp(x) for x up to 88, as the exponent of a softmax always is, to about one unit in the last
// place; 0 below -87.33 (no subnormals); NaN stays NaN. x = n log 2 + r with |r| <= log(2) / 2,
// and a polynomial in r.
inline Lanes exp_lanes(Lanes x) {
  constexpr float kLog2E = 1.44269504088896341f;
  constexpr float kLog2High = 0.693359375f, kLog2Low = -2.12194440e-4f;  // exact n * kLog2High
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  const Lanes n = (x * kLog2E + kRound) - kRound;
  const Lanes r = (x - n * kLog2High) - n * kLog2Low;
  Lanes y = r * (1.0f / 5040.0f) + 1.0f / 720.0f;
  y = y * r + 1.0f / 120.0f;
  y = y * r + 1.0f / 24.0f;
  y = y * r + 1.0f / 6.0f;
  y = y * r + 0.5f;
  y = y * (r * r) + r + 1.0f;
  return x < -87.33f ? Lanes{} : times_power_of_2(y, n);
}

#ifdef __AVX512BF16__
// 2^power for weights that are rounded to bfloat16, for powers up to 127: off by no more than 2^-18
// of the value; 0 below 2^-126 (no subnormals); NaN stays NaN. power = n + r with 0 <= r < 1, and
// a polynomial in r.
inline Lanes exp2_for_bfloat16(Lanes power) {
  constexpr int kDown = 1;
  const auto bits = reinterpret_cast<__m512>(power);
  const Lanes r = reinterpret_cast<Lanes>(_mm512_maskz_reduce_ps(0xffff, bits, kDown));
  Lanes y = r * 0.013426687f + 0.05224247f;  // minimax, with 2^0 = 1
  y = y * r + 0.24128021f;
  y = y * r + 0.69304484f;
  y = y * r + 1.0f;
  const __mmask16 normal = _mm512_cmp_ps_mask(bits, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return reinterpret_cast<Lanes>(  // y * 2^floor(power)
      _mm512_maskz_scalef_ps(normal, reinterpret_cast<__m512>(y), bits));
}
#endif

// Logarithms of positive normal numbers, off by no more than 2^-35; NaN stays NaN. x = m 2^n with
// sqrt(1/2) <= m < sqrt(2), and log m = 2 artanh s with s = (m - 1) / (m + 1), as a series.
inline void log_lanes(Lanes x, double (&to)[kLanes]) {
  using Doubles __attribute__((vector_size(sizeof(double) * kLanes))) = double;
  using Bits __attribute__((vector_size(sizeof(uint32_t) * kLanes))) = uint32_t;
  constexpr uint32_t kSqrtHalf = 0x3f3504f3;
  constexpr double kLog2 = 0.693147180559945309;
  const Bits bits = reinterpret_cast<Bits>(x);  // anything may lie in lanes that are not wanted
  const IntLanes n = reinterpret_cast<IntLanes>(bits - kSqrtHalf) >> 23;
  const Bits exponent = reinterpret_cast<Bits>(n) << 23;
  const Lanes mantissa = reinterpret_cast<Lanes>(bits - exponent) + (x - x);  // NaN of NaN
  const Doubles m = __builtin_convertvector(mantissa, Doubles);
  const Doubles s = (m - 1.0) / (m + 1.0), z = s * s;
  Doubles y = z * (1.0 / 11) + 1.0 / 9;
#pragma GCC unroll 4
  for (int k = 7; k > 0; k -= 2) y = y * z + 1.0 / k;
  const Doubles log = __builtin_convertvector(n, Doubles) * kLog2 + 2.0 * s * y;
  std::memcpy(to, &log, sizeof log);
}

}  // namespace moca::MOCA_ISA

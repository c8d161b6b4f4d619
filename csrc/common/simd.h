// Vectors of float32 in the vector extension of GCC and Clang: the same code for every
// instruction set. `Lanes` is as wide as the set's registers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <utility>

#ifdef __F16C__
#include <immintrin.h>
#endif

#include "common/dtype.h"

namespace moca::MOCA_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

using Lanes __attribute__((vector_size(sizeof(float) * kLanes), may_alias)) = float;
using LooseLanes __attribute__((vector_size(sizeof(float) * kLanes), aligned(4), may_alias)) =
    float;
using IntLanes __attribute__((vector_size(sizeof(int32_t) * kLanes), may_alias)) = int32_t;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Uninitialised floats on a cache line boundary.
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : data_(static_cast<float*>(::operator new(size * sizeof(float), kAlignment))) {}
  float* get() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(float* p) const { ::operator delete(p, kAlignment); }
  };
  std::unique_ptr<float, Free> data_;
};

inline Lanes load(const float* from) { return *reinterpret_cast<const LooseLanes*>(from); }
inline void store(float* to, Lanes x) { *reinterpret_cast<LooseLanes*>(to) = x; }
inline Lanes broadcast(float x) { return x - Lanes{}; }  // x + 0 would not be x if x is -0

// kLanes numbers of 16 bits. The compiler's own conversions take several steps, and masked forms
// are here because the plain ones read an undefined register in the headers of GCC 12, which warns.
inline IntLanes load_halves(const void* from) {
#if defined(__AVX512F__)
  return reinterpret_cast<IntLanes>(
      _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(static_cast<const __m256i*>(from))));
#elif defined(__AVX2__)
  return reinterpret_cast<IntLanes>(
      _mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from))));
#else
  using Half __attribute__((vector_size(sizeof(uint16_t) * kLanes))) = uint16_t;
  Half half;
  std::memcpy(&half, from, sizeof half);
  return __builtin_convertvector(half, IntLanes);
#endif
}

inline Lanes load(const bfloat16* from) { return reinterpret_cast<Lanes>(load_halves(from) << 16); }

inline Lanes load(const float16* from) {
  Lanes x;
#if defined(__AVX512F__)
  // The plain form reads an undefined register in the headers of GCC 12, which then warns.
  x = reinterpret_cast<Lanes>(
      _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(__F16C__)
  x = reinterpret_cast<Lanes>(
      _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
  for (int i = 0; i < kLanes; ++i) x[i] = to_float(from[i]);
#endif
  return x;
}

// Copies the first `count` elements of `from`, fewer than kLanes, and zeros after them.
template <typename T>
void copy_padded(T (&to)[kLanes], const T* from, int64_t count) {
#ifdef __AVX512VL__
  const auto some = static_cast<__mmask16>((1u << count) - 1);
  if constexpr (sizeof(T) == 2)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_maskz_loadu_epi16(some, from));
  else
    _mm512_storeu_ps(to, _mm512_maskz_loadu_ps(some, from));
#else
  std::fill(to, to + kLanes, T{});
  std::memcpy(to, from, count * sizeof(T));
#endif
}

// The first `count` elements (fewer than kLanes), then zeros.
template <typename T>
Lanes load_some(const T* from, int64_t count) {
  T padded[kLanes];
  copy_padded(padded, from, count);
  return load(padded);
}

namespace detail {
template <std::size_t... I>
constexpr IntLanes number_lanes(std::index_sequence<I...>) {
  return IntLanes{I...};
}
}  // namespace detail
constexpr IntLanes kLaneNumbers = detail::number_lanes(std::make_index_sequence<kLanes>());

// The first `count` lanes (kLanes or fewer), then zeros.
inline Lanes keep(Lanes x, int64_t count) {
  return kLaneNumbers < static_cast<int32_t>(count) ? x : Lanes{};
}

// Rounded to nearest, ties to even; NaN stays NaN. The processor's own way makes subnormals 0.
inline void store(bfloat16* to, Lanes x) {
#ifdef __AVX512BF16__
  const __m256bh half = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(x));
  std::memcpy(to, &half, sizeof half);
#else
  using Half __attribute__((vector_size(sizeof(uint16_t) * kLanes))) = uint16_t;
  const IntLanes bits = reinterpret_cast<IntLanes>(x);
  const IntLanes rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const Half half = __builtin_convertvector((x == x ? rounded : bits | 0x400000) >> 16, Half);
  std::memcpy(to, &half, sizeof half);
#endif
}

inline void store(float16* to, Lanes x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm512_maskz_cvtps_ph(0xffff, reinterpret_cast<__m512>(x), 0));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(reinterpret_cast<__m256>(x), 0));
#else
  for (int i = 0; i < kLanes; ++i) to[i] = from_float<float16>(x[i]);
#endif
}

// The first `count` lanes (fewer than kLanes).
template <typename T>
void store_some(T* to, Lanes x, int64_t count) {
  T padded[kLanes];
  store(padded, x);
#ifdef __AVX512VL__
  const auto some = static_cast<__mmask16>((1u << count) - 1);
  if constexpr (sizeof(T) == 2)
    _mm256_mask_storeu_epi16(to, some, _mm256_loadu_si256(reinterpret_cast<__m256i*>(padded)));
  else
    _mm512_mask_storeu_ps(to, some, _mm512_loadu_ps(padded));
#else
  std::memcpy(to, padded, count * sizeof(T));
#endif
}

namespace detail {

// Lanes by index out of a (0 to kLanes - 1) and b (from kLanes on).
template <std::size_t... I>
inline Lanes select_lanes(Lanes a, Lanes b, std::index_sequence<I...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, I...);
#else
  return __builtin_shuffle(a, b, IntLanes{I...});
#endif
}

// Every lane combined with the one `Step` away, and so on for smaller steps: all lanes end alike.
template <std::size_t Step, typename Combine, std::size_t... I>
inline Lanes fold(Lanes x, Combine combine, std::index_sequence<I...> lanes) {
  x = combine(x, select_lanes(x, x, std::index_sequence<(I ^ Step)...>()));
  if constexpr (Step > 1) return fold<Step / 2>(x, combine, lanes);
  return x;
}

// Swaps the off-diagonal halves of the 2 x 2 blocks of `Step` rows and columns.
template <std::size_t Step, std::size_t... I>
inline void swap_blocks(Lanes& a, Lanes& b, std::index_sequence<I...>) {
  using Top = std::index_sequence<((I & Step) ? kLanes + I - Step : I)...>;
  using Bottom = std::index_sequence<((I & Step) ? kLanes + I : I + Step)...>;
  const Lanes top = select_lanes(a, b, Top());
  b = select_lanes(a, b, Bottom());
  a = top;
}

template <std::size_t Step>
inline void transpose_from(Lanes (&x)[kLanes]) {
  if constexpr (Step < kLanes) {
#pragma GCC unroll 16
    for (std::size_t i = 0; i < kLanes; ++i)
      if (!(i & Step)) swap_blocks<Step>(x[i], x[i + Step], std::make_index_sequence<kLanes>());
    transpose_from<2 * Step>(x);
  }
}

}  // namespace detail

// The larger of two, lane by lane; the second where one is NaN.
inline Lanes larger(Lanes a, Lanes b) { return a > b ? a : b; }

// The largest lane that is not NaN, where lane 0 is not.
inline float largest(Lanes x) {
  return detail::fold<kLanes / 2>(x, larger, std::make_index_sequence<kLanes>())[0];
}

inline float sum_of(Lanes x) {
  const auto add = [](Lanes a, Lanes b) { return a + b; };
  return detail::fold<kLanes / 2>(x, add, std::make_index_sequence<kLanes>())[0];
}

// Turns kLanes rows into kLanes columns.
inline void transpose(Lanes (&x)[kLanes]) { detail::transpose_from<1>(x); }

}  // namespace moca::MOCA_ISA

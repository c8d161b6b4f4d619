// Words: what one lane of a multiply-add takes from an operand. A word is one float, or, where the
// processor has a dot product of bfloat16, two neighbouring bfloat16, whose products are exact and
// are added in float32. Products of matrices are written once, over words.
#pragma once

#include <type_traits>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "common/simd.h"

namespace moca::MOCA_ISA {

struct alignas(4) Bfloat16Pair {
  bfloat16 first, second;
};

// Elements of type T are multiplied as words of this type.
#ifdef __AVX512BF16__
template <typename T>
using WordOf = std::conditional_t<std::is_same_v<T, bfloat16>, Bfloat16Pair, float>;
#else
template <typename T>
using WordOf = float;
#endif

template <typename Word>
constexpr int kPerWord =
    sizeof(Word) == sizeof(Bfloat16Pair) && !std::is_same_v<Word, float> ? 2 : 1;

// Words travel in Lanes, as bits.
template <typename Word>
inline Lanes load_words(const Word* from) {
  return *reinterpret_cast<const LooseLanes*>(from);
}
template <typename Word>
inline void store_words(Word* to, Lanes x) {
  *reinterpret_cast<LooseLanes*>(to) = x;
}
template <typename Word>
inline Lanes broadcast_word(const Word& from) {
  int32_t bits;  // as a float, a pair whose second half is 0 would be a subnormal
  std::memcpy(&bits, &from, sizeof bits);
  return reinterpret_cast<Lanes>(IntLanes{} + bits);
}

// kLanes words made of the elements from `from` on, of which `count` are left.
template <typename Word, typename T>
inline Lanes words_of(const T* from, int64_t count) {
  if constexpr (kPerWord<Word> == 1) {
    return count >= kLanes ? load(from) : load_some(from, count);
  } else {
    if (count >= 2 * kLanes) return *reinterpret_cast<const LooseLanes*>(from);
    Lanes x = {};
    std::memcpy(&x, from, count * sizeof(T));
    return x;
  }
}

template <typename Word>
inline Lanes multiply_add(Lanes sum, Lanes a, Lanes b) {
#ifdef __AVX512BF16__
  if constexpr (kPerWord<Word> == 2)
    return reinterpret_cast<Lanes>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum),
                                                    reinterpret_cast<__m512bh>(a),
                                                    reinterpret_cast<__m512bh>(b)));
#endif
  return sum + a * b;
}

#ifdef __AVX512BF16__

// 2 * kLanes floats, rounded to nearest even, as words of neighbours: (0, 1), (2, 3), ...
inline Lanes neighbours(Lanes low, Lanes high) {
  return reinterpret_cast<Lanes>(
      _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(high), reinterpret_cast<__m512>(low)));
}

// kLanes words out of two rows of floats: (first[i], second[i]).
inline Lanes interleave(Lanes first, Lanes second) {
  alignas(64) static constexpr uint16_t kOrder[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                      21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                      11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = reinterpret_cast<__m512i>(neighbours(first, second));
  return reinterpret_cast<Lanes>(
      _mm512_maskz_permutexvar_epi16(~0u, _mm512_load_si512(kOrder), both));
}

// The same out of two rows of kLanes bfloat16.
inline Lanes interleave(const bfloat16* first, const bfloat16* second) {
  const auto wide = [](const bfloat16* from) {
    // The plain form reads an undefined register in the headers of GCC 12, which then warns.
    return _mm512_maskz_cvtepu16_epi32(0xffff,
                                       _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  };
  return reinterpret_cast<Lanes>(
      _mm512_or_si512(wide(first), _mm512_maskz_slli_epi32(0xffff, wide(second), 16)));
}

#endif

}  // namespace moca::MOCA_ISA

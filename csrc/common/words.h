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

inline float first_of(float word) { return word; }
inline float first_of(const Bfloat16Pair& word) { return to_float(word.first); }

// Elements of type T are multiplied as words of this type.
#ifdef __AVX512BF16__
template <typename T>
using WordOf = std::conditional_t<std::is_same_v<T, bfloat16>, Bfloat16Pair, float>;
#else
template <typename T>
using WordOf = float;
#endif

template <typename Word>
constexpr int kPerWord = std::is_same_v<Word, Bfloat16Pair> ? 2 : 1;

// Whether products of such words are made in tile registers (common/amx.h).
#ifdef __AMX_BF16__
template <typename Word>
constexpr bool kInTiles = kPerWord<Word> == 2;
#else
template <typename Word>
constexpr bool kInTiles = false;
#endif

// Depth is filled up with zeros to a multiple of so many words, which a product takes at once.
template <typename Word>
constexpr int64_t kDepthStep = kInTiles<Word> ? kLanes : 1;

// Words of a depth.
template <typename Word>
int64_t words(int64_t depth) {
  return round_up(ceil_div(depth, kPerWord<Word>), kDepthStep<Word>);
}

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
  int32_t bits;
  std::memcpy(&bits, &from, sizeof bits);
  return reinterpret_cast<Lanes>(IntLanes{} + bits);
}

// kLanes words made of the elements from `from` on, of which `count` are left.
template <typename Word, typename T>
inline Lanes words_of(const T* from, int64_t count) {
  if constexpr (kPerWord<Word> == 1) {
    return count >= kLanes ? load(from) : load_some(from, count);
  } else {
    Lanes x = {};
    if (count >= 2 * kLanes)  // a fixed size is one load
      std::memcpy(&x, from, sizeof x);
    else
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

// Words out of floats, rounded to nearest even, or out of rows of elements, of which `count` are
// left: `neighbours` are (0, 1), (2, 3) and so on of one row of 2 * kLanes, `interleave` gives
// (first[i], second[i]). There are such words only where there is a dot product for them.
template <typename Word>
Lanes neighbours(Lanes low, Lanes high);
template <typename Word>
Lanes interleave(Lanes first, Lanes second);
template <typename Word, typename T>
Lanes interleave(const T* first, const T* second, int64_t count);

#ifdef __AVX512BF16__

template <>
inline Lanes neighbours<Bfloat16Pair>(Lanes low, Lanes high) {
  return reinterpret_cast<Lanes>(
      _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(high), reinterpret_cast<__m512>(low)));
}

template <>
inline Lanes interleave<Bfloat16Pair>(Lanes first, Lanes second) {
  alignas(64) static constexpr uint16_t kOrder[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                      21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                      11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = reinterpret_cast<__m512i>(neighbours<Bfloat16Pair>(first, second));
  return reinterpret_cast<Lanes>(_mm512_permutexvar_epi16(_mm512_load_si512(kOrder), both));
}

template <>
inline Lanes interleave<Bfloat16Pair>(const bfloat16* first, const bfloat16* second,
                                      int64_t count) {
  bfloat16 rows[2][kLanes];
  if (count < kLanes) {
    copy_padded(rows[0], first, count);
    copy_padded(rows[1], second, count);
    first = rows[0];
    second = rows[1];
  }
  return reinterpret_cast<Lanes>(load_halves(first) | (load_halves(second) << 16));
}

#endif

}  // namespace moca::MOCA_ISA

// What a thread keeps in cache: sizes of blocks, packed operands and sums.
#pragma once

#include "attention/cpu_product.h"

namespace moca::MOCA_ISA {

// Keys packed at a time: they and their values stay in cache.
template <typename Word>
constexpr int64_t kColumns = kInTiles<Word> ? 256 : 384;

// Working memory of a thread in the forward pass, for up to `rows` rows, which fill whole blocks of
// kRows, and `heads` heads.
template <typename Word>
struct ForwardMemory {
  ForwardMemory(int64_t rows, int64_t heads, int64_t width)
      : keys(kColumns<Word> * width),
        values(kColumns<Word> * width),
        queries(heads * rows * kPitch),
        scores(kRows<Word> * kPitch),
        sums(heads * rows * width),
        totals((heads * rows + kLanes) * kLanes),
        peaks(heads * rows + kLanes) {}
  Word* queries_at(int64_t row) const {
    return reinterpret_cast<Word*>(queries.get() + row * kPitch);
  }
  Word* packed_keys() const { return reinterpret_cast<Word*>(keys.get()); }
  Word* packed_values() const { return reinterpret_cast<Word*>(values.get()); }
  Buffer keys, values, queries, scores;
  Buffer sums, totals, peaks;  // of each row: sum of weight * value, of weights, what scores are
                               // taken relative to
};

// Keys of a block: their scores with a block of queries stay in cache.
template <typename Word>
constexpr int64_t kKeys = kInTiles<Word> ? 128 : 256;
// Queries of a tile: the depth of the sums for dK and dV.
template <typename Word>
constexpr int64_t kQueries = kInTiles<Word> ? 192 : 96;

// Working memory of a thread in the backward pass, for up to `blocks` blocks of keys.
template <typename Word>
struct BackwardMemory {
  static constexpr int64_t kKeys = moca::MOCA_ISA::kKeys<Word>;
  static constexpr int64_t kQueries = moca::MOCA_ISA::kQueries<Word>;
  static constexpr int64_t kKeyPitch = kKeys + 16;  // floats between turned rows: no power of two
  // Products read so many rows of a left operand, whatever number is asked for.
  static constexpr int64_t kBlockRows = kRows<Word>;
  static constexpr int64_t kDepth = kQueries / kPerWord<Word>;  // words of a tile of queries
  static_assert(kDepth % kDepthStep<Word> == 0 && kDepth % kLanes == 0 && kDepth <= kPitch);

  BackwardMemory(int64_t width, int64_t blocks, int64_t d_q_size)
      : width(width),
        k_dims(blocks * kKeys * width),
        v_dims(blocks * kKeys * width),
        k_tokens(blocks * kKeys * width),
        q_rows((kQueries + kBlockRows) * kPitch),
        d_out_rows((kQueries + kBlockRows) * kPitch),
        q_tokens((width + kBlockRows) * kPitch),
        d_out_tokens((width + kBlockRows) * kPitch),
        d_score_rows((kQueries + kBlockRows) * kPitch),
        weights(kKeys * kDepth),
        d_scores(kKeys * kDepth),
        score_block(kBlockRows * kPitch),
        d_weight_block(kBlockRows * kPitch),
        d_k(blocks * width * kKeyPitch),
        d_v(blocks * width * kKeyPitch),
        d_q(d_q_size) {}

  // A block of packed keys, and the sums of their gradients, turned: (width, kKeyPitch).
  struct Keys {
    Word *k_dims, *v_dims, *k_tokens;
    float *d_k, *d_v;
  };
  Keys keys(int64_t block) const {
    const int64_t at = block * kKeys * width, sums = block * kKeyPitch * width;
    return {words(k_dims) + at, words(v_dims) + at, words(k_tokens) + at, d_k.get() + sums,
            d_v.get() + sums};
  }
  static Word* words(const Buffer& buffer) { return reinterpret_cast<Word*>(buffer.get()); }
  // Of a right operand of a tile: words of queries from `word`, of the keys of a panel.
  static Word* panel(const Buffer& buffer, int64_t key, int64_t word) {
    return words(buffer) + (key / kPanel * kDepth + word) * kPanel;
  }

  const int64_t width;
  Buffer k_dims, v_dims, k_tokens;                                  // right operands, of all blocks
  Buffer q_rows, d_out_rows, q_tokens, d_out_tokens, d_score_rows;  // left operands of a tile
  Buffer weights, d_scores;            // right operands of a tile: P, dS, with depth along queries
  Buffer score_block, d_weight_block;  // of a block of rows
  Buffer d_k, d_v;                     // sums, of all blocks
  Buffer d_q;                          // of a task
};

}  // namespace moca::MOCA_ISA

// How the documents of pool are shared out over blocks: in pieces of some tokens, found without the
// host reading a length. B documents, T packed tokens.
#pragma once

#include <cstdint>

#include "pool/pool.h"

namespace moca {

// Tokens [start, end) of a document. The rows past the last document count as document B.
struct TokenSpan {
  int64_t start, end;
};

__device__ inline int64_t clamped(int64_t value, int64_t least, int64_t most) {
  return value < least ? least : value > most ? most : value;
}

// Where a document starts. The first takes what is before its boundary too, for no other would.
__device__ inline int64_t start_of(const PoolParams& p, int64_t document) {
  return document == 0 ? 0 : clamped(p.cu_seqlens[document], 0, p.tokens);
}

__device__ inline TokenSpan document_span(const PoolParams& p, int64_t document) {
  const int64_t start = start_of(p, document);
  if (document == p.documents) return {start, p.tokens};
  return {start, clamped(p.cu_seqlens[document + 1], start, p.tokens)};
}

// Whether a document's boundaries are what they should be. They are not read back to be refused:
// where they are not, its embedding is NaN.
__device__ inline bool is_valid(const PoolParams& p, int64_t document) {
  const int64_t start = p.cu_seqlens[document], end = p.cu_seqlens[document + 1];
  return 0 <= start && start <= end && end <= p.tokens && (document > 0 || start == 0);
}

// Document b owns the pieces from start / kTokens + b: as many as it can need, so that no two
// documents share one. The last are past document B's.
template <int kTokens>
__host__ __device__ inline int64_t pieces_of(int64_t documents, int64_t tokens) {
  return tokens / kTokens + documents;
}

template <int kTokens>
__device__ int64_t first_piece(const PoolParams& p, int64_t document) {
  return start_of(p, document) / kTokens + document;
}

// The last of `documents` whose pieces begin at or before `piece`.
template <int kTokens>
__device__ int64_t document_of(const PoolParams& p, int64_t piece, int64_t documents) {
  int64_t low = 0, high = documents;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (first_piece<kTokens>(p, middle) <= piece)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// The tokens of a piece of its document; none if the document is shorter than it might have been.
template <int kTokens>
__device__ TokenSpan piece_span(const PoolParams& p, int64_t piece, int64_t document) {
  const TokenSpan whole = document_span(p, document);
  const int64_t start = whole.start + (piece - first_piece<kTokens>(p, document)) * kTokens;
  return {start, start + kTokens < whole.end ? start + kTokens : whole.end};
}

}  // namespace moca

// Stores that go past the caches: for results too large to be there when they are read.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace moca::MOCA_ISA {

constexpr int64_t kLine = 64;                    // bytes
constexpr int64_t kStreamed = int64_t{4} << 20;  // bytes: more than a core's own caches hold

// Copies what is in the cache to where it need not be: a store that fills a whole line does not
// read it first. Only lines that `to` starts are streamed; the rest is copied as ever. Visible to
// other threads after `finish_streaming`.
inline void stream_bytes(void* to, const void* from, int64_t bytes) {
#ifdef __AVX2__
  if (reinterpret_cast<uintptr_t>(to) % kLine == 0) {
    auto* line = static_cast<__m256i*>(to);
    const auto* source = static_cast<const __m256i*>(from);
    for (; bytes >= kLine; bytes -= kLine, line += 2, source += 2) {
      _mm256_stream_si256(line, _mm256_loadu_si256(source));
      _mm256_stream_si256(line + 1, _mm256_loadu_si256(source + 1));
    }
    to = line;
    from = source;
  }
#endif
  std::memcpy(to, from, bytes);
}

inline void finish_streaming() {
#ifdef __AVX2__
  _mm_sfence();
#endif
}

// Rows [begin, end) of a result, written one after the other by one thread: streamed if the result
// is large, so many at a time as fill whole lines.
template <typename T>
class ResultRows {
 public:
  ResultRows(void* result, int64_t rows, int64_t row_size, int64_t begin, int64_t end)
      : result_(static_cast<T*>(result)), row_size_(row_size), first_(begin), end_(end) {
    const int64_t bytes = row_size * static_cast<int64_t>(sizeof(T));
    if (!result || rows * bytes < kStreamed) return;
    group_ = kLine / std::gcd(kLine, bytes);
    staged_.reset(new T[group_ * row_size]);  // unlike make_unique, does not clear it
  }

  // Where row n is to be written; null if there is no result.
  T* begin_row(int64_t n) {
    if (!group_) return result_ ? result_ + n * row_size_ : nullptr;
    return staged_.get() + (n - first_) * row_size_;
  }

  void end_row(int64_t n) {
    const int64_t rows = n + 1 - first_;
    if (!group_ || (rows < group_ && n + 1 < end_)) return;
    stream_bytes(result_ + first_ * row_size_, staged_.get(), rows * row_size_ * sizeof(T));
    first_ = n + 1;
    if (first_ == end_) finish_streaming();
  }

 private:
  T* result_;
  int64_t row_size_, first_, end_;
  int64_t group_ = 0;  // rows that are staged together; 0 if results are not streamed
  std::unique_ptr<T[]> staged_;
};

}  // namespace moca::MOCA_ISA

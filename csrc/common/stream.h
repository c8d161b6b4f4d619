// Stores that go past the caches: for results too large to be there when they are read.
#pragma once

#include <cstdint>
#include <cstring>

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

}  // namespace moca::MOCA_ISA

// Independent chains of multiply-adds, as many as hide the latency and still fit in registers.
#include "common/amx.h"
#include "common/parallel.h"
#include "peak/peak.h"

namespace moca::MOCA_ISA {
namespace {

constexpr int kChains = kLanes == 16 ? 24 : 12;

// Hides a value from the compiler, which would otherwise make one chain out of equal ones.
inline void hide(Lanes& value) {
#if defined(__x86_64__) || defined(_M_X64)
  asm volatile("" : "+x"(value));
#else
  asm volatile("" : "+w"(value));
#endif
}

inline void hide(Lanes (&values)[kChains]) {
#pragma GCC unroll 24
  for (int chain = 0; chain < kChains; ++chain) hide(values[chain]);  // an array stays in registers
}

double multiply_add(int64_t steps) {
  Lanes factor = broadcast(0.5f), term = broadcast(1.0f), sum[kChains] = {};
  hide(factor);
  hide(term);
  hide(sum);
  for (int64_t step = 0; step < steps; ++step)
#pragma GCC unroll 24
    for (int chain = 0; chain < kChains; ++chain) sum[chain] = sum[chain] * factor + term;
  hide(sum);
  return 2.0 * kLanes * kChains * static_cast<double>(steps);
}

double dot_product([[maybe_unused]] int64_t steps) {
#if defined(__AMX_BF16__)
  const TileRegisters registers;
  clear_tile<4>();
  clear_tile<5>();
  for (int64_t step = 0; step < steps; ++step) {
    multiply_add_tiles<0, 4, 5>();
    multiply_add_tiles<1, 4, 5>();
    multiply_add_tiles<2, 4, 5>();
    multiply_add_tiles<3, 4, 5>();
  }
  return 4 * 4.0 * kTileSide * kTileSide * kTileSide * static_cast<double>(steps);
#elif defined(__AVX512BF16__)
  Lanes zeros{}, sum[kChains] = {};
  hide(zeros);
  hide(sum);
  const auto pairs = reinterpret_cast<__m512bh>(zeros);
  for (int64_t step = 0; step < steps; ++step)
#pragma GCC unroll 24
    for (int chain = 0; chain < kChains; ++chain)
      sum[chain] = reinterpret_cast<Lanes>(
          _mm512_dpbf16_ps(reinterpret_cast<__m512>(sum[chain]), pairs, pairs));
  hide(sum);
  return 4.0 * kLanes * kChains * static_cast<double>(steps);
#else
  return 0.0;
#endif
}

}  // namespace

void peak(const PeakParams& p) {
  parallel_for(p.threads, p.threads, [&](int64_t task, int) {
    p.flops[task] = p.bfloat16 ? dot_product(p.steps) : multiply_add(p.steps);
  });
}

}  // namespace moca::MOCA_ISA

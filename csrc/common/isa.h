// Instruction sets: a kernel is written once and compiled once per set, into namespace
// moca::<set>; MOCA_KERNEL declares all of them and the function that calls the active one.
#pragma once

namespace moca {

enum class Isa { portable, avx2, avx512, avx512bf16, amx };

// The widest compiled set that this processor runs, or the one MOCA_CPU_ISA names.
// Throws std::runtime_error if MOCA_CPU_ISA names a set that is unknown or not supported here.
Isa active_isa();
const char* isa_name(Isa isa);

}  // namespace moca

// CMake defines MOCA_HAS_<set> for every set that it compiles; portable always is.
#ifdef MOCA_HAS_avx2
#define MOCA_IF_AVX2(...) __VA_ARGS__
#else
#define MOCA_IF_AVX2(...)
#endif
#ifdef MOCA_HAS_avx512
#define MOCA_IF_AVX512(...) __VA_ARGS__
#else
#define MOCA_IF_AVX512(...)
#endif
#ifdef MOCA_HAS_avx512bf16
#define MOCA_IF_AVX512BF16(...) __VA_ARGS__
#else
#define MOCA_IF_AVX512BF16(...)
#endif
#ifdef MOCA_HAS_amx
#define MOCA_IF_AMX(...) __VA_ARGS__
#else
#define MOCA_IF_AMX(...)
#endif

#define MOCA_KERNEL_OF(isa, name, Params) \
  namespace isa {                         \
  void name(const Params&);               \
  }

#define MOCA_KERNEL(name, Params)                                                 \
  namespace moca {                                                                \
  MOCA_KERNEL_OF(portable, name, Params)                                          \
  MOCA_IF_AVX2(MOCA_KERNEL_OF(avx2, name, Params))                                \
  MOCA_IF_AVX512(MOCA_KERNEL_OF(avx512, name, Params))                            \
  MOCA_IF_AVX512BF16(MOCA_KERNEL_OF(avx512bf16, name, Params))                    \
  MOCA_IF_AMX(MOCA_KERNEL_OF(amx, name, Params))                                  \
  inline void name(const Params& params) {                                        \
    switch (active_isa()) {                                                       \
      MOCA_IF_AMX(case Isa::amx : return amx::name(params);)                      \
      MOCA_IF_AVX512BF16(case Isa::avx512bf16 : return avx512bf16::name(params);) \
      MOCA_IF_AVX512(case Isa::avx512 : return avx512::name(params);)             \
      MOCA_IF_AVX2(case Isa::avx2 : return avx2::name(params);)                   \
      default: return portable::name(params);                                     \
    }                                                                             \
  }                                                                               \
  }

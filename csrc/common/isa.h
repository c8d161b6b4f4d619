// Instruction sets: a kernel is written once and compiled once per set, into namespace
// moca::<set>; MOCA_KERNEL declares all of them and the function that calls the active one.
#pragma once

namespace moca {

enum class Isa { portable, avx2, avx512, avx512bf16 };

// The widest compiled set that this processor runs, or the one MOCA_CPU_ISA names.
// Throws std::runtime_error if MOCA_CPU_ISA names a set that is unknown or not supported here.
Isa active_isa();
const char* isa_name(Isa isa);

}  // namespace moca

#if defined(__x86_64__) || defined(_M_X64)
#define MOCA_KERNEL(name, Params)                            \
  namespace moca {                                           \
  namespace portable {                                       \
  void name(const Params&);                                  \
  }                                                          \
  namespace avx2 {                                           \
  void name(const Params&);                                  \
  }                                                          \
  namespace avx512 {                                         \
  void name(const Params&);                                  \
  }                                                          \
  namespace avx512bf16 {                                     \
  void name(const Params&);                                  \
  }                                                          \
  inline void name(const Params& params) {                   \
    switch (active_isa()) {                                  \
      case Isa::avx512bf16: return avx512bf16::name(params); \
      case Isa::avx512: return avx512::name(params);         \
      case Isa::avx2: return avx2::name(params);             \
      default: return portable::name(params);                \
    }                                                        \
  }                                                          \
  }
#else
#define MOCA_KERNEL(name, Params)                                    \
  namespace moca {                                                   \
  namespace portable {                                               \
  void name(const Params&);                                          \
  }                                                                  \
  inline void name(const Params& params) { portable::name(params); } \
  }
#endif

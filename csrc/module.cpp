// The extension module `moca_fast._C`: what was built, what this processor runs, and every op.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>

#include "common/binding.h"
#include "common/isa.h"
#include "common/queue.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#ifdef MOCA_CUDA_ARCHS  // CMake defines it where CUDA is compiled: "80,90a"
#define MOCA_HAS_CUDA
#else
#define MOCA_CUDA_ARCHS ""
#endif

namespace py = pybind11;

namespace moca {

std::vector<Binder>& binders() {
  static std::vector<Binder> list;
  return list;
}

constexpr std::array kNarrowestFirst = {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512bf16,
                                        Isa::amx};

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::amx: return "amx";
    case Isa::avx512bf16: return "avx512bf16";
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "portable";
  }
}

// Tile registers with products of bfloat16. Linux lends them to a process that asks for them.
static bool has_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr unsigned kBfloat16 = 1u << 22, kTile = 1u << 24;   // of leaf 7 in EDX
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kBfloat16) && (d & kTile) &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

static bool runs_here(Isa isa) {
  const std::string compiled = "," MOCA_ISA_NAMES ",";
  if (compiled.find("," + std::string(isa_name(isa)) + ",") == std::string::npos) return false;
#if defined(__x86_64__) || defined(_M_X64)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  const bool avx512bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  switch (isa) {
    case Isa::amx: return avx512bf16 && has_tiles();
    case Isa::avx512bf16: return avx512bf16;
    case Isa::avx512: return avx512;
    case Isa::avx2: return avx2;
    default: return true;
  }
#else
  return isa == Isa::portable;
#endif
}

static Isa choose_isa() {
  const char* forced = std::getenv("MOCA_CPU_ISA");
  for (auto it = kNarrowestFirst.rbegin(); it != kNarrowestFirst.rend(); ++it) {
    const Isa isa = *it;
    if (forced && *forced) {
      if (std::string(forced) != isa_name(isa)) continue;
      if (runs_here(isa)) return isa;
      throw std::runtime_error(
          std::string("MOCA_CPU_ISA: not compiled, or this processor does not run ") + forced);
    }
    if (runs_here(isa)) return isa;
  }
  throw std::runtime_error(std::string("MOCA_CPU_ISA: expected one of " MOCA_ISA_NAMES ", got ") +
                           forced);
}

Isa active_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

}  // namespace moca

PYBIND11_MODULE(_C, module) {
  using moca::DType;
  py::enum_<DType>(module, "DType")
      .value("float32", DType::float32)
      .value("bfloat16", DType::bfloat16)
      .value("float16", DType::float16);
  py::class_<moca::Queue>(module, "Queue").def(py::init([](int device, uintptr_t stream) {
    return moca::Queue{device, stream};
  }));
  module.def("build_info", [] {
    return std::map<std::string, std::string>{{"version", MOCA_VERSION},
                                              {"cpu_isas", MOCA_ISA_NAMES},
                                              {"compiler", __VERSION__},
                                              {"cuda_archs", MOCA_CUDA_ARCHS}};
  });
#ifdef MOCA_HAS_CUDA
  module.def("cuda_versions", [] {  // (driver, runtime), as 13020 for 13.2
    const moca::CudaVersions versions = moca::cuda_versions();
    return std::make_pair(versions.driver, versions.runtime);
  });
#endif
  module.def("cpu_isa", [] { return moca::isa_name(moca::active_isa()); });
  module.def("supported_isas", [] {  // of this processor, widest last
    std::vector<std::string> names;
    for (moca::Isa isa : moca::kNarrowestFirst)
      if (moca::runs_here(isa)) names.push_back(moca::isa_name(isa));
    return names;
  });
  for (moca::Binder bind : moca::binders()) bind(module);
}

// The attention kernels on the emulator, for ctypes.
#include "attention/cuda.h"
#include "attention/forward.cu"  // NOLINT: its kernels are compiled as plain C++ here
#include "device.h"

namespace {
std::string message;

template <typename Run>
const char* guarded(Run&& run, unsigned seed) {
  emulator::seed() = seed;
  try {
    run();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}
}  // namespace

// Each returns what went wrong, or null.
extern "C" const char* attention_forward(const moca::AttentionCudaParams* params, unsigned seed) {
  return guarded([&] { moca::attention_forward_cuda(*params); }, seed);
}

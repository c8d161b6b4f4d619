// The attention kernels on the emulator, for ctypes.
#include "attention/cuda.h"
#include "device.h"

namespace {

// What went wrong, or null.
const char* run(void (*kernels)(const moca::AttentionCudaParams&, moca::Queue),
                const moca::AttentionCudaParams* params, unsigned seed) {
  static std::string message;
  emulator::seed() = seed;
  try {
    kernels(*params, {});
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

}  // namespace

extern "C" const char* attention_forward(const moca::AttentionCudaParams* params, unsigned seed) {
  return run(moca::attention_forward_cuda, params, seed);
}

extern "C" const char* attention_forward_sm90a(const moca::AttentionCudaParams* params,
                                               unsigned seed) {
  if (!moca::attention_suits_sm90a(*params, {})) return "does not suit";
  return run(moca::attention_forward_sm90a, params, seed);
}

extern "C" const char* attention_backward_sm90a(const moca::AttentionCudaParams* params,
                                                unsigned seed) {
  if (!moca::attention_suits_sm90a(*params, {})) return "does not suit";
  const auto kernels = [](const moca::AttentionCudaParams& p, moca::Queue queue) {
    moca::attention_backward_rows_cuda(p, queue);
    moca::attention_backward_sm90a(p, queue);
  };
  return run(kernels, params, seed);
}

extern "C" const char* attention_backward(const moca::AttentionCudaParams* params, unsigned seed) {
  return run(moca::attention_backward_cuda, params, seed);
}

extern "C" int sizeof_params() { return sizeof(moca::AttentionCudaParams); }

#include "common/cuda.h"

namespace moca {
namespace {

// MOCA_CUDA_ARCHS is what this build holds code for, such as "80,90a".
std::string no_kernel_image(int device) {
  cudaDeviceProp gpu;
  std::string found = "this GPU";
  if (cudaGetDeviceProperties(&gpu, device) == cudaSuccess)
    found = std::string(gpu.name) + " (compute capability " + std::to_string(gpu.major) + "." +
            std::to_string(gpu.minor) + ")";
  return "this build holds CUDA code for " MOCA_CUDA_ARCHS ", none of which runs on " + found;
}

}  // namespace

CudaVersions cuda_versions() {
  CudaVersions versions;
  cudaDriverGetVersion(&versions.driver);
  cudaRuntimeGetVersion(&versions.runtime);
  return versions;
}

void check_cuda(cudaError_t status, const Launch& at) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // a launch that was refused leaves nothing behind for torch to trip over
  std::string shape;
  for (const auto& [name, size] : at.shape)
    shape += (shape.empty() ? "" : ", ") + std::string(name) + " = " + std::to_string(size);
  const std::string why = status == cudaErrorNoKernelImageForDevice
                              ? no_kernel_image(at.queue.device)
                              : cudaGetErrorString(status);
  throw std::runtime_error("moca_fast: CUDA kernel " + std::string(at.kernel) + " (" + shape +
                           ") was not launched: " + why);
}

}  // namespace moca

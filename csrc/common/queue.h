// Where a CUDA kernel runs, and what is there. No CUDA header, so that bindings can name it.
#pragma once

#include <cstdint>

namespace moca {

struct Queue {
  int device;
  uintptr_t stream;  // a cudaStream_t: torch.cuda.current_stream(device).cuda_stream
};

struct CudaVersions {
  int driver = 0, runtime = 0;  // 1000 major + 10 minor; a driver of 0 is none
};

CudaVersions cuda_versions();

}  // namespace moca

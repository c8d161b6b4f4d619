// Where a CUDA kernel runs. No CUDA header, so that bindings can name it.
#pragma once

#include <cstdint>

namespace moca {

struct Queue {
  int device;
  uintptr_t stream;  // a cudaStream_t: torch.cuda.current_stream(device).cuda_stream
};

}  // namespace moca

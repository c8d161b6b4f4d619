// The kernels that no tensor core helps (masked_patch_mse, mrope, pool) on the emulator, for
// ctypes.
#include "common/cuda.h"
#include "masked_patch_mse/masked_patch_mse.h"
#include "mrope/mrope.h"
#include "pool/pool.h"

void moca::check_cuda(cudaError_t, const Launch&) {}  // no launch fails here

#define EMULATED(name, Params)                                               \
  extern "C" void name(const moca::Params* p) { moca::name##_cuda(*p, {}); } \
  extern "C" int sizeof_##name() { return static_cast<int>(sizeof(moca::Params)); }

EMULATED(masked_patch_mse_forward, MaskedPatchMseParams)
EMULATED(masked_patch_mse_backward, MaskedPatchMseParams)
EMULATED(mrope_rotate, MropeParams)
EMULATED(pool_backward, PoolParams)

extern "C" int64_t pool_pieces(const moca::PoolParams* p) { return moca::pool_pieces(*p); }

extern "C" void pool_forward(const moca::PoolParams* p, float* sums) {
  moca::pool_forward_cuda(*p, sums, {});
}

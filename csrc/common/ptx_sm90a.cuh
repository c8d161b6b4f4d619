// Instructions of Hopper (sm_90a): barriers in shared memory, copies of boxes of a tensor, and
// matrix products of a warpgroup (four warps). tests/ops/emulator/common/ptx_sm90a.cuh has the same
// functions in plain C++.
#pragma once

#include "common/ptx.cuh"
#include "common/tensor_map.h"

namespace moca::ptx {

// A barrier is 8 bytes of shared memory. A phase of it ends when `count` threads have arrived and
// all expected bytes have come; phases have parity 0, 1, 0, ...
__device__ inline void init_barrier(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(count) : "memory");
}

// Makes initialised barriers known to the copies.
__device__ inline void fence_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}

__device__ inline void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}

// Arrives, and makes the phase wait for so many bytes of copies.
__device__ inline void arrive_expecting(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Waits for the end of the phase of this parity; for parity 1, a fresh barrier has ended it.
__device__ inline void wait_barrier(uint32_t barrier, int parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n"
        "}\n"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (done == 0);
}

// Starts the copy of a box to shared memory, in the swizzle of its map; `barrier` counts its bytes.
// The box begins at (column, head, token); what lies outside the tensor becomes 0.
__device__ inline void copy_box(uint32_t target, const TensorMap& map, int column, int head,
                                int token, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4}], [%5];\n" ::"r"(target),
      "l"(&map), "r"(column), "r"(head), "r"(token), "r"(barrier)
      : "memory");
}

// What this thread has stored in shared memory can be read by matrix products.
__device__ inline void fence_stores() {
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

// Barrier `id` (1 to 15) of the block for `threads` threads: sync waits for them all, arrive does
// not.
__device__ inline void sync_named(int id, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}

__device__ inline void arrive_named(int id, int threads) {
  asm volatile("bar.arrive %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}

// Registers that each thread of this warpgroup may use from here on.
template <int kCount>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kCount));
}

template <int kCount>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kCount));
}

// An operand of a product, `offset` into a tile in shared memory, in a swizzle of 128 or 32 bytes:
// rows of so many bytes, one after another, 8 rows a group. K-major (rows are rows of a, or columns
// of b): `groups` is the distance of groups of rows. MN-major (rows are rows of b): `groups` is
// that too, and `columns` the distance of b's next 64 columns. All in bytes, multiples of 16. The
// tile's part is the same for all of its operands, so it takes one register.
template <int kSwizzle>
__device__ inline uint64_t operand(uint32_t tile, uint32_t offset, int groups, int columns = 16) {
  static_assert(kSwizzle == 128 || kSwizzle == 32);
  constexpr uint64_t kMode = kSwizzle == 128 ? 1 : 3;
  return static_cast<uint64_t>((tile >> 4) + (offset >> 4)) |
         static_cast<uint64_t>(columns >> 4) << 16 | static_cast<uint64_t>(groups >> 4) << 32 |
         kMode << 62;
}

// Before products, where their registers were written by other instructions.
__device__ inline void begin_products() {
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}

// Closes the group of products started since the last call.
__device__ inline void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}

// Waits until at most kGroups of the latest groups are unfinished; `d`, a result of a finished one,
// can be read after it and not before.
template <int kGroups, int kColumns>
__device__ inline void wait_products(float (&d)[1][kColumns][4]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kGroups) : "memory");
#pragma unroll
  for (int n = 0; n < kColumns; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(d[0][n][i])::"memory");
}

// Results: 64 rows, of which warp w has 16 from 16 w, as multiply_add of ptx.cuh has them, in
// d[n] for columns 8 n to 8 n + 7. a in registers is as in multiply_add too.
#define MOCA_RESULT(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define MOCA_RESULTS(n)                                                                           \
  MOCA_RESULT(n), MOCA_RESULT(n + 1), MOCA_RESULT(n + 2), MOCA_RESULT(n + 3), MOCA_RESULT(n + 4), \
      MOCA_RESULT(n + 5), MOCA_RESULT(n + 6), MOCA_RESULT(n + 7)
#define MOCA_REGISTERS_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define MOCA_REGISTERS_32                                        \
  MOCA_REGISTERS_8                                               \
  ", %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define MOCA_REGISTERS_64                                             \
  MOCA_REGISTERS_32                                                   \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, "    \
  "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, " \
  "%57, %58, %59, %60, %61, %62, %63"

// d = a b, or d += a b if `add`: a (64, 16) and b (16, 8 kColumns) in shared memory, both K-major.
#define MOCA_PRODUCT(N, TYPE, REGISTERS, A, B, ADD, ...)                                           \
  asm volatile(                                                                                    \
      "{\n"                                                                                        \
      ".reg .pred add;\n"                                                                          \
      "setp.ne.b32 add, " ADD                                                                      \
      ", 0;\n"                                                                                     \
      "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" REGISTERS "}, " A ", " B \
      ", add, 1, 1, 0, 0;\n"                                                                       \
      "}\n"                                                                                        \
      : __VA_ARGS__                                                                                \
      : "l"(a), "l"(b), "r"(static_cast<int>(add)))

template <DType type>
__device__ inline void multiply(float (&d)[8][4], uint64_t a, uint64_t b, bool add) {
  if constexpr (type == DType::bfloat16)
    MOCA_PRODUCT("64", "bf16", MOCA_REGISTERS_32, "%32", "%33", "%34", MOCA_RESULTS(0));
  else
    MOCA_PRODUCT("64", "f16", MOCA_REGISTERS_32, "%32", "%33", "%34", MOCA_RESULTS(0));
}

template <DType type>
__device__ inline void multiply(float (&d)[16][4], uint64_t a, uint64_t b, bool add) {
  if constexpr (type == DType::bfloat16)
    MOCA_PRODUCT("128", "bf16", MOCA_REGISTERS_64, "%64", "%65", "%66", MOCA_RESULTS(0),
                 MOCA_RESULTS(8));
  else
    MOCA_PRODUCT("128", "f16", MOCA_REGISTERS_64, "%64", "%65", "%66", MOCA_RESULTS(0),
                 MOCA_RESULTS(8));
}
#undef MOCA_PRODUCT

// d += a b, for a (64, 16) in registers and b (16, 8 kColumns) in shared memory, MN-major.
#define MOCA_PRODUCT(N, TYPE, REGISTERS, A0, A1, A2, A3, B, ...)                             \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" REGISTERS \
               "}, {" A0 ", " A1 ", " A2 ", " A3 "}, " B ", 1, 1, 1, 1;\n"                   \
               : __VA_ARGS__                                                                 \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

template <DType type>
__device__ inline void multiply(float (&d)[2][4], const uint32_t (&a)[4], uint64_t b) {
  if constexpr (type == DType::bfloat16)
    MOCA_PRODUCT("16", "bf16", MOCA_REGISTERS_8, "%8", "%9", "%10", "%11", "%12", MOCA_RESULT(0),
                 MOCA_RESULT(1));
  else
    MOCA_PRODUCT("16", "f16", MOCA_REGISTERS_8, "%8", "%9", "%10", "%11", "%12", MOCA_RESULT(0),
                 MOCA_RESULT(1));
}

template <DType type>
__device__ inline void multiply(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b) {
  if constexpr (type == DType::bfloat16)
    MOCA_PRODUCT("64", "bf16", MOCA_REGISTERS_32, "%32", "%33", "%34", "%35", "%36",
                 MOCA_RESULTS(0));
  else
    MOCA_PRODUCT("64", "f16", MOCA_REGISTERS_32, "%32", "%33", "%34", "%35", "%36",
                 MOCA_RESULTS(0));
}

template <DType type>
__device__ inline void multiply(float (&d)[16][4], const uint32_t (&a)[4], uint64_t b) {
  if constexpr (type == DType::bfloat16)
    MOCA_PRODUCT("128", "bf16", MOCA_REGISTERS_64, "%64", "%65", "%66", "%67", "%68",
                 MOCA_RESULTS(0), MOCA_RESULTS(8));
  else
    MOCA_PRODUCT("128", "f16", MOCA_REGISTERS_64, "%64", "%65", "%66", "%67", "%68",
                 MOCA_RESULTS(0), MOCA_RESULTS(8));
}

#undef MOCA_RESULT
#undef MOCA_RESULTS
#undef MOCA_REGISTERS_8
#undef MOCA_REGISTERS_32
#undef MOCA_REGISTERS_64
#undef MOCA_PRODUCT

}  // namespace moca::ptx

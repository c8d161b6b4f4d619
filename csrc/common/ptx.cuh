// Instructions of sm_80 and later that kernels call by name, and which values each lane holds.
//
// Lanes of a warp: group = lane / 4 (0 to 7), pair = lane % 4. A register of a fragment holds two
// 16-bit values, the lower address in the lower half. tests/ops/emulator/common/ptx.cuh has the
// same functions in plain C++.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace moca::ptx {

// Where the shared memory starts that was asked for at launch.
__device__ inline uint32_t shared_memory() {
  extern __shared__ __align__(128) uint8_t memory[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(memory));
}

// Starts the copy of 16 bytes to shared memory, or of 16 zero bytes; nothing is read then.
__device__ inline void copy_async(uint32_t target, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(target), "l"(source),
               "r"(valid ? 16 : 0)
               : "memory");
}

// Closes the group of copies this thread has started since the last call.
__device__ inline void copy_async_commit() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

// Waits until at most kGroups of this thread's latest groups are unfinished.
template <int kGroups>
__device__ inline void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kGroups) : "memory");
}

// Four 8 x 8 matrices of 16-bit values. Lane l gives the address of row l % 8 of matrix l / 8;
// it gets from matrix i, in out[i], row `group`, columns 2 pair and 2 pair + 1.
__device__ inline void load_matrices(uint32_t (&out)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
}

// The same, transposed: from matrix i, rows 2 pair and 2 pair + 1 of column `group`.
__device__ inline void load_matrices_transposed(uint32_t (&out)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
}

// d += a b, for a (16, 16), b (16, 8), d (16, 8) in float32. What a lane holds, as (row, column):
//   a[0]: (group, 2 pair), + 1        a[1]: (group + 8, 2 pair), + 1
//   a[2]: (group, 2 pair + 8), + 1    a[3]: (group + 8, 2 pair + 8), + 1
//   b0: (2 pair, group), row + 1      b1: (2 pair + 8, group), row + 1
//   d[0], d[1]: (group, 2 pair), + 1  d[2], d[3]: (group + 8, 2 pair), + 1
template <DType type>
__device__ inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
  static_assert(type == DType::bfloat16 || type == DType::float16);
  if constexpr (type == DType::bfloat16)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two values rounded to 16 bits, `low` in the lower half.
template <DType type>
__device__ inline uint32_t pack(float low, float high) {
  static_assert(type == DType::bfloat16 || type == DType::float16);
  uint32_t out;
  if constexpr (type == DType::bfloat16)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(out) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(out) : "f"(high), "f"(low));
  return out;
}

// a . b, of the two values in each.
template <DType type>
__device__ inline float dot(uint32_t a, uint32_t b) {
  static_assert(type == DType::bfloat16 || type == DType::float16);
  if constexpr (type == DType::bfloat16) {
    return __uint_as_float(a << 16) * __uint_as_float(b << 16) +
           __uint_as_float(a & 0xffff0000u) * __uint_as_float(b & 0xffff0000u);
  } else {
    float out;
    asm("{\n"
        ".reg .b16 a0, a1, b0, b1;\n"
        ".reg .f32 x, y, z;\n"
        "mov.b32 {a0, a1}, %1;\n"
        "mov.b32 {b0, b1}, %2;\n"
        "cvt.f32.f16 x, a0;\n"
        "cvt.f32.f16 y, b0;\n"
        "mul.f32 z, x, y;\n"
        "cvt.f32.f16 x, a1;\n"
        "cvt.f32.f16 y, b1;\n"
        "fma.rn.f32 %0, x, y, z;\n"
        "}\n"
        : "=f"(out)
        : "r"(a), "r"(b));
    return out;
  }
}

__device__ inline void store_shared(uint32_t address, uint32_t value) {
  asm volatile("st.shared.b32 [%0], %1;\n" ::"r"(address), "r"(value) : "memory");
}

__device__ inline void store_shared(uint32_t address, uint4 value) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"r"(address), "r"(value.x),
               "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
}

__device__ inline uint4 load_shared(uint32_t address) {
  uint4 out;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(out.x), "=r"(out.y), "=r"(out.z), "=r"(out.w)
               : "r"(address)
               : "memory");
  return out;
}

// 2^x, off by at most 2^-22 of it; 0 for -inf.
__device__ inline float exp2(float x) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(out) : "f"(x));
  return out;
}

// The value of the lane whose number differs in the bits of `mask`.
__device__ inline float shuffle_xor(float value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

}  // namespace moca::ptx

// csrc/common/ptx.cuh in plain C++, from NVIDIA's description of the instructions (PTX ISA 9.0).
#pragma once

#include <deque>

#include "common/dtype.h"
#include "device.h"

namespace moca::ptx {

inline emulator::Block& block() { return *emulator::Block::active(); }

// Where a block's own shared memory begins: no further aligned than CUDA says.
inline uint32_t shared_memory() { return 1040; }

template <typename T>
T& shared(uint32_t address) {
  const uint32_t at = address - shared_memory();
  if (address % sizeof(T) || uint64_t{at} + sizeof(T) > block().shared.size())
    throw std::runtime_error("bad address in shared memory: " + std::to_string(address));
  return *reinterpret_cast<T*>(block().shared.data() + at);
}

// Copies wait here until their thread waits for them.
struct Copies {
  struct Copy {
    uint32_t target;
    const void* source;
  };
  std::vector<std::deque<std::vector<Copy>>> groups;  // of each thread; the last is open
  unsigned owner = 0;                                 // number of the block
};

inline std::deque<std::vector<Copies::Copy>>& copy_groups() {
  static Copies copies;
  if (copies.owner != block().number) {
    copies.owner = block().number;
    copies.groups.assign(block().slots.size(), {{}});
  }
  return copies.groups[block().thread()];
}

inline void copy_async(uint32_t target, const void* source, bool valid) {
  if (reinterpret_cast<uintptr_t>(source) % 16) throw std::runtime_error("source not aligned");
  std::memset(&shared<uint4>(target), 0xff, 16);
  copy_groups().back().push_back({target, valid ? source : nullptr});
}

inline void copy_async_commit() { copy_groups().push_back({}); }

template <int kGroups>
void copy_async_wait() {
  auto& groups = copy_groups();
  while (static_cast<int>(groups.size()) - 1 > kGroups) {
    for (const auto& copy : groups.front())
      if (copy.source == nullptr)
        std::memset(&shared<uint4>(copy.target), 0, 16);
      else
        std::memcpy(&shared<uint4>(copy.target), copy.source, 16);
    groups.pop_front();
  }
}

inline void load_matrices_of(uint32_t (&out)[4], uint32_t address, bool transposed) {
  auto& all = block().slots;
  const int self = block().thread();
  all[self][0] = address;
  block().meet_warp([&](int first) {
    uint32_t results[32][4];
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        uint32_t value = 0;
        for (int half = 0; half < 2; ++half) {
          const int row = transposed ? lane % 4 * 2 + half : lane / 4;
          const int column = transposed ? lane / 4 : lane % 4 * 2 + half;
          const auto base = static_cast<uint32_t>(all[first + 8 * i + row][0]);
          if (base % 16) throw std::runtime_error("matrix row not aligned");
          value |= static_cast<uint32_t>(shared<uint16_t>(base + 2 * column)) << 16 * half;
        }
        results[lane][i] = value;
      }
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) all[first + lane][i] = results[lane][i];
  });
  for (int i = 0; i < 4; ++i) out[i] = static_cast<uint32_t>(all[self][i]);
}

inline void load_matrices(uint32_t (&out)[4], uint32_t address) {
  load_matrices_of(out, address, false);
}

inline void load_matrices_transposed(uint32_t (&out)[4], uint32_t address) {
  load_matrices_of(out, address, true);
}

template <DType type>
using Element = std::conditional_t<type == DType::bfloat16, bfloat16, float16>;

template <DType type>
float half_of(uint32_t bits, int half) {
  const auto value = static_cast<uint16_t>(bits >> 16 * half);
  Element<type> element;
  std::memcpy(&element, &value, sizeof element);
  return to_float(element);
}

template <DType type>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  auto& all = block().slots;
  const int self = block().thread();
  auto& mine = all[self];
  for (int i = 0; i < 4; ++i) mine[i] = a[i];
  mine[4] = b0;
  mine[5] = b1;
  block().meet_warp([&](int first) {
    float left[16][16], right[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane / 4, pair = lane % 4;
      const auto& slot = all[first + lane];
      for (int half = 0; half < 2; ++half) {
        for (int i = 0; i < 4; ++i)
          left[group + i % 2 * 8][2 * pair + i / 2 * 8 + half] =
              half_of<type>(static_cast<uint32_t>(slot[i]), half);
        for (int i = 0; i < 2; ++i)
          right[2 * pair + i * 8 + half][group] =
              half_of<type>(static_cast<uint32_t>(slot[4 + i]), half);
      }
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        float sum = 0;
        for (int k = 0; k < 16; ++k)
          sum += left[lane / 4 + i / 2 * 8][k] * right[k][lane % 4 * 2 + i % 2];
        std::memcpy(&all[first + lane][i], &sum, sizeof sum);
      }
  });
  for (int i = 0; i < 4; ++i) {
    float sum;
    std::memcpy(&sum, &all[self][i], sizeof sum);
    d[i] += sum;
  }
}

template <DType type>
uint32_t bits_of(float value) {
  const auto element = from_float<Element<type>>(value);
  uint16_t bits;
  std::memcpy(&bits, &element, sizeof bits);
  return bits;
}

template <DType type>
uint32_t pack(float low, float high) {
  return bits_of<type>(low) | bits_of<type>(high) << 16;
}

template <DType type>
float dot(uint32_t a, uint32_t b) {
  return half_of<type>(a, 0) * half_of<type>(b, 0) + half_of<type>(a, 1) * half_of<type>(b, 1);
}

template <typename T>
void store(uint32_t address, T value) {
  shared<T>(address) = value;
  block().stores[block().thread()].push_back({address, sizeof value});
}

inline void store_shared(uint32_t address, uint32_t value) { store(address, value); }

inline void store_shared(uint32_t address, uint4 value) { store(address, value); }

inline uint4 load_shared(uint32_t address) { return shared<uint4>(address); }

inline float exp2(float x) { return std::exp2(x); }

inline float shuffle_xor(float value, int mask) {
  auto& all = block().slots;
  const int self = block().thread();
  std::memcpy(&all[self][0], &value, sizeof value);
  float result = 0;
  block().meet_warp([&](int first) {
    for (int lane = 0; lane < 32; ++lane) all[first + lane][1] = all[first + (lane ^ mask)][0];
  });
  std::memcpy(&result, &all[self][1], sizeof result);
  return result;
}

}  // namespace moca::ptx

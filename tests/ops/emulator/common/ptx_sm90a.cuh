// csrc/common/ptx_sm90a.cuh in plain C++. Copies and products are done as late as their barriers
// allow, or at a random time before; until then targets and results hold NaN.
#pragma once

#include <map>

#include "common/ptx.cuh"
#include "common/tensor_map.h"

namespace moca::ptx {

// Everything that lives as long as a block of threads, beyond its shared memory.
struct Hopper {
  struct Barrier {
    int count = 0, thread = 0;  // that made it
    bool fenced = false;
    int arrived = 0, bytes = 0;
    emulator::Counter phases = 0;  // that have ended
    void settle() {
      if (arrived == count && bytes == 0) {
        arrived = 0;
        ++phases;
      }
    }
  };
  // Products of a warpgroup: one entry for each of its threads.
  struct Product {
    std::vector<float*> d;
    std::vector<const uint32_t*> registers;  // a, or empty
    uint64_t a, b;
    int columns;
    bool add, mn_major;
    DType type;
  };
  struct Warpgroup {
    emulator::Meeting meeting;
    Product next;
    bool fenced[128] = {};  // whether its threads fenced their registers since the last group
    std::deque<std::vector<Product>> groups{{}};
    std::map<float*, std::vector<float>> results;  // in flight
  };
  std::map<uint32_t, Barrier> barriers;
  std::map<int, Warpgroup> warpgroups;
};

inline Hopper& hopper() {
  static Hopper state;
  static unsigned owner = 0;
  if (owner != block().number) {
    owner = block().number;
    state = {};
  }
  return state;
}

inline Hopper::Barrier& barrier_at(uint32_t address) {
  shared<uint64_t>(address);
  const auto found = hopper().barriers.find(address);
  if (found == hopper().barriers.end()) throw std::runtime_error("barrier is not initialised");
  return found->second;
}

inline void init_barrier(uint32_t barrier, int count) {
  shared<uint64_t>(barrier);
  hopper().barriers[barrier] = {count, block().thread()};
}

inline void fence_barriers() {
  for (auto& [address, barrier] : hopper().barriers)
    barrier.fenced |= barrier.thread == block().thread();
}

inline void arrive(uint32_t barrier) {
  auto& state = barrier_at(barrier);
  ++state.arrived;
  state.settle();
}

inline void arrive_expecting(uint32_t barrier, int bytes) {
  barrier_at(barrier).bytes += bytes;
  arrive(barrier);
}

inline void wait_barrier(uint32_t barrier, int parity) {
  auto& state = barrier_at(barrier);
  while (static_cast<int>(state.phases & 1) == parity) block().wait(state.phases);
}

// A value in shared memory as copies and products know it.
template <typename T>
const T& known(uint32_t address) {
  shared<T>(address);
  return *reinterpret_cast<const T*>(block().known.data() + (address - shared_memory()));
}

// Makes them know these bytes.
inline void publish(uint32_t address, uint32_t bytes) {
  const uint32_t at = address - shared_memory();
  std::memcpy(block().known.data() + at, block().shared.data() + at, bytes);
}

// An address that lies so many bytes into a box, in its swizzle of 16-byte chunks.
inline uint32_t swizzled(uint32_t address, int span) {
  return address ^ ((address >> 7 & static_cast<uint32_t>(span / 16 - 1)) << 4);
}

inline void copy_box(uint32_t target, const TensorMap& map, int column, int head, int token,
                     uint32_t barrier) {
  const int span = map.columns * 2;
  if (target % (8 * span)) throw std::runtime_error("box does not begin where its swizzle does");
  if (!barrier_at(barrier).fenced) throw std::runtime_error("copies do not know the barrier");
  shared<uint8_t>(target + map.rows * span - 1);
  std::memset(&shared<uint8_t>(target), 0xff, map.rows * span);
  publish(target, map.rows * span);
  block().pending.push_back([=] {
    for (int row = 0; row < map.rows; ++row)
      for (int i = 0; i < map.columns; ++i) {
        const int64_t at = static_cast<int64_t>(token) + row, from = column + i;
        const bool inside = at < map.tokens && head < map.heads && from < map.dim;
        const auto* data = static_cast<const uint16_t*>(map.data);
        shared<uint16_t>(swizzled(target + row * span + 2 * i, span)) =
            inside ? data[at * map.token_stride + head * map.head_stride + from] : 0;
      }
    publish(target, map.rows * span);
    auto& state = barrier_at(barrier);
    state.bytes -= map.rows * span;
    state.settle();
  });
}

inline void fence_stores() {
  auto& stores = block().stores[block().thread()];
  for (const auto& store : stores) publish(store.address, store.bytes);
  stores.clear();
}

inline emulator::Meeting& named_barrier(int id, int threads) {
  auto& meeting = block().barriers[id];
  if (id == 0 || (meeting.arrived > 0 && meeting.size != threads))
    throw std::runtime_error("barrier " + std::to_string(id) + " is used for something else");
  meeting.size = threads;
  return meeting;
}

inline void sync_named(int id, int threads) {
  block().meet(named_barrier(id, threads), threads, [] {});
}

inline void arrive_named(int id, int threads) {
  auto& meeting = named_barrier(id, threads);
  if (++meeting.arrived == threads) {
    meeting.arrived = 0;
    ++meeting.round;
  }
}

template <int kCount>
void give_registers() {}

template <int kCount>
void take_registers() {}

template <int kSwizzle>
uint64_t operand(uint32_t tile, uint32_t offset, int groups, int columns = 16) {
  const uint32_t address = tile + offset;
  if (tile % 16 || offset % 16 || address >= 1 << 18)
    throw std::runtime_error("operand not aligned");
  constexpr uint64_t kMode = kSwizzle == 128 ? 1 : 3;
  return static_cast<uint64_t>(address >> 4) | static_cast<uint64_t>(columns >> 4) << 16 |
         static_cast<uint64_t>(groups >> 4) << 32 | kMode << 62;
}

// Value k, n of b (n a row of a): k and n count in the directions that the canonical layouts of the
// matrix descriptor give them.
inline uint16_t operand_value(uint64_t operand, int k, int n, bool mn_major) {
  const auto field = [&](int shift) {
    return static_cast<uint32_t>(operand >> shift & 0x3fff) * 16;
  };
  const uint32_t address = field(0), columns = field(16), groups = field(32);
  const int span = operand >> 62 == 1 ? 128 : 32;
  const int row = mn_major ? k : n, byte = 2 * (mn_major ? n : k);
  const uint32_t at =
      address + row % 8 * span + row / 8 * groups + byte % span + byte / span * columns;
  return known<uint16_t>(swizzled(at, span));
}

inline float value_of(uint16_t bits, DType type) {
  return type == DType::bfloat16 ? half_of<DType::bfloat16>(bits, 0)
                                 : half_of<DType::float16>(bits, 0);
}

inline void run_product(Hopper::Warpgroup& warpgroup, const Hopper::Product& product) {
  std::vector<float> left(64 * 16), right(16 * product.columns);
  for (int row = 0; row < 64; ++row)
    for (int k = 0; k < 16; ++k) {
      const int lane = row % 8 * 4 + k % 8 / 2, i = row % 16 / 8 + k / 8 * 2;
      const uint16_t bits =
          product.registers.empty()
              ? operand_value(product.a, k, row, false)
              : static_cast<uint16_t>(product.registers[row / 16 * 32 + lane][i] >> k % 2 * 16);
      left[row * 16 + k] = value_of(bits, product.type);
    }
  for (int k = 0; k < 16; ++k)
    for (int n = 0; n < product.columns; ++n)
      right[k * product.columns + n] =
          value_of(operand_value(product.b, k, n, product.mn_major), product.type);
  for (int thread = 0; thread < 128; ++thread) {
    auto& d = warpgroup.results.at(product.d[thread]);
    for (int i = 0; i < product.columns / 2; ++i) {
      const int row = thread / 32 * 16 + thread % 32 / 4 + i % 4 / 2 * 8;
      const int column = i / 4 * 8 + thread % 4 * 2 + i % 2;
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += left[row * 16 + k] * right[k * product.columns + column];
      d[i] = product.add ? d[i] + sum : sum;
    }
  }
}

inline Hopper::Warpgroup& this_warpgroup() { return hopper().warpgroups[block().thread() / 128]; }

inline void start_product(float* d, int columns, const uint32_t* registers, uint64_t a, uint64_t b,
                          bool add, bool mn_major, DType type) {
  auto& warpgroup = this_warpgroup();
  if (!warpgroup.fenced[block().thread() % 128]) throw std::runtime_error("registers not fenced");
  auto& next = warpgroup.next;
  next.d.resize(128);
  next.registers.resize(registers == nullptr ? 0 : 128);
  next.d[block().thread() % 128] = d;
  if (registers != nullptr) next.registers[block().thread() % 128] = registers;
  const bool fresh = warpgroup.results.emplace(d, std::vector<float>(d, d + columns / 2)).second;
  if (fresh) std::fill(d, d + columns / 2, NAN);
  if (warpgroup.meeting.arrived == 0) {
    next.a = a;
    next.b = b;
  } else if (next.a != a || next.b != b) {
    throw std::runtime_error("threads of a warpgroup name different operands");
  }
  block().meet(warpgroup.meeting, 128, [&] {
    next.columns = columns;
    next.add = add;
    next.mn_major = mn_major;
    next.type = type;
    warpgroup.groups.back().push_back(next);
  });
}

inline void begin_products() { this_warpgroup().fenced[block().thread() % 128] = true; }

inline void commit_products() {
  auto& warpgroup = this_warpgroup();
  warpgroup.fenced[block().thread() % 128] = false;
  block().meet(warpgroup.meeting, 128, [&] { warpgroup.groups.push_back({}); });
}

template <int kGroups, int kColumns>
void wait_products(float (&)[1][kColumns][4]) {
  auto& warpgroup = this_warpgroup();
  block().meet(warpgroup.meeting, 128, [&] {
    while (static_cast<int>(warpgroup.groups.size()) - 1 > kGroups) {
      for (const auto& product : warpgroup.groups.front()) run_product(warpgroup, product);
      warpgroup.groups.pop_front();
    }
    std::map<float*, std::vector<float>> running;
    for (const auto& group : warpgroup.groups)
      for (const auto& product : group)
        for (float* d : product.d) running[d] = warpgroup.results.at(d);
    for (const auto& [d, values] : warpgroup.results)
      if (running.count(d) == 0) std::copy(values.begin(), values.end(), d);
    warpgroup.results = std::move(running);
  });
}

template <DType type, int kColumns>
void multiply(float (&d)[kColumns][4], uint64_t a, uint64_t b, bool add) {
  start_product(d[0], 8 * kColumns, nullptr, a, b, add, false, type);
}

template <DType type, int kColumns>
void multiply(float (&d)[kColumns][4], const uint32_t (&a)[4], uint64_t b) {
  start_product(d[0], 8 * kColumns, a, 0, b, true, true, type);
}

}  // namespace moca::ptx

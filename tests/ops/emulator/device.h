// Runs CUDA kernels on the CPU, one block after another: every CUDA thread is a fiber. What threads
// wait for (the other lanes of a warp, barriers, copies) is waited for here too, and shared memory
// is poisoned: a kernel that reads too early, or waits for what never comes, fails. Warps take
// turns in a random order, that of `seed`.
//
// The instructions are in common/ptx.cuh beside this, in place of csrc/common/ptx.cuh; sources that
// need none are compiled with cuda/, in place of CUDA's own headers.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __grid_constant__

using std::max;
using std::min;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

namespace emulator {

// Threads wait until a counter moves on from the value it had.
using Counter = uint64_t;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  const Counter* counter = nullptr;
  Counter value = 0;
  bool done = false;
  bool ready() const { return !done && (counter == nullptr || *counter != value); }
};

// `size` threads that meet: the last to come does the work for all and lets them go.
struct Meeting {
  int arrived = 0;
  Counter round = 0;
  int size = 0;  // of a named barrier
};

class Block {
 public:
  static constexpr int kStackBytes = 128 * 1024;
  const unsigned number = ++count();  // of all blocks, from 1
  std::vector<uint8_t> shared;
  std::vector<uint8_t> known;  // the same, as Hopper's copies and matrix products know it
  struct Store {
    uint32_t address, bytes;
  };
  std::vector<std::vector<Store>> stores;      // of each thread since its last fence
  std::vector<std::array<uint64_t, 8>> slots;  // what each thread brings to a meeting
  std::vector<Meeting> warps;
  Meeting barriers[16];
  std::vector<std::function<void()>> pending;  // asynchronous work that no thread waits for itself

  Block(int threads, size_t shared_bytes, std::function<void()> body, unsigned seed)
      : shared(shared_bytes, 0xff),  // NaN
        known(shared),
        stores(threads),
        slots(threads),
        warps(threads / 32),
        fibers_(threads),
        body_(std::move(body)),
        random_(seed),
        slow_(static_cast<int>(random_() % (2 * threads))),
        eager_(random_() % 2) {}

  void run() {
    active() = this;
    for (auto& fiber : fibers_) {
      fiber.stack.reset(new char[kStackBytes]);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStackBytes;
      fiber.context.uc_link = &scheduler_;
      makecontext(&fiber.context, &Block::enter, 0);
    }
    while (run_warp())
      if (failure_) std::rethrow_exception(failure_);
    for (auto& fiber : fibers_)
      if (!fiber.done)
        throw std::runtime_error("thread " + std::to_string(&fiber - &fibers_[0]) +
                                 " waits for ever");
    if (!pending.empty()) throw std::runtime_error("the block ends before its copies do");
  }

  static Block*& active() {
    static Block* block = nullptr;
    return block;
  }

  int thread() const { return current_; }

  static unsigned& count() {
    static unsigned value = 0;
    return value;
  }

  void wait(const Counter& counter) {
    Fiber& fiber = fibers_[current_];
    fiber.counter = &counter;
    fiber.value = counter;
    swapcontext(&fiber.context, &scheduler_);
  }

  template <typename Work>
  void meet(Meeting& meeting, int size, Work&& work) {
    if (++meeting.arrived == size) {
      work();
      meeting.arrived = 0;
      ++meeting.round;
    } else {
      wait(meeting.round);
    }
  }

  // work(first thread of the warp), once all its lanes are here.
  template <typename Work>
  void meet_warp(Work&& work) {
    const int warp = current_ / 32;
    meet(warps[warp], 32, [&] { work(warp * 32); });
  }

 private:
  static void enter() {
    Block& block = *active();
    const int thread = block.current_;
    try {
      block.body_();
    } catch (...) {  // must not leave the fiber's stack
      block.failure_ = std::current_exception();
    }
    block.fibers_[thread].done = true;
  }

  void resume(int thread) {
    current_ = thread;
    threadIdx.x = thread;
    fibers_[thread].counter = nullptr;
    swapcontext(&scheduler_, &fibers_[thread].context);
  }

  // Runs one warp, most often as far as it gets; false if nothing can run.
  bool run_warp() {
    const int warps = static_cast<int>(fibers_.size()) / 32;
    const int first = static_cast<int>(random_() % warps);
    if (eager_ && !pending.empty() && random_() % 4 == 0) return run_pending();
    for (int i = 0; i < warps; ++i) {
      const int begin = (first + i) % warps * 32;
      bool ran = false;
      for (bool again = true; again; ran |= again) {
        again = false;
        for (int lane = begin; lane < begin + 32; ++lane)
          if (lane != slow_ && fibers_[lane].ready()) {
            resume(lane);
            again = true;
            if (random_() % 64 == 0) return true;  // lanes of a warp need not keep step
          }
      }
      if (ran) return true;
    }
    if (slow_ < static_cast<int>(fibers_.size()) && fibers_[slow_].ready()) {
      resume(slow_);
      return true;
    }
    return !pending.empty() && run_pending();
  }

  // Copies end in any order.
  bool run_pending() {
    const auto chosen = pending.begin() + static_cast<long>(random_() % pending.size());
    const auto work = std::move(*chosen);
    pending.erase(chosen);
    work();
    return true;
  }

  std::vector<Fiber> fibers_;
  std::function<void()> body_;
  std::exception_ptr failure_;
  std::mt19937 random_;
  const int slow_;    // the thread that runs only when no other can, if there is one
  const bool eager_;  // whether copies end before some thread cannot go on without them
  ucontext_t scheduler_;
  int current_ = 0;
};

inline unsigned& seed() {
  static unsigned value = 0;
  return value;
}

// Runs body on every thread of every block.
inline void launch(dim3 grid, dim3 block, size_t shared, const std::function<void()>& body) {
  constexpr size_t kMostShared = 227 << 10;  // a block of Hopper's can have
  if (shared > kMostShared) throw std::runtime_error("too much shared memory");
  gridDim = grid;
  blockDim = block;
  for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x)
      Block(block.x, shared, body, seed()++).run();
}

}  // namespace emulator

inline void __syncthreads() {
  auto& block = *emulator::Block::active();
  block.meet(block.barriers[0], static_cast<int>(block.slots.size()), [] {});
}

inline void __syncwarp() {
  emulator::Block::active()->meet_warp([](int) {});
}

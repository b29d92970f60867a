// CUDA's threads on a CPU, so that kernels can be tried where there is no GPU.
//
// A block's threads take turns on one thread of the machine: each runs until it has to wait for
// others, at a barrier or an exchange within its warp. Blocks follow one another.
// Which thread goes next is drawn at random (MEGATRON_EMULATOR_SEED), so that a kernel that leaves
// out a barrier gives other results with another seed. A barrier that some threads of the block
// never reach, and an exchange that lacks some lanes, are errors, and so is an access of 16 bytes
// at an address that is not divisible by 16.
//
// Only what the kernels use is here.

#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct __half {
  _Float16 value;
  __half() = default;
  explicit __half(float x) : value(static_cast<_Float16>(x)) {}
  explicit operator float() const { return static_cast<float>(value); }
};

struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float x) {
    uint32_t wide;
    std::memcpy(&wide, &x, 4);
    // To the nearest, to even in a tie; a NaN stays one.
    uint32_t up = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
    bits = std::isnan(x) ? 0x7fc0 : static_cast<uint16_t>(up);
  }
  explicit operator float() const {
    uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    return x;
  }
};

namespace emulator {

constexpr int kLanes = 32;
constexpr size_t kStack = 64 * 1024;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulated kernel: %s\n", what);
  std::abort();
}

enum class Waiting { kNot, kBlock, kWarp, kDone };

// Where a run of instructions can be left and gone on with.
struct Place {
  ucontext_t context;
  jmp_buf jump;
  bool left = false;
};

inline void go(Place& from, Place& to) {
#if defined(__SANITIZE_ADDRESS__)
  swapcontext(&from.context, &to.context);  // the one change that the sanitizer understands
#else
  // Without a call of the system but at the very begin of a context.
  from.left = true;
  if (_setjmp(from.jump)) return;
  if (to.left) _longjmp(to.jump, 1);
  setcontext(&to.context);
#endif
}

// Threads run here one after the other: the next begins where the last one ended, and only a thread
// that waits keeps the fiber to itself.
struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStack]};
  Place place;
};

struct Thread {
  dim3 index;
  int number = 0;
  Waiting waiting = Waiting::kNot;
  Fiber* fiber = nullptr;
  // What was offered in this exchange and in the one before, which others may yet have to read.
  uint64_t offered[2] = {};
  int exchanges = 0;
};

struct State {
  dim3 grid, block, block_index;
  std::vector<Thread> threads;
  std::vector<size_t> order;  // in which threads take turns in this round
  size_t turn = 0, done = 0;
  bool moved = false;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Fiber*> idle;
  std::vector<unsigned char> shared;
  Place launcher;
  Thread* current = nullptr;
  std::function<void()> body;
  uint64_t random = 1;
};

inline State& state() {
  static State the;
  return the;
}

inline unsigned char* dynamic_shared() {
  auto address = reinterpret_cast<uintptr_t>(state().shared.data());
  return reinterpret_cast<unsigned char*>((address + 127) / 128 * 128);
}

// Whether all of `count` threads from `first` on wait for the same; then they may go on.
inline bool release(size_t first, size_t count, Waiting what) {
  auto& threads = state().threads;
  for (size_t i = first; i < first + count; i++)
    if (threads[i].waiting != what) return false;
  for (size_t i = first; i < first + count; i++) threads[i].waiting = Waiting::kNot;
  return true;
}

inline size_t draw(size_t below) {
  uint64_t& x = state().random;
  x ^= x << 13, x ^= x >> 7, x ^= x << 17;
  return x % below;
}

// Who may go on goes on, in another order than before.
inline void next_round() {
  auto& s = state();
  size_t count = s.threads.size();
  bool released = release(0, count, Waiting::kBlock);
  for (size_t first = 0; first < count; first += kLanes)
    released |= release(first, std::min<size_t>(kLanes, count - first), Waiting::kWarp);
  if (!s.moved && !released) fail("some threads wait at a barrier that others never reach");
  for (size_t i = count - 1; i > 0; i--) std::swap(s.order[i], s.order[draw(i + 1)]);
  s.turn = 0, s.moved = false;
}

// The thread whose turn it is, which becomes the current one; null when all have ended.
inline Thread* next() {
  auto& s = state();
  while (s.done < s.threads.size()) {
    if (s.turn == s.threads.size()) next_round();
    Thread& thread = s.threads[s.order[s.turn++]];
    if (thread.waiting != Waiting::kNot) continue;
    s.moved = true;
    return s.current = &thread;
  }
  return nullptr;
}

// Runs what is current from its begin on, then whoever is next, as long as these begin, too.
inline void run_threads() {
  auto& s = state();
  for (;;) {
    Fiber* own = s.current->fiber;
    s.body();
    s.current->waiting = Waiting::kDone;
    s.done++;
    Thread* thread = next();
    if (thread && !thread->fiber) {
      thread->fiber = own;
      continue;
    }
    s.idle.push_back(own);
    go(own->place, thread ? thread->fiber->place : s.launcher);
  }
}

// A fiber for a thread that begins: at the start, or where it has run another to the end.
inline Fiber* free_fiber() {
  auto& s = state();
  if (!s.idle.empty()) {
    Fiber* fiber = s.idle.back();
    s.idle.pop_back();
    return fiber;
  }
  s.fibers.emplace_back(new Fiber);
  Fiber* fiber = s.fibers.back().get();
  ucontext_t& context = fiber->place.context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber->stack.get();
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, run_threads, 0);
  return fiber;
}

// Leaves `from` for the thread whose turn it is.
inline void go_on(Place& from, Thread* thread) {
  if (!thread->fiber) thread->fiber = free_fiber();
  go(from, thread->fiber->place);
}

inline void wait(Waiting what) {
  Thread* me = state().current;
  me->waiting = what;
  Thread* thread = next();
  if (thread != me) go_on(me->fiber->place, thread);
}

inline void run_block() {
  auto& s = state();
  size_t count = s.threads.size();
  s.order.resize(count);
  for (size_t i = 0; i < count; i++) {
    s.order[i] = i;
    s.threads[i] = Thread();
    s.threads[i].number = static_cast<int>(i);
    s.threads[i].index =
        dim3(i % s.block.x, i / s.block.x % s.block.y, i / (s.block.x * s.block.y));
  }
  s.turn = count, s.done = 0, s.moved = true;
  go_on(s.launcher, next());
}

// Runs `body` as every thread of every block; returns 0.
inline int run(std::function<void()> body, dim3 grid, dim3 block, size_t shared) {
  auto& s = state();
  const char* seed = std::getenv("MEGATRON_EMULATOR_SEED");
  s.random = (seed ? std::strtoull(seed, nullptr, 10) : 0) * 0x9e3779b97f4a7c15ull + 0x2545f491;
  s.grid = grid, s.block = block, s.body = std::move(body);
  size_t count = static_cast<size_t>(block.x) * block.y * block.z;
  if (count == 0 || count > 1024) return 9;  // cudaErrorInvalidConfiguration
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535) return 9;
  s.threads.resize(count);
  // Shared memory is not zero at the start of a block: NaNs are.
  s.shared.assign(shared + 256, 0xff);
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x++) {
        s.block_index = dim3(x, y, z);
        std::memset(s.shared.data(), 0xff, s.shared.size());
        run_block();
      }
  return 0;
}

template <typename T>
T exchange(T value, int lane) {
  static_assert(sizeof(T) <= 8);
  auto& s = state();
  Thread* me = s.current;
  int place = me->exchanges++ % 2;
  std::memcpy(&me->offered[place], &value, sizeof(T));
  wait(Waiting::kWarp);
  T result;
  std::memcpy(&result, &s.threads[me->number / kLanes * kLanes + lane].offered[place], sizeof(T));
  return result;
}

}  // namespace emulator

#define threadIdx (emulator::state().current->index)
#define blockIdx (emulator::state().block_index)
#define blockDim (emulator::state().block)
#define gridDim (emulator::state().grid)

inline void __syncthreads() { emulator::wait(emulator::Waiting::kBlock); }
inline void __syncwarp(unsigned = ~0u) { emulator::wait(emulator::Waiting::kWarp); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask, int = emulator::kLanes) {
  return emulator::exchange(value, (emulator::state().current->number % emulator::kLanes) ^ mask);
}

template <typename T>
T __shfl_sync(unsigned, T value, int lane, int = emulator::kLanes) {
  return emulator::exchange(value, lane);
}

inline uint32_t __umulhi(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
}
inline float __expf(float x) { return std::exp(x); }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __fdividef(float x, float y) { return x / y; }
using std::max;
using std::min;

// The four bytes of x and y that the nibbles of `selector` name, x's bytes being 0 to 3.
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  uint32_t result = 0;
  for (int i = 0; i < 4; i++)
    result |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}

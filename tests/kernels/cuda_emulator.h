// Runs a CUDA kernel's source on a CPU: a fiber for each thread of a block, blocks one by one.
//
// Included before src/halfbyte/kernels/cuda/*.cu with EMULATED set; it stands in for the part of
// those files that is PTX. Copies to shared memory happen when they are waited for, no sooner, and
// shared memory is full of not-a-number at first, so that a wait that is missing shows. What a GPU does
// not promise and a CPU does all the same is refused: `fault` says what it was.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <vector>

#define __global__
#define __launch_bounds__(...)
#define DEVICE inline

struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emulator {

struct Barrier {
  int size = 0, arrived = 0, round = 0;
};

struct Copy {
  unsigned char* to;
  const unsigned char* from;
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool done = false;
  bool has_inputs = false;  // it has waited for the launches before
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
};

struct Lane {
  uint32_t a[4], b[2];
  const unsigned char* row;
};

inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline int current = 0;
inline int first_block = 0, block_threads = 1, block_memory = 0;  // of those that run together
inline bool scattered = false;  // threads go on at different times after they met
inline std::vector<Barrier> block_barriers;
inline std::vector<Barrier> warp_barriers;
inline std::vector<Lane> lanes;
inline std::vector<uint4> memory;

inline const char* fault = nullptr;  // the first one

inline void require(bool holds, const char* otherwise) {
  if (!holds && !fault) fault = otherwise;
}

inline void require_inputs(const char* otherwise) { require(fibers[current].has_inputs, otherwise); }

inline int block() { return current / block_threads; }

inline void pause() { swapcontext(&fibers[current].context, &scheduler); }

inline void arrive_at(Barrier& barrier) {
  if (++barrier.arrived == barrier.size) {
    barrier.arrived = 0;
    barrier.round++;
  }
}

inline void wait_at(Barrier& barrier) {
  int round = barrier.round;
  arrive_at(barrier);
  while (barrier.round == round) pause();
  if (scattered)
    for (int i = current % 5; i; i--) pause();
}

inline void wait_for_warp() { wait_at(warp_barriers[current / 32]); }

inline float from_bf16(uint16_t bits) {
  uint32_t wide = uint32_t(bits) << 16;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}

inline uint16_t to_bf16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if (std::isnan(value)) return 0x7FC0;
  return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

inline float from_fp16(uint16_t bits) {
  int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  float size = exponent == 31  ? (mantissa ? NAN : INFINITY)
               : exponent == 0 ? std::ldexp(float(mantissa), -24)
                               : std::ldexp(float(1024 + mantissa), exponent - 25);
  return bits & 0x8000 ? -size : size;
}

inline uint16_t to_fp16(float value) {
  uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  float size = std::fabs(value);
  if (std::isnan(value)) return 0x7E00;
  if (size == 0.0f) return sign;
  if (size >= 65520.0f) return sign | 0x7C00;
  int exponent;
  std::frexp(size, &exponent);  // size in [2^(exponent - 1), 2^exponent)
  int unit = std::max(exponent - 11, -24);
  int steps = int(std::nearbyint(std::ldexp(size, -unit)));
  // `steps` spills into the exponent by itself where it rounds up to the next power of two.
  return uint16_t(sign | (unit == -24 ? steps : ((unit + 24) << 10) + steps));
}

inline float widen(uint16_t bits) { return BF16 ? from_bf16(bits) : from_fp16(bits); }
inline uint16_t narrow(float value) { return BF16 ? to_bf16(value) : to_fp16(value); }
inline float half_of(uint32_t pair, int side) { return widen(uint16_t(pair >> 16 * side)); }

}  // namespace emulator

struct Index {
  int x;
};
inline Index gridDim;
inline struct {
  struct X {
    operator int() const { return emulator::current % emulator::block_threads; }
  } x;
} threadIdx;
inline struct {
  struct X {
    operator int() const { return emulator::first_block + emulator::block(); }
  } x;
} blockIdx;

#define shared_memory (emulator::memory.data() + emulator::block() * emulator::block_memory)

inline void __syncthreads() { emulator::wait_at(emulator::block_barriers[emulator::block()]); }
inline void __syncwarp() { emulator::wait_for_warp(); }
inline void __threadfence() {}
inline unsigned atomicAdd(unsigned* place, unsigned value) {
  emulator::require_inputs("a counter is counted up while an earlier launch may use it");
  unsigned before = *place;
  *place += value;
  return before;
}

inline void copy_ahead(unsigned char* to, const unsigned char* from) {
  emulator::fibers[emulator::current].open.push_back({to, from});
}

inline void close_copies() {
  auto& fiber = emulator::fibers[emulator::current];
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}

template <unsigned OPEN>
inline void wait_for_copies() {
  auto& groups = emulator::fibers[emulator::current].groups;
  while (groups.size() > OPEN) {
    for (auto& copy : groups.front()) memcpy(copy.to, copy.from, 16);
    groups.pop_front();
  }
}

inline void load_matrices(uint32_t (&found)[4], const unsigned char* row) {
  int warp = emulator::current / 32 * 32, lane = emulator::current % 32;
  emulator::lanes[emulator::current].row = row;
  emulator::wait_for_warp();
  for (int matrix = 0; matrix < 4; matrix++)
    memcpy(&found[matrix], emulator::lanes[warp + matrix * 8 + lane / 4].row + lane % 4 * 4, 4);
  emulator::wait_for_warp();
}

inline void multiply_add(float (&sums)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                         uint32_t b0, uint32_t b1) {
  int warp = emulator::current / 32 * 32, lane = emulator::current % 32;
  auto& own = emulator::lanes[emulator::current];
  uint32_t a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
  memcpy(own.a, a, sizeof a);
  memcpy(own.b, b, sizeof b);
  emulator::wait_for_warp();
  for (int i = 0; i < 4; i++) {
    int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; k++) {
      auto& left = emulator::lanes[warp + row % 8 * 4 + k % 8 / 2];
      auto& right = emulator::lanes[warp + column * 4 + k % 8 / 2];
      sums[i] += emulator::half_of(left.a[row / 8 + k / 8 * 2], k % 2) *
                 emulator::half_of(right.b[k / 8], k % 2);
    }
  }
  emulator::wait_for_warp();
}

template <unsigned MASK, unsigned SET>
inline uint32_t mask_and_set(uint32_t word) {
  return (word & MASK) | SET;
}

inline uint32_t narrow_pair(float low, float high) {
  return emulator::narrow(low) | uint32_t(emulator::narrow(high)) << 16;
}

inline uint32_t add_pair(uint32_t left, uint32_t right) {
  using emulator::half_of;
  return narrow_pair(half_of(left, 0) + half_of(right, 0), half_of(left, 1) + half_of(right, 1));
}

inline float widen_half(uint16_t value) { return emulator::from_fp16(value); }

inline float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

inline float4 read_beyond_l1(const float4* from) { return *from; }
inline void wait_for_inputs() { emulator::fibers[emulator::current].has_inputs = true; }
inline void let_next_begin() {}

namespace emulator {

using Entry = void (*)();

// Runs thread blocks that can see each other; one, but for clusters.
inline void run_blocks(Entry entry, int first, int blocks, int threads, int shared_bytes) {
  first_block = first;
  block_threads = threads;
  block_memory = (shared_bytes + 1023) / 1024 * 64;  // the same place in each is 1024 bytes apart
  memory.assign(blocks * block_memory, {~0u, ~0u, ~0u, ~0u});
  fibers.assign(blocks * threads, {});
  lanes.assign(blocks * threads, {});
  block_barriers.assign(blocks, {threads});
  warp_barriers.assign(blocks * threads / 32, {32});
  for (auto& fiber : fibers) {
    fiber.stack.resize(1 << 17);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, entry, 0);
  }
  int left = 1;
  while (left) {
    left = 0;
    for (current = 0; current < blocks * threads; current++) {
      if (fibers[current].done) continue;
      swapcontext(&scheduler, &fibers[current].context);
      left += !fibers[current].done;
    }
  }
}

inline void end_of_thread() { fibers[current].done = true; }

}  // namespace emulator

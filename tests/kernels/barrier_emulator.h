// What src/halfbyte/kernels/cuda/barriers.cu has, on a CPU: barriers in shared memory, bulk copies.
//
// Bulk copies happen when their barrier is waited for, or at once where `eager` is set: a wait that is
// missing shows in the one, a slot that is given back too early in the other.
#pragma once
#include <map>

#include "cuda_emulator.h"

namespace emulator {

struct BulkCopy {
  unsigned char* to;
  std::vector<unsigned char> bytes;
  uint32_t count;
};

struct PhaseBarrier {
  int size = 0, pending = 0, phase = 0;
  int begun_by = 0;
  bool published = false;
  long bytes = 0;
  std::deque<BulkCopy> copies;
};

inline bool eager = false;
inline std::map<void*, PhaseBarrier> phase_barriers;

inline void end_phase_if_done(PhaseBarrier& barrier) {
  if (barrier.pending || barrier.bytes) return;
  barrier.pending = barrier.size;
  barrier.phase ^= 1;
}

inline void carry_out(PhaseBarrier& barrier, BulkCopy& copy) {
  memcpy(copy.to, copy.bytes.data(), copy.bytes.size());
  barrier.bytes -= copy.count;
  end_phase_if_done(barrier);
}

inline void start_copy(void* place, BulkCopy copy, int alignment) {
  auto& barrier = phase_barriers.at(place);
  require(barrier.published, "a copy is to arrive at a barrier that was not published");
  require(uintptr_t(copy.to) % alignment == 0, "a copy goes to where it is not aligned");
  if (eager)
    carry_out(barrier, copy);
  else
    barrier.copies.push_back(std::move(copy));
}

}  // namespace emulator

typedef unsigned char* Shared;
inline Shared share(unsigned char* pointer) { return pointer; }
inline uint32_t shared_address(const void* pointer) { return uint32_t(uintptr_t(pointer)); }

inline void barrier_begin(Shared place, uint32_t arrivals) {
  emulator::phase_barriers[place] = {int(arrivals), int(arrivals), 0, emulator::current};
}

inline void publish_barriers() {
  for (auto& [place, barrier] : emulator::phase_barriers)
    if (barrier.begun_by == emulator::current) barrier.published = true;
}

inline void barrier_arrive(Shared place) {
  auto& barrier = emulator::phase_barriers.at(place);
  barrier.pending--;
  emulator::end_phase_if_done(barrier);
}

inline void barrier_expect(Shared place, uint32_t bytes) {
  emulator::phase_barriers.at(place).bytes += bytes;
  barrier_arrive(place);
}

inline void barrier_wait(Shared place, uint32_t parity) {
  auto& barrier = emulator::phase_barriers.at(place);
  while (uint32_t(barrier.phase) == parity) {
    if (barrier.copies.empty())
      emulator::pause();
    else {
      auto copy = std::move(barrier.copies.front());
      barrier.copies.pop_front();
      emulator::carry_out(barrier, copy);
    }
  }
}

namespace emulator {

// As _encode in tests/helpers/cuda_emulation.py.
struct Map {
  uint64_t address, element_bytes, sizes[3], strides[2], box[3], swizzled;
};

}  // namespace emulator

inline void copy_box(Shared to, const unsigned long long* encoded, uint32_t first, uint32_t second,
                     uint32_t third, Shared barrier) {
  auto& map = *(const emulator::Map*)encoded;
  // Of the tensors, x alone is swizzled.
  if (map.swizzled) emulator::require_inputs("x is copied while an earlier launch may write it");
  size_t row = map.box[0] * map.element_bytes;
  std::vector<unsigned char> box(row * map.box[1] * map.box[2], 0);
  for (uint64_t k = 0; k < map.box[2] && third + k < map.sizes[2]; k++)
    for (uint64_t j = 0; j < map.box[1] && second + j < map.sizes[1]; j++)
      for (uint64_t i = 0; i < row; i++) {
        uint64_t place = i / map.element_bytes + first;
        if (place >= map.sizes[0]) break;
        auto from = (const unsigned char*)map.address + (third + k) * map.strides[1] +
                    (second + j) * map.strides[0] + first * map.element_bytes + i;
        size_t line = k * map.box[1] + j;
        size_t to_place = map.swizzled ? line * 128 + ((i / 16 ^ (line & 7)) * 16 + i % 16)
                                       : line * row + i;
        box[to_place] = *from;
      }
  uint32_t count = box.size();
  // Where the pieces of rows are swapped about, it is by the address.
  emulator::start_copy(barrier, {to, std::move(box), count}, map.swizzled ? 1024 : 128);
}

inline void keep(uint32_t&) {}
inline void prefetch_map(const unsigned long long*) {}

inline void copy_bulk(Shared to, const unsigned char* from, uint32_t bytes, Shared barrier) {
  emulator::require(bytes % 16 == 0, "a copy in a row is not of pieces of 16 bytes");
  emulator::start_copy(barrier, {to, {from, from + bytes}, bytes}, 16);
}

// What src/halfbyte/kernels/cuda/hopper.cu has, on a CPU: clusters, copies of boxes, products of a
// warpgroup.
//
// Products read their operands when they are waited for, no sooner: registers that are written or a
// box that is filled again too early shows.
#pragma once
#include "barrier_emulator.h"

#define __grid_constant__
#define __cluster_dims__(...)

namespace emulator {

struct Product {
  float (*sums)[4];
  const uint32_t* a;
  const unsigned char* box;
  uint32_t sixteenth;
};

struct Products {
  std::vector<Product> open;
  std::deque<std::vector<Product>> groups;
};

inline std::vector<Products> products;
inline std::vector<Barrier> warpgroup_barriers;

struct Transposed {
  uint32_t pairs[4];
};
inline std::vector<Transposed> transposed;

inline Barrier cluster_barrier;
inline std::vector<Barrier> consumer_barriers, turns;

inline void begin_hopper(int threads) {
  cluster_barrier = {threads};
  phase_barriers.clear();
  products.assign(threads, {});
  transposed.assign(threads, {});
  warpgroup_barriers.assign(threads / 128, {128});
  turns.assign(CLUSTER * JOINED * 2, {256});
  consumer_barriers.assign(CLUSTER * JOINED, {128 * WARPGROUPS});
}

}  // namespace emulator

// The same place in another thread block of the cluster.
inline Shared elsewhere(Shared place, int rank) {
  return place + (rank - emulator::block()) * emulator::block_memory * 16;
}

inline void barrier_arrive_at(Shared place, uint32_t rank) { barrier_arrive(elsewhere(place, rank)); }

inline float4 read_elsewhere(Shared place, uint32_t rank) {
  return *(const float4*)elsewhere(place, rank);
}

inline void wait_for_turn(uint32_t warpgroup) {
  emulator::wait_at(emulator::turns[emulator::block() * 2 + warpgroup]);
}

inline void give_turn(uint32_t warpgroup) {
  emulator::arrive_at(emulator::turns[emulator::block() * 2 + warpgroup]);
}

inline void meet_consumers() {
  emulator::wait_at(emulator::consumer_barriers[emulator::block()]);
}

inline void meet_cluster() { emulator::wait_at(emulator::cluster_barrier); }

template <class Given>
inline void copy_box(Shared to, const Given& a, uint32_t input, uint32_t row,
                     Shared barrier) {
  constexpr uint32_t EACH = ROWS / CLUSTER;
  emulator::require_inputs("x is copied while an earlier launch may write it");
  std::vector<unsigned char> box(EACH * 128, 0);
  for (uint32_t m = 0; m < EACH && row + m < a.a.rows; m++)
    for (uint32_t piece = 0; piece < 8; piece++)
      memcpy(box.data() + m * 128 + (piece ^ (m & 7)) * 16,
             a.a.x + uint64_t(row + m) * a.a.in_features + input + piece * 8, 16);
  int own = CLUSTER > 1 ? 0 : emulator::block();
  for (int rank = own; rank < own + CLUSTER; rank++)
    emulator::start_copy(elsewhere(barrier, rank), {elsewhere(to, rank), box, EACH * 128}, 1024);
}

inline void begin_products() {}

inline void multiply_box(float (&sums)[ROWS / 8][4], const uint32_t (&a)[4],
                         Shared box, uint32_t sixteenth) {
  emulator::products[emulator::current].open.push_back({sums, a, box, sixteenth});
}

inline void close_products() {
  auto& own = emulator::products[emulator::current];
  own.groups.push_back(std::move(own.open));
  own.open.clear();
}

template <unsigned OPEN>
inline void wait_for_products() {
  using namespace emulator;
  int warp = current / 32 * 32, lane = current % 32;
  auto& own = products[current];
  while (own.groups.size() > OPEN) {
    wait_for_warp();
    for (size_t i = 0; i < own.groups.front().size(); i++) {
      auto& product = own.groups.front()[i];
      float left[2][16];
      for (int k = 0; k < 16; k++) {
        auto& other = products[warp + lane / 4 * 4 + k % 8 / 2].groups.front()[i];
        for (int h = 0; h < 2; h++) left[h][k] = half_of(other.a[h + k / 8 * 2], k % 2);
      }
      for (int n = 0; n < ROWS; n++) {
        if (n % 8 / 2 != lane % 4) continue;
        for (int k = 0; k < 16; k++) {
          int input = product.sixteenth * 16 + k;
          uint16_t bits;
          memcpy(&bits, product.box + n * 128 + ((input / 8) ^ (n & 7)) * 16 + input % 8 * 2, 2);
          float right = widen(bits);
          for (int h = 0; h < 2; h++)
            product.sums[n / 8][2 * h + n % 2] += left[h][k] * right;
        }
      }
    }
    wait_for_warp();
    own.groups.pop_front();
  }
}

inline void store_transposed(unsigned char* column, uint32_t m0, uint32_t m1, uint32_t m2,
                             uint32_t m3) {
  using namespace emulator;
  int warp = current / 32 * 32, lane = current % 32;
  transposed[current] = {{m0, m1, m2, m3}};
  wait_for_warp();
  int matrix = lane / 8, j = lane % 8;
  for (int k = 0; k < 8; k++) {
    uint16_t bits = transposed[warp + 4 * k + j / 2].pairs[matrix] >> 16 * (j % 2);
    memcpy(column + 2 * k, &bits, 2);
  }
  wait_for_warp();
}

inline void meet_warpgroup(uint32_t) {
  emulator::wait_at(emulator::warpgroup_barriers[emulator::current / 128]);
}

template <unsigned COUNT>
inline void take_registers() {}
template <unsigned COUNT>
inline void give_registers() {}

inline uint32_t multiply_pair(uint32_t left, uint32_t right) {
  using emulator::half_of;
  return narrow_pair(half_of(left, 0) * half_of(right, 0), half_of(left, 1) * half_of(right, 1));
}

inline uint32_t multiply_add_pair(uint32_t left, uint32_t right, uint32_t sum) {
  using emulator::half_of;
  return narrow_pair(std::fma(half_of(left, 0), half_of(right, 0), half_of(sum, 0)),
                     std::fma(half_of(left, 1), half_of(right, 1), half_of(sum, 1)));
}

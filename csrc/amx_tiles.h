// The tile registers of a thread.
#pragma once
#include <immintrin.h>

#include "numbers.h"
#include "rows.h"

namespace halfbyte {
namespace {

constexpr int64_t SIXTEEN = TILE * 4;  // bytes from one row of a tile to the next

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {0, 0, 0, 0, 0, 0, 16, 16};
};

// Tiles belong to a thread; others (torch's own products) configure them too.
struct Tiles {
  Tiles() { configure(TILE, TILE); }

  // Time goes with the rows of x and of the sums: of x in tile 4 and its sums in 0 and 1, of x in 5
  // and its sums in 2 and 3.
  void configure(int first, int second) {
    if (config.rows[4] == first && config.rows[5] == second) return;
    config.rows[0] = config.rows[1] = config.rows[4] = uint8_t(first);
    config.rows[2] = config.rows[3] = config.rows[5] = uint8_t(second);
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }

 private:
  TileConfig config;
};

// As store_block, quick where there is nothing special about it.
inline void store_channels(const Packed& w, const Target& target, int64_t row, int64_t block,
                           __m512 sums) {
  const int64_t first = block * LANES;
  if (target.bias || first + LANES > w.out_features || target.dtype == HB_FLOAT16) {
    return store_block(w, target, row, block, reinterpret_cast<const float*>(&sums));
  }
  const int64_t at = row * target.stride + first;
  if (target.dtype == HB_FLOAT32) {
    _mm512_storeu_ps(static_cast<float*>(target.out) + at, sums);
  } else {
    void* to = static_cast<uint16_t*>(target.out) + at;
    _mm256_storeu_si256(static_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(sums));
  }
}

}  // namespace
}  // namespace halfbyte

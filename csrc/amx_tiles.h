// Configuration and use of a thread's tile registers.
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

// Tile configuration is per thread, and other code (torch's products) changes it too.
struct Tiles {
  Tiles() { configure(TILE, TILE); }

  // Instruction time depends on the number of rows: x in tile 4 with sums in 0 and 1, x in 5 with
  // sums in 2 and 3.
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

// For few rows: x in tiles 4 and 5, weights of two blocks in 6 and 7, sums of block b in tiles b
// and 2 + b.
inline void begin_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// T is float or int32_t.
template <int TILES, int BLOCKS, class T>
inline void take_sums(T (*sums)[TILE * LANES]) {
  _tile_stored(0, sums[0], SIXTEEN);
  if (BLOCKS == 2) _tile_stored(1, sums[1], SIXTEEN);
  if (TILES == 2) _tile_stored(2, sums[2], SIXTEEN);
  if (TILES == 2 && BLOCKS == 2) _tile_stored(3, sums[3], SIXTEEN);
}

constexpr int64_t BYTES_AHEAD = 8192;

// Prefetches during the decoding of a step of BLOCKS blocks: codes ahead, or of the following
// blocks.
template <int BLOCKS, int64_t STEP_WORDS>
inline const uint32_t* codes_ahead(const Packed& w, const uint32_t* codes, int64_t step,
                                   int64_t steps) {
  const int64_t ahead = step + BYTES_AHEAD / (STEP_WORDS * 4 * BLOCKS);
  if (ahead < steps) return codes + ahead * STEP_WORDS;
  return codes + BLOCKS * w.block_words + (ahead - steps) * STEP_WORDS;
}

template <int64_t STEP_WORDS>
inline void fetch_step(const uint32_t* codes) {
  for (int64_t i = 0; i < STEP_WORDS; i += LANES) __builtin_prefetch(codes + i);
}

// As store_block, with a fast path for the common case.
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

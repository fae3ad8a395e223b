// The tile registers of a thread.
#pragma once
#include <immintrin.h>

#include "rows.h"

namespace halfbyte {
namespace {

constexpr int64_t SIXTEEN = TILE * 4;  // bytes from one row of a tile to the next

// Tiles of multiply_few; the compiler pastes their names into the assembler's.
#define SUMS 0
#define INPUT 1
#define WEIGHTS 2

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Tiles belong to a thread; others (torch's own products) configure them too.
struct Tiles {
  // Time goes with the rows of x and of the sums, so few rows configure no more.
  explicit Tiles(int rows) {
    TileConfig config;
    if (rows < TILE) config.rows[SUMS] = config.rows[INPUT] = uint8_t(rows);
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
};

}  // namespace
}  // namespace halfbyte

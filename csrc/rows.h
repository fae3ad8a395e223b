// Preparation of rows of x for a kernel.
#pragma once
#include "layout.h"

namespace halfbyte {

// Returns scratch memory that the thread keeps, 64-byte aligned, as decode steps must not allocate.
// Null if out of memory. Invalidated by the thread's next call.
float* borrow(int64_t floats);

// The same for the scores of an attention head, on the thread that computes it.
float* borrow_scores(int64_t floats);

// Floats of scratch that ready_rows needs.
int64_t scratch_floats(const Packed& w, int64_t rows);

// x: [rows, in] of `dtype`; used in place if it needs no preparation. If amx_few.h supports the
// weight, converted to tiles for few rows: [as many rows as fit or remain][step][row][part][32],
// each element as a sum of at most `most_parts` bf16 parts: 3 are exact, 2 round it to 17 bits. Out
// of memory, the result has no rows.
Rows ready_rows(const Packed& w, int dtype, const void* x, int64_t rows, float* scratch,
                int most_parts = 3);

// Whether x can be rounded to int8: the sums of a group fit 32 bits.
bool has_integers(const Packed& w);

// Rounds x, [rows, in] of `dtype`, to int8. Uses the scratch of ready_rows; no rows if out of
// memory.
Rows ready_integers(const Packed& w, int dtype, const void* x, int64_t rows, float* scratch);

// Returns the thread's aligned buffer for a stripe of dequantized weights (matrix units).
uint16_t* borrow_stripe(int64_t halves);

// Tiles of many bf16 rows for matrix units; tile_halves elements in total.
constexpr int TILE = 16;                  // rows of a tile
constexpr int STEP = 32;                  // columns of a tile
constexpr int TILE_HALVES = TILE * STEP;  // elements per tile
constexpr int CHUNK = 16;                 // steps stored together for all rows: 512 columns

// Offset of a tile among `row_tiles` x `steps`: chunk of columns by chunk, each with all rows, so
// that data that is multiplied together is contiguous.
inline int64_t place_of_tile(int64_t row_tile, int64_t step, int64_t row_tiles, int64_t steps) {
  const int64_t first = step / CHUNK * CHUNK;
  const int64_t wide = steps - first < CHUNK ? steps - first : CHUNK;
  return (first * row_tiles + row_tile * wide + step - first) * TILE_HALVES;
}

int64_t tile_halves(const Packed& w, int64_t rows);
Rows ready_tiles(const Packed& w, const uint16_t* x, int64_t rows, uint16_t* tiles, int threads);

}  // namespace halfbyte

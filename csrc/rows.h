// Rows of x on their way into a kernel.
#pragma once
#include "layout.h"

namespace halfbyte {

// Scratch that a thread keeps, 64-byte aligned: a call of a decode step must not allocate. Null
// where there is no memory. The next call of the same thread may move it.
float* borrow(int64_t floats);

// The same for the scores of an attention head, on whichever thread computes it.
float* borrow_scores(int64_t floats);

// Floats that ready_rows needs.
int64_t scratch_floats(const Packed& w, int64_t rows);

// x: [rows, in] of `dtype`; used where it is if it is ready already. Where amx_few.h takes the weight,
// in tiles for few rows: [as many rows as fit or are left][step][row][part][32], each number as the
// sum of at most `most_parts` in bf16: 3 are exact, 2 round it to 17 bits. Without memory, no rows.
Rows ready_rows(const Packed& w, int dtype, const void* x, int64_t rows, float* scratch,
                int most_parts = 3);

// Whether x can be whole numbers of 8 bits: no sum of a group leaves 32 bits.
bool has_integers(const Packed& w);

// x: [rows, in] of `dtype` as such numbers. The scratch is that of ready_rows; without memory, no rows.
Rows ready_integers(const Packed& w, int dtype, const void* x, int64_t rows, float* scratch);

// Where a matrix unit's file keeps a stripe of weights as numbers: aligned, kept by each thread.
uint16_t* borrow_stripe(int64_t halves);

// Many bf16 rows for matrix units, into tile_halves numbers.
constexpr int TILE = 16;                  // rows of a tile
constexpr int STEP = 32;                  // columns of a tile
constexpr int TILE_HALVES = TILE * STEP;  // its numbers
constexpr int CHUNK = 16;                 // steps of all rows that lie together: 512 columns

// Where a tile of rows begins among `row_tiles` of `steps` each: a chunk of columns after the other,
// in each all rows, so that what is multiplied together lies together.
inline int64_t place_of_tile(int64_t row_tile, int64_t step, int64_t row_tiles, int64_t steps) {
  const int64_t first = step / CHUNK * CHUNK;
  const int64_t wide = steps - first < CHUNK ? steps - first : CHUNK;
  return (first * row_tiles + row_tile * wide + step - first) * TILE_HALVES;
}

int64_t tile_halves(const Packed& w, int64_t rows);
Rows ready_tiles(const Packed& w, const uint16_t* x, int64_t rows, uint16_t* tiles, int threads);

}  // namespace halfbyte

// Several int8 rows on matrix units: 16 x 16 sums of 64 products per instruction.
//
// Two or more rows, with results bit-identical to integer_kernel.h: the products of a group are
// summed in integers, and groups are added in the same order. As in amx_few.h, decoding runs ahead
// of multiplication.
#pragma once
#include "amx_tiles.h"
#include "integer_kernel.h"

namespace halfbyte {
namespace {

constexpr int FEWEST_INTEGER_ROWS = 2;
constexpr int INTEGER_STEP = 64;  // columns of a tile
constexpr int TILE_BYTES = 1024;

// Decodes 64 columns of a block to a tile: four columns of a channel per lane.
template <int BITS>
inline void decode_quads(const uint32_t* codes, uint8_t* to) {
  const __m512i mask = _mm512_set1_epi32(int(Quads<BITS>::MASK));
#pragma GCC unroll 16
  for (int run = 0; run < INTEGER_STEP / Quads<BITS>::RUN; run++) {
    const __m512i words = _mm512_loadu_si512(codes + run * LANES);
#pragma GCC unroll 4
    for (int j = 0; j < Quads<BITS>::COUNT; j++, to += 4 * LANES) {
      _mm512_store_si512(to, _mm512_and_si512(_mm512_srli_epi32(words, unsigned(j * BITS)), mask));
    }
  }
}

template <int TILES, int BLOCKS>
inline void add_integers(const int8_t* const (&x)[2], int64_t stride,
                         const uint8_t (*weights)[TILE_BYTES]) {
  _tile_loadd(6, weights[0], SIXTEEN);
  _tile_loadd(4, x[0], stride);
  _tile_dpbsud(0, 4, 6);
  if (TILES == 2) {
    _tile_loadd(5, x[1], stride);
    _tile_dpbsud(2, 5, 6);
  }
  if (BLOCKS == 1) return;
  _tile_loadd(7, weights[1], SIXTEEN);
  _tile_dpbsud(1, 4, 7);
  if (TILES == 2) _tile_dpbsud(3, 5, 7);
}

template <int BITS, int TILES, int BLOCKS>
inline void add_integer_group(const Packed& w, const Rows& rows, int64_t row, int count,
                              int64_t block, int64_t g, const int32_t (*sums)[TILE * LANES],
                              Floats (*total)[TILES * TILE]) {
  for (int b = 0; b < BLOCKS; b++) {
    const int64_t at = ((block + b) * w.groups + g) * LANES;
    const Floats scale = load_scales(w, at);
    const Ints zero = load_zeros<BITS>(w, at);
    for (int t = 0; t < TILES; t++) {
      const int32_t* from = sums[2 * t + b];
      const int rest = count - t * TILE;
      for (int m = 0; m < TILE && m < rest; m++, from += LANES) {
        const int64_t of = (row + t * TILE + m) * w.groups + g;
        add_scaled(load<Ints>(from), zero, scale, rows.integers, of, &total[b][t * TILE + m]);
      }
    }
  }
}

template <int BITS, int TILES, int BLOCKS>
void multiply_integer_pass(const Packed& w, const Rows& rows, const Target& target, int64_t row,
                           int count, int64_t block) {
  constexpr int SLOTS = 4, LAG = 2;
  constexpr int64_t STEP_WORDS = INTEGER_STEP / Quads<BITS>::RUN * LANES;
  alignas(64) uint8_t weights[SLOTS][BLOCKS][TILE_BYTES];
  alignas(64) int32_t sums[2][4][TILE * LANES];
  Floats total[BLOCKS][TILES * TILE];
  for (int b = 0; b < BLOCKS; b++) {
    for (int m = 0; m < count; m++) total[b][m] = Floats{};
  }
  const int64_t columns = w.in_features, steps = columns / INTEGER_STEP;
  const int64_t group_steps = w.groups == 1 ? steps : w.group_size / INTEGER_STEP;
  const uint32_t* codes = w.codes + block * w.block_words;
  const int8_t* x[2];
  x[0] = rows.integers.codes + row * columns;
  x[1] = x[0] + (TILES == 2 ? TILE * columns : 0);
  int64_t left = group_steps, g = 0;
  begin_sums();
  for (int64_t step = 0; step < steps + LAG; step++) {
    if (step < steps) {
      const uint32_t* next = codes_ahead<BLOCKS, STEP_WORDS>(w, codes, step, steps);
#pragma GCC unroll 2
      for (int b = 0; b < BLOCKS; b++) {
        fetch_step<STEP_WORDS>(next + b * w.block_words);
        const uint32_t* from = codes + b * w.block_words + step * STEP_WORDS;
        decode_quads<BITS>(from, weights[step % SLOTS][b]);
      }
    }
    if (step < LAG) continue;
    add_integers<TILES, BLOCKS>(x, columns, weights[(step - LAG) % SLOTS]);
    x[0] += INTEGER_STEP;
    x[1] += INTEGER_STEP;
    // The last group may be shorter.
    if (--left && step < steps + LAG - 1) continue;
    take_sums<TILES, BLOCKS>(sums[g % 2]);
    if (g) {
      add_integer_group<BITS, TILES, BLOCKS>(w, rows, row, count, block, g - 1, sums[(g - 1) % 2],
                                             total);
    }
    begin_sums();
    left = group_steps;
    g++;
  }
  add_integer_group<BITS, TILES, BLOCKS>(w, rows, row, count, block, g - 1, sums[(g - 1) % 2],
                                         total);
  for (int b = 0; b < BLOCKS; b++) {
    for (int m = 0; m < count; m++) {
      store_channels(w, target, row + m, block + b, (__m512)total[b][m]);
    }
  }
}

template <int BITS>
void multiply_integer_tiles(const Packed& w, const Rows& rows, const Target& target, int64_t first,
                            int64_t last) {
  Tiles tiles;
  for (int64_t block = first; block < last;) {
    const bool wide = block + 2 <= last;
    for (int64_t row = 0; row < rows.rows; row += 2 * TILE) {
      const int64_t rest = rows.rows - row;
      const int count = int(rest < 2 * TILE ? rest : 2 * TILE);
      tiles.configure(count < TILE ? count : TILE, count > TILE ? count - TILE : 1);
      const auto multiply =
          count > TILE
              ? (wide ? multiply_integer_pass<BITS, 2, 2> : multiply_integer_pass<BITS, 2, 1>)
              : (wide ? multiply_integer_pass<BITS, 1, 2> : multiply_integer_pass<BITS, 1, 1>);
      multiply(w, rows, target, row, count, block);
    }
    block += wide ? 2 : 1;
  }
}

// Single rows, and groups that are not whole steps, use vectors.
void multiply_all_integers(const Packed& w, const Rows& rows, const Target& target, int64_t first,
                           int64_t last) {
  const bool whole = w.groups == 1 || w.group_size % INTEGER_STEP == 0;
  if (rows.rows < FEWEST_INTEGER_ROWS || !whole || w.in_features % INTEGER_STEP) {
    return multiply_integers(w, rows, target, first, last);
  }
  if (w.bits == 8) multiply_integer_tiles<8>(w, rows, target, first, last);
  if (w.bits == 4) multiply_integer_tiles<4>(w, rows, target, first, last);
  if (w.bits == 2) multiply_integer_tiles<2>(w, rows, target, first, last);
}

}  // namespace
}  // namespace halfbyte

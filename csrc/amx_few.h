// Few rows on matrix units, in any number format, with so little work per weight that memory
// bandwidth is the limit.
//
// A pair of codes becomes bf16 by two instructions: the bits are moved into the mantissa of 2^BITS,
// which gives exactly 2^BITS + code. The offset is subtracted through the sum of x in the group, as
// an asymmetric zero is (vector_kernel.h). A row of x is the sum of one, two or three bf16 parts
// (bfloat16, float16, float32), each a separate row for the matrix unit, so only the fp32 sums are
// rounded. An infinite x gives NaN, as there, and so does one above 3.39e38.
#pragma once
#include "amx_tiles.h"
#include "numbers.h"

namespace halfbyte {
namespace {

template <int BITS>
struct Few {
  static constexpr int RUN = 32 / BITS, PAIRS = RUN / 2, RUNS = STEP / RUN;
  static constexpr int UP = 7 - BITS;  // shift to the highest bits of the mantissa
  static constexpr uint32_t MASK = (((1u << BITS) - 1) << UP) * 0x10001u;
  static constexpr uint32_t POWER = uint32_t(127 + BITS) << 7;
  static constexpr float BIAS = float((1 << BITS) + (1 << (BITS - 1)));

  // Decodes a step of a block to a tile: pairs of columns j and j + PAIRS of a run.
  static inline void decode(const uint32_t* codes, uint16_t* to) {
    const __m512i mask = _mm512_set1_epi32(int(MASK));
    const __m512i power = _mm512_set1_epi32(int(POWER * 0x10001u));
#pragma GCC unroll 4
    for (int run = 0; run < RUNS; run++) {
      const __m512i words = _mm512_loadu_si512(codes + run * LANES);
#pragma GCC unroll 8
      for (int j = 0; j < PAIRS; j++, to += 2 * LANES) {
        const int down = j * BITS - UP;
        const __m512i moved =
            down < 0 ? _mm512_slli_epi32(words, unsigned(-down)) : _mm512_srli_epi32(words, unsigned(down));
        _mm512_store_si512(to, _mm512_ternarylogic_epi32(moved, mask, power, 0xEA));  // a & b | c
      }
    }
  }

  // Order of 32 columns of x that matches these pairs.
  static inline __m512i paired_order() {
    alignas(64) uint16_t order[STEP];
    for (int i = 0; i < STEP; i++) order[i] = uint16_t(i / RUN * RUN + i % RUN / 2 + i % 2 * PAIRS);
    return _mm512_load_si512(order);
  }
};

// Splits a row of float32, or of bfloat16 if HALF, in packed order into `parts` rows of each step's
// tile, steps `stride` elements apart, and computes the sums of its groups.
template <int BITS, bool HALF>
void split_row_bits(const Packed& w, const void* x, int parts, uint16_t* tiles, int64_t stride,
                    float* sums) {
  const __m512i order = Few<BITS>::paired_order();
  int64_t k = 0;
  for (int64_t g = 0; g < w.groups; g++) {
    const int64_t end = group_end(w, k);
    Floats sum = {};
    for (; k < end; k += STEP, tiles += stride) {
      Floats low = load_numbers<HALF>(x, k), high = load_numbers<HALF>(x, k + LANES);
      sum += low + high;
      for (int part = 0; part < parts; part++) {
        const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
        _mm512_storeu_si512(tiles + part * STEP, _mm512_permutexvar_epi16(order, halves));
        low -= (Floats)(widen((Halves)_mm512_castsi512_si256(halves)) << 16);
        high -= (Floats)(widen((Halves)_mm512_extracti64x4_epi64(halves, 1)) << 16);
      }
    }
    sums[g] = _mm512_reduce_add_ps((__m512)sum);
  }
}

void split_row(const Packed& w, int dtype, const void* x, int parts, uint16_t* tiles,
               int64_t stride, float* sums) {
  const bool half = dtype == HB_BFLOAT16;
  const auto split = w.bits == 4 ? (half ? split_row_bits<4, true> : split_row_bits<4, false>)
                                 : (half ? split_row_bits<2, true> : split_row_bits<2, false>);
  split(w, x, parts, tiles, stride, sums);
}

// Rows processed in one pass over the weights: one or two tiles.
struct Pass {
  int64_t row;
  int rows[2];
  int parts;
};

template <int TILES, int BLOCKS>
inline void add_products(const uint16_t* const (&x)[2], const uint16_t (*weights)[TILE_HALVES]) {
  _tile_loadd(6, weights[0], SIXTEEN);
  _tile_loadd(4, x[0], SIXTEEN);
  _tile_dpbf16ps(0, 4, 6);
  if (TILES == 2) {
    _tile_loadd(5, x[1], SIXTEEN);
    _tile_dpbf16ps(2, 5, 6);
  }
  if (BLOCKS == 1) return;
  _tile_loadd(7, weights[1], SIXTEEN);
  _tile_dpbf16ps(1, 4, 7);
  if (TILES == 2) _tile_dpbf16ps(3, 5, 7);
}

// Scales the sums of a group and adds them to those of the previous groups.
template <int BITS, int TILES, int BLOCKS>
inline void add_group(const Packed& w, const Rows& rows, const Pass& pass, int64_t block, int64_t g,
                      float (*sums)[TILE * LANES], Floats (*total)[TILES * TILE]) {
  for (int b = 0; b < BLOCKS; b++) {
    const int64_t at = ((block + b) * w.groups + g) * LANES;
    const Floats scale = load_scales(w, at);
    const Floats zero = w.symmetric ? Floats{} : load_offsets(w, at);
    const Floats offset = zero - Few<BITS>::BIAS;
    const float* x = rows.sums + pass.row * w.groups + g;
    Floats* to = total[b];
    for (int t = 0; t < TILES; t++) {
      const float* from = sums[2 * t + b];
      for (int m = 0; m < pass.rows[t]; m++, x += w.groups, to++) {
        Floats sum = load<Floats>(from);
        from += LANES;
        for (int part = 1; part < pass.parts; part++, from += LANES) sum += load<Floats>(from);
        *to += scale * (sum + offset * *x);
      }
    }
  }
}

// Decoding runs LAG steps ahead of multiplication without a pause in either, so that memory is
// always busy.
template <int BITS, int TILES, int BLOCKS>
void multiply_pass(const Packed& w, const Rows& rows, const Target& target, const Pass& pass,
                   int64_t block) {
  // A tile cannot be loaded while its rows are being stored; more buffers would exceed the L1
  // cache.
  constexpr int SLOTS = 4, LAG = 2;
  constexpr int64_t STEP_WORDS = Few<BITS>::RUNS * LANES;
  alignas(64) uint16_t weights[SLOTS][BLOCKS][TILE_HALVES];
  alignas(64) float sums[2][4][TILE * LANES];
  Floats total[BLOCKS][TILES * TILE];
  for (int b = 0; b < BLOCKS; b++) {
    for (int m = 0; m < pass.rows[0] + pass.rows[1]; m++) total[b][m] = Floats{};
  }
  const int64_t steps = w.in_features / STEP, columns = w.in_features;
  const int64_t group_steps = w.groups == 1 ? steps : w.group_size / STEP;
  const uint32_t* codes = w.codes + block * w.block_words;
  const uint16_t* x[2];
  x[0] = rows.tiles + pass.row * pass.parts * columns;
  x[1] = x[0] + pass.rows[0] * pass.parts * columns;
  int64_t left = group_steps, g = 0;
  begin_sums();
  for (int64_t step = 0; step < steps + LAG; step++) {
    if (step < steps) {
      const uint32_t* next = codes_ahead<BLOCKS, STEP_WORDS>(w, codes, step, steps);
#pragma GCC unroll 2
      for (int b = 0; b < BLOCKS; b++) {
        fetch_step<STEP_WORDS>(next + b * w.block_words);
        Few<BITS>::decode(codes + b * w.block_words + step * STEP_WORDS, weights[step % SLOTS][b]);
      }
    }
    if (step < LAG) continue;
    add_products<TILES, BLOCKS>(x, weights[(step - LAG) % SLOTS]);
    x[0] += pass.rows[0] * pass.parts * STEP;
    x[1] += pass.rows[1] * pass.parts * STEP;
    if (--left && step < steps + LAG - 1) continue;
    take_sums<TILES, BLOCKS>(sums[g % 2]);
    // Scale the previous group, because the sums of this one are still being computed.
    if (g) add_group<BITS, TILES, BLOCKS>(w, rows, pass, block, g - 1, sums[(g - 1) % 2], total);
    begin_sums();
    left = group_steps;
    g++;
  }
  add_group<BITS, TILES, BLOCKS>(w, rows, pass, block, g - 1, sums[(g - 1) % 2], total);
  for (int b = 0; b < BLOCKS; b++) {
    for (int m = 0; m < pass.rows[0] + pass.rows[1]; m++) {
      store_channels(w, target, pass.row + m, block + b, (__m512)total[b][m]);
    }
  }
}

// Processes as many rows as two tiles hold at a time; further passes find the blocks in the cache.
template <int BITS>
void multiply_few(const Packed& w, const Rows& rows, const Target& target, int64_t first,
                  int64_t last) {
  const int each = TILE / rows.parts;
  const int64_t passes = (rows.rows + 2 * each - 1) / (2 * each);
  Tiles tiles;
  for (int64_t block = first; block < last;) {
    const int together = block + 2 <= last ? 2 : 1;
    for (int64_t p = 0; p < passes; p++) {
      Pass pass = {p * 2 * each, {}, rows.parts};
      const int64_t rest = rows.rows - pass.row;
      pass.rows[0] = int(rest < each ? rest : each);
      pass.rows[1] = int(rest < each ? 0 : rest < 2 * each ? rest - each : each);
      const bool wide = together == 2;
      tiles.configure(pass.rows[0] * pass.parts, (pass.rows[1] ? pass.rows[1] : 1) * pass.parts);
      const auto multiply =
          pass.rows[1] ? (wide ? multiply_pass<BITS, 2, 2> : multiply_pass<BITS, 2, 1>)
                       : (wide ? multiply_pass<BITS, 1, 2> : multiply_pass<BITS, 1, 1>);
      multiply(w, rows, target, pass, block);
    }
    block += together;
  }
}

void multiply(const Packed& w, const Rows& rows, const Target& target, int64_t first,
              int64_t last) {
  if (!rows.parts) return multiply_floats(w, rows, target, first, last);
  if (w.bits == 4) return multiply_few<4>(w, rows, target, first, last);
  return multiply_few<2>(w, rows, target, first, last);
}

}  // namespace
}  // namespace halfbyte

// AMX with bfloat16: 16 x 16 sums of 32 products per instruction.
//
// Few rows: amx_few.h. Many rows: the weight is rounded once to bf16, 512 columns of 32 channels at
// a time, which stay in the L1 cache while all rows are multiplied by them. Everything else is as
// in avx512.cpp. AMX treats subnormal numbers as zero.
#include <immintrin.h>

#define VECTOR 16
#define MAX_SHARED_ROWS 8
#define PREFETCH_WORDS 2048  // 8 KiB ahead: 2 KiB lose 10% of the bandwidth
#define HAS_DECODE
#define HAS_DOT
#define HAS_STORE

#include "avx512_decode.h"

typedef __m512i IntVector;

namespace halfbyte {
namespace {

// Every CPU with AMX has this (VNNI).
template <int BITS>
inline __m512i dot(__m512i acc, __m512i codes, int32_t x) {
  return _mm512_dpbusd_epi32(acc, codes, _mm512_set1_epi32(x));
}

}  // namespace
}  // namespace halfbyte

#include "amx_attention.h"
#include "amx_few.h"
#include "amx_integers.h"

namespace halfbyte {
namespace {

constexpr int64_t SUMS_BYTES = 1 << 22;  // these come from a farther cache than the rows

// Decodes the columns of a chunk of a block to bf16 tiles `stride` elements apart: [pair of
// columns][channel][2].
template <int BITS>
void fill_tiles(const Packed& w, int64_t block, int64_t first, int64_t last, uint16_t* out) {
  constexpr int RUN = BITS == 3 ? 32 : 32 / BITS, WORDS = BITS == 3 ? 3 : 1;
  alignas(64) uint16_t sides[32];
  for (int i = 0; i < 32; i++) sides[i] = uint16_t(i / 2 + i % 2 * 16);
  const __m512i side_by_side = _mm512_load_si512(sides);
  const uint32_t* codes = w.codes + block * w.block_words + first / RUN * WORDS * LANES;
  for (int64_t k = first; k < last;) {
    const int64_t g = k / w.group_size, rest = (g + 1) * w.group_size;
    const int64_t end = rest < last ? rest : last;
    const int64_t at = (block * w.groups + g) * LANES;
    const Floats scale = load_scales(w, at);
    const Floats offset = w.symmetric ? Floats{} : load_offsets(w, at);
    for (; k < end; k += RUN, codes += WORDS * LANES) {
      // Prefetch the block that this thread decodes next.
      for (int i = 0; i < WORDS; i++) __builtin_prefetch(codes + 2 * w.block_words + i * LANES);
      Words words[WORDS];
      for (int i = 0; i < WORDS; i++) words[i] = load<Words>(codes + i * LANES);
      uint16_t* to = out + (k - first) / STEP * 2 * TILE_HALVES + k % STEP * LANES;
#pragma GCC unroll 16
      for (int j = 0; j < RUN; j += 2, to += 2 * LANES) {
        const Floats low = (number<BITS>(shift_down<BITS, WORDS>(words, j)) + offset) * scale;
        const Floats high = (number<BITS>(shift_down<BITS, WORDS>(words, j + 1)) + offset) * scale;
        const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
        _mm512_store_si512(to, _mm512_permutexvar_epi16(side_by_side, halves));
      }
    }
  }
}

void fill_tiles(const Packed& w, int64_t block, int64_t first, int64_t last, uint16_t* out) {
  if (w.bits == 4) fill_tiles<4>(w, block, first, last, out);
  if (w.bits == 8) fill_tiles<8>(w, block, first, last, out);
  if (w.bits == 3) fill_tiles<3>(w, block, first, last, out);
  if (w.bits == 2) fill_tiles<2>(w, block, first, last, out);
}

// The same for two adjacent blocks; zero-padded to whole steps after the last column.
void fill_pair(const Packed& w, int64_t block, int64_t step, int64_t steps, uint16_t* out) {
  const int64_t first = step * STEP;
  const int64_t last = first + steps * STEP < w.in_features ? first + steps * STEP : w.in_features;
  if ((last - first) % STEP) {
    __builtin_memset(out + (steps - 1) * 2 * TILE_HALVES, 0, 4 * TILE_HALVES);
  }
  for (int side = 0; side < 2 && block + side < w.blocks; side++) {
    fill_tiles(w, block + side, first, last, out + side * TILE_HALVES);
  }
}

// Stores the sums of up to 32 rows of two blocks from four tiles.
void store_sums(const Packed& w, const Target& target, int64_t row, int64_t rows, int64_t block,
                const float* sums) {
  for (int64_t m = 0; m < rows && m < 2 * TILE; m++) {
    for (int side = 0; side < 2 && block + side < w.blocks; side++) {
      const float* from = sums + (m / TILE * 2 + side) * TILE * LANES + m % TILE * LANES;
      store_channels(w, target, row + m, block + side, _mm512_load_ps(from));
    }
  }
}

void fetch_target(const Target& target, int64_t row, int64_t rows, int64_t block) {
  const int64_t each = target.dtype == HB_FLOAT32 ? 4 : 2;
  for (int64_t m = row; m < rows && m < row + 2 * TILE; m++) {
    const char* to = static_cast<char*>(target.out) + (m * target.stride + block * LANES) * each;
    __builtin_prefetch(to, 1);
    if (each == 4) __builtin_prefetch(to + 64, 1);
  }
}

constexpr int64_t SUMS_OF_PANEL = 4 * TILE * LANES;
constexpr int64_t NEXT_BYTES = SUMS_OF_PANEL * 4 / CHUNK;

// Adds the products of up to 32 rows and two blocks over the columns of a chunk to four tiles of
// sums.
void multiply_panel(const uint16_t* x, const uint16_t* weights, int64_t steps, bool first,
                    float* sums) {
  const uint16_t* below = x + steps * TILE_HALVES;
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums, SIXTEEN);
    _tile_loadd(1, sums + TILE * LANES, SIXTEEN);
    _tile_loadd(2, sums + 2 * TILE * LANES, SIXTEEN);
    _tile_loadd(3, sums + 3 * TILE * LANES, SIXTEEN);
  }
  for (int64_t step = 0; step < steps; step++, weights += 2 * TILE_HALVES) {
    const char* next = reinterpret_cast<const char*>(sums + SUMS_OF_PANEL) + step * NEXT_BYTES;
    for (int64_t i = 0; i < NEXT_BYTES; i += 64) __builtin_prefetch(next + i, 1);
    _tile_stream_loadd(4, x + step * TILE_HALVES, SIXTEEN);
    _tile_loadd(6, weights, SIXTEEN);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, weights + TILE_HALVES, SIXTEEN);
    _tile_dpbf16ps(1, 4, 7);
    _tile_stream_loadd(5, below + step * TILE_HALVES, SIXTEEN);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, SIXTEEN);
  _tile_stored(1, sums + TILE * LANES, SIXTEEN);
  _tile_stored(2, sums + 2 * TILE * LANES, SIXTEEN);
  _tile_stored(3, sums + 3 * TILE * LANES, SIXTEEN);
}

// Decodes a chunk of columns of two blocks into the L1 cache and multiplies all rows by it. For
// some pairs of blocks at a time, sums and a chunk of all rows stay in the L2 cache between chunks.
void multiply_many(const Packed& w, const Rows& rows, const Target& target, int64_t first,
                   int64_t last) {
  const int64_t steps = (w.in_features + STEP - 1) / STEP;
  const int64_t panels = (rows.rows + 2 * TILE - 1) / (2 * TILE);
  const int64_t pair_sums = panels * SUMS_OF_PANEL, most = SUMS_BYTES / 4 / pair_sums;
  const int64_t pairs = most > 1 ? most : 1;
  float* sums = reinterpret_cast<float*>(borrow_stripe(pairs * pair_sums * 2));
  alignas(64) uint16_t weights[CHUNK * 2 * TILE_HALVES];
  const Tiles tiles;
  for (int64_t start = first; start < last; start += 2 * pairs) {
    const int64_t end = start + 2 * pairs < last ? start + 2 * pairs : last;
    for (int64_t step = 0; step < steps; step += CHUNK) {
      const int64_t wide = steps - step < CHUNK ? steps - step : CHUNK;
      const uint16_t* chunk = rows.tiles + place_of_tile(0, step, 2 * panels, steps);
      float* to = sums;
      for (int64_t block = start; block < end; block += 2) {
        fill_pair(w, block, step, wide, weights);
        for (int64_t panel = 0; panel < panels; panel++, to += SUMS_OF_PANEL) {
          if (step + wide == steps) fetch_target(target, panel * 2 * TILE, rows.rows, block);
          multiply_panel(chunk + panel * 2 * wide * TILE_HALVES, weights, wide, step == 0, to);
          if (step + wide < steps) continue;
          const int64_t row = panel * 2 * TILE;
          store_sums(w, target, row, rows.rows - row, block, to);
        }
      }
    }
  }
}

// Converts rows [first, last) of x, padded to whole tiles, as ready_tiles does for bf16.
void round_rows(const Packed& w, const float* x, int64_t rows, uint16_t* tiles, int64_t first,
                int64_t last) {
  const int64_t columns = w.in_features, steps = (columns + STEP - 1) / STEP;
  const int64_t row_tiles = (rows + 2 * TILE - 1) / (2 * TILE) * 2;
  for (int64_t row = first; row < last; row++) {
    const float* from = x + row * columns;
    for (int64_t step = 0; step < steps; step++) {
      uint16_t* to = tiles + place_of_tile(row / TILE, step, row_tiles, steps) + row % TILE * STEP;
      const int64_t k = step * STEP;
      if (row >= rows) {
        __builtin_memset(to, 0, STEP * 2);
      } else if (!w.order && k + STEP <= columns) {
        const __m512 low = _mm512_loadu_ps(from + k), high = _mm512_loadu_ps(from + k + LANES);
        _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high, low));
      } else {
        for (int64_t i = 0; i < STEP; i++) {
          to[i] = k + i < columns ? to_bf16(from[w.order ? w.order[k + i] : k + i]) : 0;
        }
      }
    }
  }
}

}  // namespace

const Isa AMX = {"amx",     multiply,          dequantize_floats, multiply_dense, attend,        gate_silu,
                 round_row, multiply_all_integers, split_row,         round_rows,     multiply_many, attend_tiles};

}  // namespace halfbyte

// Attention of a prompt on matrix units, included by amx.cpp.
//
// Transposed: scores [keys][queries] = keys . queries, outputs [width][queries] = values . weights,
// so that a lane is a query and nothing is summed across lanes. Processes BLOCK keys at a time and
// carries the maximum score, the sum of weights and the outputs (Dao et al. 2022, "FlashAttention",
// https://arxiv.org/abs/2205.14135). Queries, keys, values and attention weights are bf16; scores,
// sums and outputs are fp32. A query's result does not depend on the other queries.
#pragma once
#include "amx_tiles.h"
#include "vector_attention.h"

namespace halfbyte {
namespace {

constexpr int64_t BLOCK = 128;  // keys at a time
constexpr float LEAST = -1e38f;

// Transposes 16 x 16 values of 32 bits.
inline void transpose(__m512i (&rows)[16]) {
  __m512i turned[16];
  for (int i = 0; i < 16; i += 2) {
    turned[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    turned[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    rows[i] = _mm512_unpacklo_epi64(turned[i], turned[i + 2]);
    rows[i + 1] = _mm512_unpackhi_epi64(turned[i], turned[i + 2]);
    rows[i + 2] = _mm512_unpacklo_epi64(turned[i + 1], turned[i + 3]);
    rows[i + 3] = _mm512_unpackhi_epi64(turned[i + 1], turned[i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    turned[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
    turned[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
    turned[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
    turned[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; i++) {
    rows[i] = _mm512_shuffle_i32x4(turned[i], turned[i + 8], 0x88);
    rows[i + 8] = _mm512_shuffle_i32x4(turned[i], turned[i + 8], 0xdd);
  }
}

// 2^x for x <= 0 with relative error 3e-6, by a polynomial of the fractional part.
inline __m512 power_of_two(__m512 x) {
  const __m512 part = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 value = _mm512_set1_ps(1.342669e-2f);
  value = _mm512_fmadd_ps(value, part, _mm512_set1_ps(5.224247e-2f));
  value = _mm512_fmadd_ps(value, part, _mm512_set1_ps(2.4128021e-1f));
  value = _mm512_fmadd_ps(value, part, _mm512_set1_ps(6.9304484e-1f));
  value = _mm512_fmadd_ps(value, part, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(value, x);
}

// The buffers of one attention task, in a single scratch allocation. Queries of a head are in tiles
// of 16 rows, one head after another, two tiles at a time.
struct TiledAttention {
  const Attention& a;
  int64_t row_tiles, tiles, steps;  // steps: of 32 elements of the width, zero-padded
  uint16_t *queries, *keys, *values, *shares;
  float *scores, *largest, *sums, *outputs;

  explicit TiledAttention(const Attention& attention) : a(attention) {
    row_tiles = (a.rows + TILE - 1) / TILE;
    tiles = (a.heads * row_tiles + 1) / 2 * 2;
    steps = (a.width + STEP - 1) / STEP;
    const int64_t query_floats = tiles * steps * TILE_HALVES / 2;
    const int64_t block_floats = BLOCK * steps * STEP / 2, output_floats = tiles * steps * 512;
    const int64_t all = query_floats + 2 * block_floats + 2 * BLOCK * LANES + BLOCK * LANES +
                        2 * tiles * LANES + output_floats;
    float* at = borrow_scores(all);
    const auto take = [&](int64_t floats) {
      float* const taken = at;
      if (at) at += floats;
      return taken;
    };
    queries = reinterpret_cast<uint16_t*>(take(query_floats));
    keys = reinterpret_cast<uint16_t*>(take(block_floats));
    values = reinterpret_cast<uint16_t*>(take(block_floats));
    scores = take(2 * BLOCK * LANES);
    shares = reinterpret_cast<uint16_t*>(take(BLOCK * LANES));
    largest = take(tiles * LANES);
    sums = take(tiles * LANES);
    outputs = take(output_floats);
  }

  // Number of positions visible to the query in a lane of a tile; 0: no query.
  int64_t length_of(int64_t tile, int lane) const {
    const int64_t row = tile % row_tiles * TILE + lane;
    return tile < a.heads * row_tiles && row < a.rows ? a.length_of(int(row)) : 0;
  }

  int64_t query_at(int64_t tile, int lane) const {
    return (tile % row_tiles * TILE + lane) * a.row_stride + tile / row_tiles * a.width;
  }

  void start() const {
    for (int64_t tile = 0; tile < tiles; tile++) {
      for (int64_t step = 0; step < steps; step++) {
        __m512i rows[16];
        for (int lane = 0; lane < 16; lane++) {
          rows[lane] = __m512i{};
          if (!length_of(tile, lane)) continue;
          const float* from = a.query + query_at(tile, lane) + step * STEP;
          const __m512 low = _mm512_loadu_ps(from);
          const bool whole = step * STEP + LANES < a.width;
          const __m512 high = whole ? _mm512_loadu_ps(from + LANES) : __m512{};
          rows[lane] = (__m512i)_mm512_cvtne2ps_pbh(high, low);
        }
        transpose(rows);
        uint16_t* to = queries + (tile * steps + step) * TILE_HALVES;
        for (int i = 0; i < 16; i++) _mm512_store_si512(to + i * STEP, rows[i]);
      }
      store(largest + tile * LANES, Floats{} + LEAST);
      store(sums + tile * LANES, Floats{});
    }
    __builtin_memset(outputs, 0, size_t(tiles * steps) * 512 * 4);
  }

  // Copies keys and transposes values: `count` of them from position t on, then zeros.
  void load_block(int64_t t, int64_t count) const {
    int64_t places[BLOCK];
    for (int64_t key = 0; key < count; key++) {
      const int64_t at = t + key;
      places[key] = a.table[at / a.page_tokens] * a.page_stride + at % a.page_tokens * a.width;
    }
    const uint16_t* all_keys = static_cast<const uint16_t*>(a.keys);
    const uint16_t* all_values = static_cast<const uint16_t*>(a.values);
    const auto halves = [&](const uint16_t* from, int64_t key, int64_t i) {
      if (key >= count || i >= a.width) return __m256i{};
      return _mm256_loadu_si256((const __m256i*)(from + places[key] + i));
    };
    const int64_t whole = (count + STEP - 1) / STEP * STEP;
    for (int64_t key = 0; key < whole; key++) {
      uint16_t* to = keys + (key / TILE * steps * TILE + key % TILE) * STEP;
      for (int64_t i = 0; i < steps * STEP; i += LANES) {
        _mm256_store_si256((__m256i*)(to + i / STEP * TILE_HALVES + i % STEP),
                           halves(all_keys, key, i));
      }
    }
    for (int64_t first = 0; first < whole; first += STEP) {
      for (int64_t i = 0; i < steps * STEP; i += LANES) {
        __m512i pairs[16];
        for (int j = 0; j < 16; j++) {
          const __m512i one = _mm512_cvtepu16_epi32(halves(all_values, first + 2 * j, i));
          const __m512i two = _mm512_cvtepu16_epi32(halves(all_values, first + 2 * j + 1, i));
          pairs[j] = _mm512_or_si512(one, _mm512_slli_epi32(two, 16));
        }
        transpose(pairs);
        uint16_t* to = values + (i / LANES * (BLOCK / STEP) + first / STEP) * TILE_HALVES;
        for (int j = 0; j < 16; j++) _mm512_store_si512(to + j * STEP, pairs[j]);
      }
    }
  }

  // Computes the scores of two tiles of queries: [tile][key][query].
  void score(int64_t tile, int64_t key_steps) const {
    const uint16_t* query = queries + tile * steps * TILE_HALVES;
    for (int64_t pair = 0; pair < key_steps; pair++) {
      const uint16_t* key = keys + pair * 2 * steps * TILE_HALVES;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t step = 0; step < steps; step++) {
        _tile_loadd(4, key + step * TILE_HALVES, SIXTEEN);
        _tile_loadd(6, query + step * TILE_HALVES, SIXTEEN);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, query + (steps + step) * TILE_HALVES, SIXTEEN);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, key + (steps + step) * TILE_HALVES, SIXTEEN);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      float* to = scores + pair * STEP * LANES;
      _tile_stored(0, to, SIXTEEN);
      _tile_stored(1, to + BLOCK * LANES, SIXTEEN);
      _tile_stored(2, to + TILE * LANES, SIXTEEN);
      _tile_stored(3, to + (BLOCK + TILE) * LANES, SIXTEEN);
    }
  }

  // Converts the scores of a tile to attention weights in the order of the second AMX operand, and
  // rescales earlier results if a larger score was found. Lanes see the first `length` keys.
  template <bool MASKED>
  void share(int64_t tile, int64_t key_steps, __m512i length) const {
    float* from = scores + tile % 2 * BLOCK * LANES;
    const int64_t count = key_steps * STEP;
    __m512 found[2] = {_mm512_set1_ps(LEAST), _mm512_set1_ps(LEAST)};
    for (int64_t key = 0; key < count; key += 2) {
      for (int i = 0; i < 2; i++) {
        __m512 score = _mm512_load_ps(from + (key + i) * LANES);
        if (MASKED) {
          const __mmask16 seen = _mm512_cmpgt_epi32_mask(length, _mm512_set1_epi32(int(key + i)));
          score = _mm512_mask_blend_ps(seen, _mm512_set1_ps(LEAST), score);
          _mm512_store_ps(from + (key + i) * LANES, score);
        }
        found[i] = _mm512_max_ps(found[i], score);
      }
    }
    const __m512 before = _mm512_load_ps(largest + tile * LANES);
    const __m512 now = _mm512_max_ps(before, _mm512_max_ps(found[0], found[1]));
    const __m512 turns = _mm512_set1_ps(a.scale * 1.44269504f);
    const __m512 base = _mm512_mul_ps(now, turns);
    alignas(64) uint16_t sides[32];
    for (int i = 0; i < 32; i++) sides[i] = uint16_t(i / 2 + i % 2 * 16);
    const __m512i side_by_side = _mm512_load_si512(sides);
    uint16_t* to = shares + tile % 2 * BLOCK * LANES;
    __m512 total[2] = {};
    for (int64_t key = 0; key < count; key += 2, to += 2 * LANES) {
      __m512 share[2];
      for (int i = 0; i < 2; i++) {
        const __m512 score = _mm512_load_ps(from + (key + i) * LANES);
        share[i] = power_of_two(_mm512_fmsub_ps(score, turns, base));
        total[i] = _mm512_add_ps(total[i], share[i]);
      }
      const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(share[1], share[0]);
      _mm512_store_si512(to, _mm512_permutexvar_epi16(side_by_side, halves));
    }
    const __m512 sum = _mm512_add_ps(total[0], total[1]);
    const __m512 old = _mm512_load_ps(sums + tile * LANES);
    // Exactly 1 if no larger score was found, as other queries decide whether rescaling happens.
    const __m512 factor = power_of_two(_mm512_mul_ps(_mm512_sub_ps(before, now), turns));
    _mm512_store_ps(sums + tile * LANES, _mm512_fmadd_ps(old, factor, sum));
    if (!_mm512_cmp_ps_mask(now, before, _CMP_NEQ_UQ)) return;
    _mm512_store_ps(largest + tile * LANES, now);
    float* out = outputs + tile * steps * STEP * LANES;
    for (int64_t i = 0; i < steps * STEP; i++, out += LANES) {
      _mm512_store_ps(out, _mm512_mul_ps(_mm512_load_ps(out), factor));
    }
  }

  // Adds the weighted values for two tiles of queries.
  void add_values(int64_t tile, int64_t key_steps) const {
    float* one = outputs + tile * steps * STEP * LANES;
    float* two = one + steps * STEP * LANES;
    const uint16_t* share = shares;
    constexpr int64_t NEXT = BLOCK / STEP * TILE_HALVES;
    for (int64_t i = 0; i < steps; i++, one += STEP * LANES, two += STEP * LANES) {
      const uint16_t* value = values + i * 2 * NEXT;
      _tile_loadd(0, one, SIXTEEN);
      _tile_loadd(1, two, SIXTEEN);
      _tile_loadd(2, one + TILE * LANES, SIXTEEN);
      _tile_loadd(3, two + TILE * LANES, SIXTEEN);
      for (int64_t step = 0; step < key_steps; step++) {
        _tile_loadd(4, value + step * TILE_HALVES, SIXTEEN);
        _tile_loadd(6, share + step * TILE_HALVES, SIXTEEN);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, share + NEXT + step * TILE_HALVES, SIXTEEN);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, value + NEXT + step * TILE_HALVES, SIXTEEN);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, one, SIXTEEN);
      _tile_stored(1, two, SIXTEEN);
      _tile_stored(2, one + TILE * LANES, SIXTEEN);
      _tile_stored(3, two + TILE * LANES, SIXTEEN);
    }
  }

  void attend_block(int64_t t, int64_t count) const {
    for (int64_t tile = 0; tile < tiles; tile += 2) {
      int64_t seen = 0;
      for (int side = 0; side < 2; side++) {
        for (int lane = 0; lane < 16; lane++) {
          const int64_t length = length_of(tile + side, lane);
          if (length > seen) seen = length;
        }
      }
      if (seen <= t) continue;
      const int64_t rest = seen - t < count ? seen - t : count;
      const int64_t key_steps = (rest + STEP - 1) / STEP;
      score(tile, key_steps);
      for (int side = 0; side < 2; side++) {
        alignas(64) int32_t lengths[16];
        bool whole = true;
        for (int lane = 0; lane < 16; lane++) {
          const int64_t length = length_of(tile + side, lane) - t;
          whole = whole && length >= key_steps * STEP;
          lengths[lane] = int32_t(length < BLOCK ? length : BLOCK);
        }
        const __m512i length = _mm512_load_si512(lengths);
        if (whole) share<false>(tile + side, key_steps, length);
        else share<true>(tile + side, key_steps, length);
      }
      add_values(tile, key_steps);
    }
  }

  void finish() const {
    for (int64_t tile = 0; tile < a.heads * row_tiles; tile++) {
      const __m512 each = _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_load_ps(sums + tile * LANES));
      for (int64_t i = 0; i < a.width; i += LANES) {
        const float* from = outputs + (tile * steps * STEP + i) * LANES;
        __m512i rows[16];
        for (int j = 0; j < 16; j++) {
          rows[j] = (__m512i)_mm512_mul_ps(_mm512_load_ps(from + j * LANES), each);
        }
        transpose(rows);
        for (int lane = 0; lane < 16 && length_of(tile, lane); lane++) {
          _mm512_storeu_ps(a.out + query_at(tile, lane) + i, (__m512)rows[lane]);
        }
      }
    }
  }
};

bool attend_tiles(const Attention& a) {
  const TiledAttention work(a);
  if (!work.queries) return false;
  const Tiles tiles;
  work.start();
  for (int64_t t = 0; t < a.length; t += BLOCK) {
    const int64_t count = a.length - t < BLOCK ? a.length - t : BLOCK;
    work.load_block(t, count);
    work.attend_block(t, count);
  }
  work.finish();
  return true;
}

}  // namespace
}  // namespace halfbyte

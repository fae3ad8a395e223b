// AVX-512 BF16: two columns of bf16 input to a lane and instruction, for 4 and 2 bits.
//
// (code - middle) is exact in bf16 and comes from a table of 32 entries, indexed by the low five
// bits of each half of a lane; entries repeat, so no mask is needed. The halves of a lane hold
// columns j and j + half of a run, which is how `Rows::pairs` stores x. Sums are fp32; the
// instruction takes subnormal inputs for zero. Other bits and other inputs go as in avx512.cpp.
#include "avx512_decode.h"
#include "vector_kernel.h"

namespace halfbyte {
namespace {

template <int BITS>
inline __m512i bf16_table() {
  alignas(64) uint16_t entries[32];
  for (int i = 0; i < 32; i++) {
    const int code = (i & ((1 << BITS) - 1)) - (1 << (BITS - 1));
    entries[i] = uint16_t(to_bits(float(code)) >> 16);
  }
  return _mm512_load_si512(entries);
}

template <int BITS, int ROWS>
void multiply_pairs_block(const Packed& w, const Rows& rows, const Target& target, int64_t row,
                          int64_t block, __m512i table) {
  constexpr int RUN = 32 / BITS, PAIRS = RUN / 2;
  constexpr int CHAINS = ROWS >= 4 ? 1 : 4 / ROWS;
  const int64_t columns = w.in_features;
  const uint32_t* codes = w.codes + block * w.block_words;
  const uint16_t* x = rows.pairs + row * columns;
  Floats sums[ROWS] = {};
  for (int64_t g = 0, k = 0; g < w.groups; g++) {
    const int64_t end = k + w.group_size < columns ? k + w.group_size : columns;
    __m512 part[CHAINS][ROWS] = {};
#pragma GCC unroll 2
    for (; k < end; k += RUN, codes += LANES) {
      __builtin_prefetch(codes + PREFETCH_WORDS);
      const __m512i words = _mm512_loadu_si512(codes);
#pragma GCC unroll 8
      for (int j = 0; j < PAIRS; j++) {
        const __m512i shifted = _mm512_srli_epi16(words, j * BITS);
        const __m512bh weights = (__m512bh)_mm512_permutexvar_epi16(shifted, table);
#pragma GCC unroll 8
        for (int m = 0; m < ROWS; m++) {
          int pair;
          __builtin_memcpy(&pair, x + m * columns + k + 2 * j, 4);
          __m512& sum = part[j % CHAINS][m];
          sum = _mm512_dpbf16_ps(sum, weights, (__m512bh)_mm512_set1_epi32(pair));
        }
      }
    }
    const int64_t at = (block * w.groups + g) * LANES;
    const Floats scale = load_scales(w, at);
    const Floats offset = w.symmetric ? Floats{} : load_offsets(w, at);
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; m++) {
      Floats sum = (Floats)part[0][m];
      for (int c = 1; c < CHAINS; c++) sum += (Floats)part[c][m];
      if (!w.symmetric) sum += offset * rows.sums[(row + m) * w.groups + g];
      sums[m] += scale * sum;
    }
  }
  for (int m = 0; m < ROWS; m++) {
    float out[LANES];
    store(out, sums[m]);
    store_block(w, target, row + m, block, out);
  }
}

template <int BITS>
void multiply_pairs(const Packed& w, const Rows& rows, const Target& target, int64_t first,
                    int64_t last) {
  const __m512i table = bf16_table<BITS>();
  for (int64_t block = first; block < last; block++) {
    int64_t m = 0;
    for (; m + 8 <= rows.rows; m += 8) {
      multiply_pairs_block<BITS, 8>(w, rows, target, m, block, table);
    }
    for (; m + 4 <= rows.rows; m += 4) {
      multiply_pairs_block<BITS, 4>(w, rows, target, m, block, table);
    }
    for (; m + 2 <= rows.rows; m += 2) {
      multiply_pairs_block<BITS, 2>(w, rows, target, m, block, table);
    }
    for (; m < rows.rows; m++) multiply_pairs_block<BITS, 1>(w, rows, target, m, block, table);
  }
}

void multiply(const Packed& w, const Rows& rows, const Target& target, int64_t first,
              int64_t last) {
  if (!rows.pairs) return multiply_floats(w, rows, target, first, last);
  if (w.bits == 4) multiply_pairs<4>(w, rows, target, first, last);
  if (w.bits == 2) multiply_pairs<2>(w, rows, target, first, last);
}

bool wants_pairs(const Packed& w) { return w.bits == 4 || w.bits == 2; }

}  // namespace

const Isa AVX512_BF16 = {"avx512_bf16", multiply, wants_pairs, dequantize_floats};

}  // namespace halfbyte

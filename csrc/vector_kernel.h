// The kernel in vectors of VECTOR floats, included by each instruction set's file after it defined
// VECTOR, MAX_SHARED_ROWS and, where it has something better, its own `decode`.
//
// Accumulates in fp32, fused where the processor can: (code - middle) times x within a group over
// independent chains, the group's sum times its scale. An asymmetric zero is folded in through the
// sum of x: its error is a multiple of |x| times 2^bits * scale instead of |x| times |W|, and an
// infinite x gives not-a-number where the reference would give infinity.
#pragma once
#include "numbers.h"

namespace halfbyte {
namespace {

typedef float Floats __attribute__((vector_size(4 * VECTOR)));
typedef uint32_t Words __attribute__((vector_size(4 * VECTOR)));
typedef int32_t Ints __attribute__((vector_size(4 * VECTOR)));
typedef uint16_t Halves __attribute__((vector_size(2 * VECTOR)));
typedef uint8_t Bytes __attribute__((vector_size(VECTOR)));

constexpr int PARTS = LANES / VECTOR;

template <class V>
inline V load(const void* from) {
  V value;
  __builtin_memcpy(&value, from, sizeof(V));
  return value;
}

template <class V>
inline void store(void* to, V value) {
  __builtin_memcpy(to, &value, sizeof(V));
}

// Codes in the low bits of each lane, whatever lies above, as numbers less the middle code.
template <int BITS>
inline Floats number(Words words) {
#ifdef HAS_DECODE
  return (Floats)decode<BITS>((__m512i)words);
#else
  const Ints codes = (Ints)(words & ((1u << BITS) - 1));
  return __builtin_convertvector(codes, Floats) - float(1 << (BITS - 1));
#endif
}

inline Halves round_to_bf16(Floats value) {
  const Words bits = (Words)value;
  return __builtin_convertvector((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, Halves);
}

// Code j of a run, from its words, in the low bits.
template <int BITS, int WORDS>
inline Words shift_down(const Words (&words)[WORDS], int j) {
  const int bit = j * BITS, word = bit / 32, shift = bit % 32;
  Words low = words[word] >> shift;
  if (shift + BITS > 32) low |= words[word + 1 < WORDS ? word + 1 : word] << (32 - shift);
  return low;
}

inline Floats load_scales(const Packed& w, int64_t at) {
  if (w.scale_dtype == HB_FLOAT32) return load<Floats>(w.scales + 4 * at);
  const Words halves = __builtin_convertvector(load<Halves>(w.scales + 2 * at), Words);
  if (w.scale_dtype == HB_BFLOAT16) return (Floats)(halves << 16);
  // Finite float16; the exponent is rebiased by a product, which also serves subnormals.
  const Floats size = (Floats)((halves & 0x7FFF) << 13) * from_bits(0x77800000);
  return (Floats)((Words)size | (halves & 0x8000) << 16);
}

// Middle code less zero.
inline Floats load_offsets(const Packed& w, int64_t at) {
  const Ints zeros = __builtin_convertvector(load<Bytes>(w.zeros + at), Ints);
  return float(1 << (w.bits - 1)) - __builtin_convertvector(zeros, Floats);
}

template <int BITS, int ROWS>
void multiply_block(const Packed& w, const Rows& rows, const Target& target, int64_t row,
                    int64_t block) {
  constexpr int RUN = BITS == 3 ? 32 : 32 / BITS, WORDS = BITS == 3 ? 3 : 1;
  // Enough independent sums to hide the latency of a multiply-add.
  constexpr int CHAINS = ROWS * PARTS >= 4 ? 1 : 4 / (ROWS * PARTS);
  const int64_t columns = w.in_features;
  const uint32_t* codes = w.codes + block * w.block_words;
  const float* x = rows.x + row * columns;
  Floats sums[ROWS][PARTS] = {};
  for (int64_t g = 0, k = 0; g < w.groups; g++) {
    const int64_t end = k + w.group_size < columns ? k + w.group_size : columns;
    Floats part[CHAINS][ROWS][PARTS] = {};
    for (; k < end; k += RUN, codes += WORDS * LANES) {
      __builtin_prefetch(codes + PREFETCH_WORDS);
#pragma GCC unroll 4
      for (int p = 0; p < PARTS; p++) {
        Words words[WORDS];
#pragma GCC unroll 3
        for (int i = 0; i < WORDS; i++) words[i] = load<Words>(codes + i * LANES + p * VECTOR);
#pragma GCC unroll 32
        for (int j = 0; j < RUN; j++) {
          const Floats weights = number<BITS>(shift_down<BITS, WORDS>(words, j));
#pragma GCC unroll 8
          for (int m = 0; m < ROWS; m++) {
            part[j % CHAINS][m][p] += weights * x[m * columns + k + j];
          }
        }
      }
    }
    for (int p = 0; p < PARTS; p++) {
      const int64_t at = (block * w.groups + g) * LANES + p * VECTOR;
      const Floats scale = load_scales(w, at);
      const Floats offset = w.symmetric ? Floats{} : load_offsets(w, at);
#pragma GCC unroll 8
      for (int m = 0; m < ROWS; m++) {
        Floats sum = part[0][m][p];
        for (int c = 1; c < CHAINS; c++) sum += part[c][m][p];
        if (!w.symmetric) sum += offset * rows.sums[(row + m) * w.groups + g];
        sums[m][p] += scale * sum;
      }
    }
  }
  for (int m = 0; m < ROWS; m++) {
    float out[LANES];
    for (int p = 0; p < PARTS; p++) store(out + p * VECTOR, sums[m][p]);
    store_block(w, target, row + m, block, out);
  }
}

// A block's codes stay in the cache between the passes over them.
template <int BITS>
void multiply_bits(const Packed& w, const Rows& rows, const Target& target, int64_t first,
                   int64_t last) {
  for (int64_t block = first; block < last; block++) {
    int64_t m = 0;
#if MAX_SHARED_ROWS >= 8
    for (; m + 8 <= rows.rows; m += 8) multiply_block<BITS, 8>(w, rows, target, m, block);
#endif
    for (; m + 4 <= rows.rows; m += 4) multiply_block<BITS, 4>(w, rows, target, m, block);
    for (; m + 2 <= rows.rows; m += 2) multiply_block<BITS, 2>(w, rows, target, m, block);
    for (; m < rows.rows; m++) multiply_block<BITS, 1>(w, rows, target, m, block);
  }
}

void multiply_floats(const Packed& w, const Rows& rows, const Target& target, int64_t first,
                     int64_t last) {
  if (w.bits == 4) multiply_bits<4>(w, rows, target, first, last);
  if (w.bits == 8) multiply_bits<8>(w, rows, target, first, last);
  if (w.bits == 3) multiply_bits<3>(w, rows, target, first, last);
  if (w.bits == 2) multiply_bits<2>(w, rows, target, first, last);
}

template <int BITS>
void dequantize_bits(const Packed& w, int64_t block, int dtype, void* out, int64_t stride) {
  constexpr int RUN = BITS == 3 ? 32 : 32 / BITS, WORDS = BITS == 3 ? 3 : 1;
  const int64_t columns = w.in_features;
  for (int p = 0; p < PARTS; p++) {
    const uint32_t* codes = w.codes + block * w.block_words + p * VECTOR;
    for (int64_t g = 0, k = 0; g < w.groups; g++) {
      const int64_t end = k + w.group_size < columns ? k + w.group_size : columns;
      const int64_t at = (block * w.groups + g) * LANES + p * VECTOR;
      const Floats scale = load_scales(w, at);
      const Floats offset = w.symmetric ? Floats{} : load_offsets(w, at);
      for (; k < end; k += RUN, codes += WORDS * LANES) {
        Words words[WORDS];
        for (int i = 0; i < WORDS; i++) words[i] = load<Words>(codes + i * LANES);
#pragma GCC unroll 32
        for (int j = 0; j < RUN; j++) {
          // The difference is exact; the product is rounded once more at most.
          const Floats weight = (number<BITS>(shift_down<BITS, WORDS>(words, j)) + offset) * scale;
          const int64_t to = (k + j) * stride + p * VECTOR;
          if (dtype == HB_FLOAT32) {
            store(static_cast<float*>(out) + to, weight);
          } else {
            store(static_cast<uint16_t*>(out) + to, round_to_bf16(weight));
          }
        }
      }
    }
  }
}

void dequantize_floats(const Packed& w, int64_t block, int dtype, void* out, int64_t stride) {
  if (w.bits == 4) dequantize_bits<4>(w, block, dtype, out, stride);
  if (w.bits == 8) dequantize_bits<8>(w, block, dtype, out, stride);
  if (w.bits == 3) dequantize_bits<3>(w, block, dtype, out, stride);
  if (w.bits == 2) dequantize_bits<2>(w, block, dtype, out, stride);
}

}  // namespace
}  // namespace halfbyte

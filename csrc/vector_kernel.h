// The kernel in vectors of VECTOR floats, included by the file of each instruction set after it
// defines VECTOR, MAX_SHARED_ROWS (rows of x that share one decoding of the weights),
// PREFETCH_WORDS and, optionally, HAS_DECODE with a faster `decode`.
//
// Accumulates in fp32, with FMA if available: (code - middle) times x within a group in independent
// chains, then the group's sum times its scale. An asymmetric zero is applied through the sum of x:
// its error is proportional to |x| times 2^bits * scale instead of |x| times |W|, and an infinite x
// gives NaN where the reference would give infinity.
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

inline Words widen(Halves halves) {
#ifdef HAS_DECODE
  return (Words)_mm512_cvtepu16_epi32((__m256i)halves);  // compilers split the generic form in two
#else
  return __builtin_convertvector(halves, Words);
#endif
}

// Decodes the code in the low bits of each lane to code - middle; higher bits are ignored.
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

// Moves code j of a run to the low bits of its words.
template <int BITS, int WORDS>
inline Words shift_down(const Words (&words)[WORDS], int j) {
  const int bit = j * BITS, word = bit / 32, shift = bit % 32;
  Words low = words[word] >> shift;
  if (shift + BITS > 32) low |= words[word + 1 < WORDS ? word + 1 : word] << (32 - shift);
  return low;
}

inline Floats load_scales(const Packed& w, int64_t at) {
  if (w.scale_dtype == HB_FLOAT32) return load<Floats>(w.scales + 4 * at);
  const Words halves = widen(load<Halves>(w.scales + 2 * at));
  if (w.scale_dtype == HB_BFLOAT16) return (Floats)(halves << 16);
  // Finite float16 only; multiplication rebiases the exponent, which also handles subnormals.
  const Floats size = (Floats)((halves & 0x7FFF) << 13) * from_bits(0x77800000);
  return (Floats)((Words)size | (halves & 0x8000) << 16);
}

// Middle code minus zero.
inline Floats load_offsets(const Packed& w, int64_t at) {
  const Ints zeros = __builtin_convertvector(load<Bytes>(w.zeros + at), Ints);
  return float(1 << (w.bits - 1)) - __builtin_convertvector(zeros, Floats);
}

// Prefetch distance in words while BLOCKS blocks are read together: the same position in the next
// blocks, unless that is too far.
template <int BLOCKS>
inline int64_t words_ahead(const Packed& w) {
  const int64_t next = BLOCKS * w.block_words;
  return BLOCKS > 1 && next <= 4 * PREFETCH_WORDS ? next : PREFETCH_WORDS / BLOCKS;
}

template <int BITS, int ROWS, int BLOCKS>
void multiply_block(const Packed& w, const Rows& rows, const Target& target, int64_t row,
                    int64_t block) {
  constexpr int RUN = BITS == 3 ? 32 : 32 / BITS, WORDS = BITS == 3 ? 3 : 1;
  // Independent of the number of rows, so that a row's result does not depend on the others. If
  // hiding FMA latency needs more chains, they come from processing several blocks together.
  constexpr int CHAINS = PARTS >= 2 ? 1 : 2;
  const int64_t columns = w.in_features;
  const uint32_t* codes = w.codes + block * w.block_words;
  const float* x = rows.x + row * columns;
  const int64_t ahead = words_ahead<BLOCKS>(w);
  Floats sums[BLOCKS][ROWS][PARTS] = {};
  for (int64_t g = 0, k = 0; g < w.groups; g++) {
    const int64_t end = group_end(w, k);
    Floats part[CHAINS][BLOCKS][ROWS][PARTS] = {};
    for (; k < end; k += RUN, codes += WORDS * LANES) {
#pragma GCC unroll 2
      for (int b = 0; b < BLOCKS; b++) {
        const uint32_t* from = codes + b * w.block_words;
        __builtin_prefetch(from + ahead);
#pragma GCC unroll 4
        for (int p = 0; p < PARTS; p++) {
          Words words[WORDS];
#pragma GCC unroll 3
          for (int i = 0; i < WORDS; i++) words[i] = load<Words>(from + i * LANES + p * VECTOR);
#pragma GCC unroll 32
          for (int j = 0; j < RUN; j++) {
            const Floats weights = number<BITS>(shift_down<BITS, WORDS>(words, j));
#pragma GCC unroll 8
            for (int m = 0; m < ROWS; m++) {
              part[j % CHAINS][b][m][p] += weights * x[m * columns + k + j];
            }
          }
        }
      }
    }
    for (int b = 0; b < BLOCKS; b++) {
      for (int p = 0; p < PARTS; p++) {
        const int64_t at = ((block + b) * w.groups + g) * LANES + p * VECTOR;
        const Floats scale = load_scales(w, at);
        const Floats offset = w.symmetric ? Floats{} : load_offsets(w, at);
#pragma GCC unroll 8
        for (int m = 0; m < ROWS; m++) {
          Floats sum = part[0][b][m][p];
          for (int c = 1; c < CHAINS; c++) sum += part[c][b][m][p];
          if (!w.symmetric) sum += offset * rows.sums[(row + m) * w.groups + g];
          sums[b][m][p] += scale * sum;
        }
      }
    }
  }
  for (int b = 0; b < BLOCKS; b++) {
    for (int m = 0; m < ROWS; m++) {
      float out[LANES];
      for (int p = 0; p < PARTS; p++) store(out + p * VECTOR, sums[b][m][p]);
      store_block(w, target, row + m, block + b, out);
    }
  }
}

// A block's codes stay in the cache between passes.
template <int BITS>
void multiply_bits(const Packed& w, const Rows& rows, const Target& target, int64_t first,
                   int64_t last) {
  int64_t block = first;
  if (rows.rows == 1 && PARTS == 2) {
    for (; block + 2 <= last; block += 2) multiply_block<BITS, 1, 2>(w, rows, target, 0, block);
  }
  for (; block < last; block++) {
    int64_t m = 0;
#if MAX_SHARED_ROWS >= 8
    for (; m + 8 <= rows.rows; m += 8) multiply_block<BITS, 8, 1>(w, rows, target, m, block);
#endif
    for (; m + 4 <= rows.rows; m += 4) multiply_block<BITS, 4, 1>(w, rows, target, m, block);
    for (; m + 2 <= rows.rows; m += 2) multiply_block<BITS, 2, 1>(w, rows, target, m, block);
    for (; m < rows.rows; m++) multiply_block<BITS, 1, 1>(w, rows, target, m, block);
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
  for (int p = 0; p < PARTS; p++) {
    const uint32_t* codes = w.codes + block * w.block_words + p * VECTOR;
    for (int64_t g = 0, k = 0; g < w.groups; g++) {
      const int64_t end = group_end(w, k);
      const int64_t at = (block * w.groups + g) * LANES + p * VECTOR;
      const Floats scale = load_scales(w, at);
      const Floats offset = w.symmetric ? Floats{} : load_offsets(w, at);
      for (; k < end; k += RUN, codes += WORDS * LANES) {
        Words words[WORDS];
        for (int i = 0; i < WORDS; i++) words[i] = load<Words>(codes + i * LANES);
#pragma GCC unroll 32
        for (int j = 0; j < RUN; j++) {
          // The difference is exact; the product is rounded at most once more.
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

// e^x for x <= 0, accurate to 2 ulp; below e^-87 it is 0.
inline Floats exp_of_negative(Floats x) {
  constexpr float LOW = -87.0f;
  const Ints below = x < LOW;
  x = (Floats)(((Ints)x & ~below) | ((Ints)(Floats{} + LOW) & below));
  const Floats turns = (x * 1.44269504f - 0.5f);
  const Ints whole = __builtin_convertvector(turns, Ints);  // truncates: rounds to nearest
  const Floats n = __builtin_convertvector(whole, Floats);
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Floats power = (Floats)((whole + 127) << 23);
  return (Floats)((Ints)(p * power) & ~below);
}

inline float add_lanes(Floats value) {
#if VECTOR >= 16
  value +=
      __builtin_shufflevector(value, value, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  value += __builtin_shufflevector(value, value, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3);
#elif VECTOR >= 8
  value += __builtin_shufflevector(value, value, 4, 5, 6, 7, 0, 1, 2, 3);
#endif
  return (value[0] + value[1]) + (value[2] + value[3]);
}

// float32, or bfloat16 where HALF.
template <bool HALF>
inline Floats load_numbers(const void* from, int64_t at) {
  if (!HALF) return load<Floats>(static_cast<const float*>(from) + at);
  return (Floats)(widen(load<Halves>(static_cast<const uint16_t*>(from) + at)) << 16);
}

// The order of a row's sums does not depend on how many rows share the weights, so neither does its
// result.
template <bool HALF, int ROWS>
void multiply_dense_rows(const Dense& d, int64_t row, int64_t n) {
  constexpr int CHAINS = 2;
  const int64_t columns = d.columns, whole = columns / (CHAINS * VECTOR) * (CHAINS * VECTOR);
  const int64_t at = n * columns;
  const float* x = d.x + row * columns;
  Floats sums[ROWS][CHAINS] = {};
  for (int64_t k = 0; k < whole; k += CHAINS * VECTOR) {
    __builtin_prefetch(static_cast<const char*>(d.weight) + (at + k) * (HALF ? 2 : 4) + 2048);
#pragma GCC unroll 2
    for (int i = 0; i < CHAINS; i++) {
      const Floats weights = load_numbers<HALF>(d.weight, at + k + i * VECTOR);
#pragma GCC unroll 8
      for (int m = 0; m < ROWS; m++) {
        sums[m][i] += weights * load<Floats>(x + m * columns + k + i * VECTOR);
      }
    }
  }
  for (int m = 0; m < ROWS; m++) {
    float sum = add_lanes(sums[m][0] + sums[m][1]);
    for (int64_t k = whole; k < columns; k++) {
      sum += load_number(d.weight, at + k, HALF ? HB_BFLOAT16 : HB_FLOAT32) * x[m * columns + k];
    }
    d.out[(row + m) * d.stride + n] = sum;
  }
}

template <bool HALF>
void multiply_dense_all(const Dense& d, int64_t first, int64_t last) {
  for (int64_t n = first; n < last; n++) {
    int64_t m = 0;
#if MAX_SHARED_ROWS >= 8
    for (; m + 8 <= d.rows; m += 8) multiply_dense_rows<HALF, 8>(d, m, n);
#endif
    for (; m + 4 <= d.rows; m += 4) multiply_dense_rows<HALF, 4>(d, m, n);
    for (; m + 2 <= d.rows; m += 2) multiply_dense_rows<HALF, 2>(d, m, n);
    for (; m < d.rows; m++) multiply_dense_rows<HALF, 1>(d, m, n);
  }
}

void multiply_dense(const Dense& d, int64_t first, int64_t last) {
  const auto multiply = d.dtype == HB_BFLOAT16 ? multiply_dense_all<true> : multiply_dense_all<false>;
  multiply(d, first, last);
}

// gate = silu(gate) * up; count is a multiple of 16.
void gate_silu(float* gate, const float* up, int64_t count) {
  for (int64_t i = 0; i < count; i += VECTOR) {
    const Floats x = load<Floats>(gate + i);
    const Ints negative = x < 0.0f;
    const Floats small = exp_of_negative((Floats)((Ints)x | (int32_t)0x80000000));
    // 1 / (1 + e^-x), from e^-|x|, which cannot overflow.
    const Floats top = (Floats)(((Ints)small & negative) | ((Ints)(Floats{} + 1.0f) & ~negative));
    store(gate + i, x * top / (1.0f + small) * load<Floats>(up + i));
  }
}

}  // namespace
}  // namespace halfbyte

// int8 activations: each group of a row is rounded to integers -127..127 times a step of its own,
// and multiplied by the codes in exact integer arithmetic.
//
// Included by the file of each instruction set after vector_kernel.h. The file defines HAS_DOT if
// it has a dot product of four bytes, or HAS_PAIRS if it has one of two bytes and one of two 16-bit
// values, and HAS_STORE if it has store_channels. A lane is a channel; its four bytes are codes p *
// V + j of a run for one j < V, where V is a quarter of a run's codes. x is stored in that order.
#pragma once
#include "numbers.h"

namespace halfbyte {
namespace {

typedef float Floats16 __attribute__((vector_size(64)));
typedef int32_t Ints16 __attribute__((vector_size(64)));
typedef uint32_t Words4 __attribute__((vector_size(16)));
typedef int16_t Shorts __attribute__((vector_size(4 * VECTOR)));

template <int BITS>
struct Quads {
  static constexpr int RUN = 32 / BITS, COUNT = RUN / 4;
  static constexpr uint32_t MASK = ((1u << BITS) - 1) * 0x01010101u;

  // Position of column i of a run.
  static constexpr int place(int i) { return i / RUN * RUN + i % COUNT * 4 + i % RUN / COUNT; }
  // Column at position i.
  static constexpr int column(int i) { return i / RUN * RUN + i % 4 * COUNT + i % RUN / 4; }
};

// acc + the sum of the four byte products of each lane; codes are 0 to 2^BITS - 1.
template <int BITS>
inline Ints add_quads(Ints acc, Words codes, int32_t x) {
#if defined(HAS_DOT)
  return (Ints)dot<BITS>((IntVector)acc, (IntVector)codes, x);
#elif defined(HAS_PAIRS)
  const Shorts four = (Shorts)(Ints{} + x);
  if (BITS < 8) {
    const IntVector pairs = multiply_pairs((IntVector)codes, (IntVector)four);
    return acc + (Ints)add_pairs(pairs, (IntVector)(Shorts{} + int16_t(1)));
  }
  // A sum of two products needs 17 bits, so even and odd bytes are summed separately in 32 bits.
  const Shorts high = (Shorts)((Words)codes >> 8 & 0x00FF00FF), low = (Shorts)(codes & 0x00FF00FF);
  acc += (Ints)add_pairs((IntVector)low, (IntVector)((Shorts)(four << 8) >> 8));
  return acc + (Ints)add_pairs((IntVector)high, (IntVector)(four >> 8));
#else
  for (int p = 0; p < 4; p++) {
    acc += (Ints)((codes >> (8 * p)) & 0xFF) * int32_t(int8_t(uint32_t(x) >> (8 * p)));
  }
  return acc;
#endif
}

// Stores sixteen integers as bytes, each at its position.
template <int BITS>
inline void store_places(int8_t* to, Ints16 whole) {
#define HB_C(i) Quads<BITS>::column(i)
#ifdef HAS_DECODE
  const Ints16 placed = __builtin_shufflevector(
      whole, whole, HB_C(0), HB_C(1), HB_C(2), HB_C(3), HB_C(4), HB_C(5), HB_C(6), HB_C(7), HB_C(8),
      HB_C(9), HB_C(10), HB_C(11), HB_C(12), HB_C(13), HB_C(14), HB_C(15));
  store(to, _mm512_cvtepi32_epi8((__m512i)placed));
#else
  // Compilers would narrow sixteen lanes one by one.
#define HB_BYTES(p) \
  (Words4) __builtin_shufflevector(whole, whole, HB_C(p), HB_C(4 + p), HB_C(8 + p), HB_C(12 + p))
  const Words4 quads = (HB_BYTES(0) & 0xFF) | (HB_BYTES(1) & 0xFF) << 8 |
                       (HB_BYTES(2) & 0xFF) << 16 | HB_BYTES(3) << 24;
  store(to, quads);
#undef HB_BYTES
#endif
#undef HB_C
}

// The sum or the maximum of all sixteen lanes.
template <bool LARGEST>
inline int32_t fold_lanes(Ints16 v) {
#define HB_FOLD(...)                                                 \
  {                                                                  \
    const Ints16 other = __builtin_shufflevector(v, v, __VA_ARGS__); \
    v = LARGEST ? (v > other ? v : other) : v + other;               \
  }
  HB_FOLD(8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7)
  HB_FOLD(4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11)
  HB_FOLD(2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13)
  HB_FOLD(1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14)
#undef HB_FOLD
  return v[0];
}

// Rounds a row in packed order, [in], to `codes` [in], with the step and the sum of codes per
// group.
template <int BITS>
void round_row_bits(const Packed& w, const float* x, int8_t* codes, float* steps, int32_t* sums) {
  for (int64_t g = 0, k = 0; g < w.groups; g++) {
    const int64_t end = group_end(w, k);
    // The bits of absolute values are ordered like integers, with infinity and NaN at the end.
    Ints16 sizes = {};
    int64_t i = k;
    for (; i + 16 <= end; i += 16) {
      const Ints16 size = load<Ints16>(x + i) & 0x7FFFFFFF;
      sizes = size > sizes ? size : sizes;
    }
    int32_t largest = fold_lanes<true>(sizes);
    for (; i < end; i++) {
      const int32_t size = int32_t(to_bits(x[i]) & 0x7FFFFFFF);
      largest = largest > size ? largest : size;
    }
    const float most = from_bits(uint32_t(largest));
    // A maximum below 1e-30 counts as zero, because 127 / most would overflow. A non-finite value
    // makes the whole group NaN.
    if (largest >= 0x7F800000 || most < 1e-30f) {
      steps[g] = largest >= 0x7F800000 ? from_bits(0x7FC00000) : 0.0f;
      sums[g] = 0;
      memset(codes + k, 0, size_t(end - k));
      k = end;
      continue;
    }
    const float inverse = 127.0f / most;
    steps[g] = most / 127.0f;
    // Adding it leaves the nearest integer in the lowest bits of the sum.
    const float shift = 12582912.0f;
    const int32_t shift_bits = int32_t(to_bits(shift));
    int32_t sum = 0;
    Ints16 lanes = {};
    for (; k + 16 <= end; k += 16) {
      const Ints16 whole = (Ints16)(load<Floats16>(x + k) * inverse + shift) - shift_bits;
      lanes += whole;
      store_places<BITS>(codes + k, whole);
    }
    for (const int64_t first = k; k < end; k++) {
      const int32_t whole = int32_t(to_bits(x[k] * inverse + shift)) - shift_bits;
      codes[first + Quads<BITS>::place(int(k - first))] = int8_t(whole);
      sum += whole;
    }
    sums[g] = sum + fold_lanes<false>(lanes);
  }
}

void round_row(const Packed& w, const float* x, int8_t* codes, float* steps, int32_t* sums) {
  if (w.bits == 8) round_row_bits<8>(w, x, codes, steps, sums);
  if (w.bits == 4) round_row_bits<4>(w, x, codes, steps, sums);
  if (w.bits == 2) round_row_bits<2>(w, x, codes, steps, sums);
}

template <int BITS>
inline Ints load_zeros(const Packed& w, int64_t at) {
  if (w.symmetric) return Ints{} + (1 << (BITS - 1));
  return __builtin_convertvector(load<Bytes>(w.zeros + at), Ints);
}

// Adds a group's scaled sum of codes times x to that of the previous groups; `of`: row and group.
inline void add_scaled(Ints sum, Ints zero, Floats scale, const Integers& x, int64_t of,
                       Floats* total) {
  const Floats step = scale * x.steps[of];
  *total += step * __builtin_convertvector(sum - zero * x.sums[of], Floats);
}

template <int BITS, int ROWS, int BLOCKS>
void multiply_integer_block(const Packed& w, const Rows& rows, const Target& target, int64_t row,
                            int64_t block) {
  // Integer sums are exact in any order, so the number of chains does not affect the result.
  constexpr int RUN = Quads<BITS>::RUN, QUADS = Quads<BITS>::COUNT;
  constexpr int CHAINS = ROWS * BLOCKS * PARTS <= 2 && QUADS >= 2 ? 2 : 1;
  const int64_t columns = w.in_features;
  const uint32_t* codes = w.codes + block * w.block_words;
  const int8_t* x = rows.integers.codes + row * columns;
  const int64_t ahead = words_ahead<BLOCKS>(w);
  Floats sums[BLOCKS][ROWS][PARTS] = {};
  for (int64_t g = 0, k = 0; g < w.groups; g++) {
    const int64_t end = group_end(w, k);
    Ints part[CHAINS][BLOCKS][ROWS][PARTS] = {};
    for (; k < end; k += RUN, codes += LANES) {
#pragma GCC unroll 2
      for (int b = 0; b < BLOCKS; b++) {
        const uint32_t* from = codes + b * w.block_words;
        __builtin_prefetch(from + ahead);
#pragma GCC unroll 4
        for (int p = 0; p < PARTS; p++) {
          const Words words = load<Words>(from + p * VECTOR);
#pragma GCC unroll 4
          for (int j = 0; j < QUADS; j++) {
            const Words quads = (words >> (j * BITS)) & Quads<BITS>::MASK;
#pragma GCC unroll 8
            for (int m = 0; m < ROWS; m++) {
              Ints& to = part[j % CHAINS][b][m][p];
              to = add_quads<BITS>(to, quads, load<int32_t>(x + m * columns + k + 4 * j));
            }
          }
        }
      }
    }
    for (int b = 0; b < BLOCKS; b++) {
      for (int p = 0; p < PARTS; p++) {
        const int64_t at = ((block + b) * w.groups + g) * LANES + p * VECTOR;
        const Floats scale = load_scales(w, at);
        const Ints zero = load_zeros<BITS>(w, at);
#pragma GCC unroll 8
        for (int m = 0; m < ROWS; m++) {
          Ints sum = part[0][b][m][p];
          for (int c = 1; c < CHAINS; c++) sum += part[c][b][m][p];
          const int64_t of = (row + m) * w.groups + g;
          add_scaled(sum, zero, scale, rows.integers, of, &sums[b][m][p]);
        }
      }
    }
  }
  for (int b = 0; b < BLOCKS; b++) {
    for (int m = 0; m < ROWS; m++) {
#ifdef HAS_STORE
      store_channels(w, target, row + m, block + b, (__m512)sums[b][m][0]);
#else
      float out[LANES];
      for (int p = 0; p < PARTS; p++) store(out + p * VECTOR, sums[b][m][p]);
      store_block(w, target, row + m, block + b, out);
#endif
    }
  }
}

template <int BITS, int BLOCKS>
void multiply_integer_rows(const Packed& w, const Rows& rows, const Target& target, int64_t block) {
  int64_t m = 0;
#if MAX_SHARED_ROWS >= 8
  for (; m + 8 <= rows.rows; m += 8) {
    for (int b = 0; b < BLOCKS; b++) {
      multiply_integer_block<BITS, 8, 1>(w, rows, target, m, block + b);
    }
  }
#endif
  for (; m + 4 <= rows.rows; m += 4) {
    multiply_integer_block<BITS, 4, BLOCKS>(w, rows, target, m, block);
  }
  for (; m + 2 <= rows.rows; m += 2) {
    multiply_integer_block<BITS, 2, BLOCKS>(w, rows, target, m, block);
  }
  for (; m < rows.rows; m++) multiply_integer_block<BITS, 1, BLOCKS>(w, rows, target, m, block);
}

template <int BITS>
void multiply_integer_bits(const Packed& w, const Rows& rows, const Target& target, int64_t first,
                           int64_t last) {
  // Two blocks at a time if there are enough registers.
  constexpr int BLOCKS = PARTS == 1 ? 2 : 1;
  int64_t block = first;
  for (; block + BLOCKS <= last; block += BLOCKS) {
    multiply_integer_rows<BITS, BLOCKS>(w, rows, target, block);
  }
  for (; block < last; block++) multiply_integer_rows<BITS, 1>(w, rows, target, block);
}

void multiply_integers(const Packed& w, const Rows& rows, const Target& target, int64_t first,
                       int64_t last) {
  if (w.bits == 8) multiply_integer_bits<8>(w, rows, target, first, last);
  if (w.bits == 4) multiply_integer_bits<4>(w, rows, target, first, last);
  if (w.bits == 2) multiply_integer_bits<2>(w, rows, target, first, last);
}

}  // namespace
}  // namespace halfbyte

// The packed weight: a header, then codes, scales, zeros and column order, each 64-byte aligned.
//
//   codes   uint32 [out / 16][in / run][words of a run][16]   lane = output channel
//   scales         [out / 16][groups][16]                     of the stored dtype
//   zeros   uint8  [out / 16][groups][16]                     asymmetric only
//   order   int32  [in]                                       act-order only
//
// A run is the smallest number of codes that fills whole words: 16, 32, 8 and 4 codes at 2, 3, 4
// and 8 bits. The words are those of the GPTQ format; only the channels are regrouped, so that one
// 64-byte load fetches the next codes of 16 channels and a thread reads one contiguous stream.
#pragma once
#include <stdint.h>

#include "halfbyte_cpu.h"

namespace halfbyte {

constexpr int LANES = 16;
constexpr uint32_t MAGIC = 0x30344248;  // "HB40"

struct Header {
  uint32_t magic, abi;
  hb_linear_shape shape;
  int32_t groups, blocks;  // blocks of 16 output channels
  int64_t scales_at, zeros_at, order_at, bytes;
};

constexpr int64_t CODES_AT = 128;
static_assert(sizeof(Header) <= CODES_AT, "codes begin after the header");

static inline int run_codes(int bits) { return bits == 3 ? 32 : 32 / bits; }
static inline int run_words(int bits) { return bits == 3 ? 3 : 1; }

// A view of a packed weight.
struct Packed {
  const Header* header;
  int bits, in_features, out_features, group_size, groups, blocks, scale_dtype;
  bool symmetric;
  const uint32_t* codes;
  const uint8_t* scales;
  const uint8_t* zeros;  // null if symmetric
  const int32_t* order;  // null without act-order
  int64_t block_words;   // words per block of 16 channels

  int scale_bytes() const { return scale_dtype == HB_FLOAT32 ? 4 : 2; }
};

// End of the group that starts at a column; the last group may be shorter.
static inline int64_t group_end(const Packed& w, int64_t first) {
  return first + w.group_size < w.in_features ? first + w.group_size : w.in_features;
}

// Returns false if the bytes are not a packed weight of this version.
bool open_packed(const void* bytes, Packed* packed);

// Rows of x quantized to integers -127..127, in the order of integer_kernel.h.
struct Integers {
  const int8_t* codes = nullptr;  // [rows][in]
  const float* steps = nullptr;   // [rows][groups]: scales
  const int32_t* sums = nullptr;  // [rows][groups]: sums of codes
};

// Rows of x prepared for a kernel, with columns in packed order.
struct Rows {
  int64_t rows;
  const float* x;     // [rows][in]
  const float* sums;  // [rows][groups]: sums of x; null if not needed
  // For matrix units, instead of x: bf16 tiles in the order of rows.h. With `parts`, those for few
  // rows; without, zero-padded to 32 rows and whole steps of columns.
  const uint16_t* tiles;
  int parts;
  // With int8 activations, instead of all of these.
  Integers integers = {};
};

// The output of a kernel.
struct Target {
  int dtype;
  const void* bias;
  void* out;  // [rows][out]
  int64_t stride;
};

// out[m, n] = weight[n, :] . x[m, :]; each instruction set computes channels [first, last).
struct Dense {
  const void* weight;  // [out][columns]
  int dtype;
  const float* x;  // [rows][columns]
  int64_t rows, columns;
  float* out;  // [rows][stride]
  int64_t stride;
};

// Attention of the query heads that share a key-value head. Rows are consecutive positions of one
// sequence; each row attends to one more position than the previous row.
struct Attention {
  const float* query;  // [rows][heads][width], rows row_stride elements apart
  const void* keys;    // page p: [page_tokens][width] at p * page_stride, float32 or bfloat16
  const void* values;
  const int32_t* table;              // page table of the sequence
  int64_t page_tokens, page_stride;  // page_tokens: a multiple of 16, unless there is one page
  float* out;                        // as query
  int64_t row_stride;
  int64_t length;  // positions that the last row attends to
  int rows, heads, width, dtype;
  float scale;

  // Scores per head, padded by a whole vector after the last.
  int64_t scores_stride() const { return (length + 2 * LANES) / LANES * LANES; }
  // Floats of scratch memory: all scores, and 16 positions as float32.
  int64_t scratch() const { return rows * heads * scores_stride() + LANES * width; }
  int64_t length_of(int row) const { return length - rows + 1 + row; }
};

// The kernels of an instruction set.
struct Isa {
  const char* name;
  // Computes blocks [first, last) for all rows.
  void (*multiply)(const Packed&, const Rows&, const Target&, int64_t first, int64_t last);
  // Dequantizes a block to out[k * stride + lane].
  void (*dequantize)(const Packed&, int64_t block, int dtype, void* out, int64_t stride);
  void (*multiply_dense)(const Dense&, int64_t first, int64_t last);
  // Widths and counts are multiples of 16.
  void (*attend)(const Attention&, float* scratch);
  void (*gate_silu)(float* gate, const float* up, int64_t count);
  // With int8 activations: rounds one row of x in packed order; computes blocks [first, last).
  void (*round_row)(const Packed&, const float* x, int8_t* codes, float* steps, int32_t* sums);
  void (*multiply_integers)(const Packed&, const Rows&, const Target&, int64_t first, int64_t last);
  // The rest is null without matrix units. Splits a row of x, float32 or bfloat16, in packed order,
  // into `parts` bf16 rows whose sum it is, in each of the tiles `stride` elements apart; and
  // computes the sums of its groups.
  void (*split_row)(const Packed&, int dtype, const void* x, int parts, uint16_t* tiles,
                    int64_t stride, float* sums);
  // Converts rows [first, last) of x to tiles of bf16.
  void (*round_rows)(const Packed&, const float* x, int64_t rows, uint16_t* tiles, int64_t first,
                     int64_t last);
  // As `multiply`, from tiles of many rows.
  void (*multiply_tiles)(const Packed&, const Rows&, const Target&, int64_t first, int64_t last);
  // As `attend`, for a bfloat16 cache, with its own scratch; false if out of memory.
  bool (*attend_tiles)(const Attention&);
};

extern const Isa SERIAL;
#if defined(__x86_64__)
extern const Isa AVX2, AVX512, AMX;
#elif defined(__aarch64__)
extern const Isa NEON;
#endif

}  // namespace halfbyte

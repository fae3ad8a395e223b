// The C interface of the CPU library: y = x @ dequantize(W).T and more, without torch or Python.
//
// A packed weight is a self-describing block of bytes (layout.h), so calls after hb_pack need no
// sizes. Functions that return int return 0 or one of the status codes below.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define HB_API __attribute__((visibility("default")))

// Incremented whenever a signature, a struct or the packed layout changes; callers check it.
#define HB_ABI_VERSION 5

enum hb_status {
  HB_OK = 0,
  HB_BAD_ARGUMENT = 1,  // sizes or types that the layout does not support
  HB_BAD_BLOB = 2,      // not a packed weight of this version
  HB_NO_MEMORY = 3,
  HB_UNKNOWN_ISA = 4,
  HB_ABSENT_ISA = 5,  // known, but not supported by this CPU
};

enum hb_dtype { HB_FLOAT32 = 0, HB_BFLOAT16 = 1, HB_FLOAT16 = 2 };

// A quantized linear in the GPTQ format.
typedef struct {
  int32_t bits;         // 2, 3, 4 or 8
  int32_t in_features;  // a multiple of the codes per run (layout.h): 16, 32, 8, 4
  int32_t out_features;
  int32_t group_size;   // a multiple of the same; the last group may be shorter
  int32_t scale_dtype;  // hb_dtype
  int32_t symmetric;    // every zero is 2^(bits-1)
  int32_t has_order;    // act-order: packed column k is stored column order[k]
} hb_linear_shape;

HB_API uint32_t hb_abi_version(void);

// The instruction set in use, and those that this CPU supports, comma separated, best last.
HB_API const char* hb_isa(void);
HB_API const char* hb_isas(void);
// Selects an instruction set; NULL for the best. Must not be called while a computation runs.
HB_API int hb_select_isa(const char* name);

// Runs parallel work through this OpenMP runtime's GOMP_parallel, so that the process has a single
// thread pool; NULL: use std::thread.
typedef void (*hb_gomp_parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
HB_API void hb_use_openmp(hb_gomp_parallel start);

// Size of the packed weight in bytes; negative if the shape cannot be packed.
HB_API int64_t hb_packed_bytes(const hb_linear_shape* shape);
// qweight: [in * bits / 32, out] words. scales: [groups, out]. zeros: [groups, out], NULL if
// symmetric. order: [in], NULL without has_order.
HB_API int hb_pack(const hb_linear_shape* shape, const uint32_t* qweight, const void* scales,
                   const uint8_t* zeros, const int32_t* order, void* packed, int threads);
// Restores qweight, bit for bit.
HB_API int hb_unpack(const void* packed, uint32_t* qweight, int threads);

// out[m, :] = x[m, :] @ W.T + bias. x: [rows, in], out: [rows, out], bias: [out] or NULL, all of
// `dtype`, contiguous. One pass over the packed weights per eight rows. activation_bits: 16, or 8
// to round each group of x to multiples of max|x| / 127 first; ignored for 3 bits and for groups
// whose sums overflow 32 bits.
HB_API int hb_linear(const void* packed, int dtype, const void* x, int64_t rows, const void* bias,
                     void* out, int activation_bits, int threads);
// Whether bf16 input of many rows runs on matrix units, so that hb_linear is the fastest choice.
HB_API int hb_tiles(void);
// Dequantizes output channels [first, last), both multiples of 16 or the end, to [in, last - first]
// in packed column order, rounded once to `dtype` (float32 or bfloat16).
HB_API int hb_dequantize(const void* packed, int64_t first, int64_t last, int dtype, void* out,
                         int threads);

// out[m, :] = weight @ x[m, :] for x [rows, in] and a dense weight [out, in] of float32 or
// bfloat16, read once per eight rows: for the output head, which is rarely quantized.
HB_API int hb_dense(const void* weight, int dtype, const float* x, int64_t rows,
                    int64_t in_features, int64_t out_features, float* out, int threads);

// Runs tokens through all blocks of a decoder: norm, attention with rotary embedding over a KV
// cache, residual, norm, gated MLP or mixture of experts, residual; then the final norm. All arrays
// belong to the caller. The cache is paged; the page table of a sequence lists its pages in order.
typedef struct {
  const void *q, *k, *v, *o, *gate, *up, *down;  // packed weights
  const float *q_bias, *k_bias, *v_bias, *o_bias, *gate_bias, *up_bias, *down_bias;  // or NULL
  const float *attention_norm, *mlp_norm;                                            // [hidden]
  const float *q_norm, *k_norm;  // [head_dim], per head; or NULL
  void *keys, *values;           // [pages][kv_heads][page_tokens][head_dim] of `dtype`
  // A mixture of experts in place of gate, up and down, or NULL: packed weights [experts][3] in that
  // order, and the router [experts][hidden] of `dtype`.
  const void* const* experts;
  const void* router;
} hb_block;

typedef struct {
  int32_t blocks, hidden, heads, kv_heads, head_dim, rotary_dim, intermediate;
  int32_t dtype;                 // of the cache: float32 or bfloat16
  int32_t activation_bits;       // as in hb_linear; prompts on matrix units use 16
  // Mixtures of experts: their number, intermediate width and how many run per token. An expert's
  // weight is the softmax of the router's logits; normalized: divided by the sum over those that run.
  int32_t experts, expert_width, experts_per_token, normalize_weights;
  int64_t pages;                 // pages in the cache
  int64_t page_tokens;           // positions per page: a multiple of 16, unless there is one page
  int64_t capacity;              // positions in cosines and sines
  float epsilon, scale;          // of the norms; factor of the attention scores
  const float *cosines, *sines;  // [capacity][rotary_dim]
  const float* last_norm;        // [hidden]
  const hb_block* block;
} hb_decoder;

// Rows are tokens of any sequences; those of one sequence are ordered by position, and all earlier
// positions are in the cache. The result of a row does not depend on the others, to the last bit.
// Rows of a prompt may run on matrix units if the cache is bfloat16, with inputs and weights
// rounded to bfloat16: several times faster from some 32 rows on, but not bit-identical.
typedef struct {
  int64_t rows;
  int32_t prompt;
  float* x;                  // [rows][hidden]: the tokens' embeddings; overwritten
  const int64_t* positions;  // [rows]
  const int32_t* tables;     // concatenated page tables of the sequences
  const int64_t* starts;     // [rows]: start in `tables` of the row's sequence
  float* out;                // [rows][hidden]: hidden states after the final norm
} hb_rows;

HB_API int hb_decode(const hb_decoder* decoder, const hb_rows* rows, int threads);

// Conversions of codes to the order of another format, lossless and single-threaded. Arrays are
// contiguous.

// to[c][r] = from[r][c], of words.
HB_API void hb_transpose(const uint32_t* from, int64_t rows, int64_t columns, uint32_t* to);
// 4 bits: words along `in` [in / 8][out] <-> AWQ's along `out` [in][out / 8], nibble i of a word
// being output 0, 2, 4, 6, 1, 3, 5, 7 of its eight. rows: in / 8; columns: out, a multiple of 8.
HB_API void hb_to_awq(const uint32_t* words, int64_t rows, int64_t columns, uint32_t* to);
HB_API void hb_from_awq(const uint32_t* from, int64_t rows, int64_t columns, uint32_t* words);

// GGUF blocks of 32 codes: `grid_bytes` of scale (and minimum), then the codes.
typedef struct {
  int64_t count;       // number of blocks
  int64_t per_group;   // consecutive blocks that share a grid
  int32_t grid_bytes;  // 2, or 4 with a minimum
  int32_t bits;        // 4: byte j has codes j and j + 16; 8: less 128, as int8
} hb_blocks;

// codes: [count][4 * bits] bytes, a stream, lowest bits first. grid: [count /
// per_group][grid_bytes].
HB_API void hb_to_blocks(const hb_blocks* blocks, const uint8_t* codes, const uint8_t* grid,
                         uint8_t* to);
HB_API void hb_from_blocks(const hb_blocks* blocks, const uint8_t* from, uint8_t* codes);

// Dequantizes codes of 2 to 8 bits: out[o][i] = scales[o][g] * (code - zeros[o][g]), rounded once.
typedef struct {
  const uint32_t* words;  // [rows][columns * bits / 32]
  const void* scales;     // [rows][groups] of `scale_dtype`
  const int16_t* zeros;   // [rows][groups]
  int64_t rows, columns, groups, group_size;  // the last group may be shorter
  int32_t bits, scale_dtype;
} hb_codes;

HB_API void hb_expand(const hb_codes* codes, int dtype, void* out);

// Reads `bytes` (a multiple of 64) once and returns a checksum, to measure memory bandwidth.
HB_API uint64_t hb_read(const void* from, int64_t bytes, int threads);

#ifdef __cplusplus
}
#endif

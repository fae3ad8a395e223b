// y = x @ dequantize(W).T on a CPU: the whole interface, plain C, no torch, no Python.
//
// A packed weight is one block of bytes that describes itself (layout.h): every call after hb_pack
// needs no other sizes. Functions that return int give 0, or one of the codes below.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define HB_API __attribute__((visibility("default")))

// Raised whenever a signature, a struct or the packed layout changes; the caller compares.
#define HB_ABI_VERSION 5

enum hb_status {
  HB_OK = 0,
  HB_BAD_ARGUMENT = 1,  // sizes or types that the layout cannot hold
  HB_BAD_BLOB = 2,      // not made by hb_pack of this version
  HB_NO_MEMORY = 3,
  HB_UNKNOWN_ISA = 4,
  HB_ABSENT_ISA = 5,  // known, but this processor lacks it
};

enum hb_dtype { HB_FLOAT32 = 0, HB_BFLOAT16 = 1, HB_FLOAT16 = 2 };

// One quantized linear as the GPTQ format stores it.
typedef struct {
  int32_t bits;         // 2, 3, 4 or 8
  int32_t in_features;  // a multiple of the codes in a run of whole words: 16, 32, 8, 4
  int32_t out_features;
  int32_t group_size;   // a multiple of the same; the last group may be shorter
  int32_t scale_dtype;  // hb_dtype
  int32_t symmetric;    // every zero is 2^(bits-1)
  int32_t has_order;    // columns are permuted: packed column k is stored column order[k]
} hb_linear_shape;

HB_API uint32_t hb_abi_version(void);

// The instruction set in use, and those that this processor can use, best last, comma separated.
HB_API const char* hb_isa(void);
HB_API const char* hb_isas(void);
// Use another one; NULL for the best. Not while another thread computes.
HB_API int hb_select_isa(const char* name);

// Run parallel work by this OpenMP runtime's GOMP_parallel, so that there is one pool of threads in
// the process; NULL: by threads of our own.
typedef void (*hb_gomp_parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
HB_API void hb_use_openmp(hb_gomp_parallel start);

// Bytes that hb_pack fills; negative where the shape cannot be packed.
HB_API int64_t hb_packed_bytes(const hb_linear_shape* shape);
// qweight: [in * bits / 32, out] words. scales: [groups, out]. zeros: [groups, out], NULL where
// symmetric. order: [in], NULL without has_order.
HB_API int hb_pack(const hb_linear_shape* shape, const uint32_t* qweight, const void* scales,
                   const uint8_t* zeros, const int32_t* order, void* packed, int threads);
// Gives qweight back, bit for bit.
HB_API int hb_unpack(const void* packed, uint32_t* qweight, int threads);

// out[m, :] = x[m, :] @ W.T + bias. x: [rows, in], out: [rows, out], bias: [out] or NULL, all of
// `dtype`, contiguous. One pass over the packed weights for every eight rows. activation_bits: 16, or 8
// to round each row's groups of x to multiples of their largest number / 127 first, which 3 bits and
// sums beyond 32 bits do not take.
HB_API int hb_linear(const void* packed, int dtype, const void* x, int64_t rows, const void* bias,
                     void* out, int activation_bits, int threads);
// Whether bf16 input of many rows runs on matrix units, so that hb_linear is the way for it too.
HB_API int hb_tiles(void);
// Output channels [first, last), both multiples of 16 or the end, as numbers [in, last - first] in
// packed column order, rounded once to `dtype` (float32 or bfloat16).
HB_API int hb_dequantize(const void* packed, int64_t first, int64_t last, int dtype, void* out,
                         int threads);

// out[m, :] = weight @ x[m, :] for x [rows, in] and a dense weight [out, in] of float32 or bfloat16,
// read once for every eight rows: the head of a model, which seldom is quantized.
HB_API int hb_dense(const void* weight, int dtype, const float* x, int64_t rows,
                    int64_t in_features, int64_t out_features, float* out, int threads);

// Tokens through all blocks of a decoder: norm, attention with rotary positions over a cache of
// keys and values, residual, norm, gated MLP or experts, residual; then the last norm. All arrays belong to
// the caller. The cache is in pages of some positions each; which pages a sequence has, and in what
// order, its table says.
typedef struct {
  const void *q, *k, *v, *o, *gate, *up, *down;  // packed weights
  const float *q_bias, *k_bias, *v_bias, *o_bias, *gate_bias, *up_bias, *down_bias;  // or NULL
  const float *attention_norm, *mlp_norm;                                            // [hidden]
  const float *q_norm, *k_norm;  // [head_dim] of each head, or NULL
  void *keys, *values;           // [pages][kv_heads][page_tokens][head_dim] of `dtype`
  // In place of gate, up and down, or NULL: packed weights [experts][3] in that order, and the router
  // [experts][hidden] of `dtype`.
  const void* const* experts;
  const void* router;
} hb_block;

typedef struct {
  int32_t blocks, hidden, heads, kv_heads, head_dim, rotary_dim, intermediate;
  int32_t dtype;                 // of the cache: float32 or bfloat16
  int32_t activation_bits;       // as in hb_linear; a prompt on matrix units keeps 16
  // Blocks with experts: how many, of what width between their stages, how many take a token. Their
  // weights are the softmax of the router's scores, or the shares in it of those that take the token.
  int32_t experts, expert_width, experts_per_token, normalise_routes;
  int64_t pages;                 // that the cache has
  int64_t page_tokens;           // positions to a page: a multiple of 16, or all are on one page
  int64_t capacity;              // positions that there are angles for
  float epsilon, scale;          // of the norms; of the attention scores
  const float *cosines, *sines;  // [capacity][rotary_dim]
  const float* last_norm;        // [hidden]
  const hb_block* block;
} hb_decoder;

// Rows are tokens of any sequences; those of one sequence stand in the order of their positions, and
// all positions before them are in the cache. What a row computes does not depend on the others, to
// the last bit. A prompt's rows may run on matrix units, with inputs and weights rounded to bfloat16,
// where the cache is bfloat16: several times faster from some 32 rows on, but not the same numbers.
typedef struct {
  int64_t rows;
  int32_t prompt;
  float* x;                  // [rows][hidden]: the tokens' embeddings; overwritten
  const int64_t* positions;  // [rows]
  const int32_t* tables;     // page numbers of one sequence after the other
  const int64_t* starts;     // [rows]: where in `tables` the row's sequence begins
  float* out;                // [rows][hidden]: the normed hidden states
} hb_rows;

HB_API int hb_decode(const hb_decoder* decoder, const hb_rows* rows, int threads);

// The same codes in another format's order, bit for bit; one thread each. Arrays are contiguous.

// to[c][r] = from[r][c], of words.
HB_API void hb_transpose(const uint32_t* from, int64_t rows, int64_t columns, uint32_t* to);
// 4 bits: words along `in` [in / 8][out] <-> AWQ's along `out` [in][out / 8], nibble i of a word being
// output 0, 2, 4, 6, 1, 3, 5, 7 of its eight. rows: in / 8; columns: out, a multiple of 8.
HB_API void hb_to_awq(const uint32_t* words, int64_t rows, int64_t columns, uint32_t* to);
HB_API void hb_from_awq(const uint32_t* from, int64_t rows, int64_t columns, uint32_t* words);

// GGUF's blocks of 32 codes: `grid_bytes` of scale (and minimum), then the codes.
typedef struct {
  int64_t count;       // of blocks
  int64_t per_group;   // that share a grid, one after another
  int32_t grid_bytes;  // 2, or 4 with a minimum
  int32_t bits;        // 4: byte j has codes j and j + 16; 8: less 128, as int8
} hb_blocks;

// codes: [count][4 * bits] bytes, a stream, lowest bits first. grid: [count / per_group][grid_bytes].
HB_API void hb_to_blocks(const hb_blocks* blocks, const uint8_t* codes, const uint8_t* grid,
                         uint8_t* to);
HB_API void hb_from_blocks(const hb_blocks* blocks, const uint8_t* from, uint8_t* codes);

// Codes of 2 to 8 bits as numbers: out[o][i] = scales[o][g] * (code - zeros[o][g]), rounded once.
typedef struct {
  const uint32_t* words;  // [rows][columns * bits / 32]
  const void* scales;     // [rows][groups] of `scale_dtype`
  const int16_t* zeros;   // [rows][groups]
  int64_t rows, columns, groups, group_size;  // the last group may be shorter
  int32_t bits, scale_dtype;
} hb_codes;

HB_API void hb_expand(const hb_codes* codes, int dtype, void* out);

// Reads `bytes` (a multiple of 64) once, and gives a checksum: how fast this machine can read.
HB_API uint64_t hb_read(const void* from, int64_t bytes, int threads);

#ifdef __cplusplus
}
#endif

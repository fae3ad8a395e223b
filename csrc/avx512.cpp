// AVX-512 (F, BW, DQ, VL): sixteen floats per vector; codes are decoded by table lookup.
#define VECTOR 16
#define MAX_SHARED_ROWS 8
#define PREFETCH_WORDS 2048  // 8 KiB ahead: 2 KiB lose 10% of the bandwidth
#define HAS_DECODE

#include "avx512_decode.h"

#define HAS_PAIRS
typedef __m512i IntVector;

namespace halfbyte {
namespace {

inline IntVector multiply_pairs(IntVector codes, IntVector x) {
  return _mm512_maddubs_epi16(codes, x);
}
inline IntVector add_pairs(IntVector a, IntVector b) { return _mm512_madd_epi16(a, b); }

}  // namespace
}  // namespace halfbyte

#include "vector_attention.h"
#include "integer_kernel.h"

namespace halfbyte {

const Isa AVX512 = {"avx512", multiply_floats, dequantize_floats, multiply_dense,
                    attend,   gate_silu,       round_row,         multiply_integers,
                    nullptr,  nullptr,         nullptr,           nullptr};

}  // namespace halfbyte

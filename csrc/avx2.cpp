// AVX2 with FMA: eight floats per vector, sixteen registers.
#define VECTOR 8
#define MAX_SHARED_ROWS 4
#define PREFETCH_WORDS 2048  // 8 KiB ahead: 2 KiB lose 10% of the bandwidth
#define HAS_PAIRS

#include <immintrin.h>

typedef __m256i IntVector;

namespace halfbyte {
namespace {

inline IntVector multiply_pairs(IntVector codes, IntVector x) {
  return _mm256_maddubs_epi16(codes, x);
}
inline IntVector add_pairs(IntVector a, IntVector b) { return _mm256_madd_epi16(a, b); }

}  // namespace
}  // namespace halfbyte

#include "vector_attention.h"
#include "integer_kernel.h"

namespace halfbyte {

const Isa AVX2 = {"avx2",  multiply_floats, dequantize_floats, multiply_dense,
                  attend,  gate_silu,       round_row,         multiply_integers,
                  nullptr, nullptr,         nullptr,           nullptr};

}  // namespace halfbyte

// AVX2 with FMA: eight floats to a vector, sixteen registers.
#define VECTOR 8
#define MAX_SHARED_ROWS 4
#define PREFETCH_WORDS 2048  // 8 KiB ahead: 2 KiB lose a tenth of the speed of memory
#define HAS_DOT

#include <immintrin.h>

typedef __m256i IntVector;

namespace halfbyte {
namespace {

template <int BITS>
inline __m256i dot(__m256i acc, __m256i codes, int32_t x) {
  const __m256i four = _mm256_set1_epi32(x);
  if constexpr (BITS == 8) {
    // A pair of products has 17 bits: two by two in 32.
    const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(four, 8), 8);
    const __m256i low = _mm256_and_si256(codes, _mm256_set1_epi16(0xFF));
    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(low, even));
    const __m256i high = _mm256_srli_epi16(codes, 8);
    return _mm256_add_epi32(acc, _mm256_madd_epi16(high, _mm256_srai_epi16(four, 8)));
  } else {
    const __m256i pairs = _mm256_maddubs_epi16(codes, four);
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
}

}  // namespace
}  // namespace halfbyte

#include "vector_attention.h"
#include "integer_kernel.h"

namespace halfbyte {

const Isa AVX2 = {"avx2", multiply_floats, dequantize_floats, multiply_dense,    attend,
    gate_silu, round_row, multiply_integers, nullptr, nullptr, nullptr, nullptr};

}  // namespace halfbyte

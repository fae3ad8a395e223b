// AVX-512 (F, BW, DQ, VL): sixteen floats to a vector, codes to numbers by look-up.
#define VECTOR 16
#define MAX_SHARED_ROWS 8
#define PREFETCH_WORDS 2048  // 8 KiB ahead: 2 KiB lose a tenth of the speed of memory
#define HAS_DECODE

#include "avx512_decode.h"

#define HAS_DOT
typedef __m512i IntVector;

namespace halfbyte {
namespace {

template <int BITS>
inline __m512i dot(__m512i acc, __m512i codes, int32_t x) {
  const __m512i four = _mm512_set1_epi32(x);
  if constexpr (BITS == 8) {
    // A pair of products has 17 bits: two by two in 32.
    const __m512i even = _mm512_srai_epi16(_mm512_slli_epi16(four, 8), 8);
    const __m512i low = _mm512_and_si512(codes, _mm512_set1_epi16(0xFF));
    acc = _mm512_add_epi32(acc, _mm512_madd_epi16(low, even));
    const __m512i high = _mm512_srli_epi16(codes, 8);
    return _mm512_add_epi32(acc, _mm512_madd_epi16(high, _mm512_srai_epi16(four, 8)));
  } else {
    const __m512i pairs = _mm512_maddubs_epi16(codes, four);
    return _mm512_add_epi32(acc, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
  }
}

}  // namespace
}  // namespace halfbyte

#include "vector_attention.h"
#include "integer_kernel.h"

namespace halfbyte {

const Isa AVX512 = {"avx512", multiply_floats, dequantize_floats, multiply_dense,    attend,
    gate_silu, round_row, multiply_integers, nullptr, nullptr, nullptr, nullptr};

}  // namespace halfbyte

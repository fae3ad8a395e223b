// Decodes codes by one table lookup, which uses only the low four bits of a lane.
#pragma once
#include <immintrin.h>

namespace halfbyte {
namespace {

template <int BITS>
inline __m512 decode(__m512i words) {
  constexpr int MIDDLE = 1 << (BITS - 1), MASK = (1 << BITS) - 1;
  if constexpr (BITS == 8) {
    const __m512i codes = _mm512_and_si512(words, _mm512_set1_epi32(MASK));
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(codes, _mm512_set1_epi32(MIDDLE)));
  } else {
    // Entries for narrower codes repeat, so that the bits above them are ignored.
#define HB_ENTRY(i) float(((i) & MASK) - MIDDLE)
    const __m512 table =
        _mm512_setr_ps(HB_ENTRY(0), HB_ENTRY(1), HB_ENTRY(2), HB_ENTRY(3), HB_ENTRY(4), HB_ENTRY(5),
                       HB_ENTRY(6), HB_ENTRY(7), HB_ENTRY(8), HB_ENTRY(9), HB_ENTRY(10),
                       HB_ENTRY(11), HB_ENTRY(12), HB_ENTRY(13), HB_ENTRY(14), HB_ENTRY(15));
#undef HB_ENTRY
    return _mm512_permutexvar_ps(words, table);
  }
}

}  // namespace
}  // namespace halfbyte

// AVX-512 (F, BW, DQ, VL): sixteen floats to a vector, codes to numbers by look-up.
#include "avx512_decode.h"
#include "vector_kernel.h"

namespace halfbyte {
namespace {
bool wants_pairs(const Packed&) { return false; }
}  // namespace

const Isa AVX512 = {"avx512", multiply_floats, wants_pairs, dequantize_floats};

}  // namespace halfbyte

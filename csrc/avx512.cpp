// AVX-512 (F, BW, DQ, VL): sixteen floats to a vector, codes to numbers by look-up.
#define VECTOR 16
#define MAX_SHARED_ROWS 8
#define PREFETCH_WORDS 2048  // 8 KiB ahead: 2 KiB lose a tenth of the speed of memory
#define HAS_DECODE

#include "avx512_decode.h"
#include "vector_attention.h"

namespace halfbyte {

const Isa AVX512 = {"avx512",  multiply_floats, dequantize_floats, multiply_dense, attend,
                    gate_silu, nullptr,         nullptr,           nullptr,        nullptr};

}  // namespace halfbyte

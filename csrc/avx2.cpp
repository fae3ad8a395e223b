// AVX2 with FMA: eight floats to a vector, sixteen registers.
#define VECTOR 8
#define MAX_SHARED_ROWS 4
#define PREFETCH_WORDS 2048  // 8 KiB ahead: 2 KiB lose a tenth of the speed of memory
#include "vector_attention.h"

namespace halfbyte {

const Isa AVX2 = {"avx2",    multiply_floats, dequantize_floats, multiply_dense, attend,
                  gate_silu, nullptr,         nullptr,           nullptr,        nullptr};

}  // namespace halfbyte

// NEON, which every 64-bit ARM has: four floats to a vector, 32 registers.
#define VECTOR 4
#define MAX_SHARED_ROWS 4
#define PREFETCH_WORDS 512
#include "vector_attention.h"
#include "integer_kernel.h"

namespace halfbyte {

const Isa NEON = {"neon", multiply_floats, dequantize_floats, multiply_dense,    attend,
    gate_silu, round_row, multiply_integers, nullptr, nullptr, nullptr, nullptr};

}  // namespace halfbyte

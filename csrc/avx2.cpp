// AVX2 with FMA: eight floats to a vector, sixteen registers.
#define VECTOR 8
#define MAX_SHARED_ROWS 4
#define PREFETCH_WORDS 512
#include "vector_kernel.h"

namespace halfbyte {
namespace {
bool wants_pairs(const Packed&) { return false; }
}  // namespace

const Isa AVX2 = {"avx2", multiply_floats, wants_pairs, dequantize_floats};

}  // namespace halfbyte

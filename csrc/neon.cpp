// NEON, which every 64-bit ARM has: four floats to a vector, 32 registers.
#define VECTOR 4
#define MAX_SHARED_ROWS 4
#define PREFETCH_WORDS 512
#include "vector_kernel.h"

namespace halfbyte {
namespace {
bool wants_pairs(const Packed&) { return false; }
}  // namespace

const Isa NEON = {"neon", multiply_floats, wants_pairs, dequantize_floats};

}  // namespace halfbyte

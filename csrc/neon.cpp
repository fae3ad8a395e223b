// NEON, available on every 64-bit ARM CPU: four floats per vector, 32 registers.
#define VECTOR 4
#define MAX_SHARED_ROWS 4
#define PREFETCH_WORDS 512
#define HAS_DOT

#include <arm_neon.h>

typedef int32x4_t IntVector;

namespace halfbyte {
namespace {

template <int BITS>
inline int32x4_t dot(int32x4_t acc, int32x4_t codes, int32_t x) {
  const int8x16_t four = vreinterpretq_s8_s32(vdupq_n_s32(x));
  int8x16_t bytes = vreinterpretq_s8_s32(codes);
  if (BITS == 8) {
    // Signed: code - 128, which the sum of x corrects.
    bytes = veorq_s8(bytes, vdupq_n_s8(-128));
    acc = vaddq_s32(acc, vshlq_n_s32(vpaddlq_s16(vpaddlq_s8(four)), 7));
  }
  const int16x8_t low = vmull_s8(vget_low_s8(bytes), vget_low_s8(four));
  const int16x8_t high = vmull_high_s8(bytes, four);
  return vpadalq_s16(acc, vpaddq_s16(low, high));  // a sum of two products fits 16 bits with sign
}

}  // namespace
}  // namespace halfbyte

#include "vector_attention.h"
#include "integer_kernel.h"

namespace halfbyte {

const Isa NEON = {"neon",  multiply_floats, dequantize_floats, multiply_dense,
                  attend,  gate_silu,       round_row,         multiply_integers,
                  nullptr, nullptr,         nullptr,           nullptr};

}  // namespace halfbyte

// Loads, stores and number format conversions, for the file of each instruction set. Everything is
// static and no templates of the standard library are used, so that the linker cannot substitute
// machine code compiled for another instruction set.
#pragma once
#include <stdint.h>
#include <string.h>

#include "layout.h"

namespace halfbyte {
namespace {

// Loads and stores a vector, aligned or not.
template <class V>
inline V load(const void* from) {
  V value;
  memcpy(&value, from, sizeof(V));
  return value;
}

template <class V>
inline void store(void* to, V value) {
  memcpy(to, &value, sizeof(V));
}

inline float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

inline float from_bf16(uint16_t half) { return from_bits(uint32_t(half) << 16); }

// Rounds to nearest even; NaN stays NaN.
inline uint16_t to_bf16(float value) {
  const uint32_t bits = to_bits(value);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  return uint16_t((bits & 0x7FFFFFFF) > 0x7F800000 ? (bits >> 16) | 0x40 : rounded);
}

inline float from_f16(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16, rest = half & 0x7FFF;
  // Multiplication rebiases the exponent, which also handles subnormals.
  const float size = from_bits(rest << 13) * from_bits(0x77800000);
  return from_bits(sign | (rest >= 0x7C00 ? 0x7F800000 | rest << 13 : to_bits(size)));
}

inline uint16_t to_f16(float value) {
  const uint32_t bits = to_bits(value), sign = (bits >> 16) & 0x8000, size = bits & 0x7FFFFFFF;
  if (size > 0x7F800000) return uint16_t(sign | 0x7E00);
  if (size >= 0x477FF000) return uint16_t(sign | 0x7C00);  // 65520 and above round to infinity
  if (size < 0x38800000) {
    // Subnormal: the addition rounds to multiples of 2^-24.
    return uint16_t(sign | (to_bits(from_bits(size) + 0.5f) - 0x3F000000));
  }
  return uint16_t(sign | ((size + 0xFFF + ((size >> 13) & 1) - 0x38000000) >> 13));
}

inline float load_number(const void* from, int64_t at, int dtype) {
  if (dtype == HB_FLOAT32) return static_cast<const float*>(from)[at];
  const uint16_t half = static_cast<const uint16_t*>(from)[at];
  return dtype == HB_BFLOAT16 ? from_bf16(half) : from_f16(half);
}

inline void store_number(void* to, int64_t at, int dtype, float value) {
  if (dtype == HB_FLOAT32) {
    static_cast<float*>(to)[at] = value;
  } else {
    static_cast<uint16_t*>(to)[at] = dtype == HB_BFLOAT16 ? to_bf16(value) : to_f16(value);
  }
}

// Stores a block's results of one row: adds the bias, rounds once, skips padding channels.
inline void store_block(const Packed& w, const Target& target, int64_t row, int64_t block,
                        const float* sums) {
  const int64_t first = block * LANES;
  const int64_t rest = w.out_features - first;
  const int count = int(rest < LANES ? rest : LANES);
  const int64_t at = row * target.stride + first;
  for (int i = 0; i < count; i++) {
    const float bias = target.bias ? load_number(target.bias, first + i, target.dtype) : 0.0f;
    store_number(target.out, at + i, target.dtype, sums[i] + bias);
  }
}

}  // namespace
}  // namespace halfbyte

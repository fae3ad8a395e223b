// A quantized linear of random codes, and random numbers, for the programs that check the library.
#pragma once
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <memory>
#include <utility>
#include <vector>

#include "halfbyte_cpu.h"

inline uint32_t state = 1;

inline uint32_t draw() {
  state ^= state << 13;
  state ^= state >> 17;
  return state ^= state << 5;
}

inline float uniform() { return float(draw() >> 8) / float(1 << 24); }

inline uint16_t to_bf16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

inline float from_bf16(uint16_t half) {
  const uint32_t bits = uint32_t(half) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

struct Layer {
  hb_linear_shape shape;
  std::vector<uint32_t> qweight;
  std::vector<float> scales;
  std::vector<uint8_t> zeros;
  std::vector<int32_t> order;
  std::vector<double> weight;  // [out, in], columns as stored
};

inline Layer make_layer(int bits, int in, int out, int group, bool symmetric, bool ordered) {
  Layer layer;
  layer.shape = {bits, in, out, group, HB_FLOAT32, symmetric, ordered};
  const int groups = (in + group - 1) / group;
  layer.qweight.assign(size_t(in) * bits / 32 * out, 0);
  for (int k = 0; k < in; k++) layer.order.push_back(k);
  for (int k = in - 1; ordered && k > 0; k--) {
    std::swap(layer.order[k], layer.order[draw() % (k + 1)]);
  }
  for (int i = 0; i < groups * out; i++) {
    layer.scales.push_back(0.01f + 0.02f * uniform());
    layer.zeros.push_back(uint8_t(draw() % (1u << bits)));
  }
  layer.weight.resize(size_t(in) * out);
  for (int place = 0; place < in; place++) {
    const int k = layer.order[place], g = place / group;
    for (int n = 0; n < out; n++) {
      const uint32_t code = draw() % (1u << bits);
      const int bit = k * bits, word = bit / 32, shift = bit % 32;
      layer.qweight[size_t(word) * out + n] |= code << shift;
      if (shift + bits > 32) layer.qweight[size_t(word + 1) * out + n] |= code >> (32 - shift);
      const double zero = symmetric ? 1 << (bits - 1) : layer.zeros[size_t(g) * out + n];
      layer.weight[size_t(n) * in + k] = (code - zero) * layer.scales[size_t(g) * out + n];
    }
  }
  return layer;
}

struct Freed {
  void operator()(void* memory) const { free(memory); }
};

// The layer as the library wants it; null where that failed.
inline std::unique_ptr<void, Freed> pack(const Layer& layer) {
  const size_t bytes = size_t(hb_packed_bytes(&layer.shape) + 63) / 64 * 64;
  std::unique_ptr<void, Freed> packed(aligned_alloc(64, bytes));
  const int failed = hb_pack(&layer.shape, layer.qweight.data(), layer.scales.data(),
                             layer.shape.symmetric ? nullptr : layer.zeros.data(),
                             layer.shape.has_order ? layer.order.data() : nullptr, packed.get(), 2);
  if (failed) packed.reset();
  return packed;
}

// The reference implementation in plain loops, which the other files must match.
//
// Accumulates in fp32: codes times x within a group, the group's sum times its scale. Portable.
#include <math.h>

#include "numbers.h"

namespace halfbyte {
namespace {

uint32_t code_at(const Packed& w, int64_t block, int64_t k, int lane) {
  const int run = run_codes(w.bits), words = run_words(w.bits);
  const uint32_t* from = w.codes + block * w.block_words + k / run * words * LANES + lane;
  const int bit = int(k % run) * w.bits, word = bit / 32, shift = bit % 32;
  uint64_t two = from[word * LANES];
  if (word + 1 < words) two |= uint64_t(from[(word + 1) * LANES]) << 32;
  return uint32_t(two >> shift) & ((1u << w.bits) - 1);
}

float scale_at(const Packed& w, int64_t block, int64_t group, int lane) {
  return load_number(w.scales, (block * w.groups + group) * LANES + lane, w.scale_dtype);
}

float zero_at(const Packed& w, int64_t block, int64_t group, int lane) {
  if (w.symmetric) return float(1 << (w.bits - 1));
  return float(w.zeros[(block * w.groups + group) * LANES + lane]);
}

void multiply(const Packed& w, const Rows& rows, const Target& target, int64_t first,
              int64_t last) {
  for (int64_t block = first; block < last; block++) {
    for (int64_t m = 0; m < rows.rows; m++) {
      float sums[LANES];
      for (int lane = 0; lane < LANES; lane++) {
        float sum = 0;
        for (int64_t g = 0; g < w.groups; g++) {
          const float zero = zero_at(w, block, g, lane);
          float part = 0;
          for (int64_t k = g * w.group_size; k < w.in_features && k < (g + 1) * w.group_size; k++) {
            part += (float(code_at(w, block, k, lane)) - zero) * rows.x[m * w.in_features + k];
          }
          sum += scale_at(w, block, g, lane) * part;
        }
        sums[lane] = sum;
      }
      store_block(w, target, m, block, sums);
    }
  }
}

void round_row(const Packed& w, const float* x, int8_t* codes, float* steps, int32_t* sums) {
  const int run = run_codes(w.bits), quads = run / 4;
  for (int64_t g = 0; g < w.groups; g++) {
    const int64_t first = g * w.group_size;
    const int64_t last = group_end(w, first);
    float most = 0;
    for (int64_t k = first; k < last; k++) {
      if (most == most && !(fabsf(x[k]) <= most)) most = fabsf(x[k]);
    }
    const bool finite = most < INFINITY, counts = finite && most >= 1e-30f;
    steps[g] = counts ? most / 127.0f : finite ? 0.0f : NAN;
    sums[g] = 0;
    for (int64_t k = first; k < last; k++) {
      const int i = int(k % run), code = counts ? int(rintf(x[k] * (127.0f / most))) : 0;
      codes[k - i + i % quads * 4 + i / quads] = int8_t(code);
      sums[g] += code;
    }
  }
}

void multiply_integers(const Packed& w, const Rows& rows, const Target& target, int64_t first,
                       int64_t last) {
  const int run = run_codes(w.bits), quads = run / 4;
  for (int64_t block = first; block < last; block++) {
    for (int64_t m = 0; m < rows.rows; m++) {
      const int8_t* x = rows.integers.codes + m * w.in_features;
      float sums[LANES];
      for (int lane = 0; lane < LANES; lane++) {
        float sum = 0;
        for (int64_t g = 0; g < w.groups; g++) {
          const int32_t zero = int32_t(zero_at(w, block, g, lane));
          int32_t part = 0;
          for (int64_t k = g * w.group_size; k < w.in_features && k < (g + 1) * w.group_size; k++) {
            const int i = int(k % run);
            part += (int32_t(code_at(w, block, k, lane)) - zero) * x[k - i + i % quads * 4 + i / quads];
          }
          const float step = rows.integers.steps[m * w.groups + g];
          sum += scale_at(w, block, g, lane) * step * float(part);
        }
        sums[lane] = sum;
      }
      store_block(w, target, m, block, sums);
    }
  }
}

void dequantize(const Packed& w, int64_t block, int dtype, void* out, int64_t stride) {
  for (int64_t k = 0; k < w.in_features; k++) {
    const int64_t g = k / w.group_size;
    for (int lane = 0; lane < LANES; lane++) {
      const float code = float(code_at(w, block, k, lane)) - zero_at(w, block, g, lane);
      store_number(out, k * stride + lane, dtype, code * scale_at(w, block, g, lane));
    }
  }
}

void multiply_dense(const Dense& d, int64_t first, int64_t last) {
  for (int64_t m = 0; m < d.rows; m++) {
    for (int64_t n = first; n < last; n++) {
      float sum = 0;
      for (int64_t k = 0; k < d.columns; k++) {
        sum += load_number(d.weight, n * d.columns + k, d.dtype) * d.x[m * d.columns + k];
      }
      d.out[m * d.stride + n] = sum;
    }
  }
}

int64_t place_of(const Attention& a, int64_t t) {
  return a.table[t / a.page_tokens] * a.page_stride + t % a.page_tokens * a.width;
}

void attend_head(const Attention& a, const float* query, int64_t length, float* scores,
                 float* out) {
  float largest = -INFINITY, total = 0;
  for (int64_t t = 0; t < length; t++) {
    float dot = 0;
    for (int i = 0; i < a.width; i++) {
      dot += query[i] * load_number(a.keys, place_of(a, t) + i, a.dtype);
    }
    scores[t] = dot * a.scale;
    if (!(scores[t] <= largest)) largest = scores[t];
  }
  for (int64_t t = 0; t < length; t++) total += scores[t] = expf(scores[t] - largest);
  for (int i = 0; i < a.width; i++) {
    float sum = 0;
    for (int64_t t = 0; t < length; t++) {
      sum += scores[t] * load_number(a.values, place_of(a, t) + i, a.dtype);
    }
    out[i] = sum / total;
  }
}

void attend(const Attention& a, float* scores) {
  for (int row = 0; row < a.rows; row++) {
    for (int head = 0; head < a.heads; head++) {
      const int64_t at = row * a.row_stride + head * a.width;
      attend_head(a, a.query + at, a.length_of(row), scores, a.out + at);
    }
  }
}

void gate_silu(float* gate, const float* up, int64_t count) {
  for (int64_t i = 0; i < count; i++) gate[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
}

}  // namespace

const Isa SERIAL = {"serial",  multiply,  dequantize,        multiply_dense, attend,
                    gate_silu, round_row, multiply_integers, nullptr,        nullptr,
                    nullptr,   nullptr};

}  // namespace halfbyte

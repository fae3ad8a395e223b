// One token through all blocks of a decoder, without a word of Python in between.
//
// Everything is fp32 but the cache, which is rounded to the model's own type.
#include <math.h>

#include "isa.h"
#include "numbers.h"
#include "parallel.h"
#include "rows.h"

namespace halfbyte {
namespace {

// A product by one packed weight, as a part of a parallel step.
struct Product {
  const void* packed;
  const float* bias;
  float* out;
};

constexpr int MOST_PRODUCTS = 3;

// Several products of one input at once: threads share all of their blocks.
template <int COUNT>
bool multiply_all(const Isa& isa, const float* x, const Product (&products)[COUNT], float* scratch,
                  int threads) {
  static_assert(COUNT <= MOST_PRODUCTS, "the scratch is sized for so many");
  Packed weights[COUNT];
  Rows rows[COUNT];
  int64_t ends[COUNT], blocks = 0;
  for (int i = 0; i < COUNT; i++) {
    if (!open_packed(products[i].packed, &weights[i])) return false;
    rows[i] = ready_rows(weights[i], HB_FLOAT32, x, 1, scratch);
    scratch += scratch_floats(weights[i], 1);
    ends[i] = blocks += weights[i].blocks;
  }
  parallel_for(blocks, threads, [&](int64_t first, int64_t last) {
    for (int i = 0; i < COUNT; i++) {
      const int64_t start = ends[i] - weights[i].blocks;
      const int64_t from = first > start ? first - start : 0;
      const int64_t to = (last < ends[i] ? last : ends[i]) - start;
      if (from >= to) continue;
      const Target target = {HB_FLOAT32, products[i].bias, products[i].out,
                             weights[i].out_features};
      isa.multiply(weights[i], rows[i], target, from, to);
    }
  });
  return true;
}

void normalise(const float* x, const float* weight, int count, float epsilon, float* out) {
  float lanes[8] = {}, sum = 0;
  int i = 0;
  for (; i + 8 <= count; i += 8) {
    for (int j = 0; j < 8; j++) lanes[j] += x[i + j] * x[i + j];
  }
  for (; i < count; i++) sum += x[i] * x[i];
  for (float lane : lanes) sum += lane;
  const float factor = 1.0f / sqrtf(sum / float(count) + epsilon);
  for (i = 0; i < count; i++) out[i] = x[i] * factor * weight[i];
}

// Each head by its position: the first half of the rotary columns turns with the second.
void rotate(const hb_decoder& d, int64_t position, const float* norm, int heads, float* x) {
  const float* cosines = d.cosines + position * d.rotary_dim;
  const float* sines = d.sines + position * d.rotary_dim;
  const int half = d.rotary_dim / 2;
  for (int head = 0; head < heads; head++, x += d.head_dim) {
    if (norm) normalise(x, norm, d.head_dim, d.epsilon, x);
    for (int i = 0; i < half; i++) {
      const float low = x[i], high = x[i + half];
      x[i] = low * cosines[i] - high * sines[i];
      x[i + half] = high * cosines[i + half] + low * sines[i + half];
    }
  }
}

void cache_heads(const hb_decoder& d, int64_t position, const float* x, void* cache) {
  for (int head = 0; head < d.kv_heads; head++) {
    const int64_t to = (head * d.capacity + position) * d.head_dim;
    for (int i = 0; i < d.head_dim; i++) {
      store_number(cache, to + i, d.dtype, x[head * d.head_dim + i]);
    }
  }
}

void add(float* to, const float* from, int count) {
  for (int i = 0; i < count; i++) to[i] += from[i];
}

}  // namespace
}  // namespace halfbyte

using namespace halfbyte;

extern "C" int hb_decode(const hb_decoder* decoder, float* x, int64_t position, float* out,
                         int threads) {
  const hb_decoder& d = *decoder;
  if (d.dtype != HB_FLOAT32 && d.dtype != HB_BFLOAT16) return HB_BAD_ARGUMENT;
  if (position < 0 || position >= d.capacity) return HB_BAD_ARGUMENT;
  if (d.head_dim % LANES || d.intermediate % LANES || d.heads % d.kv_heads) return HB_BAD_ARGUMENT;
  const Isa& isa = current_isa();
  const int64_t query = int64_t(d.heads) * d.head_dim, kv = int64_t(d.kv_heads) * d.head_dim;
  const int64_t scores_each = (d.capacity + 2 * LANES) / LANES * LANES;
  int64_t widest = d.hidden > d.intermediate ? d.hidden : d.intermediate;
  if (query > widest) widest = query;
  // Room for the inputs of three products: numbers and, at most as many, their sums.
  const int64_t input_floats = MOST_PRODUCTS * (widest * 2 + LANES);
  const int64_t own = 2 * int64_t(d.hidden) + 2 * query + 2 * kv + 2 * int64_t(d.intermediate);
  float* scratch = borrow(own + input_floats + d.heads * scores_each);
  if (!scratch) return HB_NO_MEMORY;
  float *h = scratch, *q = h + d.hidden, *attended = q + query, *k = attended + query, *v = k + kv;
  float *gate = v + kv, *up = gate + d.intermediate, *part = up + d.intermediate;
  float *scores = part + d.hidden, *inputs = scores + d.heads * scores_each;
  const int shared = d.heads / d.kv_heads, each = d.dtype == HB_FLOAT32 ? 4 : 2;

  for (int i = 0; i < d.blocks; i++) {
    const hb_block& b = d.block[i];
    normalise(x, b.attention_norm, d.hidden, d.epsilon, h);
    const Product qkv[] = {{b.q, b.q_bias, q}, {b.k, b.k_bias, k}, {b.v, b.v_bias, v}};
    if (!multiply_all(isa, h, qkv, inputs, threads)) return HB_BAD_BLOB;
    rotate(d, position, b.q_norm, d.heads, q);
    rotate(d, position, b.k_norm, d.kv_heads, k);
    cache_heads(d, position, k, b.keys);
    cache_heads(d, position, v, b.values);
    parallel_for(d.heads, threads, [&](int64_t first, int64_t last) {
      for (int64_t head = first; head < last; head++) {
        const int64_t at = head / shared * d.capacity * d.head_dim * each;
        const Attention a = {q + head * d.head_dim,
                             static_cast<char*>(b.keys) + at,
                             static_cast<char*>(b.values) + at,
                             attended + head * d.head_dim,
                             position + 1,
                             d.head_dim,
                             d.dtype,
                             d.scale};
        isa.attend(a, scores + head * scores_each);
      }
    });
    const Product o[] = {{b.o, b.o_bias, part}};
    if (!multiply_all(isa, attended, o, inputs, threads)) return HB_BAD_BLOB;
    add(x, part, d.hidden);
    normalise(x, b.mlp_norm, d.hidden, d.epsilon, h);
    const Product mlp[] = {{b.gate, b.gate_bias, gate}, {b.up, b.up_bias, up}};
    if (!multiply_all(isa, h, mlp, inputs, threads)) return HB_BAD_BLOB;
    isa.gate_silu(gate, up, d.intermediate);
    const Product down[] = {{b.down, b.down_bias, part}};
    if (!multiply_all(isa, gate, down, inputs, threads)) return HB_BAD_BLOB;
    add(x, part, d.hidden);
  }
  normalise(x, d.last_norm, d.hidden, d.epsilon, out);
  return HB_OK;
}

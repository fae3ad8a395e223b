// Tokens of several sequences through all blocks of a decoder, without a word of Python in between.
//
// Everything is fp32 but the cache, which is rounded to the model's own type.
#include <math.h>

#include <atomic>

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

// Rows that go through the blocks at a time; others wait, and read the weights again.
constexpr int64_t ROWS_AT_A_TIME = 64;

// Numbers from which more than one thread prepares rows between two products.
constexpr int64_t SHARED_NUMBERS = 1 << 14;

// Several products of the same rows at once: threads share all of their blocks.
template <int COUNT>
bool multiply_all(const Isa& isa, const float* x, int64_t rows, const Product (&products)[COUNT],
                  float* scratch, int threads) {
  static_assert(COUNT <= MOST_PRODUCTS, "the scratch is sized for so many");
  Packed weights[COUNT];
  Rows ready[COUNT];
  int64_t ends[COUNT], blocks = 0;
  for (int i = 0; i < COUNT; i++) {
    if (!open_packed(products[i].packed, &weights[i])) return false;
    ready[i] = ready_rows(weights[i], HB_FLOAT32, x, rows, scratch);
    scratch += scratch_floats(weights[i], rows);
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
      isa.multiply(weights[i], ready[i], target, from, to);
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

// Where a position's keys or values of head 0 lie in the cache; other heads follow by pages.
int64_t place_of(const hb_decoder& d, const int32_t* table, int64_t position) {
  const int64_t page = table[position / d.page_tokens], at = position % d.page_tokens;
  return (page * d.kv_heads * d.page_tokens + at) * d.head_dim;
}

void cache_heads(const hb_decoder& d, const int32_t* table, int64_t position, const float* x,
                 void* cache) {
  int64_t to = place_of(d, table, position);
  for (int head = 0; head < d.kv_heads; head++, to += d.page_tokens * d.head_dim) {
    for (int i = 0; i < d.head_dim; i++) {
      store_number(cache, to + i, d.dtype, x[head * d.head_dim + i]);
    }
  }
}

void add(float* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; i++) to[i] += from[i];
}

// Where the numbers of one chunk of rows are kept.
struct Work {
  float *h, *q, *attended, *k, *v, *gate, *up, *part, *inputs;
};

int64_t query_width(const hb_decoder& d) { return int64_t(d.heads) * d.head_dim; }
int64_t kv_width(const hb_decoder& d) { return int64_t(d.kv_heads) * d.head_dim; }

bool borrow_work(const hb_decoder& d, int64_t rows, Work* work) {
  const int64_t query = query_width(d), kv = kv_width(d);
  int64_t widest = d.hidden > d.intermediate ? d.hidden : d.intermediate;
  if (query > widest) widest = query;
  // Room for the inputs of three products: numbers and, at most as many, their sums.
  const int64_t input_floats = MOST_PRODUCTS * (widest * 2 * rows + LANES);
  const int64_t each = 2 * int64_t(d.hidden) + 2 * query + 2 * kv + 2 * int64_t(d.intermediate);
  float* at = borrow(each * rows + input_floats);
  if (!at) return false;
  const auto take = [&](int64_t width) {
    float* const taken = at;
    at += width * rows;
    return taken;
  };
  *work = {take(d.hidden), take(query),          take(query),          take(kv),      take(kv),
           take(d.intermediate), take(d.intermediate), take(d.hidden), at};
  return true;
}

// Each query head of each row over its own sequence's cache.
bool attend_all(const hb_decoder& d, const Isa& isa, const hb_block& b, const hb_rows& rows,
                const Work& work, int threads) {
  const int shared = d.heads / d.kv_heads, each = d.dtype == HB_FLOAT32 ? 4 : 2;
  const int64_t head_stride = d.page_tokens * d.head_dim;
  std::atomic<bool> failed{false};
  parallel_for(rows.rows * d.heads, threads, [&](int64_t first, int64_t last) {
    int64_t longest = 0;
    for (int64_t i = first; i < last; i++) {
      const int64_t length = rows.positions[i / d.heads] + 1;
      if (length > longest) longest = length;
    }
    float* scores = borrow_scores((longest + 2 * LANES) / LANES * LANES);
    if (!scores) failed = true;
    for (int64_t i = first; scores && i < last; i++) {
      const int64_t row = i / d.heads, head = i % d.heads;
      const int64_t at = head / shared * head_stride * each;
      const Attention a = {work.q + i * d.head_dim,
                           static_cast<char*>(b.keys) + at,
                           static_cast<char*>(b.values) + at,
                           rows.tables + rows.starts[row],
                           d.page_tokens,
                           d.kv_heads * head_stride,
                           work.attended + i * d.head_dim,
                           rows.positions[row] + 1,
                           d.head_dim,
                           d.dtype,
                           d.scale};
      isa.attend(a, scores);
    }
  });
  return !failed;
}

int decode_chunk(const hb_decoder& d, const Isa& isa, const hb_rows& rows, int threads) {
  Work w;
  if (!borrow_work(d, rows.rows, &w)) return HB_NO_MEMORY;
  const int64_t hidden = d.hidden, query = query_width(d), kv = kv_width(d), count = rows.rows;
  // Between two products: each row by itself.
  const int some = count * hidden >= SHARED_NUMBERS ? threads : 1;
  const auto each_row = [&](const auto& prepare) {
    parallel_for(count, some, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; row++) prepare(row);
    });
  };
  for (int i = 0; i < d.blocks; i++) {
    const hb_block& b = d.block[i];
    each_row([&](int64_t r) {
      float* x = rows.x + r * hidden;
      if (i) add(x, w.part + r * hidden, hidden);
      normalise(x, b.attention_norm, d.hidden, d.epsilon, w.h + r * hidden);
    });
    const Product qkv[] = {{b.q, b.q_bias, w.q}, {b.k, b.k_bias, w.k}, {b.v, b.v_bias, w.v}};
    if (!multiply_all(isa, w.h, count, qkv, w.inputs, threads)) return HB_BAD_BLOB;
    each_row([&](int64_t r) {
      const int64_t position = rows.positions[r];
      const int32_t* table = rows.tables + rows.starts[r];
      rotate(d, position, b.q_norm, d.heads, w.q + r * query);
      rotate(d, position, b.k_norm, d.kv_heads, w.k + r * kv);
      cache_heads(d, table, position, w.k + r * kv, b.keys);
      cache_heads(d, table, position, w.v + r * kv, b.values);
    });
    if (!attend_all(d, isa, b, rows, w, threads)) return HB_NO_MEMORY;
    const Product o[] = {{b.o, b.o_bias, w.part}};
    if (!multiply_all(isa, w.attended, count, o, w.inputs, threads)) return HB_BAD_BLOB;
    each_row([&](int64_t r) {
      float* x = rows.x + r * hidden;
      add(x, w.part + r * hidden, hidden);
      normalise(x, b.mlp_norm, d.hidden, d.epsilon, w.h + r * hidden);
    });
    const Product mlp[] = {{b.gate, b.gate_bias, w.gate}, {b.up, b.up_bias, w.up}};
    if (!multiply_all(isa, w.h, count, mlp, w.inputs, threads)) return HB_BAD_BLOB;
    each_row([&](int64_t r) {
      isa.gate_silu(w.gate + r * d.intermediate, w.up + r * d.intermediate, d.intermediate);
    });
    const Product down[] = {{b.down, b.down_bias, w.part}};
    if (!multiply_all(isa, w.gate, count, down, w.inputs, threads)) return HB_BAD_BLOB;
  }
  each_row([&](int64_t r) {
    float* x = rows.x + r * hidden;
    if (d.blocks) add(x, w.part + r * hidden, hidden);
    normalise(x, d.last_norm, d.hidden, d.epsilon, rows.out + r * hidden);
  });
  return HB_OK;
}

}  // namespace
}  // namespace halfbyte

using namespace halfbyte;

extern "C" int hb_decode(const hb_decoder* decoder, const hb_rows* rows, int threads) {
  const hb_decoder& d = *decoder;
  if (d.dtype != HB_FLOAT32 && d.dtype != HB_BFLOAT16) return HB_BAD_ARGUMENT;
  if (d.head_dim % LANES || d.intermediate % LANES || d.heads % d.kv_heads) return HB_BAD_ARGUMENT;
  if (d.page_tokens < 1) return HB_BAD_ARGUMENT;
  for (int64_t r = 0; r < rows->rows; r++) {
    const int64_t position = rows->positions[r];
    if (position < 0 || position >= d.capacity) return HB_BAD_ARGUMENT;
    // Kernels take two positions at a time.
    if (d.page_tokens % 2 && position >= d.page_tokens) return HB_BAD_ARGUMENT;
    const int32_t* table = rows->tables + rows->starts[r];
    for (int64_t i = 0; i <= position / d.page_tokens; i++) {
      if (table[i] < 0 || table[i] >= d.pages) return HB_BAD_ARGUMENT;
    }
  }
  // One chunk after the other through all blocks: a later one finds the earlier in the cache.
  for (int64_t first = 0; first < rows->rows; first += ROWS_AT_A_TIME) {
    const int64_t rest = rows->rows - first;
    const hb_rows chunk = {rest < ROWS_AT_A_TIME ? rest : ROWS_AT_A_TIME,
                           rows->x + first * d.hidden,
                           rows->positions + first,
                           rows->tables,
                           rows->starts + first,
                           rows->out + first * d.hidden};
    const int status = decode_chunk(d, current_isa(), chunk, threads);
    if (status != HB_OK) return status;
  }
  return HB_OK;
}

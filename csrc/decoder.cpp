// hb_decode: runs tokens of several sequences through all blocks of a decoder.
//
// Everything is fp32 except the KV cache, which has the model's dtype.
#include <math.h>

#include <atomic>
#include <new>

#include "experts.h"
#include "isa.h"
#include "numbers.h"
#include "parallel.h"
#include "products.h"
#include "rows.h"

namespace halfbyte {
namespace {

// Rows that go through all blocks at a time; the weights are read again for the next ones. On
// matrix units decoding a weight costs as much as multiplying it by a hundred rows, so there the
// number is limited only by WORK_BYTES.
constexpr int64_t ROWS_AT_A_TIME = 128, MOST_TILED_ROWS = 512, WORK_BYTES = 64 << 20;

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

// Applies rotary embedding to each head: the first half of the rotary columns pairs with the
// second.
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

// Offset of a position's key or value of head 0 in the cache; other heads are whole pages apart.
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

// Buffers for one chunk of rows.
struct Work {
  float *h, *q, *attended, *k, *v, *gate, *up, *part, *routed, *logits, *inputs;
};

int64_t query_width(const hb_decoder& d) { return int64_t(d.heads) * d.head_dim; }
int64_t kv_width(const hb_decoder& d) { return int64_t(d.kv_heads) * d.head_dim; }

// Floats per row between the two stages of an MLP, or of all experts that the row is routed to.
int64_t middle_width(const hb_decoder& d) {
  const int64_t routed = int64_t(d.experts_per_token) * d.expert_width;
  return routed > d.intermediate ? routed : d.intermediate;
}

int64_t routed_width(const hb_decoder& d) { return int64_t(d.experts_per_token) * d.hidden; }

// Floats per row, besides the inputs of products.
int64_t work_of_row(const hb_decoder& d) {
  return 2 * int64_t(d.hidden) + 2 * query_width(d) + 2 * kv_width(d) + 2 * middle_width(d) +
         routed_width(d) + d.experts;
}

// Number of rows that go through the blocks together.
int64_t rows_at_a_time(const hb_decoder& d, int64_t rows, bool tiles) {
  if (!tiles) return ROWS_AT_A_TIME;
  int64_t most = WORK_BYTES / 4 / work_of_row(d);
  if (most > MOST_TILED_ROWS) most = MOST_TILED_ROWS;
  if (most < ROWS_AT_A_TIME) most = ROWS_AT_A_TIME;
  // Equal chunks: a small last chunk would decode all weights for a few rows.
  const int64_t parts = (rows + most - 1) / most;
  return (rows + parts - 1) / parts;
}

bool borrow_work(const hb_decoder& d, int64_t rows, bool tiles, Work* work) {
  const int64_t query = query_width(d), kv = kv_width(d);
  int64_t widest = d.hidden > d.intermediate ? d.hidden : d.intermediate;
  if (query > widest) widest = query;
  if (d.expert_width > widest) widest = d.expert_width;
  // Space for the inputs of three products: values or their parts, and at most as many sums.
  int64_t input_floats = 3 * (widest * 5 / 2 * rows + 2 * LANES);
  const int64_t of_experts = expert_input_floats(d, rows);
  if (of_experts > input_floats) input_floats = of_experts;
  if (tiles) {
    // 16-bit values, in tiles of 32 rows and 32 columns.
    input_floats = (rows + 31) / 32 * 32 * ((widest + 31) / 32 * 32) / 2;
  }
  float* at = borrow(work_of_row(d) * rows + input_floats);
  if (!at) return false;
  const auto take = [&](int64_t width) {
    float* const taken = at;
    at += width * rows;
    return taken;
  };
  *work = {take(d.hidden),       take(query),  take(query),           take(kv),        take(kv),
           take(middle_width(d)), take(middle_width(d)), take(d.hidden), take(routed_width(d)),
           take(d.experts),      at};
  return true;
}

// Rows of one sequence that attend together, so that keys and values are read once for them. On
// matrix units enough rows that the cost of transposing keys and values is small.
constexpr int ROWS_TOGETHER = 8, QUERIES_TOGETHER = 256;

int rows_together(const hb_decoder& d, bool tiles) {
  if (!tiles) return ROWS_TOGETHER;
  const int shared = d.heads / d.kv_heads;
  return (QUERIES_TOGETHER / shared + LANES) / LANES * LANES;
}

// Attention of every row over its sequence's cache; heads that share keys and values run together.
bool attend_all(const hb_decoder& d, const Isa& isa, const hb_block& b, const hb_rows& rows,
                bool tiles, const Work& work, int threads) {
  const int shared = d.heads / d.kv_heads, each = d.dtype == HB_FLOAT32 ? 4 : 2;
  const int64_t head_stride = d.page_tokens * d.head_dim;
  const int together = rows_together(d, tiles);
  int64_t groups = 0, starts[MOST_TILED_ROWS + 1];
  for (int64_t r = 0; r < rows.rows; r++) {
    const bool follows = r && rows.starts[r] == rows.starts[r - 1] &&
                         rows.positions[r] == rows.positions[r - 1] + 1;
    if (!follows || r - starts[groups - 1] == together) starts[groups++] = r;
  }
  starts[groups] = rows.rows;
  std::atomic<bool> failed{false};
  const auto attend = [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) {
      // Last rows first: they attend to the most positions.
      const int64_t group = groups - 1 - i / d.kv_heads;
      const int64_t row = starts[group], end = starts[group + 1];
      const int64_t head = i % d.kv_heads, at = head * head_stride * each;
      const int64_t query = row * query_width(d) + head * shared * d.head_dim;
      const Attention a = {work.q + query,
                           static_cast<char*>(b.keys) + at,
                           static_cast<char*>(b.values) + at,
                           rows.tables + rows.starts[row],
                           d.page_tokens,
                           d.kv_heads * head_stride,
                           work.attended + query,
                           query_width(d),
                           rows.positions[end - 1] + 1,
                           int(end - row),
                           shared,
                           d.head_dim,
                           d.dtype,
                           d.scale};
      if (tiles) {
        if (!isa.attend_tiles(a)) failed = true;
        continue;
      }
      float* scratch = borrow_scores(a.scratch());
      if (scratch) isa.attend(a, scratch);
      else failed = true;
    }
  };
  parallel_for(groups * d.kv_heads, threads, attend, tiles ? 1 : 0);
  return !failed;
}

bool takes_tiles(const hb_decoder& d, const Isa& isa, const hb_rows& rows) {
  return rows.prompt && d.dtype == HB_BFLOAT16 && isa.multiply_tiles;
}

int decode_chunk(const hb_decoder& d, const Isa& isa, const hb_rows& rows, int threads) {
  Work w;
  const bool tiles = takes_tiles(d, isa, rows);
  if (!borrow_work(d, rows.rows, tiles, &w)) return HB_NO_MEMORY;
  const Multiplier multiplier = {isa, d, w.inputs, threads};
  const auto multiply = [&](const auto& products) {
    const int count = int(sizeof products / sizeof products[0]);
    return tiles ? multiplier.multiply_tiles(products, count) : multiplier.multiply(products, count);
  };
  const int64_t hidden = d.hidden, query = query_width(d), kv = kv_width(d), count = rows.rows;
  // Work on each row between two products.
  const int some = threads_for(count * hidden, threads);
  const auto each_row = [&](const auto& prepare) {
    parallel_for(count, some, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; row++) prepare(row);
    });
  };
  int status = HB_OK;
  for (int i = 0; i < d.blocks; i++) {
    const hb_block& b = d.block[i];
    each_row([&](int64_t r) {
      float* x = rows.x + r * hidden;
      if (i) add(x, w.part + r * hidden, hidden);
      normalise(x, b.attention_norm, d.hidden, d.epsilon, w.h + r * hidden);
    });
    const Product qkv[] = {{b.q, w.h, count, b.q_bias, w.q},
                           {b.k, w.h, count, b.k_bias, w.k},
                           {b.v, w.h, count, b.v_bias, w.v}};
    if ((status = multiply(qkv)) != HB_OK) return status;
    each_row([&](int64_t r) {
      const int64_t position = rows.positions[r];
      const int32_t* table = rows.tables + rows.starts[r];
      rotate(d, position, b.q_norm, d.heads, w.q + r * query);
      rotate(d, position, b.k_norm, d.kv_heads, w.k + r * kv);
      cache_heads(d, table, position, w.k + r * kv, b.keys);
      cache_heads(d, table, position, w.v + r * kv, b.values);
    });
    if (!attend_all(d, isa, b, rows, tiles, w, threads)) return HB_NO_MEMORY;
    const Product o[] = {{b.o, w.attended, count, b.o_bias, w.part}};
    if ((status = multiply(o)) != HB_OK) return status;
    each_row([&](int64_t r) {
      float* x = rows.x + r * hidden;
      add(x, w.part + r * hidden, hidden);
      normalise(x, b.mlp_norm, d.hidden, d.epsilon, w.h + r * hidden);
    });
    if (b.experts) {
      const Experts experts = {multiplier, b, w.h, w.gate, w.up, w.routed, w.logits, w.part};
      if ((status = experts.run(count, tiles)) != HB_OK) return status;
      continue;
    }
    const Product mlp[] = {{b.gate, w.h, count, b.gate_bias, w.gate},
                           {b.up, w.h, count, b.up_bias, w.up}};
    if ((status = multiply(mlp)) != HB_OK) return status;
    each_row([&](int64_t r) {
      isa.gate_silu(w.gate + r * d.intermediate, w.up + r * d.intermediate, d.intermediate);
    });
    const Product down[] = {{b.down, w.gate, count, b.down_bias, w.part}};
    if ((status = multiply(down)) != HB_OK) return status;
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
  if (d.expert_width % LANES || d.experts_per_token > d.experts) return HB_BAD_ARGUMENT;
  if (d.activation_bits != 16 && d.activation_bits != 8) return HB_BAD_ARGUMENT;
  if (d.page_tokens < 1) return HB_BAD_ARGUMENT;
  for (int i = 0; i < d.blocks; i++) {
    if (!d.block[i].experts) continue;
    if (d.experts_per_token < 1 || !d.block[i].router) return HB_BAD_ARGUMENT;
  }
  if (rows->rows <= 0) return HB_OK;
  for (int64_t r = 0; r < rows->rows; r++) {
    const int64_t position = rows->positions[r];
    if (position < 0 || position >= d.capacity) return HB_BAD_ARGUMENT;
    if (d.page_tokens % LANES && position >= d.page_tokens) return HB_BAD_ARGUMENT;
    const int32_t* table = rows->tables + rows->starts[r];
    for (int64_t i = 0; i <= position / d.page_tokens; i++) {
      if (table[i] < 0 || table[i] >= d.pages) return HB_BAD_ARGUMENT;
    }
  }
  // Chunks run through all blocks in order, so that later ones find earlier ones in the cache.
  const Isa& isa = current_isa();
  const int64_t most = rows_at_a_time(d, rows->rows, takes_tiles(d, isa, *rows));
  for (int64_t first = 0; first < rows->rows; first += most) {
    const int64_t rest = rows->rows - first;
    const hb_rows chunk = {rest < most ? rest : most,
                           rows->prompt,
                           rows->x + first * d.hidden,
                           rows->positions + first,
                           rows->tables,
                           rows->starts + first,
                           rows->out + first * d.hidden};
    try {
      const int status = decode_chunk(d, isa, chunk, threads);
      if (status != HB_OK) return status;
    } catch (const std::bad_alloc&) {
      return HB_NO_MEMORY;
    }
  }
  return HB_OK;
}

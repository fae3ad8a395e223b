// hb_linear, hb_dequantize and hb_dense: prepare the rows of x, then distribute blocks to threads.
#include <stdlib.h>

#include "isa.h"
#include "numbers.h"
#include "parallel.h"
#include "rows.h"

namespace halfbyte {
namespace {

// Rows prepared at a time; further passes find the block in the cache.
constexpr int64_t ROWS_AT_A_TIME = 32;

// The same for int8 rows on matrix units: a quarter of the bytes.
constexpr int64_t INTEGER_ROWS_AT_A_TIME = 256;

// bf16 rows from which matrix units round the weight too, which is less work for many rows
// (bench/measure_cpu_layers.py), and the number of rows copied into tiles at a time.
constexpr int64_t FEWEST_TILED_ROWS = 2, MOST_FEW_ROWS = 16, TILED_ROWS_AT_A_TIME = 1024;

}  // namespace

namespace {

struct Scratch {
  void* memory = nullptr;
  int64_t bytes = 0;

  ~Scratch() { free(memory); }

  void* grow(int64_t wanted) {
    if (bytes < wanted) {
      free(memory);
      bytes = (wanted + 4095) / 4096 * 4096;
      memory = aligned_alloc(64, size_t(bytes));
      if (!memory) bytes = 0;
    }
    return memory;
  }
};

}  // namespace

float* borrow(int64_t floats) {
  static thread_local Scratch scratch;
  return static_cast<float*>(scratch.grow(floats * 4));
}

float* borrow_scores(int64_t floats) {
  static thread_local Scratch scratch;
  return static_cast<float*>(scratch.grow(floats * 4));
}

uint16_t* borrow_stripe(int64_t halves) {
  static thread_local Scratch scratch;
  return static_cast<uint16_t*>(scratch.grow(halves * 2));
}

namespace {

int64_t align_floats(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

void prepare_row(const Packed& w, int dtype, const void* from, int64_t at, float* x) {
  const int64_t columns = w.in_features;
  if (w.order) {
    for (int64_t k = 0; k < columns; k++) x[k] = load_number(from, at + w.order[k], dtype);
  } else if (dtype == HB_FLOAT32) {
    memcpy(x, static_cast<const float*>(from) + at, size_t(columns) * 4);
  } else if (dtype == HB_BFLOAT16) {
    const uint16_t* halves = static_cast<const uint16_t*>(from) + at;
    for (int64_t k = 0; k < columns; k++) x[k] = from_bf16(halves[k]);
  } else {
    const uint16_t* halves = static_cast<const uint16_t*>(from) + at;
    for (int64_t k = 0; k < columns; k++) x[k] = from_f16(halves[k]);
  }
}

void sum_groups(const Packed& w, const float* x, float* sums) {
  for (int64_t g = 0; g < w.groups; g++) {
    const int64_t first = g * w.group_size;
    const int64_t last = group_end(w, first);
    float lanes[8] = {};
    int64_t k = first;
    for (; k + 8 <= last; k += 8) {
      for (int i = 0; i < 8; i++) lanes[i] += x[k + i];
    }
    float sum = 0;
    for (; k < last; k++) sum += x[k];
    for (int i = 0; i < 8; i++) sum += lanes[i];
    sums[g] = sum;
  }
}

}  // namespace

namespace {

// Whether amx_few.h supports the weight: each group is a whole number of steps.
bool has_few(const Packed& w) {
  const bool whole = w.group_size % STEP == 0 || w.groups == 1;
  return current_isa().split_row && (w.bits == 4 || w.bits == 2) && whole &&
         w.in_features % STEP == 0;
}

// bf16 parts whose sum represents any value of the type exactly.
int parts_of(int dtype) { return dtype == HB_BFLOAT16 ? 1 : dtype == HB_FLOAT16 ? 2 : 3; }

Rows split_rows(const Packed& w, int dtype, const void* x, int64_t rows, int parts,
                float* scratch) {
  const int64_t columns = w.in_features, each = TILE / parts;
  float* const sums = scratch;
  uint16_t* const tiles = reinterpret_cast<uint16_t*>(scratch + align_floats(rows * w.groups));
  const bool ready = !w.order && dtype != HB_FLOAT16;
  float* const floats = ready ? nullptr : reinterpret_cast<float*>(borrow_stripe(columns * 2));
  if (!ready && !floats) return {0, nullptr, nullptr, nullptr, 0};
  for (int64_t m = 0; m < rows; m++) {
    const void* row = static_cast<const char*>(x) + m * columns * (dtype == HB_FLOAT32 ? 4 : 2);
    if (!ready) prepare_row(w, dtype, x, m * columns, floats);
    const int64_t first = m / each * each;
    const int64_t height = (rows - first < each ? rows - first : each) * parts;
    uint16_t* const to = tiles + first * parts * columns + (m - first) * parts * STEP;
    current_isa().split_row(w, ready ? dtype : HB_FLOAT32, ready ? row : floats, parts, to,
                            height * STEP, sums + m * w.groups);
  }
  return {rows, nullptr, sums, tiles, parts};
}

}  // namespace

int64_t scratch_floats(const Packed& w, int64_t rows) {
  const int64_t columns = w.in_features;
  const int64_t numbers = has_few(w) ? columns * parts_of(HB_FLOAT32) / 2 : columns;
  const int64_t integers = 2 * align_floats(rows * w.groups) + align_floats(rows * columns / 4);
  const int64_t most = align_floats(rows * w.groups) + align_floats(rows * numbers);
  return most > integers ? most : integers;
}

bool has_integers(const Packed& w) {
  const int64_t most = int64_t(w.groups == 1 ? w.in_features : w.group_size) * 127;
  return w.bits != 3 && most < (int64_t(1) << (31 - w.bits));
}

Rows ready_integers(const Packed& w, int dtype, const void* x, int64_t rows, float* scratch) {
  const int64_t columns = w.in_features;
  float* const steps = scratch;
  int32_t* const sums = reinterpret_cast<int32_t*>(steps + align_floats(rows * w.groups));
  int8_t* const codes = reinterpret_cast<int8_t*>(sums + align_floats(rows * w.groups));
  const bool ready = !w.order && dtype == HB_FLOAT32;
  float* const floats = ready ? nullptr : reinterpret_cast<float*>(borrow_stripe(columns * 2));
  if (!ready && !floats) return {0, nullptr, nullptr, nullptr, 0};
  for (int64_t m = 0; m < rows; m++) {
    if (!ready) prepare_row(w, dtype, x, m * columns, floats);
    const float* row = ready ? static_cast<const float*>(x) + m * columns : floats;
    current_isa().round_row(w, row, codes + m * columns, steps + m * w.groups, sums + m * w.groups);
  }
  return {rows, nullptr, nullptr, nullptr, 0, {codes, steps, sums}};
}

Rows ready_rows(const Packed& w, int dtype, const void* x, int64_t rows, float* scratch,
                int most_parts) {
  const int64_t columns = w.in_features;
  if (has_few(w)) {
    const int parts = parts_of(dtype);
    return split_rows(w, dtype, x, rows, parts < most_parts ? parts : most_parts, scratch);
  }
  if (dtype == HB_FLOAT32 && !w.order && w.symmetric) {
    return {rows, static_cast<const float*>(x), nullptr, nullptr, 0};
  }
  float* sums = scratch + rows * columns;
  for (int64_t m = 0; m < rows; m++) {
    const int64_t at = m * columns;
    prepare_row(w, dtype, x, at, scratch + at);
    if (!w.symmetric) sum_groups(w, scratch + at, sums + m * w.groups);
  }
  return {rows, scratch, w.symmetric ? nullptr : sums, nullptr, 0};
}

int64_t tile_halves(const Packed& w, int64_t rows) {
  const int64_t columns = (w.in_features + STEP - 1) / STEP * STEP;
  return (rows + 2 * TILE - 1) / (2 * TILE) * (2 * TILE) * columns;
}

Rows ready_tiles(const Packed& w, const uint16_t* x, int64_t rows, uint16_t* tiles, int threads) {
  const int64_t columns = w.in_features, steps = (columns + STEP - 1) / STEP;
  const int64_t row_tiles = tile_halves(w, rows) / (steps * TILE_HALVES);
  parallel_for(row_tiles * TILE, threads, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
      const uint16_t* from = x + row * columns;
      for (int64_t step = 0; step < steps; step++) {
        uint16_t* to = tiles + place_of_tile(row / TILE, step, row_tiles, steps) + row % TILE * STEP;
        const int64_t k = step * STEP;
        if (row >= rows) {
          memset(to, 0, STEP * 2);
        } else if (!w.order && k + STEP <= columns) {
          memcpy(to, from + k, STEP * 2);
        } else {
          for (int64_t i = k; i < k + STEP; i++) {
            *to++ = i >= columns ? 0 : from[w.order ? w.order[i] : i];
          }
        }
      }
    }
  });
  return {rows, nullptr, nullptr, tiles, 0};
}

}  // namespace halfbyte

using namespace halfbyte;

namespace {

// Processes a few rows at a time, which share a pass over the weights.
int multiply_rows(const Packed& w, int dtype, const void* x, int64_t rows, const void* bias,
                  void* out, bool integers, int threads) {
  const Isa& isa = current_isa();
  const auto multiply = integers ? isa.multiply_integers : isa.multiply;
  const int64_t each = dtype == HB_FLOAT32 ? 4 : 2;
  const int64_t most = integers && isa.multiply_tiles ? INTEGER_ROWS_AT_A_TIME : ROWS_AT_A_TIME;
  const int64_t at_a_time = rows < most ? rows : most;
  float* scratch = borrow(scratch_floats(w, at_a_time));
  if (!scratch) return HB_NO_MEMORY;
  for (int64_t first = 0; first < rows; first += at_a_time) {
    const int64_t count = rows - first < at_a_time ? rows - first : at_a_time;
    const void* from = static_cast<const char*>(x) + first * w.in_features * each;
    const Rows ready = integers ? ready_integers(w, dtype, from, count, scratch)
                                : ready_rows(w, dtype, from, count, scratch);
    if (!ready.rows) return HB_NO_MEMORY;
    char* to = static_cast<char*>(out) + first * w.out_features * each;
    const Target target = {dtype, bias, to, w.out_features};
    parallel_for(w.blocks, threads,
                 [&](int64_t begin, int64_t end) { multiply(w, ready, target, begin, end); });
  }
  return HB_OK;
}

int multiply_tiles(const Packed& w, const uint16_t* x, int64_t rows, const void* bias,
                   uint16_t* out, int threads) {
  const Isa& isa = current_isa();
  for (int64_t first = 0; first < rows; first += TILED_ROWS_AT_A_TIME) {
    const int64_t rest = rows - first;
    const int64_t count = rest < TILED_ROWS_AT_A_TIME ? rest : TILED_ROWS_AT_A_TIME;
    // Also kept by the thread: fresh pages for a long prompt would cost 10% of the product.
    static thread_local Scratch scratch;
    uint16_t* tiles = static_cast<uint16_t*>(scratch.grow(tile_halves(w, count) * 2));
    if (!tiles) return HB_NO_MEMORY;
    const Rows ready = ready_tiles(w, x + first * w.in_features, count, tiles, threads);
    const Target target = {HB_BFLOAT16, bias, out + first * w.out_features, w.out_features};
    // Two blocks share the loaded rows.
    parallel_for((w.blocks + 1) / 2, threads, [&](int64_t begin, int64_t end) {
      isa.multiply_tiles(w, ready, target, begin * 2, end * 2 < w.blocks ? end * 2 : w.blocks);
    });
  }
  return HB_OK;
}

}  // namespace

extern "C" int hb_linear(const void* packed, int dtype, const void* x, int64_t rows,
                         const void* bias, void* out, int activation_bits, int threads) {
  Packed w;
  if (!open_packed(packed, &w)) return HB_BAD_BLOB;
  if (dtype < HB_FLOAT32 || dtype > HB_FLOAT16) return HB_BAD_ARGUMENT;
  if (activation_bits != 16 && activation_bits != 8) return HB_BAD_ARGUMENT;
  // An expert without tokens.
  if (rows <= 0) return HB_OK;
  if (activation_bits == 8 && has_integers(w)) {
    return multiply_rows(w, dtype, x, rows, bias, out, true, threads);
  }
  const int64_t fewest = has_few(w) ? MOST_FEW_ROWS + 1 : FEWEST_TILED_ROWS;
  if (dtype == HB_BFLOAT16 && rows >= fewest && current_isa().multiply_tiles) {
    return multiply_tiles(w, static_cast<const uint16_t*>(x), rows, bias,
                          static_cast<uint16_t*>(out), threads);
  }
  return multiply_rows(w, dtype, x, rows, bias, out, false, threads);
}

extern "C" int hb_tiles(void) { return current_isa().multiply_tiles != nullptr; }

extern "C" int hb_dequantize(const void* packed, int64_t first, int64_t last, int dtype, void* out,
                             int threads) {
  Packed w;
  if (!open_packed(packed, &w)) return HB_BAD_BLOB;
  if (dtype != HB_FLOAT32 && dtype != HB_BFLOAT16) return HB_BAD_ARGUMENT;
  if (first % LANES || first < 0 || last > w.out_features || first > last) return HB_BAD_ARGUMENT;
  if (last % LANES && last != w.out_features) return HB_BAD_ARGUMENT;
  const Isa& isa = current_isa();
  const int64_t stride = last - first, each = dtype == HB_FLOAT32 ? 4 : 2;
  parallel_for((stride + LANES - 1) / LANES, threads, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++) {
      char* to = static_cast<char*>(out) + b * LANES * each;
      if ((b + 1) * LANES <= stride) {
        isa.dequantize(w, first / LANES + b, dtype, to, stride);
        continue;
      }
      // Padding channels of the last block must not overwrite the next row.
      const int64_t lanes = stride - b * LANES;
      char* block = static_cast<char*>(malloc(size_t(w.in_features) * LANES * each));
      isa.dequantize(w, first / LANES + b, dtype, block, LANES);
      for (int64_t k = 0; k < w.in_features; k++) {
        memcpy(to + k * stride * each, block + k * LANES * each, size_t(lanes * each));
      }
      free(block);
    }
  });
  return HB_OK;
}

extern "C" int hb_dense(const void* weight, int dtype, const float* x, int64_t rows,
                        int64_t in_features, int64_t out_features, float* out, int threads) {
  if (dtype != HB_FLOAT32 && dtype != HB_BFLOAT16) return HB_BAD_ARGUMENT;
  if (rows <= 0) return HB_OK;
  const Isa& isa = current_isa();
  const Dense dense = {weight, dtype, x, rows, in_features, out, out_features};
  parallel_for(out_features, threads, [&](int64_t first, int64_t last) {
    isa.multiply_dense(dense, first, last);
  });
  return HB_OK;
}

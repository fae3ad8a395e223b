// hb_linear, hb_dequantize and hb_dense: make the rows of x ready, then hand out blocks to the threads.
#include <stdlib.h>

#include "isa.h"
#include "numbers.h"
#include "parallel.h"
#include "rows.h"

namespace halfbyte {
namespace {

// Rows that are made ready at a time; more passes over a block that is in the cache.
constexpr int64_t ROWS_AT_A_TIME = 32;

}  // namespace

float* borrow(int64_t floats) {
  struct Scratch {
    float* memory = nullptr;
    int64_t floats = 0;
    ~Scratch() { free(memory); }
  };
  static thread_local Scratch scratch;
  if (scratch.floats < floats) {
    free(scratch.memory);
    scratch.floats = (floats + 4095) / 4096 * 4096;
    scratch.memory = static_cast<float*>(aligned_alloc(64, size_t(scratch.floats) * 4));
    if (!scratch.memory) scratch.floats = 0;
  }
  return scratch.memory;
}

namespace {

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
    const int64_t last =
        first + w.group_size < w.in_features ? first + w.group_size : w.in_features;
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

int64_t scratch_floats(const Packed& w, int64_t rows) {
  return (rows * (w.in_features + w.groups) + LANES - 1) / LANES * LANES;
}

Rows ready_rows(const Packed& w, int dtype, const void* x, int64_t rows, float* scratch) {
  const int64_t columns = w.in_features;
  float* sums = scratch + rows * columns;
  for (int64_t m = 0; m < rows; m++) {
    const int64_t at = m * columns;
    prepare_row(w, dtype, x, at, scratch + at);
    if (!w.symmetric) sum_groups(w, scratch + at, sums + m * w.groups);
  }
  return {rows, scratch, w.symmetric ? nullptr : sums};
}

}  // namespace halfbyte

using namespace halfbyte;

extern "C" int hb_linear(const void* packed, int dtype, const void* x, int64_t rows,
                         const void* bias, void* out, int threads) {
  Packed w;
  if (!open_packed(packed, &w)) return HB_BAD_BLOB;
  if (dtype < HB_FLOAT32 || dtype > HB_FLOAT16) return HB_BAD_ARGUMENT;
  const Isa& isa = current_isa();
  const int64_t columns = w.in_features, each = dtype == HB_FLOAT32 ? 4 : 2;
  const int64_t at_a_time = rows < ROWS_AT_A_TIME ? rows : ROWS_AT_A_TIME;
  float* scratch = borrow(scratch_floats(w, at_a_time));
  if (!scratch) return HB_NO_MEMORY;
  for (int64_t first = 0; first < rows; first += at_a_time) {
    const int64_t count = rows - first < at_a_time ? rows - first : at_a_time;
    const void* from = static_cast<const char*>(x) + first * columns * each;
    const Rows ready = ready_rows(w, dtype, from, count, scratch);
    char* to = static_cast<char*>(out) + first * w.out_features * each;
    const Target target = {dtype, bias, to, w.out_features};
    parallel_for(w.blocks, threads, [&](int64_t begin, int64_t end) {
      isa.multiply(w, ready, target, begin, end);
    });
  }
  return HB_OK;
}

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
      // The last block's missing channels must not land on the next row.
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

extern "C" int hb_dense(const void* weight, int dtype, const float* x, int64_t in_features,
                        int64_t out_features, float* out, int threads) {
  if (dtype != HB_FLOAT32 && dtype != HB_BFLOAT16) return HB_BAD_ARGUMENT;
  const Isa& isa = current_isa();
  parallel_for(out_features, threads, [&](int64_t first, int64_t last) {
    isa.multiply_dense(weight, dtype, x, in_features, first, last, out);
  });
  return HB_OK;
}

// Several products with packed weights in one parallel step; part of decoder.cpp.
#pragma once
#include <vector>

#include "layout.h"
#include "parallel.h"
#include "rows.h"

namespace halfbyte {
namespace {

// Elements from which several threads prepare the rows between two products.
constexpr int64_t SHARED_NUMBERS = 1 << 14;

int threads_for(int64_t numbers, int threads) { return numbers >= SHARED_NUMBERS ? threads : 1; }

struct Product {
  const void* packed;
  const float* x;  // [rows][in]
  int64_t rows;
  const float* bias;  // or null
  float* out;         // [rows][out]
};

// Whether ready_rows gives the same result for both weights.
bool alike(const Packed& a, const Packed& b) {
  return a.bits == b.bits && a.group_size == b.group_size && a.symmetric == b.symmetric &&
         !a.order && !b.order;
}

bool same_input(const Product& a, const Product& b) { return a.x == b.x && a.rows == b.rows; }

// Runs the products of one decoder.
struct Multiplier {
  const Isa& isa;
  const hb_decoder& d;
  float* scratch;
  int threads;

  struct Step {
    Packed weight;
    Rows ready;
    float* scratch;      // null if the prepared input is that of the previous step
    int64_t first, end;  // range among the blocks of all products
  };

  // Computes all products in one parallel loop over their blocks.
  int multiply(const Product* products, int count) const {
    // The vector keeps its capacity, so that a decode step does not allocate.
    static thread_local std::vector<Step> kept;
    std::vector<Step>& steps = kept;
    steps.resize(size_t(count));
    int64_t blocks = 0, numbers = 0;
    float* at = scratch;
    for (int i = 0; i < count; i++) {
      Step& step = steps[size_t(i)];
      if (!open_packed(products[i].packed, &step.weight)) return HB_BAD_BLOB;
      const bool shared = i && same_input(products[i], products[i - 1]) &&
                          alike(step.weight, steps[size_t(i) - 1].weight);
      step.scratch = shared ? nullptr : at;
      step.first = blocks;
      step.end = blocks += step.weight.blocks;
      if (shared) continue;
      at += scratch_floats(step.weight, products[i].rows);
      numbers += products[i].rows * step.weight.in_features;
    }
    // The few products of a dense block mostly share one input.
    const int preparers = count > 3 ? threads_for(numbers, threads) : 1;
    parallel_for(count, preparers, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; i++) {
        if (steps[size_t(i)].scratch) prepare(products[i], steps[size_t(i)]);
      }
    });
    for (int i = 0; i < count; i++) {
      Step& step = steps[size_t(i)];
      if (!step.scratch) step.ready = steps[size_t(i) - 1].ready;
      if (!step.ready.rows) return HB_NO_MEMORY;
    }
    parallel_for(blocks, threads, [&](int64_t first, int64_t last) {
      for (int i = 0; i < count; i++) {
        const Step& step = steps[size_t(i)];
        const int64_t from = first > step.first ? first - step.first : 0;
        const int64_t to = (last < step.end ? last : step.end) - step.first;
        if (from >= to) continue;
        const Target target = {HB_FLOAT32, products[i].bias, products[i].out,
                               step.weight.out_features};
        const auto run = step.ready.integers.codes ? isa.multiply_integers : isa.multiply;
        run(step.weight, step.ready, target, from, to);
      }
    });
    return HB_OK;
  }

  // The same on matrix units: inputs rounded to bf16, sums and results in fp32.
  int multiply_tiles(const Product* products, int count) const {
    uint16_t* const tiles = reinterpret_cast<uint16_t*>(scratch);
    Packed last;
    for (int i = 0; i < count; i++) {
      const Product& product = products[i];
      Packed w;
      if (!open_packed(product.packed, &w)) return HB_BAD_BLOB;
      // Products of the same input share its rows, unless their column orders differ.
      if (i == 0 || !same_input(product, products[i - 1]) || w.order || last.order) {
        parallel_for((product.rows + 31) / 32 * 32, threads, [&](int64_t first, int64_t end) {
          isa.round_rows(w, product.x, product.rows, tiles, first, end);
        });
      }
      const Rows ready = {product.rows, nullptr, nullptr, tiles, 0};
      last = w;
      const Target target = {HB_FLOAT32, product.bias, product.out, w.out_features};
      // Two blocks share the loaded rows.
      parallel_for((w.blocks + 1) / 2, threads, [&](int64_t first, int64_t end) {
        isa.multiply_tiles(w, ready, target, first * 2, end * 2 < w.blocks ? end * 2 : w.blocks);
      });
    }
    return HB_OK;
  }

 private:
  void prepare(const Product& product, Step& step) const {
    // For a bf16 model, inputs keep at least 17 bits.
    const int most_parts = d.dtype == HB_BFLOAT16 ? 2 : 3;
    const bool integers = d.activation_bits == 8 && has_integers(step.weight);
    step.ready = integers ? ready_integers(step.weight, HB_FLOAT32, product.x, product.rows,
                                           step.scratch)
                          : ready_rows(step.weight, HB_FLOAT32, product.x, product.rows,
                                       step.scratch, most_parts);
  }
};

}  // namespace
}  // namespace halfbyte

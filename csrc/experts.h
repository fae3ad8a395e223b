// A mixture of experts in place of an MLP; part of decoder.cpp.
//
//   rows -> router -> softmax -> top experts per row
//        -> rows gathered by expert -> gate, up -> silu -> down -> weighted sum per row
#pragma once
#include <math.h>
#include <string.h>

#include <vector>

#include "layout.h"
#include "parallel.h"
#include "products.h"

namespace halfbyte {
namespace {

// Space for the prepared inputs of all products of one stage.
int64_t expert_input_floats(const hb_decoder& d, int64_t rows) {
  const int64_t routed = rows * d.experts_per_token;
  const int64_t busy = routed < d.experts ? routed : d.experts;
  const int64_t widest = 2 * d.hidden > d.expert_width ? 2 * d.hidden : d.expert_width;
  return widest * 5 / 2 * routed + 2 * LANES * 2 * busy;
}

struct Experts {
  const Multiplier& multiplier;
  const hb_block& b;
  const float* h;  // [rows][hidden]: the input
  float *gate, *up;  // [routed][expert_width]
  float* routed;     // [routed][hidden]: inputs, then results, by expert
  float* logits;     // [rows][experts]
  float* out;        // [rows][hidden]

  // A route is a row and one of its experts.
  struct Routes {
    std::vector<int32_t> expert;  // [rows][experts_per_token], ascending per row
    std::vector<float> weight;    // [rows][experts_per_token]
    std::vector<int64_t> place;   // [rows][experts_per_token]: index among routes sorted by expert
    std::vector<int64_t> first;   // [experts + 1]: index of each expert's first route
    std::vector<Product> products;
  };

  int run(int64_t rows, bool tiles) const {
    const hb_decoder& d = multiplier.d;
    // The vectors keep their capacity, so that a decode step does not allocate.
    static thread_local Routes kept;
    Routes& routes = kept;
    route(rows, routes);
    const int64_t hidden = d.hidden, width = d.expert_width, count = rows * d.experts_per_token;
    const int some = threads_for(count * hidden, multiplier.threads);
    if (rows > 1) {
      each(count, some, [&](int64_t i) {
        memcpy(routed + routes.place[size_t(i)] * hidden, h + i / d.experts_per_token * hidden,
               size_t(hidden) * 4);
      });
    }
    int status = stage(routes, tiles, [&](int32_t expert, int64_t at, int64_t n) {
      // A single row is the input of all of its experts, so it is prepared only once.
      const float* x = rows > 1 ? routed + at * hidden : h;
      routes.products.push_back({b.experts[3 * expert], x, n, nullptr, gate + at * width});
      routes.products.push_back({b.experts[3 * expert + 1], x, n, nullptr, up + at * width});
    });
    if (status != HB_OK) return status;
    each(count, some, [&](int64_t i) {
      multiplier.isa.gate_silu(gate + i * width, up + i * width, width);
    });
    status = stage(routes, tiles, [&](int32_t expert, int64_t at, int64_t n) {
      routes.products.push_back(
          {b.experts[3 * expert + 2], gate + at * width, n, nullptr, routed + at * hidden});
    });
    if (status != HB_OK) return status;
    each(rows, some, [&](int64_t row) { sum(routes, row); });
    return HB_OK;
  }

 private:
  template <class F>
  static void each(int64_t count, int threads, const F& function) {
    parallel_for(count, threads, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; i++) function(i);
    });
  }

  void route(int64_t rows, Routes& routes) const {
    const hb_decoder& d = multiplier.d;
    const size_t count = size_t(rows) * size_t(d.experts_per_token);
    routes.expert.resize(count);
    routes.weight.resize(count);
    routes.place.resize(count);
    routes.first.assign(size_t(d.experts) + 1, 0);
    const Dense router = {b.router, d.dtype, h, rows, d.hidden, logits, d.experts};
    parallel_for(d.experts, multiplier.threads, [&](int64_t first, int64_t last) {
      multiplier.isa.multiply_dense(router, first, last);
    });
    each(rows, threads_for(rows * d.experts, multiplier.threads), [&](int64_t row) {
      const size_t at = size_t(row) * size_t(d.experts_per_token);
      choose(logits + row * d.experts, &routes.expert[at], &routes.weight[at]);
    });
    for (int32_t expert : routes.expert) routes.first[size_t(expert) + 1]++;
    for (int32_t e = 0; e < d.experts; e++) routes.first[size_t(e) + 1] += routes.first[size_t(e)];
    // Counting sort: `first` advances past each expert's routes and is shifted back afterwards.
    for (size_t i = 0; i < count; i++) {
      routes.place[i] = routes.first[size_t(routes.expert[i])]++;
    }
    for (int32_t e = d.experts; e > 0; e--) routes.first[size_t(e)] = routes.first[size_t(e) - 1];
    routes.first[0] = 0;
  }

  // Selects the top experts of a row, in ascending order, and their weights. NaN ranks highest.
  void choose(const float* scores, int32_t* chosen, float* weights) const {
    const hb_decoder& d = multiplier.d;
    const int wanted = d.experts_per_token;
    int count = 0;
    float largest = scores[0];
    for (int32_t e = 0; e < d.experts; e++) {
      if (!(scores[e] <= largest)) largest = scores[e];
      int at = count;
      while (at > 0 && !(scores[e] <= scores[chosen[at - 1]])) at--;
      if (at == wanted) continue;
      if (count < wanted) count++;
      for (int i = count - 1; i > at; i--) chosen[i] = chosen[i - 1];
      chosen[at] = e;
    }
    for (int i = 1; i < wanted; i++) {
      const int32_t expert = chosen[i];
      int at = i;
      for (; at > 0 && chosen[at - 1] > expert; at--) chosen[at] = chosen[at - 1];
      chosen[at] = expert;
    }
    float of_all = 0, of_chosen = 0;
    for (int32_t e = 0; e < d.experts; e++) of_all += expf(scores[e] - largest);
    for (int i = 0; i < wanted; i++) {
      weights[i] = expf(scores[chosen[i]] - largest);
      of_chosen += weights[i];
    }
    const float total = d.normalize_weights ? of_chosen : of_all;
    for (int i = 0; i < wanted; i++) weights[i] /= total;
  }

  // Runs one stage of all experts that have rows; `append` adds the products of one expert.
  template <class F>
  int stage(Routes& routes, bool tiles, const F& append) const {
    const int32_t experts = multiplier.d.experts;
    routes.products.clear();
    for (int32_t e = 0; e < experts; e++) {
      const int64_t at = routes.first[size_t(e)], n = routes.first[size_t(e) + 1] - at;
      if (n) append(e, at, n);
    }
    const int count = int(routes.products.size());
    return tiles ? multiplier.multiply_tiles(routes.products.data(), count)
                 : multiplier.multiply(routes.products.data(), count);
  }

  // Sums in the order of the experts, so that the result does not depend on other rows.
  void sum(const Routes& routes, int64_t row) const {
    const hb_decoder& d = multiplier.d;
    float* to = out + row * d.hidden;
    for (int i = 0; i < d.experts_per_token; i++) {
      const size_t at = size_t(row) * size_t(d.experts_per_token) + size_t(i);
      const float* from = routed + routes.place[at] * d.hidden;
      const float weight = routes.weight[at];
      for (int64_t k = 0; k < d.hidden; k++) to[k] = i ? to[k] + weight * from[k] : weight * from[k];
    }
  }
};

}  // namespace
}  // namespace halfbyte

// A decoder of random layers through the library, and the same in plain double precision.
#pragma once
#include <algorithm>

#include "random_layer.h"

constexpr int HIDDEN = 64, HEADS = 4, KV_HEADS = 2, HEAD = 16, ROTARY = 8, MIDDLE = 96;
constexpr int EXPERTS = 5, CHOSEN = 2, WIDTH = 48;
constexpr int BLOCKS = 2, CAPACITY = 48, PAGE = 16, PAGES = 12;
constexpr double EPSILON = 1e-5, SCALE = 0.25;

using Numbers = std::vector<double>;

inline std::vector<float> draw_many(size_t count, float low, float high) {
  std::vector<float> made;
  for (size_t i = 0; i < count; i++) made.push_back(low + (high - low) * uniform());
  return made;
}

struct TestBlock {
  Layer layers[7] = {
      make_layer(4, HIDDEN, HEADS * HEAD, 32, true, false),
      make_layer(4, HIDDEN, KV_HEADS * HEAD, 32, false, true),
      make_layer(8, HIDDEN, KV_HEADS * HEAD, 64, true, false),
      make_layer(4, HEADS * HEAD, HIDDEN, 32, false, false),
      make_layer(4, HIDDEN, MIDDLE, 32, true, false),
      make_layer(4, HIDDEN, MIDDLE, 32, true, false),
      make_layer(3, MIDDLE, HIDDEN, 96, true, false),
  };
  std::unique_ptr<void, Freed> packed[7];
  std::vector<float> norms[2] = {draw_many(HIDDEN, .5f, 1.5f), draw_many(HIDDEN, .5f, 1.5f)};
  std::vector<float> q_norm = draw_many(HEAD, .5f, 1.5f), k_norm = draw_many(HEAD, .5f, 1.5f);
  std::vector<float> bias = draw_many(HEADS * HEAD, -.1f, .1f);
  std::vector<uint8_t> keys, values;
  // In place of the last three layers, where there are any: gate, up and down of each.
  std::vector<Layer> experts;
  std::vector<std::unique_ptr<void, Freed>> packed_experts;
  std::vector<const void*> expert_addresses;
  std::vector<float> router;  // scores far apart: no rounding may choose another expert
  std::vector<uint16_t> half_router;

  TestBlock(int dtype, bool has_experts) {
    for (int i = 0; i < 7; i++) packed[i] = pack(layers[i]);
    for (int i = 0; has_experts && i < 3 * EXPERTS; i++) {
      const bool down = i % 3 == 2;
      experts.push_back(make_layer(4, down ? WIDTH : HIDDEN, down ? HIDDEN : WIDTH,
                                   down ? 48 : 32, i % 2 == 0, i % 3 == 1));
      packed_experts.push_back(pack(experts.back()));
      expert_addresses.push_back(packed_experts.back().get());
    }
    router = draw_many(EXPERTS * HIDDEN, -2, 2);
    for (float& number : router) {
      half_router.push_back(to_bf16(number));
      if (dtype == HB_BFLOAT16) number = from_bf16(half_router.back());
    }
    // What was never written must not matter: a byte pattern that is no number in either type.
    keys.assign(size_t(PAGES) * KV_HEADS * PAGE * HEAD * (dtype == HB_FLOAT32 ? 4 : 2), 0xFF);
    values = keys;
  }
};

inline Numbers multiply(const Layer& layer, const Numbers& x, const float* bias = nullptr) {
  const int in = layer.shape.in_features;
  Numbers y(layer.shape.out_features);
  for (size_t n = 0; n < y.size(); n++) {
    y[n] = bias ? bias[n] : 0;
    for (int k = 0; k < in; k++) y[n] += layer.weight[n * in + k] * x[k];
  }
  return y;
}

inline Numbers normed(Numbers x, const std::vector<float>& weight) {
  // Heads one after the other, where there are several.
  for (size_t first = 0; first < x.size(); first += weight.size()) {
    double sum = 0;
    for (size_t i = 0; i < weight.size(); i++) sum += x[first + i] * x[first + i];
    const double factor = 1 / sqrt(sum / double(weight.size()) + EPSILON);
    for (size_t i = 0; i < weight.size(); i++) x[first + i] *= factor * weight[i];
  }
  return x;
}

inline void turn(Numbers& x, const float* cosines, const float* sines) {
  for (size_t head = 0; head < x.size(); head += HEAD) {
    for (int i = 0; i < ROTARY / 2; i++) {
      const double low = x[head + i], high = x[head + i + ROTARY / 2];
      x[head + i] = low * cosines[i] - high * sines[i];
      x[head + i + ROTARY / 2] = high * cosines[i + ROTARY / 2] + low * sines[i + ROTARY / 2];
    }
  }
}

inline Numbers mlp(const Layer* layers, const Numbers& x) {
  Numbers gate = multiply(layers[0], x);
  const Numbers up = multiply(layers[1], x);
  for (size_t i = 0; i < gate.size(); i++) gate[i] = gate[i] / (1 + exp(-gate[i])) * up[i];
  return multiply(layers[2], gate);
}

// The best experts, weighted by their shares among each other.
inline Numbers mixture(const TestBlock& b, const Numbers& x) {
  std::vector<std::pair<double, int>> scores;
  for (int e = 0; e < EXPERTS; e++) {
    double score = 0;
    for (int k = 0; k < HIDDEN; k++) score += b.router[e * HIDDEN + k] * x[k];
    scores.emplace_back(-score, e);
  }
  std::sort(scores.begin(), scores.end());
  double total = 0;
  for (int i = 0; i < CHOSEN; i++) total += exp(scores[0].first - scores[i].first);
  Numbers sum(HIDDEN);
  for (int i = 0; i < CHOSEN; i++) {
    const Numbers one = mlp(&b.experts[3 * scores[i].second], x);
    const double share = exp(scores[0].first - scores[i].first) / total;
    for (int k = 0; k < HIDDEN; k++) sum[k] += share * one[k];
  }
  return sum;
}

// The last states [tokens][hidden] of one sequence.
inline std::vector<Numbers> decode_exactly(const std::vector<TestBlock>& blocks,
                                           const std::vector<float>& last_norm,
                                           const std::vector<float>& cosines,
                                           const std::vector<float>& sines,
                                           std::vector<Numbers> states) {
  for (const TestBlock& b : blocks) {
    std::vector<Numbers> keys, values;
    for (size_t t = 0; t < states.size(); t++) {
      Numbers& x = states[t];
      const Numbers h = normed(x, b.norms[0]);
      Numbers q = normed(multiply(b.layers[0], h, b.bias.data()), b.q_norm);
      Numbers k = normed(multiply(b.layers[1], h), b.k_norm);
      turn(q, &cosines[t * ROTARY], &sines[t * ROTARY]);
      turn(k, &cosines[t * ROTARY], &sines[t * ROTARY]);
      keys.push_back(k);
      values.push_back(multiply(b.layers[2], h));
      Numbers attended(HEADS * HEAD);
      for (int head = 0; head < HEADS; head++) {
        const int own = head / (HEADS / KV_HEADS) * HEAD;
        Numbers shares;
        double total = 0;
        for (size_t s = 0; s <= t; s++) {
          double score = 0;
          for (int i = 0; i < HEAD; i++) score += q[head * HEAD + i] * keys[s][own + i];
          shares.push_back(exp(score * SCALE));
          total += shares.back();
        }
        for (size_t s = 0; s <= t; s++) {
          for (int i = 0; i < HEAD; i++) {
            attended[head * HEAD + i] += shares[s] / total * values[s][own + i];
          }
        }
      }
      const Numbers o = multiply(b.layers[3], attended);
      for (int i = 0; i < HIDDEN; i++) x[i] += o[i];
      const Numbers m = normed(x, b.norms[1]);
      const Numbers down = b.experts.empty() ? mlp(&b.layers[4], m) : mixture(b, m);
      for (int i = 0; i < HIDDEN; i++) x[i] += down[i];
    }
  }
  for (Numbers& x : states) x = normed(x, last_norm);
  return states;
}

// How far the library's states are from exact ones, as a share of their length: three sequences, run
// together in pieces, over pages in no order.
inline double check_decoder(int dtype) {
  std::vector<TestBlock> blocks;
  for (int i = 0; i < BLOCKS; i++) blocks.emplace_back(dtype, i == 1);
  const auto last_norm = draw_many(HIDDEN, .5f, 1.5f);
  std::vector<float> cosines, sines;
  for (int i = 0; i < CAPACITY * ROTARY; i++) {
    const float angle = float(i / ROTARY) / float(1 + i % ROTARY % (ROTARY / 2) * 3);
    cosines.push_back(cosf(angle));
    sines.push_back(sinf(angle));
  }
  std::vector<hb_block> parts;
  for (TestBlock& b : blocks) {
    hb_block part = {};
    const void** places[] = {&part.q, &part.k, &part.v, &part.o, &part.gate, &part.up, &part.down};
    for (int i = 0; i < 7; i++) {
      if (!b.packed[i]) return INFINITY;
      *places[i] = b.packed[i].get();
    }
    part.q_bias = b.bias.data();
    part.attention_norm = b.norms[0].data();
    part.mlp_norm = b.norms[1].data();
    part.q_norm = b.q_norm.data();
    part.k_norm = b.k_norm.data();
    part.keys = b.keys.data();
    part.values = b.values.data();
    if (!b.experts.empty()) {
      for (const void* address : b.expert_addresses) {
        if (!address) return INFINITY;
      }
      part.experts = b.expert_addresses.data();
      part.router = dtype == HB_FLOAT32 ? static_cast<const void*>(b.router.data())
                                        : b.half_router.data();
    }
    parts.push_back(part);
  }
  const hb_decoder decoder = {BLOCKS,        HIDDEN,         HEADS,        KV_HEADS,
                              HEAD,          ROTARY,         MIDDLE,       dtype,
                              16,            EXPERTS,        WIDTH,        CHOSEN,
                              1,             PAGES,          PAGE,         CAPACITY,
                              float(EPSILON), float(SCALE),  cosines.data(), sines.data(),
                              last_norm.data(), parts.data()};
  const int lengths[] = {40, 9, 17}, tables[] = {7, 2, 11, 5, 0, 9, 4}, starts[] = {0, 3, 5};
  std::vector<float> inputs[3];
  std::vector<std::vector<Numbers>> exact;
  for (int s = 0; s < 3; s++) {
    inputs[s] = draw_many(size_t(lengths[s]) * HIDDEN, -1, 1);
    std::vector<Numbers> states;
    for (int t = 0; t < lengths[s]; t++) {
      states.emplace_back(inputs[s].begin() + t * HIDDEN, inputs[s].begin() + (t + 1) * HIDDEN);
    }
    exact.push_back(decode_exactly(blocks, last_norm, cosines, sines, states));
  }
  double error = 0, size = 0;
  int done[3] = {};
  // Prompts of 33, 5 and 16 tokens, then one token each at a time; what has ended stays away.
  for (int round = 0, left = 1; left; round++) {
    left = 0;
    std::vector<float> x;
    std::vector<int64_t> positions, places;
    std::vector<std::pair<int, int>> whose;
    for (int s = 0; s < 3; s++) {
      const int first[] = {33, 5, 16};
      for (int i = 0; i < (round ? 1 : first[s]) && done[s] < lengths[s]; i++, done[s]++) {
        const float* from = &inputs[s][size_t(done[s]) * HIDDEN];
        x.insert(x.end(), from, from + HIDDEN);
        positions.push_back(done[s]);
        places.push_back(starts[s]);
        whose.emplace_back(s, done[s]);
      }
      left |= done[s] < lengths[s];
    }
    std::vector<float> out(x.size());
    const hb_rows rows = {int64_t(whose.size()), round == 0,     x.data(), positions.data(),
                          tables,                places.data(), out.data()};
    if (hb_decode(&decoder, &rows, 2) != HB_OK) return INFINITY;
    for (size_t r = 0; r < whose.size(); r++) {
      for (int i = 0; i < HIDDEN; i++) {
        const double wanted = exact[whose[r].first][whose[r].second][i];
        error += (out[r * HIDDEN + i] - wanted) * (out[r * HIDDEN + i] - wanted);
        size += wanted * wanted;
      }
    }
  }
  return sqrt(error / size);
}

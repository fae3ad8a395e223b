// The library against plain double precision, without Python: run under a sanitizer, under
// valgrind, or on another processor's emulator. Prints one line per instruction set; exits 1 on a
// difference.
#include <stdio.h>

#include <string>

#include "check_decoder.h"
#include "check_respell.h"
#include "random_layer.h"

namespace {

// Largest error of a product as a share of its bound; above 1 is wrong.
double check(const Layer& layer, int dtype, int rows) {
  const int in = layer.shape.in_features, out = layer.shape.out_features;
  const auto owned = pack(layer);
  const void* packed = owned.get();
  if (!packed) return INFINITY;
  std::vector<uint32_t> again(layer.qweight.size());
  int failed = hb_unpack(packed, again.data(), 2) | (again != layer.qweight);
  std::vector<float> x(size_t(rows) * in), y(size_t(rows) * out);
  std::vector<uint16_t> halves(x.size()), results(y.size());
  for (size_t i = 0; i < x.size(); i++) {
    halves[i] = to_bf16(x[i] = uniform() * 2 - 1);
    if (dtype == HB_BFLOAT16) x[i] = from_bf16(halves[i]);
  }
  const bool half = dtype == HB_BFLOAT16;
  const void* from = half ? (const void*)halves.data() : x.data();
  void* to = half ? (void*)results.data() : y.data();
  failed |= hb_linear(packed, dtype, from, rows, nullptr, to, 16, 2);
  // Products of float32 do not depend on the other rows, to the last bit.
  std::vector<float> single(out);
  for (int m = 0; m < rows && !half; m++) {
    failed |= hb_linear(packed, dtype, &x[size_t(m) * in], 1, nullptr, single.data(), 16, 1);
    failed |= memcmp(single.data(), &y[size_t(m) * out], size_t(out) * 4) != 0;
  }
  if (failed) return INFINITY;
  const double unit = half ? 3.0 / 256 : 3.0 / (1 << 24);
  const double bound = unit + 1.2e-7 * (in + 256);
  double worst = 0;
  for (int m = 0; m < rows; m++) {
    for (int n = 0; n < out; n++) {
      double exact = 0, size = 0;
      for (int k = 0; k < in; k++) {
        const double term = layer.weight[size_t(n) * in + k] * x[size_t(m) * in + k];
        exact += term;
        size += fabs(term);
      }
      const size_t at = size_t(m) * out + n;
      const double found = half ? from_bf16(results[at]) : y[at];
      worst = fmax(worst, fabs(found - exact) / (bound * size + 1e-30));
    }
  }
  return worst;
}

// The same with activations of 8 bits: each number of x is off by half a step of its group at most.
double check_integers(const Layer& layer, int rows) {
  const int in = layer.shape.in_features, out = layer.shape.out_features;
  const int group = layer.shape.group_size;
  const auto owned = pack(layer);
  if (!owned) return INFINITY;
  std::vector<float> x(size_t(rows) * in), y(size_t(rows) * out);
  for (size_t i = 0; i < x.size(); i++) x[i] = (uniform() * 2 - 1) * float(1 << (i % 7));
  if (hb_linear(owned.get(), HB_FLOAT32, x.data(), rows, nullptr, y.data(), 8, 2)) return INFINITY;
  std::vector<int> group_of(in);
  for (int place = 0; place < in; place++) group_of[layer.order[place]] = place / group;
  double worst = 0;
  for (int m = 0; m < rows; m++) {
    const float* row = &x[size_t(m) * in];
    std::vector<double> most(size_t(in / group + 1));
    for (int k = 0; k < in; k++) most[group_of[k]] = fmax(most[group_of[k]], fabs(row[k]));
    for (int n = 0; n < out; n++) {
      double exact = 0, bound = 1e-30;
      for (int k = 0; k < in; k++) {
        const double weight = layer.weight[size_t(n) * in + k];
        exact += weight * row[k];
        bound += fabs(weight) * (most[group_of[k]] * (1.0001 / 254 + 1.2e-7 * (in + 256)));
      }
      worst = fmax(worst, fabs(y[size_t(m) * out + n] - exact) / bound);
    }
  }
  return worst;
}

}  // namespace

int main() {
  struct Shape {
    int bits, in, out, group;
  };
  const Shape shapes[] = {{4, 64, 64, 32},  {4, 576, 40, 128}, {4, 144, 24, 16},
                          {4, 136, 8, 136}, {8, 100, 24, 20},  {3, 288, 32, 96},
                          {2, 144, 48, 16}, {2, 256, 16, 64},  {4, 1024, 32, 512},
                          {4, 1160, 40, 232}};
  const std::string isas = hb_isas();
  bool wrong = !check_respellings();
  printf("respellings are %s\n", wrong ? "wrong" : "the same");
  for (size_t start = 0; start < isas.size();) {
    const size_t end = isas.find(',', start);
    const std::string isa = isas.substr(start, end - start);
    start = end == std::string::npos ? isas.size() : end + 1;
    if (hb_select_isa(isa.c_str()) != HB_OK) return 1;
    double worst = 0;
    for (const Shape& s : shapes) {
      for (int kind = 0; kind < 3; kind++) {
        const Layer layer = make_layer(s.bits, s.in, s.out, s.group, kind == 0, kind == 2);
        for (int rows : {1, 2, 3, 7, 8, 16, 35}) {
          worst = fmax(worst, check(layer, HB_FLOAT32, rows));
          worst = fmax(worst, check(layer, HB_BFLOAT16, rows));
          if (s.bits != 3) worst = fmax(worst, check_integers(layer, rows));
        }
      }
    }
    printf("%s: largest error %.3f of the bound\n", isa.c_str(), worst);
    wrong |= !(worst <= 1);
    for (int dtype : {HB_FLOAT32, HB_BFLOAT16}) {
      const double deviation = check_decoder(dtype);
      printf("%s: a decoder's states deviate by %.2g, %s cache\n", isa.c_str(), deviation,
             dtype == HB_FLOAT32 ? "float32" : "bfloat16");
      wrong |= !(deviation <= (dtype == HB_FLOAT32 ? 2e-6 : 2e-2));
    }
  }
  return wrong;
}

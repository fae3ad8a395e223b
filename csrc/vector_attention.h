// Attention over pages in vectors of VECTOR floats; included by the file of each instruction set
// instead of vector_kernel.h, which it includes.
//
// Scores, probabilities and sums are fp32. VECTOR positions are processed at a time: their keys are
// converted to float32 once for all rows and heads that share them, and scores are the lane sums of
// VECTOR products. The order of summation does not depend on the number of rows or on the pages.
#pragma once
#include "vector_kernel.h"

namespace halfbyte {
namespace {

template <int... LANE>
struct LaneList {};

#if VECTOR >= 16
typedef LaneList<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15> AllLanes;
#elif VECTOR >= 8
typedef LaneList<0, 1, 2, 3, 4, 5, 6, 7> AllLanes;
#else
typedef LaneList<0, 1, 2, 3> AllLanes;
#endif

// Index of a lane's first summand in the concatenation of a and b, in blocks of HALF lanes.
template <int HALF>
constexpr int fold_from(int lane) {
  const int block = lane / (2 * HALF) * (2 * HALF), place = lane % (2 * HALF);
  return place < HALF ? block + place : VECTOR + block + place - HALF;
}

template <int HALF, int... LANE>
inline Floats fold(Floats a, Floats b, LaneList<LANE...>) {
  return __builtin_shufflevector(a, b, fold_from<HALF>(LANE)...) +
         __builtin_shufflevector(a, b, (fold_from<HALF>(LANE) + HALF)...);
}

// Lane j of the result is the sum of all lanes of parts[j]; overwrites parts.
inline Floats add_each(Floats (&parts)[VECTOR]) {
#if VECTOR >= 16
  for (int j = 0; j < 8; j++) parts[j] = fold<8>(parts[j], parts[j + 8], AllLanes());
#endif
#if VECTOR >= 8
  for (int j = 0; j < 4; j++) parts[j] = fold<4>(parts[j], parts[j + 4], AllLanes());
#endif
  for (int j = 0; j < 2; j++) parts[j] = fold<2>(parts[j], parts[j + 2], AllLanes());
  return fold<1>(parts[0], parts[1], AllLanes());
}

inline void prefetch(const char* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i);
}

// Calls use(t, values, count) for strips of VECTOR positions from t on, fewer at the end of the
// text, with their keys or values [count][width] as float32. Pages consist of whole strips, so the
// order of summation does not depend on the pages.
template <bool HALF, class F>
inline void walk_strips(const Attention& a, const void* cache, float* numbers, const F& use) {
  const int64_t width = a.width;
  for (int64_t start = 0, page = 0; start < a.length; start += a.page_tokens, page++) {
    const int64_t from = a.table[page] * a.page_stride;
    const int64_t end = start + a.page_tokens < a.length ? start + a.page_tokens : a.length;
    for (int64_t t = start; t < end; t += VECTOR) {
      const int count = int(end - t < VECTOR ? end - t : VECTOR);
      const int64_t at = from + (t - start) * width;
      // The hardware prefetcher cannot predict the next page.
      if (t + VECTOR < a.length) {
        const int64_t next =
            t + VECTOR < end ? at + VECTOR * width : a.table[page + 1] * a.page_stride;
        prefetch(static_cast<const char*>(cache) + next * (HALF ? 2 : 4),
                 VECTOR * width * (HALF ? 2 : 4));
      }
      if (HALF) {
        for (int64_t i = 0, all = count * width; i < all; i += VECTOR) {
          store(numbers + i, load_numbers<HALF>(cache, at + i));
        }
        use(t, numbers, count);
      } else {
        use(t, static_cast<const float*>(cache) + at, count);
      }
    }
  }
}

// The largest score, or NaN if any score is NaN.
inline float find_largest(const float* scores, int64_t length) {
  Floats largest = Floats{} - 3e38f;
  for (int64_t t = 0; t < length; t += VECTOR) {
    const Floats x = load<Floats>(scores + t);
    const Ints keep = x <= largest;
    largest = (Floats)(((Ints)largest & keep) | ((Ints)x & ~keep));
  }
  float found = largest[0];
  for (int i = 1; i < VECTOR; i++) {
    if (!(largest[i] <= found)) found = largest[i];
  }
  return found;
}

// parts[j] += query times key j, lane by lane, WIDE vectors at a time; `first`: initializes parts.
template <int WIDE>
inline void multiply_keys(const float* query, const float* keys, int64_t width, int count,
                          bool first, Floats (&parts)[VECTOR]) {
  Floats own[WIDE];
  for (int w = 0; w < WIDE; w++) own[w] = load<Floats>(query + w * VECTOR);
  for (int j = 0; j < count; j++) {
    Floats sum = own[0] * load<Floats>(keys + j * width);
#pragma GCC unroll 4
    for (int w = 1; w < WIDE; w++) sum += own[w] * load<Floats>(keys + j * width + w * VECTOR);
    parts[j] = first ? sum : parts[j] + sum;
  }
}

// out += the sum of `count` values, weighted by their probabilities, WIDE vectors at a time.
template <int WIDE>
inline void add_values(const float* shares, const float* values, int64_t width, int count,
                       float* out) {
  Floats sums[2][WIDE] = {};
  for (int j = 0; j < count; j += 2) {
    const float* one = values + j * width;
    // Beyond the text: probability 0, with a valid value.
    const float* other = j + 1 < count ? one + width : one;
    const float share = j + 1 < count ? shares[j + 1] : 0.0f;
#pragma GCC unroll 4
    for (int w = 0; w < WIDE; w++) {
      sums[0][w] += shares[j] * load<Floats>(one + w * VECTOR);
      sums[1][w] += share * load<Floats>(other + w * VECTOR);
    }
  }
  for (int w = 0; w < WIDE; w++) {
    store(out + w * VECTOR, load<Floats>(out + w * VECTOR) + (sums[0][w] + sums[1][w]));
  }
}

template <bool HALF>
void attend_to(const Attention& a, float* scratch) {
  const int64_t stride = a.scores_stride(), width = a.width;
  float* numbers = scratch + a.rows * a.heads * stride;
  // Calls use(query or out, scores, length) for every head of every row.
  const auto each_head = [&](const auto& use) {
    for (int row = 0; row < a.rows; row++) {
      for (int head = 0; head < a.heads; head++) {
        use(row * a.row_stride + head * width, scratch + (row * a.heads + head) * stride,
            a.length_of(row));
      }
    }
  };
  walk_strips<HALF>(a, a.keys, numbers, [&](int64_t t, const float* keys, int all) {
    each_head([&](int64_t at, float* scores, int64_t length) {
      const int count = int(length - t < all ? length - t : all);
      if (count <= 0) return;
      const float* query = a.query + at;
      Floats parts[VECTOR];
      int64_t i = 0;
      for (; i + 4 * VECTOR <= width; i += 4 * VECTOR) {
        multiply_keys<4>(query + i, keys + i, width, count, i == 0, parts);
      }
      for (; i < width; i += VECTOR) {
        multiply_keys<1>(query + i, keys + i, width, count, i == 0, parts);
      }
      for (int j = count; j < VECTOR; j++) parts[j] = Floats{};
      store(scores + t, add_each(parts) * a.scale);
    });
  });
  each_head([&](int64_t at, float* scores, int64_t length) {
    for (int i = 0; i < VECTOR; i++) scores[length + i] = -3e38f;
    const float largest = find_largest(scores, length);
    Floats total = {};
    for (int64_t t = 0; t < length; t += VECTOR) {
      const Floats share = exp_of_negative(load<Floats>(scores + t) - largest);
      store(scores + t, share);
      total += share;
    }
    scores[length + VECTOR - 1] = 1.0f / add_lanes(total);  // used at the end
    for (int64_t i = 0; i < width; i += VECTOR) store(a.out + at + i, Floats{});
  });
  walk_strips<HALF>(a, a.values, numbers, [&](int64_t t, const float* values, int all) {
    each_head([&](int64_t at, float* scores, int64_t length) {
      const int count = int(length - t < all ? length - t : all);
      if (count <= 0) return;
      float* out = a.out + at;
      int64_t i = 0;
      for (; i + 4 * VECTOR <= width; i += 4 * VECTOR) {
        add_values<4>(scores + t, values + i, width, count, out + i);
      }
      for (; i < width; i += VECTOR) {
        add_values<1>(scores + t, values + i, width, count, out + i);
      }
    });
  });
  each_head([&](int64_t at, float* scores, int64_t length) {
    const float each = scores[length + VECTOR - 1];
    float* out = a.out + at;
    for (int64_t i = 0; i < width; i += VECTOR) store(out + i, load<Floats>(out + i) * each);
  });
}

void attend(const Attention& a, float* scratch) {
  return a.dtype == HB_BFLOAT16 ? attend_to<true>(a, scratch) : attend_to<false>(a, scratch);
}

}  // namespace
}  // namespace halfbyte

// Respellings against codes that are moved one by one, and back again.
#pragma once
#include "random_layer.h"

inline std::vector<uint32_t> draw_words(size_t count) {
  std::vector<uint32_t> words(count);
  for (uint32_t& word : words) word = draw();
  return words;
}

// Code k of a stream, lowest bits first.
inline uint32_t code_of(const uint32_t* words, int64_t k, int bits) {
  uint32_t code = 0;
  for (int bit = 0; bit < bits; bit++) {
    const int64_t at = k * bits + bit;
    code |= ((words[at / 32] >> (at % 32)) & 1) << bit;
  }
  return code;
}

inline bool check_transpose(int64_t rows, int64_t columns) {
  const auto from = draw_words(size_t(rows * columns));
  std::vector<uint32_t> to(from.size());
  hb_transpose(from.data(), rows, columns, to.data());
  bool right = true;
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t c = 0; c < columns; c++) right &= to[c * rows + r] == from[r * columns + c];
  }
  return right;
}

inline bool check_awq(int64_t rows, int64_t columns) {
  const int order[8] = {0, 2, 4, 6, 1, 3, 5, 7};
  const auto words = draw_words(size_t(rows * columns));
  std::vector<uint32_t> turned(words.size()), again(words.size());
  hb_to_awq(words.data(), rows, columns, turned.data());
  hb_from_awq(turned.data(), rows, columns, again.data());
  bool right = again == words;
  for (int64_t in = 0; in < rows * 8; in++) {
    for (int64_t out = 0; out < columns; out++) {
      int place = 0;
      while (order[place] != out % 8) place++;
      const uint32_t found = turned[in * (columns / 8) + out / 8] >> (4 * place) & 15;
      right &= found == (words[in / 8 * columns + out] >> (4 * (in % 8)) & 15);
    }
  }
  return right;
}

inline bool check_blocks(int64_t count, int64_t per_group, int head, int bits) {
  const hb_blocks facts = {count, per_group, head, bits};
  const auto words = draw_words(size_t(count * bits));
  std::vector<uint32_t> again(words.size());
  std::vector<uint8_t> grid(size_t(count / per_group * head)), made(size_t(count * (4 * bits + head)));
  for (uint8_t& byte : grid) byte = uint8_t(draw());
  hb_to_blocks(&facts, reinterpret_cast<const uint8_t*>(words.data()), grid.data(), made.data());
  hb_from_blocks(&facts, made.data(), reinterpret_cast<uint8_t*>(again.data()));
  bool right = again == words;
  for (int64_t block = 0; block < count; block++) {
    const uint8_t* at = &made[size_t(block * (4 * bits + head))];
    right &= memcmp(at, &grid[size_t(block / per_group * head)], size_t(head)) == 0;
    for (int k = 0; k < 32; k++) {
      const uint8_t byte = at[head + (bits == 8 ? k : k % 16)];
      const uint32_t code = bits == 8 ? byte ^ 128 : k < 16 ? byte & 15 : byte >> 4;
      right &= code == code_of(words.data(), block * 32 + k, bits);
    }
  }
  return right;
}

inline bool check_expand(int bits, int64_t rows, int64_t columns, int64_t group) {
  const int64_t groups = (columns + group - 1) / group;
  const auto words = draw_words(size_t(rows * columns * bits / 32));
  std::vector<float> scales(size_t(rows * groups)), out(size_t(rows * columns));
  std::vector<int16_t> zeros(scales.size());
  for (float& scale : scales) scale = uniform() - 0.5f;
  for (int16_t& zero : zeros) zero = int16_t(draw() % (1u << bits));
  const hb_codes codes = {words.data(), scales.data(), zeros.data(), rows, columns, groups, group,
                          bits,         HB_FLOAT32};
  hb_expand(&codes, HB_FLOAT32, out.data());
  bool right = true;
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t k = 0; k < columns; k++) {
      const int64_t at = r * groups + k / group;
      const int code = int(code_of(&words[size_t(r * columns * bits / 32)], k, bits));
      right &= out[size_t(r * columns + k)] == float(code - zeros[size_t(at)]) * scales[size_t(at)];
    }
  }
  return right;
}

inline bool check_respellings() {
  bool right = true;
  for (int64_t rows : {1, 16, 17, 33}) {
    for (int64_t columns : {1, 15, 64, 81}) right &= check_transpose(rows, columns);
    for (int64_t columns : {8, 24, 32, 72}) right &= check_awq(rows, columns);
  }
  for (int bits : {4, 8}) {
    for (int head : {2, 4}) right &= check_blocks(12, 1, head, bits) & check_blocks(12, 4, head, bits);
  }
  for (int bits : {2, 3, 4, 5, 6, 8}) {
    for (int64_t group : {20, 32, 96, 160}) right &= check_expand(bits, 3, 160, group);
  }
  return right;
}

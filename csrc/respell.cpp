// Lossless conversion of codes to the order of another format, single-threaded.
//
// Uses 16-byte vectors, which every supported CPU has; memory bandwidth is the limit.
// halfbyte/convert/bit_order.py implements the same in torch, as the reference and the fallback.
#include "huge_pages.h"
#include "layout.h"
#include "numbers.h"

namespace halfbyte {
namespace {

typedef uint32_t Words __attribute__((vector_size(16)));
typedef uint8_t Bytes __attribute__((vector_size(16)));

// Transposes 4 x 4 words.
inline void turn(Words& a, Words& b, Words& c, Words& d) {
  const Words ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
  const Words ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const Words cd_low = __builtin_shufflevector(c, d, 0, 4, 1, 5);
  const Words cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  a = __builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5);
  b = __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7);
  c = __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5);
  d = __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7);
}

// Transposes a tile of 16 x 16 words: reads and writes whole cache lines. Reads into a copy first,
// because rows a power of two apart evict each other from the cache.
void transpose_tile(const uint32_t* from, int64_t from_stride, uint32_t* to, int64_t to_stride) {
  uint32_t tile[16][16];
  for (int row = 0; row < 16; row++) memcpy(tile[row], from + row * from_stride, sizeof(tile[row]));
  for (int column = 0; column < 16; column += 4) {
    Words parts[16];
    for (int row = 0; row < 16; row++) parts[row] = load<Words>(&tile[row][column]);
    for (int row = 0; row < 16; row += 4) {
      turn(parts[row], parts[row + 1], parts[row + 2], parts[row + 3]);
    }
    for (int j = 0; j < 4; j++) {
      for (int row = 0; row < 16; row += 4) {
        store(to + (column + j) * to_stride + row, parts[row + j]);
      }
    }
  }
}

// Swaps nibble i of word k with nibble k of word i, in four squares at once: halves, then quarters
// (Warren, Hacker's Delight, 2nd ed., section 7-3).
inline void turn_nibbles(Words (&words)[8]) {
  for (int half = 4; half; half /= 2) {
    const int shift = 4 * half;
    const uint32_t mask = half == 4 ? 0x0000FFFF : half == 2 ? 0x00FF00FF : 0x0F0F0F0F;
    for (int k = 0; k < 8; k++) {
      if (k & half) continue;
      const Words change = ((words[k] >> shift) ^ words[k + half]) & mask;
      words[k + half] ^= change;
      words[k] ^= change << shift;
    }
  }
}

// AWQ's order of the eight outputs in a word.
constexpr int ORDER[8] = {0, 2, 4, 6, 1, 3, 5, 7};

// Processes [8 * count] words, four squares of eight at a time; the last up to three singly.
template <class Get, class Put>
inline void turn_squares(int64_t count, const Get& get, const Put& put) {
  int64_t at = 0;
  for (; at + 4 <= count; at += 4) {
    Words words[8];
    get(at, 4, words);
    turn_nibbles(words);
    put(at, 4, words);
  }
  if (at < count) {
    Words words[8] = {};
    get(at, int(count - at), words);
    turn_nibbles(words);
    put(at, int(count - at), words);
  }
}

// Bytes of codes (2k, 2k + 1) <-> bytes of codes (j, j + 16), 16 bytes to a block of 32 codes.
inline Bytes pair_halves(Bytes codes) {
  const Bytes low = codes & 15, high = codes >> 4;
  // Codes 0..15 in order, then codes 16..31.
  const Bytes first = __builtin_shufflevector(low, high, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21,
                                              6, 22, 7, 23);
  const Bytes second = __builtin_shufflevector(low, high, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13,
                                               29, 14, 30, 15, 31);
  return first | (second << 4);
}

inline Bytes part_halves(Bytes pairs) {
  const Bytes first = pairs & 15, second = pairs >> 4;
  const Bytes even = __builtin_shufflevector(first, second, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20,
                                             22, 24, 26, 28, 30);
  const Bytes odd = __builtin_shufflevector(first, second, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21,
                                            23, 25, 27, 29, 31);
  return even | (odd << 4);
}

inline void round_all(const float* from, int count, int, float* to) {
  memcpy(to, from, size_t(count) * 4);
}

// Branch-free versions of the conversions in numbers.h, so that they vectorize.
inline void round_all(const float* from, int count, int dtype, uint16_t* to) {
  if (dtype == HB_BFLOAT16) {
    for (int i = 0; i < count; i++) to[i] = to_bf16(from[i]);
    return;
  }
  for (int i = 0; i < count; i++) {
    const uint32_t bits = to_bits(from[i]);
    const int32_t size = int32_t(bits & 0x7FFFFFFF);
    const int32_t normal = (size + 0xFFF + ((size >> 13) & 1) - 0x38000000) >> 13;
    const int32_t small = int32_t(to_bits(from_bits(uint32_t(size)) + 0.5f)) - 0x3F000000;
    int32_t half = size < 0x38800000 ? small : normal;
    half = size >= 0x477FF000 ? 0x7C00 : half;
    half = size > 0x7F800000 ? 0x7E00 : half;
    to[i] = uint16_t(half | int32_t((bits >> 16) & 0x8000));
  }
}

// Reads codes from a stream of words, lowest bits first.
struct Stream {
  const uint32_t* words;
  uint64_t left;
  int have;

  uint32_t take(int bits) {
    if (have < bits) {
      left |= uint64_t(*words++) << have;
      have += 32;
    }
    const uint32_t code = uint32_t(left) & ((1u << bits) - 1);
    left >>= bits;
    have -= bits;
    return code;
  }
};

template <class T>
void expand_group(Stream& stream, int bits, int64_t count, const T* values, T* out) {
  int64_t k = 0;
  for (; bits == 4 && !stream.have && k + 8 <= count; k += 8) {
    const uint32_t word = *stream.words++;
    for (int j = 0; j < 8; j++) out[k + j] = values[(word >> (4 * j)) & 15];
  }
  for (; k < count; k++) out[k] = values[stream.take(bits)];
}

template <class T>
void expand(const hb_codes& codes, int dtype, T* out) {
  const int64_t columns = codes.columns, groups = codes.groups;
  prefer_huge_pages(out, codes.rows * columns * int64_t(sizeof(T)));
  const int number = 1 << codes.bits;
  float exact[256];
  T values[256];
  for (int64_t row = 0; row < codes.rows; row++) {
    Stream stream = {codes.words + row * (columns * codes.bits / 32), 0, 0};
    for (int64_t group = 0; group < groups; group++) {
      const float scale = load_number(codes.scales, row * groups + group, codes.scale_dtype);
      const int zero = codes.zeros[row * groups + group];
      for (int code = 0; code < number; code++) exact[code] = float(code - zero) * scale;
      round_all(exact, number, dtype, values);
      const int64_t first = group * codes.group_size, rest = columns - first;
      const int64_t count = rest < codes.group_size ? rest : codes.group_size;
      expand_group(stream, codes.bits, count, values, out + first);
    }
    out += columns;
  }
}

}  // namespace
}  // namespace halfbyte

using namespace halfbyte;

extern "C" void hb_transpose(const uint32_t* from, int64_t rows, int64_t columns, uint32_t* to) {
  constexpr int64_t STRIP = 64;  // columns at a time, so that the output stays in the cache
  prefer_huge_pages(to, rows * columns * 4);
  for (int64_t first = 0; first < columns; first += STRIP) {
    const int64_t end = columns - first < STRIP ? columns : first + STRIP;
    for (int64_t row = 0; row < rows; row += 16) {
      const int64_t height = rows - row < 16 ? rows - row : 16;
      for (int64_t column = first; column < end; column += 16) {
        const int64_t width = end - column < 16 ? end - column : 16;
        const uint32_t* part = from + row * columns + column;
        uint32_t* turned = to + column * rows + row;
        if (height == 16 && width == 16) {
          transpose_tile(part, columns, turned, rows);
          continue;
        }
        for (int64_t i = 0; i < height; i++) {
          for (int64_t j = 0; j < width; j++) turned[j * rows + i] = part[i * columns + j];
        }
      }
    }
  }
}

extern "C" void hb_to_awq(const uint32_t* words, int64_t rows, int64_t columns, uint32_t* to) {
  prefer_huge_pages(to, rows * columns * 4);
  const int64_t count = columns / 8;
  for (int64_t row = 0; row < rows; row++, words += columns, to += columns) {
    turn_squares(
        count,
        [&](int64_t at, int number, Words (&parts)[8]) {
          // Eight words of each square -> one vector per position in a square.
          Words low[4] = {}, high[4] = {};
          for (int c = 0; c < number; c++) {
            low[c] = load<Words>(words + (at + c) * 8);
            high[c] = load<Words>(words + (at + c) * 8 + 4);
          }
          turn(low[0], low[1], low[2], low[3]);
          turn(high[0], high[1], high[2], high[3]);
          for (int i = 0; i < 8; i++) parts[i] = ORDER[i] < 4 ? low[ORDER[i]] : high[ORDER[i] - 4];
        },
        [&](int64_t at, int number, const Words (&parts)[8]) {
          for (int i = 0; i < 8; i++) memcpy(to + i * count + at, &parts[i], size_t(number) * 4);
        });
  }
}

extern "C" void hb_from_awq(const uint32_t* from, int64_t rows, int64_t columns, uint32_t* words) {
  prefer_huge_pages(words, rows * columns * 4);
  const int64_t count = columns / 8;
  for (int64_t row = 0; row < rows; row++, from += columns, words += columns) {
    turn_squares(
        count,
        [&](int64_t at, int number, Words (&parts)[8]) {
          for (int i = 0; i < 8; i++) memcpy(&parts[i], from + i * count + at, size_t(number) * 4);
        },
        [&](int64_t at, int number, const Words (&parts)[8]) {
          Words low[4], high[4];
          for (int i = 0; i < 8; i++) (ORDER[i] < 4 ? low[ORDER[i]] : high[ORDER[i] - 4]) = parts[i];
          turn(low[0], low[1], low[2], low[3]);
          turn(high[0], high[1], high[2], high[3]);
          for (int c = 0; c < number; c++) {
            store(words + (at + c) * 8, low[c]);
            store(words + (at + c) * 8 + 4, high[c]);
          }
        });
  }
}

extern "C" void hb_to_blocks(const hb_blocks* blocks, const uint8_t* codes, const uint8_t* grid,
                             uint8_t* to) {
  const int width = 4 * blocks->bits, head = blocks->grid_bytes;
  prefer_huge_pages(to, blocks->count * (width + head));
  int64_t used = 0;  // blocks that used this grid so far
  for (int64_t at = 0; at < blocks->count; at++, codes += width, to += width + head) {
    if (used++ == blocks->per_group) {
      used = 1;
      grid += head;
    }
    memcpy(to, grid, 2);
    if (head == 4) memcpy(to + 2, grid + 2, 2);
    for (int part = 0; part < width; part += 16) {
      const Bytes bytes = load<Bytes>(codes + part);
      store(to + head + part, blocks->bits == 4 ? pair_halves(bytes) : bytes ^ 128);
    }
  }
}

extern "C" void hb_from_blocks(const hb_blocks* blocks, const uint8_t* from, uint8_t* codes) {
  const int width = 4 * blocks->bits, head = blocks->grid_bytes;
  prefer_huge_pages(codes, blocks->count * width);
  for (int64_t at = 0; at < blocks->count; at++, codes += width, from += width + head) {
    for (int part = 0; part < width; part += 16) {
      const Bytes bytes = load<Bytes>(from + head + part);
      store(codes + part, blocks->bits == 4 ? part_halves(bytes) : bytes ^ 128);
    }
  }
}

extern "C" void hb_expand(const hb_codes* codes, int dtype, void* out) {
  if (dtype == HB_FLOAT32) {
    expand(*codes, dtype, static_cast<float*>(out));
  } else {
    expand(*codes, dtype, static_cast<uint16_t*>(out));
  }
}

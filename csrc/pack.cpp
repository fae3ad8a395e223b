// Conversion between the GPTQ format and the packed layout.
#include "huge_pages.h"
#include "layout.h"
#include "numbers.h"
#include "parallel.h"

namespace halfbyte {

bool open_packed(const void* bytes, Packed* packed) {
  const Header* header = static_cast<const Header*>(bytes);
  if (header->magic != MAGIC || header->abi != HB_ABI_VERSION) return false;
  const hb_linear_shape& shape = header->shape;
  const char* base = static_cast<const char*>(bytes);
  packed->header = header;
  packed->bits = shape.bits;
  packed->in_features = shape.in_features;
  packed->out_features = shape.out_features;
  packed->group_size = shape.group_size;
  packed->groups = header->groups;
  packed->blocks = header->blocks;
  packed->scale_dtype = shape.scale_dtype;
  packed->symmetric = shape.symmetric != 0;
  packed->codes = reinterpret_cast<const uint32_t*>(base + CODES_AT);
  packed->scales = reinterpret_cast<const uint8_t*>(base + header->scales_at);
  packed->zeros =
      packed->symmetric ? nullptr : reinterpret_cast<const uint8_t*>(base + header->zeros_at);
  packed->order =
      shape.has_order ? reinterpret_cast<const int32_t*>(base + header->order_at) : nullptr;
  packed->block_words =
      int64_t(shape.in_features) / run_codes(shape.bits) * run_words(shape.bits) * LANES;
  return true;
}

namespace {

int64_t align(int64_t bytes) { return (bytes + 63) / 64 * 64; }

bool make_header(const hb_linear_shape& shape, Header* header) {
  const int bits = shape.bits;
  if (bits != 2 && bits != 3 && bits != 4 && bits != 8) return false;
  if (shape.in_features < 1 || shape.out_features < 1 || shape.group_size < 1) return false;
  if (shape.in_features % run_codes(bits) || shape.group_size % run_codes(bits)) return false;
  if (shape.scale_dtype < HB_FLOAT32 || shape.scale_dtype > HB_FLOAT16) return false;
  memset(header, 0, sizeof(Header));
  header->magic = MAGIC;
  header->abi = HB_ABI_VERSION;
  header->shape = shape;
  header->groups = (shape.in_features + shape.group_size - 1) / shape.group_size;
  header->blocks = (shape.out_features + LANES - 1) / LANES;
  const int64_t blocks = header->blocks, grid = blocks * header->groups * LANES;
  const int64_t words = int64_t(shape.in_features) / run_codes(bits) * run_words(bits) * LANES;
  header->scales_at = CODES_AT + align(blocks * words * 4);
  header->zeros_at = header->scales_at + align(grid * (shape.scale_dtype == HB_FLOAT32 ? 4 : 2));
  header->order_at = header->zeros_at + (shape.symmetric ? 0 : align(grid));
  header->bytes = header->order_at + (shape.has_order ? align(int64_t(shape.in_features) * 4) : 0);
  return true;
}

// Reads code k of a channel whose words are `stride` apart.
uint32_t get_code(const uint32_t* words, int64_t stride, int64_t k, int bits) {
  const int64_t bit = k % run_codes(bits) * bits;
  const uint32_t* from = words + (k / run_codes(bits) * run_words(bits) + bit / 32) * stride;
  uint64_t two = from[0];
  if (bit % 32 + bits > 32) two |= uint64_t(from[stride]) << 32;
  return uint32_t(two >> (bit % 32)) & ((1u << bits) - 1);
}

// Writes a code into words that are initially zero.
void put_code(uint32_t* words, int64_t stride, int64_t k, int bits, uint32_t code) {
  const int64_t bit = k % run_codes(bits) * bits;
  uint32_t* to = words + (k / run_codes(bits) * run_words(bits) + bit / 32) * stride;
  to[0] |= code << (bit % 32);
  if (bit % 32 + bits > 32) to[stride] |= code >> (32 - bit % 32);
}

void pack_codes(const Header& header, const uint32_t* qweight, const int32_t* order, int64_t block,
                uint32_t* to) {
  const hb_linear_shape& shape = header.shape;
  const int64_t out = shape.out_features, first = block * LANES;
  const int lanes = int(out - first < LANES ? out - first : LANES);
  const int64_t rows = int64_t(shape.in_features) / run_codes(shape.bits) * run_words(shape.bits);
  if (!order) {
    for (int64_t row = 0; row < rows; row++, to += LANES) {
      memcpy(to, qweight + row * out + first, size_t(lanes) * 4);
      memset(to + lanes, 0, size_t(LANES - lanes) * 4);
    }
    return;
  }
  memset(to, 0, size_t(rows) * LANES * 4);
  for (int64_t k = 0; k < shape.in_features; k++) {
    for (int lane = 0; lane < lanes; lane++) {
      const uint32_t code = get_code(qweight + first + lane, out, order[k], shape.bits);
      put_code(to + lane, LANES, k, shape.bits, code);
    }
  }
}

void unpack_codes(const Packed& w, int64_t block, uint32_t* qweight) {
  const int64_t out = w.out_features, first = block * LANES;
  const int lanes = int(out - first < LANES ? out - first : LANES);
  const uint32_t* from = w.codes + block * w.block_words;
  const int64_t rows = w.block_words / LANES;
  if (!w.order) {
    for (int64_t row = 0; row < rows; row++) {
      memcpy(qweight + row * out + first, from + row * LANES, size_t(lanes) * 4);
    }
    return;
  }
  for (int64_t row = 0; row < rows; row++) {
    memset(qweight + row * out + first, 0, size_t(lanes) * 4);
  }
  for (int64_t k = 0; k < w.in_features; k++) {
    for (int lane = 0; lane < lanes; lane++) {
      const uint32_t code = get_code(from + lane, LANES, k, w.bits);
      put_code(qweight + first + lane, out, w.order[k], w.bits, code);
    }
  }
}

// Copies a block's scales or zeros from [groups, out]; padding channels get zeros.
void pack_grid(const Header& header, const void* from, int64_t bytes_each, int64_t block,
               char* to) {
  const int64_t out = header.shape.out_features, first = block * LANES;
  const int64_t lanes = out - first < LANES ? out - first : LANES;
  to += block * header.groups * LANES * bytes_each;
  for (int64_t g = 0; g < header.groups; g++, to += LANES * bytes_each) {
    const char* row = static_cast<const char*>(from) + (g * out + first) * bytes_each;
    memcpy(to, row, size_t(lanes * bytes_each));
    memset(to + lanes * bytes_each, 0, size_t((LANES - lanes) * bytes_each));
  }
}

}  // namespace
}  // namespace halfbyte

using namespace halfbyte;

extern "C" uint32_t hb_abi_version(void) { return HB_ABI_VERSION; }

extern "C" int64_t hb_packed_bytes(const hb_linear_shape* shape) {
  Header header;
  return make_header(*shape, &header) ? header.bytes : -1;
}

extern "C" int hb_pack(const hb_linear_shape* shape, const uint32_t* qweight, const void* scales,
                       const uint8_t* zeros, const int32_t* order, void* packed, int threads) {
  Header header;
  if (!make_header(*shape, &header)) return HB_BAD_ARGUMENT;
  if (!shape->symmetric != !!zeros || !shape->has_order != !order) return HB_BAD_ARGUMENT;
  for (int64_t k = 0; order && k < shape->in_features; k++) {
    if (order[k] < 0 || order[k] >= shape->in_features) return HB_BAD_ARGUMENT;
  }
  char* base = static_cast<char*>(packed);
  prefer_huge_pages(packed, header.bytes);
  memset(base, 0, CODES_AT);
  memcpy(base, &header, sizeof(header));
  if (order) memcpy(base + header.order_at, order, size_t(shape->in_features) * 4);
  const int64_t words =
      int64_t(shape->in_features) / run_codes(shape->bits) * run_words(shape->bits) * LANES;
  parallel_for(header.blocks, threads, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; block++) {
      uint32_t* codes = reinterpret_cast<uint32_t*>(base + CODES_AT) + block * words;
      pack_codes(header, qweight, order, block, codes);
      pack_grid(header, scales, shape->scale_dtype == HB_FLOAT32 ? 4 : 2, block,
                base + header.scales_at);
      if (zeros) pack_grid(header, zeros, 1, block, base + header.zeros_at);
    }
  });
  return HB_OK;
}

extern "C" int hb_unpack(const void* packed, uint32_t* qweight, int threads) {
  Packed w;
  if (!open_packed(packed, &w)) return HB_BAD_BLOB;
  parallel_for(w.blocks, threads, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; block++) unpack_codes(w, block, qweight);
  });
  return HB_OK;
}

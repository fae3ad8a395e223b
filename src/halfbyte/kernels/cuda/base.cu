// Shared by the kernels over the layout of halfbyte/kernels/fragments.py: the parameter struct,
// decoding of codes, and the partition of work. halfbyte/kernels/cuda_compiler.py expands includes
// of this file.
//
//   BF16         1: x is bf16; 0: fp16
//   BITS         2, 3, 4 or 8
//   SCALE_KIND   0: scales are fp16; 1: bf16; 2: fp32
//   HAS_ZEROS    1: zeros are stored; 0: all are the middle code
//   HALF_GROUPS  1: groups of 32 inputs; 0: of a multiple of 64
//   FOLDED       1: take_apart returns OFFSET + code, and the caller corrects the sums; default 0

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct Arguments {
  const u8* codes;       // [in / 64, out / 16, 128 * BITS] bytes
  const u8* scales;      // [groups, out]
  const u8* zeros;       // [groups, out]
  const u16* x;          // [rows, in]
  const u16* bias;       // [out] or null
  u16* result;           // [rows, out]
  float4* partials;      // [2 * thread blocks, FRAGMENTS, 32]
  u32* arrivals;         // [channel blocks], all 0 between launches
  u32 rows;
  u32 in_features;
  u32 out_features;
  u32 group_steps;       // 64-input steps per group; unused with HALF_GROUPS
  int group_shift;       // log2 of group_steps; -1 if it is not a power of two
};

constexpr u32 GROUPS_IN_STEP = HALF_GROUPS ? 2 : 1;
constexpr u32 SCALE_SIZE = SCALE_KIND == 2 ? 4 : 2;
constexpr u32 TILE_BYTES = 128 * BITS;

#ifndef FOLDED
#define FOLDED 0
#endif
static_assert(!FOLDED || BITS <= 4, "eight bits beside the offset do not fit a bf16");

#ifndef EMULATED
// ---------------------------------------------------------------- device instructions

#define DEVICE __device__ __forceinline__

DEVICE u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }

// (word & mask) | bits, in one instruction.
template <u32 MASK, u32 SET>
DEVICE u32 mask_and_set(u32 word) {
  u32 found;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(found) : "r"(word), "n"(MASK), "n"(SET));
  return found;
}

// Adds two pairs, in the type of x.
DEVICE u32 add_pair(u32 left, u32 right) {
  u32 found;
#if BF16
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(found) : "r"(left), "r"(0x3F803F80), "r"(right));
#else
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(found) : "r"(left), "r"(right));
#endif
  return found;
}

// Converts two floats to a pair in the type of x; `low` in the low half.
DEVICE u32 narrow_pair(float low, float high) {
  u32 found;
#if BF16
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(found) : "f"(high), "f"(low));
#else
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(found) : "f"(high), "f"(low));
#endif
  return found;
}

DEVICE float widen_half(u16 value) {
  float found;
  asm("cvt.f32.f16 %0, %1;" : "=f"(found) : "h"(value));
  return found;
}

DEVICE float bits_to_float(u32 bits) { return __uint_as_float(bits); }

DEVICE float4 read_beyond_l1(const float4* from) {
  float4 found;
  asm volatile("ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(found.x), "=f"(found.y), "=f"(found.z), "=f"(found.w)
               : "l"(from)
               : "memory");
  return found;
}

// Waits until the results of earlier launches may be read.
DEVICE void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Allows the next launch to start and load its weights.
DEVICE void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

#endif

// ---------------------------------------------------------------- decoding of codes

DEVICE float read_scale(const u8* scales, u32 index) {
#if SCALE_KIND == 0
  return widen_half(((const u16*)scales)[index]);
#elif SCALE_KIND == 1
  return bits_to_float((u32)((const u16*)scales)[index] << 16);
#else
  return ((const float*)scales)[index];
#endif
}

// Bits that make a pair of codes a pair of OFFSET + code.
#if BF16
constexpr u32 MAGIC = 0x43004300;
constexpr u32 OFFSET = 128;
#else
constexpr u32 MAGIC = 0x64006400;
constexpr u32 OFFSET = 1024;
#endif

// Returns the pair of -(OFFSET + zero).
DEVICE u32 negate_zero(u32 zero) { return zero * 0x00010001u | MAGIC | 0x80008000u; }

DEVICE u32 take_zero(u32 pair, u32 negated) { return FOLDED ? pair : add_pair(pair, negated); }

// Decodes the A operand registers of one channel over 32 inputs: pairs (s, u) of code - zero, or of
// OFFSET + code.
DEVICE void take_apart(u32 (&pairs)[4], const u32* words, int h, int half, u32 zero) {
#if BITS == 4
  // words [s / 2, h]
  u32 word = words[2 * half + h];
  u32 negated = negate_zero(zero);
  pairs[0] = take_zero(mask_and_set<0x000F000F, MAGIC>(word), negated);
  pairs[1] = take_zero(mask_and_set<0x000F000F, MAGIC>(word >> 4), negated);
  pairs[2] = take_zero(mask_and_set<0x000F000F, MAGIC>(word >> 8), negated);
  pairs[3] = take_zero(mask_and_set<0x000F000F, MAGIC>(word >> 12), negated);
#elif BITS == 2
  u32 word = words[h] >> 8 * half;
  u32 negated = negate_zero(zero);
  pairs[0] = take_zero(mask_and_set<0x00030003, MAGIC>(word), negated);
  pairs[1] = take_zero(mask_and_set<0x00030003, MAGIC>(word >> 2), negated);
  pairs[2] = take_zero(mask_and_set<0x00030003, MAGIC>(word >> 4), negated);
  pairs[3] = take_zero(mask_and_set<0x00030003, MAGIC>(word >> 6), negated);
#elif BITS == 3
  // words [h] of the low two bits, then one of the high bits
  u32 negated = negate_zero(zero);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    u32 low = mask_and_set<0x00030003, MAGIC>(words[h] >> (8 * half + 2 * i));
    int place = 8 * h + 4 * half + i;
    u32 high = place >= 2 ? words[2] >> (place - 2) : words[2] << (2 - place);
    pairs[i] = take_zero(low | (high & 0x00040004), negated);
  }
#else
  // words [s, h]
#pragma unroll
  for (int i = 0; i < 4; i++) {
    u32 word = words[4 * half + 2 * (i / 2) + h] >> 8 * (i % 2);
#if BF16
    // 2^23 + code is exact in fp32; 128 + code would not be exact in bf16.
    float offset = 8388608.0f + (float)zero;
    float low = bits_to_float((word & 0xFF) | 0x4B000000) - offset;
    float high = bits_to_float((word >> 16 & 0xFF) | 0x4B000000) - offset;
    pairs[i] = narrow_pair(low, high);
#else
    pairs[i] = add_pair(mask_and_set<0x00FF00FF, MAGIC>(word), negate_zero(zero));
#endif
  }
#endif
}

// Loads the words of a lane of one tile, in the order that take_apart expects.
DEVICE void read_words(u32 (&words)[BITS], const u8* tile, u32 lane) {
#if BITS == 4
  *(uint4*)words = ((const uint4*)tile)[lane];
#elif BITS == 8
  ((uint4*)words)[0] = ((const uint4*)tile)[lane];
  ((uint4*)words)[1] = ((const uint4*)tile)[32 + lane];
#else
  uint2 low = ((const uint2*)tile)[lane];
  words[0] = low.x;
  words[1] = low.y;
#if BITS == 3
  words[2] = ((const u32*)tile)[64 + lane];
#endif
#endif
}

// ---------------------------------------------------------------- partition of work units

struct Walk {
  u32 chunks;  // per block of channels, WARPS_IN * 64 inputs each
  u32 units;
  u32 runs;

  // units * runs fits 32 bits, as the launcher guarantees.
  DEVICE u32 begin(u32 run) const { return units * run / runs; }
  DEVICE u32 run_of(u32 unit) const { return ((unit + 1) * runs - 1) / units; }
};

// The group of a step's inputs; `half`: of its second 32 inputs.
DEVICE u32 find_group(const Arguments& a, u32 step, u32 half) {
  return HALF_GROUPS          ? 2 * step + half
         : a.group_shift >= 0 ? step >> a.group_shift
                              : step / a.group_steps;
}

// Swizzles the 16-byte pieces of row m by m, to avoid bank conflicts when reading a column of
// pieces.
DEVICE u32 x_place(u32 m, u32 piece) { return m * 128 + ((piece ^ (m & 7)) << 4); }

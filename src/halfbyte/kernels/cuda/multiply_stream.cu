// result [rows, out] = x [rows, in] @ weight.T + bias, from packed codes, for few rows of x, on
// compute capability 9.0 and later.
//
// Weight, units and runs: as in multiply.cu. The warps of a thread block are specialized. One
// copies whole units in bulk, STAGES ahead. WARPS_IN * WARPS_OUT warps multiply with as few
// instructions as possible, because at one row instructions, not memory, are the bottleneck. One
// warp adds and stores the sums of a block of channels while the others process the next.
//
// With bf16 the OFFSET of codes is not subtracted: out += scale * (sum((OFFSET + code) * x) -
// (OFFSET + zero) * sum(x)), both sums in fp32, where a product with a tile of ones gives sum(x).
// With fp16, whose offset is eight times as large, it would cost precision.
//
//   ROW_TILES    maximum rows of x, in units of 8
//   TILES, WARPS_OUT, WARPS_IN, STAGES, BLOCKS   as in multiply.cu
//
// A unit contains whole groups of inputs, or is part of one.

#define FOLDED (BF16 && BITS <= 4)
#include "base.cu"
#include "few_rows.cu"

struct StreamArguments {
  // CUtensorMaps: of codes, boxes of a unit; of scales and zeros, of BLOCK_TILES * 16 channels by
  // group_rows; of x, of `rows` rows by WARPS_IN times 64 inputs, swizzled.
  alignas(64) u64 codes_map[16];
  alignas(64) u64 scales_map[16];
  alignas(64) u64 zeros_map[16];
  alignas(64) u64 x_map[16];
  Arguments a;
  u32 group_rows;  // rows of scales per unit
};

constexpr u32 WARPS = WARPS_OUT * WARPS_IN;
constexpr u32 THREADS = 32 * (WARPS + 2);
constexpr u32 BLOCK_TILES = WARPS_OUT * TILES;
constexpr u32 STEP_BYTES = BLOCK_TILES * TILE_BYTES;
constexpr u32 SCALE_ROW = BLOCK_TILES * 16 * SCALE_SIZE;
constexpr u32 ZERO_ROW = BLOCK_TILES * 16;
constexpr u32 MOST_GROUPS = WARPS_IN * GROUPS_IN_STEP;
// A slot: x [WARPS_IN, rows, 64], codes [WARPS_IN, BLOCK_TILES], scales and zeros [group_rows].
constexpr u32 CODES_AT = WARPS_IN * ROW_TILES * 1024;
constexpr u32 SCALES_AT = CODES_AT + WARPS_IN * STEP_BYTES;
constexpr u32 ZEROS_AT = SCALES_AT + (MOST_GROUPS * SCALE_ROW + 127) / 128 * 128;
constexpr u32 STAGE_BYTES = (ZEROS_AT + HAS_ZEROS * MOST_GROUPS * ZERO_ROW + 1023) / 1024 * 1024;
constexpr u32 FRAGMENTS = BLOCK_TILES * ROW_TILES;
constexpr u32 EXCHANGE_BYTES = WARPS_IN * FRAGMENTS * 512;
// 1024 more, because the slots start at a multiple of it.
constexpr u32 SHARED_BYTES = STAGES * STAGE_BYTES + EXCHANGE_BYTES + 16 * STAGES + 32 + 1024;

#ifndef EMULATED
#include "barriers.cu"

// Keeps a value in a register: compilers tend to recompute addresses in every step.
DEVICE void keep(u32& number) { asm volatile("" : "+r"(number)); }

// Prefetches a map before the first copy needs it.
DEVICE void prefetch_map(const u64* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Copies a box of a three-dimensional tensor; elements outside the tensor are 0.
DEVICE void copy_box(Shared to, const u64* map, u32 first, u32 second, u32 third, Shared barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(first), "r"(second), "r"(third)
      : "memory");
}

extern __shared__ uint4 shared_memory[];
#endif

#include "ring.cu"

// State shared by the warps of a thread block.
struct Shop {
  u8* memory;             // slots
  float4* exchange;       // [WARPS_IN, FRAGMENTS, 32]: the sums of a block of channels
  u32* last;
  Ring ring;              // in its initial state
  Shared given, taken;    // barriers: the exchange is full; it may be overwritten
  Walk walk;
  u32 run, begin, count;  // of units
};

// ---------------------------------------------------------------- the producer warp

// Starts the copies of a unit's codes, scales and zeros, from one thread.
DEVICE void copy_weight(const StreamArguments& a, Shared to, u32 block, u32 chunk, Shared barrier) {
  barrier_expect(barrier, WARPS_IN * STEP_BYTES + WARPS_IN * a.a.rows * 128 +
                              a.group_rows * (SCALE_ROW + HAS_ZEROS * ZERO_ROW));
  copy_box(to + CODES_AT, a.codes_map, 0, block * BLOCK_TILES, chunk * WARPS_IN, barrier);
  u32 group = find_group(a.a, chunk * WARPS_IN, 0), channel = block * BLOCK_TILES * 16;
  copy_box(to + SCALES_AT, a.scales_map, channel, group, 0, barrier);
  if (HAS_ZEROS) copy_box(to + ZEROS_AT, a.zeros_map, channel, group, 0, barrier);
}

DEVICE void copy_units(const StreamArguments& a, const Shop& shop, u32 early) {
  Ring ring = shop.ring;
  u32 block = shop.begin / shop.walk.chunks, chunk = shop.begin % shop.walk.chunks;
  wait_for_inputs();
  for (u32 i = 0; i < shop.count; i++) {
    if (i >= early) {
      barrier_wait(ring.taken(), ring.parity ^ 1);
      copy_weight(a, ring.place(), block, chunk, ring.filled());
    }
    copy_box(ring.place(), a.x_map, 0, 0, chunk * WARPS_IN, ring.filled());
    ring.advance();
    if (++chunk == shop.walk.chunks) {
      chunk = 0;
      block++;
    }
  }
}

// ---------------------------------------------------------------- the multiplying warps

typedef float Sums[TILES][ROW_TILES][4];

constexpr u32 ONES = 0x3F803F80;  // a pair in bf16

// Offsets of a lane's parts of a step in a slot.
struct Lane {
  u32 codes, scales, zeros;
  u32 x[ROW_TILES][2];  // by halves of 32 inputs

  DEVICE Lane(const Arguments& a, u32 warp, u32 lane) {
    u32 warp_in = warp / WARPS_OUT, warp_out = warp % WARPS_OUT;
    u32 channel = warp_out * TILES * 16 + lane / 4;
    // Groups start at unit boundaries, or a unit is inside one group.
    u32 group = HALF_GROUPS ? 2 * warp_in : warp_in / a.group_steps;
    codes = CODES_AT + warp_in * STEP_BYTES + warp_out * TILES * TILE_BYTES;
    scales = SCALES_AT + group * SCALE_ROW + channel * SCALE_SIZE;
    zeros = ZEROS_AT + group * ZERO_ROW + channel;
    keep(codes);
    keep(scales);
    if (HAS_ZEROS) keep(zeros);
#pragma unroll
    for (u32 r = 0; r < ROW_TILES; r++) {
      // Sums of missing rows are never stored, so any row will do.
      u32 m = r * 8 + lane % 8, row = warp_in * a.rows + (m < a.rows ? m : 0);
#pragma unroll
      for (u32 half = 0; half < 2; half++) {
        x[r][half] = x_place(row, half * 4 + lane / 8);
        keep(x[r][half]);
      }
    }
  }
};

// The operands of a warp in a step.
struct Step {
  alignas(16) u32 words[TILES][BITS];
  u32 x[2][ROW_TILES][4];  // of 32 inputs each
  float scales[GROUPS_IN_STEP][TILES][2];
  u32 zeros[GROUPS_IN_STEP][TILES][2];

  DEVICE void read(const u8* slot, const Lane& at, u32 lane) {
#pragma unroll
    for (u32 tile = 0; tile < TILES; tile++)
      read_words(words[tile], slot + at.codes + tile * TILE_BYTES, lane);
#pragma unroll
    for (u32 half = 0; half < 2; half++)
#pragma unroll
      for (u32 r = 0; r < ROW_TILES; r++) load_matrices(x[half][r], slot + at.x[r][half]);
#pragma unroll
    for (u32 group = 0; group < GROUPS_IN_STEP; group++)
#pragma unroll
      for (u32 tile = 0; tile < TILES; tile++)
#pragma unroll
        for (u32 h = 0; h < 2; h++) {
          u32 channel = tile * 16 + h * 8;
          scales[group][tile][h] = read_scale(slot + at.scales + group * SCALE_ROW, channel);
          zeros[group][tile][h] =
              HAS_ZEROS ? slot[at.zeros + group * ZERO_ROW + channel] : 1 << (BITS - 1);
        }
  }

  DEVICE void add_to(Sums& sums) const {
#pragma unroll
    for (u32 group = 0; group < GROUPS_IN_STEP; group++) {
      float x_sums[ROW_TILES][4] = {};
      if (FOLDED)
#pragma unroll
        for (u32 half = group; half < 2; half += GROUPS_IN_STEP)
#pragma unroll
          for (u32 r = 0; r < ROW_TILES; r++) {
            multiply_add(x_sums[r], ONES, ONES, ONES, ONES, x[half][r][0], x[half][r][1]);
            multiply_add(x_sums[r], ONES, ONES, ONES, ONES, x[half][r][2], x[half][r][3]);
          }
#pragma unroll
      for (u32 tile = 0; tile < TILES; tile++) {
        const u32(&zero)[2] = zeros[group][tile];
        const float(&scale)[2] = scales[group][tile];
        float part[ROW_TILES][4];
#pragma unroll
        for (u32 r = 0; r < ROW_TILES; r++)
#pragma unroll
          for (u32 i = 0; i < 4; i++)
            part[r][i] = FOLDED ? -(float)(OFFSET + zero[i / 2]) * x_sums[r][i] : 0.0f;
#pragma unroll
        for (u32 half = group; half < 2; half += GROUPS_IN_STEP) {
          u32 first[4], second[4];
          take_apart(first, words[tile], 0, half, zero[0]);
          take_apart(second, words[tile], 1, half, zero[1]);
#pragma unroll
          for (u32 r = 0; r < ROW_TILES; r++) {
            const u32(&b)[4] = x[half][r];
            multiply_add(part[r], first[0], second[0], first[1], second[1], b[0], b[1]);
            multiply_add(part[r], first[2], second[2], first[3], second[3], b[2], b[3]);
          }
        }
#pragma unroll
        for (u32 r = 0; r < ROW_TILES; r++)
#pragma unroll
          for (u32 i = 0; i < 4; i++) sums[tile][r][i] += part[r][i] * scale[i / 2];
      }
    }
  }
};

DEVICE void multiply_units(const Arguments& a, const Shop& shop, u32 warp, u32 lane) {
  Lane at(a, warp, lane);
  u32 warp_in = warp / WARPS_OUT, warp_out = warp % WARPS_OUT, steps = a.in_features / 64;
  float4* exchange = shop.exchange + (warp_in * FRAGMENTS + warp_out * TILES * ROW_TILES) * 32 + lane;
  Sums sums = {};
  Ring ring = shop.ring;
  u32 chunk = shop.begin % shop.walk.chunks, hand_overs = 0;
  for (u32 i = 0; i < shop.count; i++) {
    barrier_wait(ring.filled(), ring.parity);
    Step step;
    bool is_step = chunk * WARPS_IN + warp_in < steps;
    if (is_step) step.read(shop.memory + ring.offset, at, lane);
    __syncwarp();
    if (lane == 0) barrier_arrive(ring.taken());
    if (is_step) step.add_to(sums);
    ring.advance();
    if (++chunk < shop.walk.chunks && i < shop.count - 1) continue;
    chunk = 0;
    if (hand_overs) barrier_wait(shop.taken, (hand_overs - 1) & 1);
    hand_overs++;
#pragma unroll
    for (u32 tile = 0; tile < TILES; tile++)
#pragma unroll
      for (u32 r = 0; r < ROW_TILES; r++) {
        float(&s)[4] = sums[tile][r];
        exchange[(tile * ROW_TILES + r) * 32] = make_float4(s[0], s[1], s[2], s[3]);
        s[0] = s[1] = s[2] = s[3] = 0.0f;
      }
    __syncwarp();
    if (lane == 0) barrier_arrive(shop.given);
  }
}

// ---------------------------------------------------------------- the adding warp

DEVICE float4 add(float4 left, float4 right) {
  return make_float4(left.x + right.x, left.y + right.y, left.z + right.z, left.w + right.w);
}

// Adds the sums of all runs of a block in order, and stores them.
DEVICE void join_runs(const Arguments& a, const Walk& walk, u32 block, u32 first_run, u32 last_run,
                      u32 lane) {
  // Fragments of two runs at a time, because a read takes as long as a hundred additions.
  constexpr u32 AT_ONCE = FRAGMENTS < 4 ? FRAGMENTS : 4;
  u32 first_unit = block * walk.chunks;
#pragma unroll 1
  for (u32 first = 0; first < FRAGMENTS; first += AT_ONCE) {
    float4 sums[AT_ONCE] = {};
#pragma unroll 1
    for (u32 run = first_run; run <= last_run; run += 2) {
      float4 found[2][AT_ONCE];
#pragma unroll
      for (u32 other = 0; other < 2; other++) {
        u32 from = run + other < last_run ? run + other : last_run;
        u32 slot = 2 * from + (walk.begin(from) < first_unit);
        const float4* partials = a.partials + ((u64)slot * FRAGMENTS + first) * 32 + lane;
#pragma unroll
        for (u32 i = 0; i < AT_ONCE; i++)
          if (first + i < FRAGMENTS) found[other][i] = read_beyond_l1(partials + i * 32);
      }
#pragma unroll
      for (u32 other = 0; other < 2; other++)
#pragma unroll
        for (u32 i = 0; i < AT_ONCE; i++)
          if (run + other <= last_run && first + i < FRAGMENTS)
            sums[i] = add(sums[i], found[other][i]);
    }
#pragma unroll
    for (u32 i = 0; i < AT_ONCE; i++)
      if (first + i < FRAGMENTS) store_sums(a, block, (first + i) * 32 + lane, sums[i]);
  }
}

DEVICE void add_units(const Arguments& a, const Shop& shop, u32 lane) {
  const Walk& walk = shop.walk;
  u32 end = shop.begin + shop.count;
  u32 block = shop.begin / walk.chunks;
  for (u32 unit = shop.begin, hand_overs = 0; unit < end; block++, hand_overs++) {
    u32 first_unit = block * walk.chunks, end_unit = first_unit + walk.chunks;
    bool whole = shop.begin <= first_unit && end_unit <= end;
    // A run has at most two incomplete blocks: its first and its last.
    u32 slot = 2 * shop.run + (shop.begin < first_unit);
    barrier_wait(shop.given, hand_overs & 1);
#pragma unroll 1
    for (u32 fragment = 0; fragment < FRAGMENTS; fragment++) {
      float4 sum = shop.exchange[fragment * 32 + lane];
#pragma unroll
      for (u32 other = 1; other < WARPS_IN; other++)
        sum = add(sum, shop.exchange[(other * FRAGMENTS + fragment) * 32 + lane]);
      if (whole)
        store_sums(a, block, fragment * 32 + lane, sum);
      else
        a.partials[((u64)slot * FRAGMENTS + fragment) * 32 + lane] = sum;
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(shop.taken);
    unit = end_unit;
    if (whole) continue;
    __threadfence();
    __syncwarp();
    u32 first_run = walk.run_of(first_unit), last_run = walk.run_of(end_unit - 1);
    if (lane == 0) {
      *shop.last = atomicAdd(a.arrivals + block, 1u) == last_run - first_run;
      __threadfence();
    }
    __syncwarp();
    if (*shop.last) {
      join_runs(a, walk, block, first_run, last_run, lane);
      if (lane == 0) a.arrivals[block] = 0;
    }
    __syncwarp();
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    multiply_stream(const __grid_constant__ StreamArguments a) {
  u8* begin_of_memory = (u8*)shared_memory;
  Shop shop;
  shop.memory = begin_of_memory + (1024 - (shared_address(begin_of_memory) & 1023)) % 1024;
  shop.exchange = (float4*)(shop.memory + STAGES * STAGE_BYTES);
  u8* barriers = (u8*)shop.exchange + EXCHANGE_BYTES;
  shop.last = (u32*)(barriers + 16 * STAGES + 16);
  shop.ring = {share(shop.memory), share(barriers), share(barriers + 8 * STAGES)};
  shop.given = share(barriers + 16 * STAGES);
  shop.taken = share(barriers + 16 * STAGES + 8);
  u32 blocks = (a.a.out_features + 16 * BLOCK_TILES - 1) / (16 * BLOCK_TILES);
  shop.walk.chunks = (a.a.in_features / 64 + WARPS_IN - 1) / WARPS_IN;
  shop.walk.units = shop.walk.chunks * blocks;
  shop.walk.runs = gridDim.x;
  shop.run = blockIdx.x;
  shop.begin = shop.walk.begin(shop.run);
  shop.count = shop.walk.begin(shop.run + 1) - shop.begin;
  u32 thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  u32 early = shop.count < STAGES ? shop.count : STAGES;
  let_next_begin();
  if (thread == 32 * WARPS) {
    for (u32 stage = 0; stage < STAGES; stage++) {
      barrier_begin(shop.ring.full + 8 * stage, 1);
      barrier_begin(shop.ring.empty + 8 * stage, WARPS);
    }
    barrier_begin(shop.given, WARPS);
    barrier_begin(shop.taken, 1);
    publish_barriers();
    // Weights never change, so the first loads start before the launches that compute x end.
    for (u32 i = 0; i < early; i++) {
      u32 unit = shop.begin + i;
      copy_weight(a, shop.ring.memory + i * STAGE_BYTES, unit / shop.walk.chunks,
                  unit % shop.walk.chunks, shop.ring.full + 8 * i);
    }
    prefetch_map(a.x_map);
  }
  __syncthreads();
  if (warp < WARPS) {
    multiply_units(a.a, shop, warp, lane);
  } else if (warp == WARPS) {
    if (lane == 0) copy_units(a, shop, early);
  } else {
    wait_for_inputs();  // until then, earlier launches may use the results and the counters
    add_units(a.a, shop, lane);
  }
}

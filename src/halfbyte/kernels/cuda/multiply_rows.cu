// result [rows, out] = x [rows, in] @ weight.T + bias, from packed codes, for many rows of x, on
// compute capability 9.0.
//
// Weight: the fragments of halfbyte/kernels/fragments.py, which are also the register A operand of
// wgmma; the rows of x are its B operand in shared memory. code - zero is exact, its product with
// the scale is rounded once to the type of x; sums are fp32.
//
// Work (Stream-K): a tile is CHANNELS channels by ROWS rows. The (tile, step of 64 inputs) units,
// steps within a tile first, are split into as many equal runs as there are thread blocks. A
// producer warp copies codes, scales and x STAGES steps ahead into shared memory; WARPGROUPS
// consumer warpgroups of TILES * 64 channels each decode codes while the tensor cores multiply the
// previous ones. If a run ends within a tile, its sums go to `partials`, and the last warpgroup to
// arrive adds the sums of all runs in a fixed order, so the result is deterministic.
//
//   ROWS         per tile: 8, 16, 32, 64, 128 or 256
//   TILES, WARPGROUPS, STAGES   as above
//   BLOCKS       minimum thread blocks per multiprocessor
//   TURNS        1: the two warpgroups start the products of a step in turns, so that one decodes
//                codes while the other's products run; 0: no order
//   CLUSTER      thread blocks per cluster, which share the rows of x: each copies its part to all
//   JOINED       thread blocks of a cluster that share a tile, each with a part of its steps: their
//                sums are added in shared memory, without `partials`; 1: none

#include "base.cu"

struct RowsArguments {
  alignas(64) u64 x_map[16];  // CUtensorMap of x: boxes of 64 inputs by ROWS rows, swizzled
  Arguments a;
};

constexpr u32 CHANNELS = WARPGROUPS * TILES * 64;
constexpr u32 THREADS = 128 * (WARPGROUPS + 1);
constexpr u32 X_BYTES = ROWS * 128;
constexpr u32 CODE_BYTES = CHANNELS / 16 * TILE_BYTES;
constexpr u32 SCALE_ROW = CHANNELS * SCALE_SIZE;
constexpr u32 ZERO_ROW = HAS_ZEROS ? CHANNELS : 0;
constexpr u32 GRID_AT = X_BYTES + CODE_BYTES;
constexpr u32 STAGE_BYTES = (GRID_AT + GROUPS_IN_STEP * (SCALE_ROW + ZERO_ROW) + 1023) / 1024 * 1024;
constexpr u32 TURN_BYTES = 512;  // per warp, to transpose 16 channels by 16 rows
constexpr u32 TAIL_BYTES = WARPGROUPS * 4 * TURN_BYTES + 16 * STAGES + 16;
constexpr u32 SHARED_BYTES = STAGES * STAGE_BYTES + TAIL_BYTES + 1024;  // to start at a multiple
// A product covers 16 inputs; this many products per tile are started together.
constexpr u32 TOGETHER = TURNS ? 4 : TILES > 2 ? 1 : 2;
static_assert(!TURNS || WARPGROUPS == 2, "two take turns");
constexpr u32 FRAGMENTS = TILES * ROWS / 8;  // float4 of sums per thread
static_assert(JOINED == 1 || WARPGROUPS * FRAGMENTS * 2048 <= STAGES * STAGE_BYTES,
              "the sums of a tile meet where the slots were");

// Registers per thread at launch, and those that the two kinds of warps need.
constexpr u32 GIVEN = 65536 / BLOCKS / THREADS / 8 * 8;
constexpr u32 COPY_REGISTERS = 40;
constexpr u32 SHARE = (GIVEN * THREADS - COPY_REGISTERS * 128) / (WARPGROUPS * 128) / 8 * 8;
constexpr u32 PRODUCT_REGISTERS = SHARE > 240 ? 240 : SHARE;

// If the scale is not of x's type, it is represented as two numbers of that type.
#define TWO_SCALES (SCALE_KIND != BF16)

#ifndef EMULATED
#include "hopper.cu"

DEVICE u32 multiply_pair(u32 left, u32 right) {
  u32 found;
#if BF16
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(found) : "r"(left), "r"(right));
#else
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(found) : "r"(left), "r"(right));
#endif
  return found;
}

DEVICE u32 multiply_add_pair(u32 left, u32 right, u32 sum) {
  u32 found;
#if BF16
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(found) : "r"(left), "r"(right), "r"(sum));
#else
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(found) : "r"(left), "r"(right), "r"(sum));
#endif
  return found;
}

extern __shared__ uint4 shared_memory[];
#endif

// Converts the low half of a pair to float.
DEVICE float widen_low(u32 pair) {
#if BF16
  return bits_to_float(pair << 16);
#else
  return widen_half((u16)pair);
#endif
}

struct Scale {
  u32 high;  // twice
#if TWO_SCALES
  u32 low;  // the remainder of `high`, twice
#endif

  DEVICE void read(const u8* scales, u32 index) {
#if TWO_SCALES
    float whole = read_scale(scales, index);
    high = narrow_pair(whole, whole);
    float rest = whole - widen_low(high);
    low = narrow_pair(rest, rest);
#else
    high = ((const u16*)scales)[index] * 0x00010001u;
#endif
  }

  DEVICE u32 apply(u32 pair) const {
#if TWO_SCALES
    return multiply_add_pair(pair, high, multiply_pair(pair, low));
#else
    return multiply_pair(pair, high);
#endif
  }
};

// The work of this thread block: a run of units, with every CLUSTERth block of channels.
struct Run {
  Walk walk;
  u32 row_tiles, number, rank;
  u32 begin, end;
};

// A tile's position, and its steps in a run.
struct Part {
  u32 tile, step, end;  // first step of the run in this tile, and one past the last
  u32 block, row;       // of channels; first row of the tile

  DEVICE void begin(const Run& run, u32 unit) {
    tile = unit / run.walk.chunks;
    step = unit - tile * run.walk.chunks;
    end = step + (run.end - unit) < run.walk.chunks ? step + (run.end - unit) : run.walk.chunks;
    block = tile / run.row_tiles * CLUSTER + run.rank;
    row = tile % run.row_tiles * ROWS;
  }
};

#include "ring.cu"

// ---------------------------------------------------------------- the producer warp

// Starts the copies of a step of a tile, from one thread.
DEVICE void copy_weight(const Arguments& a, Shared to, u32 block, u32 step, Shared barrier) {
  u32 tiles = a.out_features / 16, first = block * (CHANNELS / 16);
  u32 left = tiles > first ? tiles - first : 0;
  u32 count = left < CHANNELS / 16 ? left : CHANNELS / 16;
  barrier_expect(barrier, count * (TILE_BYTES + GROUPS_IN_STEP * 16 * (SCALE_SIZE + HAS_ZEROS)) +
                              X_BYTES);
  if (CLUSTER > 1 && count == 0) return;
  copy_bulk(to + X_BYTES, a.codes + ((u64)step * tiles + first) * TILE_BYTES, count * TILE_BYTES,
            barrier);
#pragma unroll
  for (u32 half = 0; half < GROUPS_IN_STEP; half++) {
    u64 at = (u64)find_group(a, step, half) * a.out_features + first * 16;
    copy_bulk(to + GRID_AT + half * SCALE_ROW, a.scales + at * SCALE_SIZE, count * 16 * SCALE_SIZE,
              barrier);
#if HAS_ZEROS
    copy_bulk(to + GRID_AT + GROUPS_IN_STEP * SCALE_ROW + half * ZERO_ROW, a.zeros + at, count * 16,
              barrier);
#endif
  }
}

DEVICE void copy_all(const RowsArguments& a, const Run& run, Ring ring, u32 lane) {
  // Weights never change, so the first loads start before the launches that compute x end.
  u32 early = run.end - run.begin < STAGES ? run.end - run.begin : STAGES;
  if (lane == 0)
    for (u32 i = 0; i < early; i++) {
      Part part;
      part.begin(run, run.begin + i);
      copy_weight(a.a, ring.memory + i * STAGE_BYTES, part.block, part.step, ring.full + 8 * i);
    }
  wait_for_inputs();
  for (u32 unit = run.begin; unit < run.end;) {
    Part part;
    part.begin(run, unit);
    unit += part.end - part.step;
    for (u32 step = part.step; step < part.end; step++) {
      if (early)
        early--;
      else {
        barrier_wait(ring.taken(), ring.parity ^ 1);
        if (lane == 0) copy_weight(a.a, ring.place(), part.block, step, ring.filled());
      }
      // Each thread block of a cluster copies its part of the rows to all.
      u32 first = run.rank * (ROWS / CLUSTER);
      if (lane == 0)
        copy_box(ring.place() + first * 128, a, step * 64, part.row + first, ring.filled());
      ring.advance();
    }
  }
}

// ---------------------------------------------------------------- the consumer warps

// Tells all thread blocks of the cluster that this warp has released a slot.
DEVICE void give_back(Shared taken, u32 lane) {
#if CLUSTER > 1
  if (lane < CLUSTER) barrier_arrive_at(taken, lane);
#else
  if (lane == 0) barrier_arrive(taken);
#endif
}

#include "rows_sums.cu"

DEVICE void multiply_all(const Arguments& a, const Run& run, Ring ring, u8* memory,
                         u32 warpgroup, u32 thread, u8* turn, u32* last) {
  u32 lane = thread % 32, warp = thread / 32;
  const u8* own_codes = memory + X_BYTES + (warpgroup * TILES * 4 + warp) * TILE_BYTES;
  const u8* own_scales =
      memory + GRID_AT + (warpgroup * TILES * 64 + warp * 16 + lane / 4) * SCALE_SIZE;
#if HAS_ZEROS
  const u8* own_zeros = memory + GRID_AT + GROUPS_IN_STEP * SCALE_ROW + warpgroup * TILES * 64 +
                        warp * 16 + lane / 4;
#endif
  Sums sums;
  u32 numbers[2][TOGETHER][TILES][4];  // of the running products, and of the next ones
  u32 steps_left = run.end - run.begin;
  if (TURNS && warpgroup == 1) give_turn(0);
  for (u32 unit = run.begin; unit < run.end;) {
    Part own;
    own.begin(run, unit);
    unit += own.end - own.step;
#pragma unroll
    for (u32 t = 0; t < TILES; t++)
#pragma unroll
      for (u32 r = 0; r < ROWS / 8; r++)
#pragma unroll
        for (u32 i = 0; i < 4; i++) sums[t][r][i] = 0.0f;
    Shared taken = ring.taken();  // of the previous step, whose products may still run
    for (u32 step = own.step; step < own.end; step++) {
      barrier_wait(ring.filled(), ring.parity);
      Shared x = ring.place();
      alignas(16) u32 words[TILES][BITS];
#pragma unroll
      for (u32 t = 0; t < TILES; t++)
        read_words(words[t], own_codes + ring.offset + t * 4 * TILE_BYTES, lane);
      Scale scales[TILES][2];
      u32 zeros[TILES][2];
#pragma unroll
      for (u32 part = 0; part < 4 / TOGETHER; part++) {
        // All products except the last group have finished, so their registers may be overwritten.
        wait_for_products<TURNS ? 0 : 1>();
        if (part == (TURNS ? 0 : 1) && step > own.step) give_back(taken, lane);
#pragma unroll
        for (u32 t = 0; t < TILES; t++) {
#pragma unroll
          for (u32 h = 0; h < 2; h++)
#pragma unroll
            for (u32 i = 0; i < TOGETHER; i++) {
              u32 sixteenth = part * TOGETHER + i, half = sixteenth / 2;
              if (sixteenth == 0 || (HALF_GROUPS && sixteenth == 2)) {
                scales[t][h].read(own_scales + ring.offset + half * SCALE_ROW, t * 64 + h * 8);
                zeros[t][h] = 1 << (BITS - 1);
#if HAS_ZEROS
                zeros[t][h] = own_zeros[ring.offset + half * ZERO_ROW + t * 64 + h * 8];
#endif
              }
              u32 pairs[4];
              take_apart(pairs, words[t], h, half, zeros[t][h]);
#pragma unroll
              for (u32 u = 0; u < 2; u++)
                numbers[part % 2][i][t][u * 2 + h] =
                    scales[t][h].apply(pairs[sixteenth % 2 * 2 + u]);
            }
        }
        if (TURNS) wait_for_turn(warpgroup);
        begin_products();
#pragma unroll
        for (u32 i = 0; i < TOGETHER; i++)
#pragma unroll
          for (u32 t = 0; t < TILES; t++)
            multiply_box(sums[t], numbers[part % 2][i][t], x, part * TOGETHER + i);
        close_products();
        steps_left--;
        if (TURNS && (warpgroup == 0 || steps_left)) give_turn(1 - warpgroup);
      }
      taken = ring.taken();
      ring.advance();
    }
    wait_for_products<0>();
    give_back(taken, lane);
#if JOINED > 1
    join_sums(a, sums, own, ring.memory, memory, warpgroup, thread, turn + warp * TURN_BYTES);
#else
    if (share_sums(a, run, sums, own.tile, warpgroup, thread, last))
      store_sums(a, sums, own, warpgroup, warp, lane, turn + warp * TURN_BYTES);
#endif
  }
}

#if CLUSTER * JOINED > 1
#define CLUSTERED __cluster_dims__(CLUSTER * JOINED, 1, 1)
#else
#define CLUSTERED
#endif

extern "C" __global__ void CLUSTERED __launch_bounds__(THREADS, BLOCKS)
    multiply_rows(const __grid_constant__ RowsArguments a) {
  u8* begin_of_memory = (u8*)shared_memory;
  u8* memory = begin_of_memory + (1024 - (shared_address(begin_of_memory) & 1023)) % 1024;
  u8* turn = memory + STAGES * STAGE_BYTES;
  u8* barriers = turn + WARPGROUPS * 4 * TURN_BYTES;
  u32* last = (u32*)(barriers + 16 * STAGES);
  Ring ring = {share(memory), share(barriers), share(barriers + 8 * STAGES)};
  u32 thread = threadIdx.x;
  Run run;
  run.row_tiles = (a.a.rows + ROWS - 1) / ROWS;
  run.walk.chunks = a.a.in_features / 64;
  run.walk.units = run.walk.chunks * run.row_tiles *
                   ((a.a.out_features + CLUSTER * CHANNELS - 1) / (CLUSTER * CHANNELS));
  run.walk.runs = gridDim.x / CLUSTER;
  run.number = blockIdx.x / CLUSTER;
  run.rank = blockIdx.x % CLUSTER;
  run.begin = run.walk.begin(run.number);
  run.end = run.walk.begin(run.number + 1);
  if (thread == 0) {
    for (u32 stage = 0; stage < STAGES; stage++) {
      barrier_begin(ring.full + 8 * stage, 1);
      barrier_begin(ring.empty + 8 * stage, CLUSTER * WARPGROUPS * 4);
    }
    publish_barriers();
  }
  let_next_begin();
  meet_cluster();
  u32 warpgroup = thread / 128;
  if (warpgroup == WARPGROUPS) {
    give_registers<COPY_REGISTERS>();
    if (thread % 128 < 32) copy_all(a, run, ring, thread % 32);
    __syncwarp();
    if (JOINED > 1) meet_cluster();
  } else {
    take_registers<PRODUCT_REGISTERS>();
    wait_for_inputs();
    multiply_all(a.a, run, ring, memory, warpgroup, thread % 128, turn + warpgroup * 4 * TURN_BYTES,
                 last);
  }
  // No thread block may exit while others of its cluster copy to it, arrive at its barriers or read
  // it.
  __syncwarp();
  if (CLUSTER * JOINED > 1) meet_cluster();
}

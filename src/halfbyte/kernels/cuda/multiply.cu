// result [rows, out] = x [rows, in] @ weight.T + bias, from packed codes, for few rows of x.
//
// Weight: the fragments of halfbyte/kernels/fragments.py, which are the A operand of mma.m16n8k16,
// so that the few rows of x are the narrow side. code - zero is exact, sums are fp32 and scaled in
// fp32.
//
// Work (Stream-K): the (channel block, chunk of inputs) units, chunks within a block first, are
// split into as many equal runs as there are thread blocks. In a thread block, WARPS_IN warps
// process 64 inputs of a chunk each and WARPS_OUT warps TILES * 16 channels each; loads run STAGES
// ahead through shared memory. If a run ends within a channel block, its sums go to `partials`, and
// the last thread block to arrive adds the sums of all runs in a fixed order, so the result is
// deterministic.
//
// Compiled by halfbyte/kernels/cuda_compiler.py for each kind of layer and number of rows:
//   ROW_TILES    maximum rows of x, in units of 8
//   TILES, WARPS_OUT, WARPS_IN, STAGES   as above
//   BLOCKS       minimum thread blocks per multiprocessor

#include "base.cu"
#include "few_rows.cu"

constexpr u32 WARPS = WARPS_OUT * WARPS_IN;
constexpr u32 THREADS = 32 * WARPS;
constexpr u32 CODE_BYTES = TILES * TILE_BYTES;
constexpr u32 SCALE_ROW = TILES * 16 * SCALE_SIZE;
constexpr u32 ZERO_ROW = HAS_ZEROS ? TILES * 16 : 0;
constexpr u32 WARP_BYTES = CODE_BYTES + GROUPS_IN_STEP * (SCALE_ROW + ZERO_ROW);
constexpr u32 X_BYTES = ROW_TILES * 8 * 128;
constexpr u32 STAGE_BYTES = WARPS * WARP_BYTES + WARPS_IN * X_BYTES;
constexpr u32 FRAGMENTS = WARPS_OUT * TILES * ROW_TILES;

#ifndef EMULATED
// ---------------------------------------------------------------- device instructions

DEVICE void copy_ahead(u8* to, const u8* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from)
               : "memory");
}

DEVICE void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <u32 OPEN>
DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(OPEN) : "memory");
}

extern __shared__ uint4 shared_memory[];
#endif

// ---------------------------------------------------------------- loads

// Source of a warp's next copies. Pointers advance by a constant from unit to unit, because
// computing every address again would cost as much as the products.
struct Source {
  u32 lane, warp_in, warp_out;
  u32 chunk, block, step;
  u32 tiles_left;   // tiles of the weight from the warp's first on
  u32 channel;      // the warp's first channel
  const u8* codes;  // this lane's first piece
  const u8* x;

  DEVICE void begin(const Arguments& a, const Walk& walk, u32 unit) {
    block = unit / walk.chunks;
    chunk = unit % walk.chunks;
    aim(a);
  }

  DEVICE void aim(const Arguments& a) {
    u32 tiles = a.out_features / 16, first = (block * WARPS_OUT + warp_out) * TILES;
    step = chunk * WARPS_IN + warp_in;
    tiles_left = first < tiles ? tiles - first : 0;
    channel = first * 16;
    codes = a.codes + ((u64)step * tiles + first) * TILE_BYTES + lane * 16;
    u32 index = warp_out * 32 + lane;
    x = (const u8*)a.x + ((u64)(index / 8) * a.in_features + step * 64) * 2 + index % 8 * 16;
  }

  DEVICE void advance(const Arguments& a, const Walk& walk) {
    chunk++;
    step += WARPS_IN;
    codes += (u64)(a.out_features / 16) * (WARPS_IN * TILE_BYTES);
    x += WARPS_IN * 128;
    if (chunk == walk.chunks) {
      chunk = 0;
      block++;
      aim(a);
    }
  }

  // Starts the copies of the warp's codes, scales and zeros.
  DEVICE void copy_weight(const Arguments& a, u8* to) const {
#pragma unroll
    for (u32 i = 0; i < (CODE_BYTES + 511) / 512; i++) {
      u32 place = (i * 32 + lane) * 16;
      if ((CODE_BYTES % 512 == 0 || place < CODE_BYTES) && place / TILE_BYTES < tiles_left)
        copy_ahead(to + place, codes + i * 512);
    }
#pragma unroll
    for (u32 half = 0; half < GROUPS_IN_STEP; half++) {
      u64 first = (u64)find_group(a, step, half) * a.out_features + channel;
      u8* scales_to = to + CODE_BYTES + half * SCALE_ROW;
#pragma unroll
      for (u32 i = 0; i < (SCALE_ROW + 511) / 512; i++) {
        u32 place = (i * 32 + lane) * 16;
        if (place < SCALE_ROW && place / (16 * SCALE_SIZE) < tiles_left)
          copy_ahead(scales_to + place, a.scales + first * SCALE_SIZE + place);
      }
#if HAS_ZEROS
      u8* zeros_to = to + CODE_BYTES + GROUPS_IN_STEP * SCALE_ROW + half * ZERO_ROW;
      if (lane < TILES && lane < tiles_left)
        copy_ahead(zeros_to + lane * 16, a.zeros + first + lane * 16);
#endif
    }
  }

  // Copies the inputs of the step; warps with the same inputs share the work.
  template <bool AHEAD>
  DEVICE void copy_x(const Arguments& a, u8* to) const {
    constexpr u32 EACH = 4 * WARPS_OUT;  // rows at a time
#pragma unroll
    for (u32 i = 0; i < (ROW_TILES * 8 + EACH - 1) / EACH; i++) {
      u32 m = i * EACH + warp_out * 4 + lane / 8;
      if (m < a.rows && (ROW_TILES * 8 % EACH == 0 || m < ROW_TILES * 8)) {
        const u8* from = x + (u64)(i * EACH) * a.in_features * 2;
        u8* target = to + x_place(m, lane % 8);
        if (AHEAD)
          copy_ahead(target, from);
        else
          *(uint4*)target = *(const uint4*)from;
      }
    }
  }
};

DEVICE void meet() {
#if WARPS_OUT == 1
  __syncwarp();
#else
  __syncthreads();
#endif
}

DEVICE void add_step(float (&sums)[TILES][ROW_TILES][4], const u8* weight, const u8* x, u32 lane) {
  const u8* scales = weight + CODE_BYTES;
  alignas(16) u32 words[TILES][BITS];
#pragma unroll
  for (u32 tile = 0; tile < TILES; tile++)
    read_words(words[tile], weight + tile * TILE_BYTES, lane);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    u32 b[ROW_TILES][4];
#pragma unroll
    for (u32 r = 0; r < ROW_TILES; r++)
      load_matrices(b[r], x + x_place(r * 8 + lane % 8, half * 4 + lane / 8));
    u32 scale_row = HALF_GROUPS ? half * TILES * 16 : 0;
#pragma unroll
    for (u32 tile = 0; tile < TILES; tile++) {
      u32 channel = scale_row + tile * 16 + lane / 4;
      u32 zero0 = 1 << (BITS - 1), zero1 = zero0;
#if HAS_ZEROS
      const u8* zeros = scales + GROUPS_IN_STEP * SCALE_ROW;
      zero0 = zeros[channel];
      zero1 = zeros[channel + 8];
#endif
      u32 first[4], second[4];
      take_apart(first, words[tile], 0, half, zero0);
      take_apart(second, words[tile], 1, half, zero1);
      float scale0 = read_scale(scales, channel), scale1 = read_scale(scales, channel + 8);
#pragma unroll
      for (u32 r = 0; r < ROW_TILES; r++) {
        float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        multiply_add(part, first[0], second[0], first[1], second[1], b[r][0], b[r][1]);
        multiply_add(part, first[2], second[2], first[3], second[3], b[r][2], b[r][3]);
        sums[tile][r][0] += part[0] * scale0;
        sums[tile][r][1] += part[1] * scale0;
        sums[tile][r][2] += part[2] * scale1;
        sums[tile][r][3] += part[3] * scale1;
      }
    }
  }
}

// Adds the sums of the warps, and those of other runs if this run does not have all inputs of the
// block.
DEVICE void finish_block(const Arguments& a, const Walk& walk, u32 block, u32 run, u32 thread,
                         float (&sums)[TILES][ROW_TILES][4], float4* exchange, u32* last) {
  u32 lane = thread % 32, warp = thread / 32;
  u32 warp_in = warp / WARPS_OUT, warp_out = warp % WARPS_OUT;
#pragma unroll
  for (u32 tile = 0; tile < TILES; tile++)
#pragma unroll
    for (u32 r = 0; r < ROW_TILES; r++) {
      u32 fragment = (warp_out * TILES + tile) * ROW_TILES + r;
      float(&s)[4] = sums[tile][r];
      exchange[(warp_in * FRAGMENTS + fragment) * 32 + lane] = make_float4(s[0], s[1], s[2], s[3]);
      s[0] = s[1] = s[2] = s[3] = 0.0f;
    }
  __syncthreads();
  u32 first_unit = block * walk.chunks, end_unit = first_unit + walk.chunks;
  u32 first_run = walk.run_of(first_unit), last_run = walk.run_of(end_unit - 1);
  bool whole = first_run == last_run;
  // A run has at most two incomplete blocks: its first and its last.
  u32 slot = 2 * run + (walk.begin(run) < first_unit);
  for (u32 index = thread; index < FRAGMENTS * 32; index += THREADS) {
    float4 sum = exchange[index];
#pragma unroll
    for (u32 other = 1; other < WARPS_IN; other++) {
      float4 more = exchange[other * FRAGMENTS * 32 + index];
      sum.x += more.x;
      sum.y += more.y;
      sum.z += more.z;
      sum.w += more.w;
    }
    if (whole)
      store_sums(a, block, index, sum);
    else
      a.partials[(u64)slot * FRAGMENTS * 32 + index] = sum;
  }
  if (whole) {
    __syncthreads();  // before `exchange` is overwritten
    return;
  }
  __threadfence();
  __syncthreads();
  if (thread == 0) {
    *last = atomicAdd(a.arrivals + block, 1u) == last_run - first_run;
    __threadfence();
  }
  __syncthreads();
  if (*last) {
    for (u32 index = thread; index < FRAGMENTS * 32; index += THREADS) {
      float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      for (u32 other = first_run; other <= last_run; other++) {
        u32 place = 2 * other + (walk.begin(other) < first_unit);
        float4 more = read_beyond_l1(a.partials + (u64)place * FRAGMENTS * 32 + index);
        sum.x += more.x;
        sum.y += more.y;
        sum.z += more.z;
        sum.w += more.w;
      }
      store_sums(a, block, index, sum);
    }
    if (thread == 0) a.arrivals[block] = 0;
  }
  __syncthreads();
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) multiply(Arguments a) {
  u8* ring = (u8*)shared_memory;
  float4* exchange = (float4*)(ring + STAGES * STAGE_BYTES);
  u32* last = (u32*)(exchange + WARPS_IN * FRAGMENTS * 32);
  u32 thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  u32 warp_in = warp / WARPS_OUT, warp_out = warp % WARPS_OUT;
  u32 steps = a.in_features / 64;
  Walk walk;
  walk.chunks = (steps + WARPS_IN - 1) / WARPS_IN;
  walk.units = walk.chunks * ((a.out_features + 16 * TILES * WARPS_OUT - 1) / (16 * TILES * WARPS_OUT));
  walk.runs = gridDim.x;
  u32 run = blockIdx.x, begin = walk.begin(run), count = walk.begin(run + 1) - begin;
  u8* weight_part = ring + warp * WARP_BYTES;
  u8* x_part = ring + WARPS * WARP_BYTES + warp_in * X_BYTES;

  Source source = {lane, warp_in, warp_out};
  source.begin(a, walk, begin);
  let_next_begin();
#pragma unroll
  for (u32 stage = 0; stage < STAGES - 1; stage++) {
    if (stage < count && source.step < steps)
      source.copy_weight(a, weight_part + stage * STAGE_BYTES);
    close_copies();
    source.advance(a, walk);
  }
  // Weights never change, so their loads were started before the launches that compute x ended.
  wait_for_inputs();
  Source early = {lane, warp_in, warp_out};
  early.begin(a, walk, begin);
#pragma unroll
  for (u32 stage = 0; stage < STAGES - 1; stage++) {
    if (stage < count && early.step < steps)
      early.copy_x<false>(a, x_part + stage * STAGE_BYTES);
    early.advance(a, walk);
  }

  float sums[TILES][ROW_TILES][4];
#pragma unroll
  for (u32 tile = 0; tile < TILES; tile++)
#pragma unroll
    for (u32 r = 0; r < ROW_TILES; r++)
#pragma unroll
      for (u32 i = 0; i < 4; i++) sums[tile][r][i] = 0.0f;

  u32 block = begin / walk.chunks, chunk = begin % walk.chunks;
  u32 slot = 0, slot_ahead = (STAGES - 1) * STAGE_BYTES;
  for (u32 unit = 0; unit < count; unit++) {
    wait_for_copies<STAGES - 2>();
    meet();  // all copies have arrived, and all threads have read the slot that is filled next
    if (unit + STAGES - 1 < count && source.step < steps) {
      source.copy_weight(a, weight_part + slot_ahead);
      source.copy_x<true>(a, x_part + slot_ahead);
    }
    close_copies();
    source.advance(a, walk);
    if (chunk * WARPS_IN + warp_in < steps) add_step(sums, weight_part + slot, x_part + slot, lane);
    chunk++;
    if (chunk == walk.chunks || unit == count - 1)
      finish_block(a, walk, block, run, thread, sums, exchange, last);
    if (chunk == walk.chunks) {
      chunk = 0;
      block++;
    }
    slot = slot + STAGE_BYTES == STAGES * STAGE_BYTES ? 0 : slot + STAGE_BYTES;
    slot_ahead = slot_ahead + STAGE_BYTES == STAGES * STAGE_BYTES ? 0 : slot_ahead + STAGE_BYTES;
  }
}

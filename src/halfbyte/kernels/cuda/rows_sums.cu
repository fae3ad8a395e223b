// Storage of a tile's sums in multiply_rows.cu: directly if one run has all steps of the tile;
// otherwise after adding the sums of all runs, through L2 by the last run to arrive, or in the
// shared memory of a cluster. Sums are always added in the order of the runs.

typedef float Sums[TILES][ROWS / 8][4];

// Stores a lane's sums of 16 channels from n on by 16 rows from m on.
DEVICE void store_pair(const Arguments& a, const float (&low)[4], const float (&high)[4], u32 n,
                       u32 m, u32 lane, u8* turn) {
  float bias0 = 0.0f, bias1 = 0.0f;
  if (a.bias) {
    bias0 = widen_low(a.bias[n + lane / 4]);
    bias1 = widen_low(a.bias[n + lane / 4 + 8]);
  }
  store_transposed(turn + (lane / 16 * 8 + lane % 8) * 32 + lane / 8 % 2 * 16,
                   narrow_pair(low[0] + bias0, low[1] + bias0),
                   narrow_pair(low[2] + bias1, low[3] + bias1),
                   narrow_pair(high[0] + bias0, high[1] + bias0),
                   narrow_pair(high[2] + bias1, high[3] + bias1));
  __syncwarp();
  if (m + lane / 2 < a.rows && lane / 2 < ROWS)
    *(uint4*)(a.result + (u64)(m + lane / 2) * a.out_features + n + lane % 2 * 8) =
        *(const uint4*)(turn + lane * 16);
  __syncwarp();
}

// The other eight rows of a pair; the same rows if a tile has only eight.
constexpr u32 NEXT = ROWS > 8 ? 1 : 0;

DEVICE void store_sums(const Arguments& a, Sums& sums, const Part& own, u32 warpgroup, u32 warp,
                       u32 lane, u8* turn) {
#pragma unroll
  for (u32 t = 0; t < TILES; t++) {
    u32 n = ((own.block * WARPGROUPS + warpgroup) * TILES + t) * 64 + warp * 16;
    if (n >= a.out_features) continue;
#pragma unroll
    for (u32 r = 0; r < ROWS / 8; r += 2)
      if (own.row + r * 8 < a.rows)
        store_pair(a, sums[t][r], sums[t][r + NEXT], n, own.row + r * 8, lane, turn);
  }
}

#if JOINED > 1
// Adds the sums of the thread blocks of a cluster in order, each a part of the tile, and stores it.
DEVICE void join_sums(const Arguments& a, Sums& sums, const Part& own, Shared memory, u8* exchange,
                      u32 warpgroup, u32 thread, u8* turn) {
  constexpr u32 PAIRS = (ROWS / 8 + 1) / 2;
  u32 lane = thread % 32, warp = thread / 32, rank = blockIdx.x % JOINED;
  u32 first = (warpgroup * FRAGMENTS * 128 + thread) * 16;
  meet_consumers();  // all products have finished, so the slots are free
#pragma unroll
  for (u32 t = 0; t < TILES; t++)
#pragma unroll
    for (u32 r = 0; r < ROWS / 8; r++) {
      float(&s)[4] = sums[t][r];
      *(float4*)(exchange + first + (t * (ROWS / 8) + r) * 2048) =
          make_float4(s[0], s[1], s[2], s[3]);
    }
  meet_cluster();
  for (u32 index = rank; index < TILES * PAIRS; index += JOINED) {
    u32 t = index / PAIRS, r = index % PAIRS * 2;
    u32 n = ((own.block * WARPGROUPS + warpgroup) * TILES + t) * 64 + warp * 16;
    if (n >= a.out_features || own.row + r * 8 >= a.rows) continue;
    Shared from = memory + first + (t * (ROWS / 8) + r) * 2048;
    float4 parts[2][JOINED];
#pragma unroll
    for (u32 other = 0; other < JOINED; other++) {
      parts[0][other] = read_elsewhere(from, other);
      parts[1][other] = read_elsewhere(from + NEXT * 2048, other);
    }
    float total[2][4];
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
      total[i][0] = total[i][1] = total[i][2] = total[i][3] = 0.0f;
#pragma unroll
      for (u32 other = 0; other < JOINED; other++) {
        total[i][0] += parts[i][other].x;
        total[i][1] += parts[i][other].y;
        total[i][2] += parts[i][other].z;
        total[i][3] += parts[i][other].w;
      }
    }
    store_pair(a, total[0], total[1], n, own.row + r * 8, lane, turn);
  }
}
#endif

// Shares this run's sums of a tile with the other runs; returns true if it is the last and has all.
DEVICE bool share_sums(const Arguments& a, const Run& run, Sums& sums, u32 tile, u32 warpgroup,
                       u32 thread, u32* last) {
  const Walk& walk = run.walk;
  u32 first_unit = tile * walk.chunks;
  u32 first_run = walk.run_of(first_unit), last_run = walk.run_of(first_unit + walk.chunks - 1);
  if (first_run == last_run) return true;
  // A run has at most two incomplete tiles: its first and its last.
  u32 slot = 2 * run.number + (run.begin < first_unit);
  u32 part = run.rank * WARPGROUPS + warpgroup;
  float4* own = a.partials + (u64)(slot * CLUSTER * WARPGROUPS + part) * (FRAGMENTS * 128) + thread;
#pragma unroll
  for (u32 t = 0; t < TILES; t++)
#pragma unroll
    for (u32 r = 0; r < ROWS / 8; r++) {
      float(&s)[4] = sums[t][r];
      own[(t * (ROWS / 8) + r) * 128] = make_float4(s[0], s[1], s[2], s[3]);
    }
  __threadfence();
  meet_warpgroup(warpgroup);
  if (thread == 0) {
    u32* arrivals = a.arrivals + tile * CLUSTER * WARPGROUPS + part;
    u32 is_last = atomicAdd(arrivals, 1u) == last_run - first_run;
    if (is_last) *arrivals = 0;
    last[warpgroup] = is_last;
    __threadfence();
  }
  meet_warpgroup(warpgroup);
  if (!last[warpgroup]) return false;
#pragma unroll
  for (u32 t = 0; t < TILES; t++)
#pragma unroll
    for (u32 r = 0; r < ROWS / 8; r++)
#pragma unroll
      for (u32 i = 0; i < 4; i++) sums[t][r][i] = 0.0f;
  for (u32 other = first_run; other <= last_run; other++) {
    u32 place = 2 * other + (walk.begin(other) < first_unit);
    const float4* from =
        a.partials + (u64)(place * CLUSTER * WARPGROUPS + part) * (FRAGMENTS * 128) + thread;
#pragma unroll
    for (u32 t = 0; t < TILES; t++)
#pragma unroll
      for (u32 r = 0; r < ROWS / 8; r++) {
        float4 more = read_beyond_l1(from + (t * (ROWS / 8) + r) * 128);
        sums[t][r][0] += more.x;
        sums[t][r][1] += more.y;
        sums[t][r][2] += more.z;
        sums[t][r][3] += more.w;
      }
  }
  return true;
}

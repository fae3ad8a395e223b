// Shared by the kernels for few rows of x: the products of a warp, and the storage of their sums.
//
//   ROW_TILES    maximum rows of x, in units of 8
//   TILES        tiles of 16 channels by 64 inputs per warp and step
//   WARPS_OUT    warps along the channels

#ifndef EMULATED
DEVICE void load_matrices(u32 (&found)[4], const u8* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(found[0]), "=r"(found[1]), "=r"(found[2]), "=r"(found[3])
               : "r"(shared_address(row))
               : "memory");
}

DEVICE void multiply_add(float (&sums)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if BF16
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
#else
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
#endif
               "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
#endif

DEVICE void store_one(const Arguments& a, u32 m, u32 n, float value) {
  if (m < a.rows) {
#if BF16
    if (a.bias) value += bits_to_float((u32)a.bias[n] << 16);
#else
    if (a.bias) value += widen_half(a.bias[n]);
#endif
    a.result[(u64)m * a.out_features + n] = (u16)narrow_pair(value, 0.0f);
  }
}

// Stores a lane's four sums of a fragment of a block of channels.
DEVICE void store_sums(const Arguments& a, u32 block, u32 index, float4 sum) {
  u32 lane = index % 32, fragment = index / 32;
  u32 tile = block * WARPS_OUT * TILES + fragment / ROW_TILES;
  if (tile * 16 >= a.out_features) return;
  u32 n = tile * 16 + lane / 4, m = fragment % ROW_TILES * 8 + lane % 4 * 2;
  store_one(a, m, n, sum.x);
  store_one(a, m + 1, n, sum.y);
  store_one(a, m, n + 8, sum.z);
  store_one(a, m + 1, n + 8, sum.w);
}

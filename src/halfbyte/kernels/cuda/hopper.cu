// Instructions of compute capability 9.0 (sm_90a): clusters, TMA copies of boxes, and warpgroup
// products (wgmma) with the A operand in registers and the B operand in shared memory. In emulated
// kernels tests/kernels/hopper_emulator.h replaces this file.

#include "barriers.cu"

// Arrives at the barrier at the same address in another thread block of the cluster.
DEVICE void barrier_arrive_at(Shared barrier, u32 rank) {
  asm volatile(
      "{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there]; }" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

// Synchronizes the threads of a cluster.
DEVICE void meet_cluster() {
#if CLUSTER * JOINED > 1
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
#else
  __syncthreads();
#endif
}

// Copies 64 inputs of ROWS / CLUSTER rows of x to the same address in all thread blocks of the
// cluster, swizzled as in x_place; missing rows are 0.
DEVICE void copy_box(Shared to, const RowsArguments& a, u32 input, u32 row, Shared barrier) {
#if CLUSTER > 1
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to),
      "l"(a.x_map), "r"(barrier), "r"(input), "r"(row), "h"((u16)((1 << CLUSTER) - 1))
      : "memory");
#else
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];" ::"r"(to),
      "l"(a.x_map), "r"(barrier), "r"(input), "r"(row)
      : "memory");
#endif
}

// Must precede products whose registers were written since the previous ones.
DEVICE void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

DEVICE void close_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <u32 OPEN>
DEVICE void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(OPEN) : "memory");
}

// Descriptor of the B operand at 16 inputs of a box: swizzled rows of 128 bytes, groups of eight
// 1024 bytes apart.
DEVICE u64 describe_box(Shared box, u32 sixteenth) {
  return (u64)(1u << 30 | 64) << 32 | ((box >> 4 | 1u << 16) + 2 * sixteenth);
}

#if BF16
#define WGMMA_TYPES ".f32.bf16.bf16 "
#else
#define WGMMA_TYPES ".f32.f16.f16 "
#endif
#define SUMS_OF(i) "+f"(sums[i][0]), "+f"(sums[i][1]), "+f"(sums[i][2]), "+f"(sums[i][3])
#define SUMS_OF_4(i) SUMS_OF(i), SUMS_OF(i + 1), SUMS_OF(i + 2), SUMS_OF(i + 3)
#define SUMS_OF_16(i) SUMS_OF_4(i), SUMS_OF_4(i + 4), SUMS_OF_4(i + 8), SUMS_OF_4(i + 12)
#define OPERANDS "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(describe_box(box, sixteenth))

// sums [64 channels, ROWS] += a [64, 16] x the box's rows at these 16 inputs. Asynchronous: `a`,
// `sums` and the box must not be accessed before wait_for_products.
DEVICE void multiply_box(float (&sums)[ROWS / 8][4], const u32 (&a)[4], Shared box,
                         u32 sixteenth) {
#if ROWS == 8
  asm volatile("{ .reg .pred add; setp.ne.b32 add, 1, 0; "
               "wgmma.mma_async.sync.aligned.m64n8k16" WGMMA_TYPES "{"
               "%0,%1,%2,%3"
               "}, {%4,%5,%6,%7}, %8, add, 1, 1, 0; }"
               : SUMS_OF(0)
               : OPERANDS);
#elif ROWS == 16
  asm volatile("{ .reg .pred add; setp.ne.b32 add, 1, 0; "
               "wgmma.mma_async.sync.aligned.m64n16k16" WGMMA_TYPES "{"
               "%0,%1,%2,%3,%4,%5,%6,%7"
               "}, {%8,%9,%10,%11}, %12, add, 1, 1, 0; }"
               : SUMS_OF(0), SUMS_OF(1)
               : OPERANDS);
#elif ROWS == 32
  asm volatile("{ .reg .pred add; setp.ne.b32 add, 1, 0; "
               "wgmma.mma_async.sync.aligned.m64n32k16" WGMMA_TYPES "{"
               "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
               "}, {%16,%17,%18,%19}, %20, add, 1, 1, 0; }"
               : SUMS_OF_4(0)
               : OPERANDS);
#elif ROWS == 64
  asm volatile("{ .reg .pred add; setp.ne.b32 add, 1, 0; "
               "wgmma.mma_async.sync.aligned.m64n64k16" WGMMA_TYPES "{"
               "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,"
               "%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
               "}, {%32,%33,%34,%35}, %36, add, 1, 1, 0; }"
               : SUMS_OF_4(0), SUMS_OF_4(4)
               : OPERANDS);
#elif ROWS == 128
  asm volatile("{ .reg .pred add; setp.ne.b32 add, 1, 0; "
               "wgmma.mma_async.sync.aligned.m64n128k16" WGMMA_TYPES "{"
               "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,"
               "%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
               "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,"
               "%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,"
               "%62,%63"
               "}, {%64,%65,%66,%67}, %68, add, 1, 1, 0; }"
               : SUMS_OF_16(0)
               : OPERANDS);
#elif ROWS == 256
  asm volatile("{ .reg .pred add; setp.ne.b32 add, 1, 0; "
               "wgmma.mma_async.sync.aligned.m64n256k16" WGMMA_TYPES "{"
               "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,"
               "%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
               "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,"
               "%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,"
               "%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,"
               "%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,"
               "%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,"
               "%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,"
               "%119,%120,%121,%122,%123,%124,%125,%126,%127"
               "}, {%128,%129,%130,%131}, %132, add, 1, 1, 0; }"
               : SUMS_OF_16(0), SUMS_OF_16(16)
               : OPERANDS);
#endif
}

// Stores four 8 by 8 matrices of pairs transposed; lane 8 i + j names where column j of matrix i
// goes.
DEVICE void store_transposed(u8* column, u32 m0, u32 m1, u32 m2, u32 m3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(
                   shared_address(column)),
               "r"(m0), "r"(m1), "r"(m2), "r"(m3)
               : "memory");
}

// Reads the same address in the shared memory of another thread block of the cluster.
DEVICE float4 read_elsewhere(Shared place, u32 rank) {
  float4 found;
  asm volatile(
      "{ .reg .b32 there; mapa.shared::cluster.u32 there, %4, %5;\n"
      "ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [there]; }"
      : "=f"(found.x), "=f"(found.y), "=f"(found.z), "=f"(found.w)
      : "r"(place), "r"(rank)
      : "memory");
  return found;
}

// Synchronizes the threads of all consumer warpgroups.
DEVICE void meet_consumers() {
  asm volatile("bar.sync 15, %0;" ::"n"(128 * WARPGROUPS) : "memory");
}

// Waits until the other of two warpgroups passes the turn.
DEVICE void wait_for_turn(u32 warpgroup) {
  asm volatile("bar.sync %0, 256;" ::"r"(8 + warpgroup) : "memory");
}

DEVICE void give_turn(u32 warpgroup) {
  asm volatile("bar.arrive %0, 256;" ::"r"(8 + warpgroup) : "memory");
}

// Synchronizes the threads of a warpgroup.
DEVICE void meet_warpgroup(u32 warpgroup) {
  asm volatile("bar.sync %0, 128;" ::"r"(1 + warpgroup) : "memory");
}

template <u32 COUNT>
DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <u32 COUNT>
DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// Instructions of compute capability 9.0 and later: mbarriers in shared memory, and bulk copies
// that complete on them. In emulated kernels tests/kernels/barrier_emulator.h replaces this file.

typedef u32 Shared;  // an address in shared memory

DEVICE Shared share(const u8* pointer) { return shared_address(pointer); }

DEVICE void barrier_begin(Shared barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals)
               : "memory");
}

// After this fence, initialized barriers may be used by copies of this thread, and after
// __syncthreads by other threads. Limited to shared memory: a fence for all memory is GPU-wide and
// slower.
DEVICE void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

DEVICE void barrier_arrive(Shared barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and makes the barrier's phase also wait for a number of bytes from bulk copies.
DEVICE void barrier_expect(Shared barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier),
               "r"(bytes)
               : "memory");
}

// Waits until the barrier's phase of this parity completes.
DEVICE void barrier_wait(Shared barrier, u32 parity) {
  asm volatile(
      "{ .reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
      "@!done bra again; }" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Copies contiguous bytes, a multiple of 16.
DEVICE void copy_bulk(Shared to, const u8* from, u32 bytes, Shared barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

// Instructions of compute capability 9.0 and later: barriers in shared memory, and copies in bulk that
// arrive at them. Not included where a kernel is emulated: tests/kernels/barrier_emulator.h stands in
// for it.

typedef u32 Shared;  // an address of shared memory

DEVICE Shared share(const u8* pointer) { return shared_address(pointer); }

DEVICE void barrier_begin(Shared barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals)
               : "memory");
}

// Barriers that were begun may be used by copies of this thread after this, and by other threads after a
// __syncthreads too. Of shared memory: for all memory this fence is one of the whole GPU, and takes longer.
DEVICE void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

DEVICE void barrier_arrive(Shared barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and lets the barrier's phase wait for so many bytes of bulk copies too.
DEVICE void barrier_expect(Shared barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier),
               "r"(bytes)
               : "memory");
}

// Waits for the end of the barrier's current phase of this parity.
DEVICE void barrier_wait(Shared barrier, u32 parity) {
  asm volatile(
      "{ .reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
      "@!done bra again; }" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Copies bytes in a row, a multiple of 16.
DEVICE void copy_bulk(Shared to, const u8* from, u32 bytes, Shared barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

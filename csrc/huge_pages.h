// Huge pages for memory that is about to be filled for the first time.
#pragma once
#include <stdint.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace halfbyte {
namespace {

// Must be called before first touch; large pages save page faults and TLB misses.
inline void prefer_huge_pages(void* bytes, int64_t count) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t PAGE = 2 << 20;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(bytes) + PAGE - 1) / PAGE * PAGE;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(bytes) + count) / PAGE * PAGE;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)bytes;
  (void)count;
#endif
}

}  // namespace
}  // namespace halfbyte

// A parallel loop on the process's existing thread pool.
#pragma once
#include <stdint.h>

namespace halfbyte {

// Calls body(data, first, last) for pieces of [0, count) on up to `threads` threads and returns
// when all are done. Threads take pieces of `piece` elements in order; piece 0: one piece per
// thread.
void parallel_for(int64_t count, int threads, void (*body)(void*, int64_t, int64_t), void* data,
                  int64_t piece);

template <class F>
void parallel_for(int64_t count, int threads, const F& function, int64_t piece = 0) {
  parallel_for(
      count, threads,
      [](void* data, int64_t first, int64_t last) { (*static_cast<const F*>(data))(first, last); },
      const_cast<F*>(&function), piece);
}

}  // namespace halfbyte

// Threads: one function, behind which stands the pool that the process already has.
#pragma once
#include <stdint.h>

namespace halfbyte {

// Calls body(data, first, last) for pieces of [0, count) on up to `threads` threads at once;
// returns when all are done. Threads take pieces in order, as they come free; piece 0: one for each
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

#include "parallel.h"

#include <atomic>
#include <thread>
#include <vector>

#include "halfbyte_cpu.h"

namespace halfbyte {
namespace {

hb_gomp_parallel openmp = nullptr;

struct Work {
  std::atomic<int64_t> next;
  int64_t count, piece;
  void (*body)(void*, int64_t, int64_t);
  void* data;
};

// Usually one piece per thread: long streams from memory are fast, and pieces an eighth as large
// make a decode step 20% slower. If a thread starts late, others take its piece.
void take_pieces(void* from) {
  Work& work = *static_cast<Work*>(from);
  for (;;) {
    const int64_t first = work.next.fetch_add(work.piece);
    if (first >= work.count) return;
    const int64_t last = first + work.piece;
    work.body(work.data, first, last < work.count ? last : work.count);
  }
}

}  // namespace

void parallel_for(int64_t count, int threads, void (*body)(void*, int64_t, int64_t), void* data,
                  int64_t piece) {
  if (count <= 0) return;
  if (threads < 2 || count < 2) return body(data, 0, count);
  if (!piece) piece = (count + threads - 1) / threads;
  Work work{{0}, count, piece, body, data};
  if (openmp) return openmp(take_pieces, &work, unsigned(threads), 0);
  std::vector<std::thread> others;
  for (int i = 1; i < threads; i++) others.emplace_back(take_pieces, &work);
  take_pieces(&work);
  for (std::thread& other : others) other.join();
}

}  // namespace halfbyte

extern "C" void hb_use_openmp(hb_gomp_parallel start) { halfbyte::openmp = start; }

extern "C" uint64_t hb_read(const void* from, int64_t bytes, int threads) {
  std::atomic<uint64_t> sum{0};
  halfbyte::parallel_for(bytes / 64, threads, [&](int64_t first, int64_t last) {
    const uint64_t* words = static_cast<const uint64_t*>(from);
    uint64_t lanes[8] = {};
    for (int64_t i = first * 8; i < last * 8; i += 8) {
      __builtin_prefetch(words + i + 256);
      for (int j = 0; j < 8; j++) lanes[j] ^= words[i + j];
    }
    for (int j = 1; j < 8; j++) lanes[0] ^= lanes[j];
    sum ^= lanes[0];
  });
  return sum;
}

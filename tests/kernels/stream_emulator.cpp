// The kernel for few rows of compute capability 9.0 as a function for ctypes.
#include "barrier_emulator.h"

#define __grid_constant__

#include "multiply_stream.cu"

static StreamArguments arguments;

static void enter() {
  multiply_stream(arguments);
  emulator::end_of_thread();
}

extern "C" int shared_bytes() { return SHARED_BYTES; }
extern "C" int arguments_bytes() { return sizeof(StreamArguments); }

// `order` 1: thread blocks backwards; 2: bulk copies at once; 3: and threads scattered.
// What a GPU would not have run, or null.
extern "C" const char* emulate(const StreamArguments* given, int blocks, int order) {
  memcpy(&arguments, given, sizeof arguments);
  gridDim.x = blocks;
  emulator::eager = order >= 2;
  emulator::scattered = order == 3;
  emulator::fault = nullptr;
  for (int i = 0; i < blocks; i++) {
    emulator::phase_barriers.clear();
    emulator::run_blocks(enter, order == 1 ? blocks - 1 - i : i, 1, THREADS, SHARED_BYTES);
  }
  return emulator::fault;
}

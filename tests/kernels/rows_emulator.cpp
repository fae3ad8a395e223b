// The kernel for many rows as a function for ctypes.
#include "hopper_emulator.h"

#include "multiply_rows.cu"

constexpr int IN_CLUSTER = CLUSTER * JOINED;
static RowsArguments arguments;

static void enter() {
  multiply_rows(arguments);
  emulator::end_of_thread();
}

extern "C" int shared_bytes() { return SHARED_BYTES; }
extern "C" int arguments_bytes() { return sizeof(RowsArguments); }

// `order` 1: thread blocks backwards; 2: bulk copies at once; 3: and threads scattered.
// What a GPU would not have run, or null.
extern "C" const char* emulate(const RowsArguments* given, int blocks, int order) {
  memcpy(&arguments, given, sizeof arguments);
  gridDim.x = blocks;
  emulator::eager = order >= 2;
  emulator::scattered = order == 3;
  emulator::fault = nullptr;
  for (int i = 0; i < blocks; i += IN_CLUSTER) {
    int block = order == 1 ? blocks - IN_CLUSTER - i : i;
    emulator::begin_hopper(IN_CLUSTER * THREADS);
    emulator::run_blocks(enter, block, IN_CLUSTER, THREADS, SHARED_BYTES);
  }
  return emulator::fault;
}

// The multiply kernel as a function for ctypes: emulate(arguments, thread blocks, backwards).
#include "cuda_emulator.h"

#include "multiply.cu"

static Arguments arguments;

static void enter() {
  multiply(arguments);
  emulator::end_of_thread();
}

extern "C" int shared_bytes() {
  return STAGES * STAGE_BYTES + WARPS_IN * FRAGMENTS * 512 + 16;
}

// What a GPU would not have run, or null.
extern "C" const char* emulate(const Arguments* given, int blocks, int backwards) {
  arguments = *given;
  gridDim.x = blocks;
  emulator::fault = nullptr;
  for (int i = 0; i < blocks; i++) {
    int block = backwards ? blocks - 1 - i : i;
    emulator::run_blocks(enter, block, 1, THREADS, shared_bytes());
  }
  return emulator::fault;
}

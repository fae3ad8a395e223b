// Slots of STAGE_BYTES in shared memory that one warp fills and others read, STAGES of them.

struct Ring {
  Shared memory, full, empty;  // slots; barriers: a slot is full, a slot may be filled again
  u32 slot, parity, offset;

  DEVICE Shared place() const { return memory + offset; }
  DEVICE Shared filled() const { return full + 8 * slot; }
  DEVICE Shared taken() const { return empty + 8 * slot; }

  DEVICE void advance() {
    slot++;
    offset += STAGE_BYTES;
    if (slot == STAGES) {
      slot = offset = 0;
      parity ^= 1;
    }
  }
};

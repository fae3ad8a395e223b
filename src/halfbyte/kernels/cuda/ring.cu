// A ring buffer of STAGES slots of STAGE_BYTES in shared memory, filled by one warp and read by
// others.

struct Ring {
  Shared memory, full, empty;  // slots; barriers: slot full, slot free
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

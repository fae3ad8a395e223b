"""Hidden states between two blocks, in a file: batch by batch, whatever their number.

A file and not memory, for two reasons: the resident size of a run does not depend on how much
calibration text there is, and a killed run finds them again. Recently written pages are in the
system's cache anyway, so this costs a copy, not a disk access.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor


class HiddenStates:
    """One tensor [sequences, tokens, hidden] per batch, all of one dtype, in one file."""

    def __init__(
        self, path: Path, batches: Sequence[tuple[int, int]], width: int, dtype: torch.dtype
    ) -> None:
        """Open the file, making or resizing it where needed.

        Args:
            path: The file.
            batches: Sequences and tokens of each batch.
            width: Hidden size.
            dtype: Element type.
        """
        self.path = path
        self.dtype = dtype
        self._shapes = [(count, length, width) for count, length in batches]
        sizes = [c * n * w * dtype.itemsize for c, n, w in self._shapes]
        self._offsets = [sum(sizes[:i]) for i in range(len(sizes))]
        self.num_bytes = sum(sizes)
        self._file = path.open("r+b" if path.exists() else "w+b", buffering=0)
        self._file.truncate(self.num_bytes)

    def __enter__(self) -> Self:
        """Do nothing; the file is open."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self.close()

    def __len__(self) -> int:
        """Count batches."""
        return len(self._shapes)

    def write(self, batch: int, states: Tensor) -> None:
        """Store one batch."""
        data = states.detach().to(device="cpu", dtype=self.dtype).contiguous()
        if tuple(data.shape) != self._shapes[batch]:
            raise AssertionError(f"batch {batch}: {tuple(data.shape)} != {self._shapes[batch]}")
        self._file.seek(self._offsets[batch])
        view = data.reshape(-1).view(torch.uint8).numpy().data
        while view:
            view = view[self._file.write(view) :]

    def read(self, batch: int) -> Tensor:
        """Load one batch into memory of its own."""
        shape = self._shapes[batch]
        data = torch.empty(shape, dtype=self.dtype)
        view = data.reshape(-1).view(torch.uint8).numpy().data
        self._file.seek(self._offsets[batch])
        while view:
            count = self._file.readinto(view)
            if not count:
                raise OSError(f"{self.path} ends early")
            view = view[count:]
        return data

    def digest(self) -> int:
        """Compute a CRC-32 over the whole file, to recognise a damaged one."""
        crc = 0
        for batch in range(len(self)):
            data = self.read(batch)
            crc = zlib.crc32(data.reshape(-1).view(torch.uint8).numpy().data, crc)
        return crc

    def close(self) -> None:
        """Close the file; it stays on disk."""
        self._file.close()

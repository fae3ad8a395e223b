"""Hidden states between two blocks, in a file: batch by batch, whatever their number.

A file and not memory, for two reasons: the resident size of a run does not depend on how much
calibration text there is, and a killed run finds them again. Recently written pages are in the
system's cache anyway, so this costs a copy, not a disk access.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from halfbyte.errors import CheckpointError
from halfbyte.units import format_bytes


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

        Raises:
            CheckpointError: The file cannot be made so large, here or where it is written to.
        """
        self.path = path
        self.dtype = dtype
        self._shapes = [(count, length, width) for count, length in batches]
        sizes = [c * n * w * dtype.itemsize for c, n, w in self._shapes]
        self._offsets = [sum(sizes[:i]) for i in range(len(sizes))]
        self.num_bytes = sum(sizes)
        with self._writing(), ExitStack() as undo:
            path.touch()
            self._file = undo.enter_context(path.open("r+b", buffering=0))
            self._file.truncate(self.num_bytes)
            undo.pop_all()

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
        self._store(batch, states)

    def _store(self, batch: int, states: Tensor) -> memoryview:
        """Write one batch into the file; give the bytes."""
        data = states.detach().to(device="cpu", dtype=self.dtype).contiguous()
        if tuple(data.shape) != self._shapes[batch]:
            raise AssertionError(f"batch {batch}: {tuple(data.shape)} != {self._shapes[batch]}")
        whole = view = data.reshape(-1).view(torch.uint8).numpy().data
        with self._writing():
            self._file.seek(self._offsets[batch])
            while view:
                view = view[self._file.write(view) :]
        return whole

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"Cannot write {self.path}, the hidden states of {format_bytes(self.num_bytes)}: "
                f"{error.strerror}. Free disk space, or give less calibration text; what is done "
                "is kept for --resume."
            ) from error

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


class HeldStates(HiddenStates):
    """Hidden states that stay on the device; the file gets them when it is told to.

    A GPU computes a block faster than its states go to a disk and back. Of the two files of a
    stream one takes the other's place batch by batch, so that both hold one stream's worth.
    """

    def __init__(
        self, path: Path, batches: Sequence[tuple[int, int]], width: int, dtype: torch.dtype
    ) -> None:
        """Open the file, making or resizing it where needed; nothing is held yet."""
        super().__init__(path, batches, width, dtype)
        self._held: list[Tensor | None] = [None] * len(batches)
        self.replaced: HeldStates | None = None
        """Whose batches are let go of as those of the same number come in here."""

    def write(self, batch: int, states: Tensor) -> None:
        """Hold one batch."""
        self._held[batch] = states.detach().to(self.dtype)
        if self.replaced is not None:
            self.replaced._held[batch] = None

    def read(self, batch: int) -> Tensor:
        """Give one batch: the one that is held, or what the file has."""
        held = self._held[batch]
        return super().read(batch) if held is None else held

    def save(self) -> int:
        """Bring what is held into the file.

        Returns:
            The file's digest.
        """
        crc = 0
        for batch in range(len(self)):
            crc = zlib.crc32(self._store(batch, self.read(batch)), crc)
        return crc

    def digest(self) -> int:
        """Compute a CRC-32 over what the file holds."""
        held, self._held = self._held, [None] * len(self)
        try:
            return super().digest()
        finally:
            self._held = held

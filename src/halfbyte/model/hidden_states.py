"""Hidden states between two blocks, stored in a file batch by batch.

There are two reasons for a file: the memory of a run does not grow with the amount of calibration
text, and a killed run can resume from it. Recently written pages are in the page cache, so reading
them costs a copy and no disk access.
"""

from __future__ import annotations

import math
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
    """A file with one tensor [sequences, tokens, *token_shape] of the same dtype per batch."""

    def __init__(
        self,
        path: Path,
        batches: Sequence[tuple[int, int]],
        token_shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> None:
        """Open the file, creating or resizing it if needed.

        Args:
            path: The file.
            batches: Sequences and tokens of each batch.
            token_shape: Shape of one token's states.
            dtype: Element type.

        Raises:
            CheckpointError: The file cannot be created or resized. Writing raises it as well.
        """
        self.path = path
        self.dtype = dtype
        self._shapes = [(count, length, *token_shape) for count, length in batches]
        sizes = [math.prod(shape) * dtype.itemsize for shape in self._shapes]
        self._offsets = [sum(sizes[:i]) for i in range(len(sizes))]
        self.num_bytes = sum(sizes)
        with self._writing(), ExitStack() as undo:
            path.touch()
            self._file = undo.enter_context(path.open("r+b", buffering=0))
            self._file.truncate(self.num_bytes)
            undo.pop_all()

    def __enter__(self) -> Self:
        """Return self; the file is already open."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self.close()

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self._shapes)

    def write(self, batch: int, states: Tensor) -> None:
        """Store one batch."""
        self._store(batch, states)

    def _store(self, batch: int, states: Tensor) -> memoryview:
        """Write one batch into the file and return its bytes."""
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
                f"{error.strerror}. Free disk space, or use less calibration text."
            ) from error

    def read(self, batch: int) -> Tensor:
        """Read one batch into newly allocated memory."""
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
        """Compute a CRC-32 over the whole file, to detect damage."""
        crc = 0
        for batch in range(len(self)):
            data = self.read(batch)
            crc = zlib.crc32(data.reshape(-1).view(torch.uint8).numpy().data, crc)
        return crc

    def close(self) -> None:
        """Close the file without deleting it."""
        self._file.close()


class DeviceHiddenStates(HiddenStates):
    """Hidden states that stay on the device and are written to the file only by :meth:`save`.

    A GPU computes a block faster than its states can be written to disk and read back. The two
    objects of a stream, input and output of a block, replace each other's batches one by one, so
    that together they hold no more than one set of states.
    """

    def __init__(
        self,
        path: Path,
        batches: Sequence[tuple[int, int]],
        token_shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> None:
        """Open the file, creating or resizing it if needed; no states are held yet."""
        super().__init__(path, batches, token_shape, dtype)
        self._held: list[Tensor | None] = [None] * len(batches)
        self.replaced: DeviceHiddenStates | None = None
        """The other object, whose batch is freed when the same batch is written here."""

    def write(self, batch: int, states: Tensor) -> None:
        """Keep one batch on the device."""
        self._held[batch] = states.detach().to(self.dtype)
        if self.replaced is not None:
            self.replaced._held[batch] = None

    def read(self, batch: int) -> Tensor:
        """Return one batch, from the device if it is held there, else from the file."""
        held = self._held[batch]
        return super().read(batch) if held is None else held

    def save(self) -> int:
        """Write all batches to the file.

        Returns:
            The file's CRC-32.
        """
        crc = 0
        for batch in range(len(self)):
            crc = zlib.crc32(self._store(batch, self.read(batch)), crc)
        return crc

    def digest(self) -> int:
        """Compute a CRC-32 over the file's content."""
        held, self._held = self._held, [None] * len(self)
        try:
            return super().digest()
        finally:
            self._held = held

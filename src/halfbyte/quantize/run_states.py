"""The hidden states of a run between blocks, for the calibration text and the probe.

There are two files per stream: a block reads one and writes the other, so that the output of the
last finished block stays intact until the next block is finished. If the states are kept on the
device, the files are written only from time to time, and a resumed run repeats the blocks since
then.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from halfbyte.errors import JournalError
from halfbyte.model.hidden_states import DeviceHiddenStates, HiddenStates
from halfbyte.model.stream import BlockStream
from halfbyte.quantize.probe import Probe, ProbeTrace

CALIBRATION, BASE_CALIBRATION = "calibration", "full"
PROBE, BASE_PROBE = "probe", "base"
"""Streams of hidden states, named as their files; BASE ones are those of the base model."""
TUNED = {CALIBRATION: "calibration-tuned", PROBE: "probe-tuned"}
"""Streams that go through the blocks again after end-to-end training. They have separate files,
because a resumed run may still need the original ones."""

SAVE_EVERY_SECONDS = 60.0
"""Minimum time between two saves of states that are kept on the device."""


class RunStates:
    """The input states of every block, for every stream of a run.

    There are up to four streams: the calibration text and the probe through the quantized model,
    the calibration text through the base model (if ``match_base``), and the probe through the base
    model (if the probe is held-out text).
    """

    def __init__(
        self,
        folder: Path,
        batches: Sequence[Tensor],
        probe: Probe,
        *,
        num_blocks: int,
        token_shape: tuple[int, ...],
        dtype: torch.dtype,
        match_base: bool,
        tuned: Collection[str] = (),
        on_device: bool = False,
    ) -> None:
        """Open the files, creating them if needed.

        Args:
            folder: The run's work folder.
            batches: Calibration ids, [sequences, tokens] each.
            probe: The probe.
            num_blocks: Number of blocks of the model.
            token_shape: Shape of one token's states between blocks.
            dtype: Dtype of the model's computation.
            match_base: Whether the calibration text also goes through the base model.
            tuned: Streams that go through the blocks again after end-to-end training.
            on_device: Whether states stay on the device between blocks.
        """
        shapes = {CALIBRATION: [(b.shape[0], b.shape[1]) for b in batches], PROBE: [probe.shape]}
        if match_base:
            shapes[BASE_CALIBRATION] = shapes[CALIBRATION]
        if probe.is_held_out:
            shapes[BASE_PROBE] = [probe.shape]
        self._checked = tuple(shapes)
        shapes |= {TUNED[name]: shapes[name] for name in tuned}
        self._folder = folder
        self._stack = ExitStack()
        self._on_device = on_device
        self._saved_at = time.monotonic()
        self._saved: int | None = None
        kind = DeviceHiddenStates if on_device else HiddenStates
        self._files = {
            name: [
                self._stack.enter_context(
                    kind(folder / f"{name}-{k}.bin", shape, token_shape, dtype)
                )
                for k in range(2)
            ]
            for name, shape in shapes.items()
        }
        for one, other in self._files.values():
            if isinstance(one, DeviceHiddenStates) and isinstance(other, DeviceHiddenStates):
                one.replaced, other.replaced = other, one
        self.trace = ProbeTrace(
            folder / "trail.bin", num_blocks, probe.shape[1], token_shape, dtype
        )
        self._stack.callback(self.trace.close)

    def __enter__(self) -> Self:
        """Return self; the files are already open."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the files."""
        self._stack.close()

    @property
    def has_base(self) -> bool:
        """Whether the probe also goes through the base model."""
        return BASE_PROBE in self._files

    def at(self, stream: str, position: int) -> HiddenStates:
        """Return a stream's input states of a block; at ``num_blocks``, the last block's output."""
        return self._files[stream][position % 2]

    def save(self, position: int) -> dict[str, int] | None:
        """Save the input states of a block for a resumed run, unless the last save was recent.

        Args:
            position: The block that comes next.

        Returns:
            Digests of all streams, for the journal; None if the states were not saved.
        """
        if self._on_device:
            # Never overwrite the files of the last save.
            free = self._saved is None or self._saved % 2 != position % 2
            if not free or time.monotonic() - self._saved_at < SAVE_EVERY_SECONDS:
                return None
            self._saved, self._saved_at = position, time.monotonic()
        digests = {}
        for name in self._checked:
            states = self.at(name, position)
            digests[name] = (
                states.save() if isinstance(states, DeviceHiddenStates) else states.digest()
            )
        return digests

    def check(self, position: int, expected: Mapping[str, int]) -> None:
        """Check the input states of a block that an earlier process saved.

        Args:
            position: The block that comes next.
            expected: Digests from the journal.

        Raises:
            JournalError: A file is damaged; names it.
        """
        self._saved = position
        for name in self._checked:
            states = self.at(name, position)
            if states.digest() != expected[name]:
                raise JournalError(
                    f"Cannot resume: the hidden states of the unfinished run in {self._folder} are "
                    f"damaged ({states.path.name}). Remove {self._folder.parent} and quantize "
                    "again."
                )

    def run_probe(self, name: str, index: int, stream: BlockStream, ids: Tensor) -> None:
        """Run the probe through the current block.

        Args:
            name: ``BASE_PROBE``, ``PROBE`` or ``TUNED[PROBE]``.
            index: The block.
            stream: The stream, positioned at the block.
            ids: The probe's windows, on the device.
        """
        hidden = None if index == 0 else self.at(name, index).read(0).to(ids.device)
        output = stream.run(ids, hidden)
        self.at(name, index + 1).write(0, output)
        if name in (PROBE, TUNED[PROBE]):
            self.trace.write(index, output)

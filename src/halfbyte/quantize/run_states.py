"""The hidden states of a run: of the calibration text and of the probe, in front of each block.

Two files per stream: a block reads one and writes the other, so that what a finished block left is
whole until the next one is finished too. Where the device holds the states, the files get them only
now and then, and a killed run does again the blocks since.
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
from halfbyte.quantize.probe import Probe, Trail

CALIBRATION, FULL, BASE, PROBE = "calibration", "full", "base", "probe"
TUNED = {CALIBRATION: "calibration-tuned", PROBE: "probe-tuned"}
"""Streams through the finished blocks after training; files of their own, since a killed run may
still need the others."""


SAVE_EVERY_SECONDS = 60.0
"""Work that a killed run may lose where saving takes longer than computing a block."""


class RunStates:
    """Hidden states in front of block ``position``, for every stream of a run.

    Streams: the calibration text and the probe through the quantized model; where the weights are
    to match the base model, the calibration text through that too; and where the probe is held out,
    the probe through the base.
    """

    def __init__(
        self,
        folder: Path,
        batches: Sequence[Tensor],
        probe: Probe,
        *,
        num_blocks: int,
        width: int,
        dtype: torch.dtype,
        match_base: bool,
        tuned: Collection[str] = (),
        held: bool = False,
    ) -> None:
        """Open the files, making them where needed.

        Args:
            folder: The run's work folder.
            batches: Calibration ids, [sequences, tokens] each.
            probe: The probe.
            num_blocks: Blocks of the model.
            width: Hidden size.
            dtype: In which the model computes.
            match_base: Whether the calibration text also goes through the base.
            tuned: Streams that go through the blocks once more after training.
            held: Whether states stay on the device between blocks.
        """
        shapes = {CALIBRATION: [(b.shape[0], b.shape[1]) for b in batches], PROBE: [probe.shape]}
        if match_base:
            shapes[FULL] = shapes[CALIBRATION]
        if probe.is_held_out:
            shapes[BASE] = [probe.shape]
        self._checked = tuple(shapes)
        shapes |= {TUNED[name]: shapes[name] for name in tuned}
        self._folder = folder
        self._stack = ExitStack()
        self._held = held
        self._saved_at = time.monotonic()
        self._saved: int | None = None
        kind = DeviceHiddenStates if held else HiddenStates
        self._files = {
            name: [
                self._stack.enter_context(kind(folder / f"{name}-{k}.bin", shape, width, dtype))
                for k in range(2)
            ]
            for name, shape in shapes.items()
        }
        for one, other in self._files.values():
            if isinstance(one, DeviceHiddenStates) and isinstance(other, DeviceHiddenStates):
                one.replaced, other.replaced = other, one
        self.trail = Trail(folder / "trail.bin", num_blocks, probe.shape[1], width, dtype)
        self._stack.callback(self.trail.close)

    def __enter__(self) -> Self:
        """Do nothing; the files are open."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the files."""
        self._stack.close()

    @property
    def has_base(self) -> bool:
        """Whether the probe also goes through the base."""
        return BASE in self._files

    def at(self, stream: str, position: int) -> HiddenStates:
        """Give a stream's states in front of a block; behind the last one at ``num_blocks``."""
        return self._files[stream][position % 2]

    def save(self, position: int) -> dict[str, int] | None:
        """Make sure that a killed run finds the states in front of a block again.

        Args:
            position: The block that comes next.

        Returns:
            Digests of all streams, for the journal; None where the states were not saved, since
            little would be lost.
        """
        if self._held:
            # The files that were saved last stay whole until others are.
            free = self._saved is None or self._saved % 2 != position % 2
            if not free or time.monotonic() - self._saved_at < SAVE_EVERY_SECONDS:
                return None
            self._saved, self._saved_at = position, time.monotonic()
        found = {}
        for name in self._checked:
            states = self.at(name, position)
            found[name] = (
                states.save() if isinstance(states, DeviceHiddenStates) else states.digest()
            )
        return found

    def check(self, position: int, expected: Mapping[str, int]) -> None:
        """Make sure that the states in front of a block are those that an earlier process left.

        Args:
            position: The block that comes next.
            expected: Digests out of the journal.

        Raises:
            JournalError: A file is damaged; names it.
        """
        self._saved = position
        for name in self._checked:
            states = self.at(name, position)
            if states.digest() != expected[name]:
                raise JournalError(
                    f"The hidden states that the unfinished run left in {self._folder} are damaged "
                    f"({states.path.name}). Remove {self._folder.parent} and quantize again."
                )

    def run_probe(self, name: str, index: int, stream: BlockStream, ids: Tensor) -> None:
        """Take the probe through the current block.

        Args:
            name: ``BASE``, ``PROBE`` or what is ``TUNED`` of it.
            index: The block.
            stream: Stands at it.
            ids: The probe's windows, on the device.
        """
        hidden = None if index == 0 else self.at(name, index).read(0).to(ids.device)
        output = stream.run(ids, hidden)
        self.at(name, index + 1).write(0, output)
        if name in (PROBE, TUNED[PROBE]):
            self.trail.write(index, output)

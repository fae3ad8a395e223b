"""Run the calibration and probe text through one block while it is quantized and written.

::

    load -> base model on the probe -> round, with the calibration text -> tune
         -> hidden states behind the block -> quantized model on the probe -> shard and journal
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from halfbyte.machine.memory import release_memory
from halfbyte.model.blocks import LinearTensors
from halfbyte.model.stream import ForwardPasses
from halfbyte.quantize.block_plan import plan_tasks
from halfbyte.quantize.block_shard import gather_block
from halfbyte.quantize.block_tuning import TuningData, tune_rounded
from halfbyte.quantize.block_work import DISCOVERY_TOKENS, BlockWork, LoadBatch
from halfbyte.quantize.block_writer import BlockWriter
from halfbyte.quantize.journal import Journal
from halfbyte.quantize.probe import Probe
from halfbyte.quantize.report import SkippedModule
from halfbyte.quantize.resources import RunSettings
from halfbyte.quantize.rounding import LinearTask, RoundedLinear
from halfbyte.quantize.run_states import BASE_CALIBRATION, BASE_PROBE, CALIBRATION, PROBE, RunStates


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockWalk:
    """Takes a run's text through its model, one block at a time."""

    work: BlockWork
    states: RunStates
    journal: Journal
    probe: Probe
    batches: Sequence[Tensor]
    """Calibration ids, [sequences, tokens] each."""
    settings: RunSettings
    seed: int
    """Plus the block's index: the seed that shuffles the batches of block tuning."""

    def quantize_block(self, index: int, writer: BlockWriter) -> None:
        """Round and write a block, and save the hidden states behind it.

        Args:
            index: The first block that is not finished.
            writer: Writes the block's shard and journal entry.
        """
        work, weights, stream = self.work, self.work.weights, self.work.stream
        probe_ids = self.probe.ids.to(weights.device)
        with work.meter.timed("load"):
            block, exact = work.load(index)
            if self.settings.hold_states and index + 1 < len(weights.blocks.modules):
                weights.prefetch_block(index + 1)
        work.find_stages(index, block, self.loader(CALIBRATION, index))
        if self.states.has_base:
            with work.meter.timed("quality"), stream.at(index):
                self.states.run_probe(BASE_PROBE, index, stream, probe_ids)
        prefix = f"{weights.blocks.name(index)}."
        tasks, skipped = plan_tasks(prefix, block, exact, work.config, weights.disk_name)
        rounded = self._round(index, block, tasks, exact)
        with work.meter.timed("quality"), stream.at(index):
            self.states.run_probe(PROBE, index, stream, probe_ids)
        with work.meter.timed("write"):
            self._write(index, rounded, exact, skipped, writer)
        # release_memory can only return what is no longer referenced.
        del block, exact, tasks, rounded
        weights.drop_block(index)
        release_memory()

    def check_blocks(self, indices: Sequence[int], ids: Tensor) -> None:
        """Check that blocks run without those before them, before hours are spent on others.

        Args:
            indices: The blocks.
            ids: [1, tokens], of which a few are used.

        Raises:
            ModelError: One needs more than hidden states from the blocks before it.
        """
        weights, stream = self.work.weights, self.work.stream
        ids = ids[:, :DISCOVERY_TOKENS]
        shape = (*ids.shape, *stream.token_shape)
        hidden = torch.zeros(shape, dtype=stream.dtype, device=ids.device)
        for index in indices:
            self.work.load(index)
            with stream.at(index):
                stream.run(ids, hidden)
            weights.drop_block(index)
            release_memory()

    def loader(self, stream: str, position: int) -> LoadBatch:
        """Return a function that loads a batch's input to a block.

        Args:
            stream: A stream of the calibration text; see :mod:`halfbyte.quantize.run_states`.
            position: Index of the block; the number of blocks for the states behind the last one.

        Returns:
            Maps a batch's index to its input ids and hidden states (None in front of the first
            block).
        """
        device = self.work.weights.device
        states = self.states.at(stream, position)

        def load(batch: int) -> tuple[Tensor, Tensor | None]:
            ids = self.batches[batch].to(device)
            return ids, states.read(batch).to(device) if position else None

        return load

    def passes(self, stream: str, position: int, *, keep_paused: bool) -> ForwardPasses:
        """Create the passes of a stream's batches through a block.

        Args:
            stream: A stream of the calibration text.
            position: Index of the block.
            keep_paused: See :class:`halfbyte.model.stream.ForwardPasses`.

        Returns:
            The passes, not started yet.
        """
        load = self.loader(stream, position)
        return ForwardPasses(self.work.stream, len(self.batches), load, keep_paused=keep_paused)

    def _round(
        self,
        index: int,
        block: nn.Module,
        tasks: Sequence[LinearTask],
        exact: Mapping[str, LinearTensors],
    ) -> list[RoundedLinear]:
        """Round and tune a block, and save the calibration text's hidden states behind it."""
        work, stream, keep = self.work, self.work.stream, self.settings.keep_paused
        with stream.at(index, work.stages):
            passes = self.passes(CALIBRATION, index, keep_paused=keep)
            base_passes = None
            if work.config.match_base:
                base_passes = self.passes(BASE_CALIBRATION, index, keep_paused=keep)
            rounded = work.round_block(block, tasks, passes, base_passes)
            if base_passes is not None:
                with work.meter.timed("forward and Hessians"), work.base_weights(block):
                    self._save_states(BASE_CALIBRATION, index, base_passes)
            if work.config.tune_steps and rounded:
                # Tuning changes weights that the paused batches have already used.
                passes.close()
                with work.meter.timed("tune"):
                    rounded = self._tune(index, block, rounded, exact)
            with work.meter.timed("forward and Hessians"):
                self._save_states(CALIBRATION, index, passes)
        return rounded

    def _save_states(self, stream: str, index: int, passes: ForwardPasses) -> None:
        """Finish all batches of a stream and save their hidden states behind the block."""
        states = self.states.at(stream, index + 1)
        for batch in range(len(self.batches)):
            states.write(batch, passes.finish(batch))

    def _tune(
        self,
        index: int,
        block: nn.Module,
        rounded: Sequence[RoundedLinear],
        exact: Mapping[str, LinearTensors],
    ) -> list[RoundedLinear]:
        work = self.work
        load = self.loader(CALIBRATION, index)
        base_states = self.states.at(BASE_CALIBRATION, index + 1)
        data = TuningData(
            run=lambda batch: work.stream.run(*load(batch)),
            target=lambda batch: base_states.read(batch).to(work.weights.device),
            num_batches=len(self.batches),
        )
        steps, seed = work.config.tune_steps, self.seed + index
        return tune_rounded(block, rounded, exact, data, steps=steps, seed=seed)

    def _write(
        self,
        index: int,
        rounded: Sequence[RoundedLinear],
        exact: Mapping[str, LinearTensors],
        skipped: Sequence[SkippedModule],
        writer: BlockWriter,
    ) -> None:
        shard = gather_block(
            self.work.weights,
            self.journal.output,
            index,
            rounded=rounded,
            exact=exact,
            split_experts=self.work.split_experts,
        )
        # Saving states overwrites older ones; until the previous block's journal entry is written,
        # resuming would need those.
        writer.wait()
        details = {
            "skipped": [[s.name, s.reason] for s in skipped],
            "stages": [[list(g.linears) for g in stage.groups] for stage in self.work.stages],
            "output_size": self.work.stream.output_sizes[index],
            "states": self.states.save(index + 1),
        }
        writer.submit(lambda: {**shard.write(), **details})

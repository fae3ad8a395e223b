"""All streams of a run through one block: states in front of it -> its shard and those behind it.

::

    load -> base model's probe -> round, the calibration text passing through -> tune
         -> states behind the block -> quantized model's probe -> shard and journal
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from halfbyte.machine.memory import release_memory
from halfbyte.model.blocks import LinearTensors
from halfbyte.model.stream import ForwardPasses
from halfbyte.quantize.block_plan import plan_tasks
from halfbyte.quantize.block_shard import gather_block
from halfbyte.quantize.block_tuning import TuningData, tune_rounded
from halfbyte.quantize.block_work import BlockWork, LoadBatch
from halfbyte.quantize.block_writer import BlockWriter
from halfbyte.quantize.journal import Journal
from halfbyte.quantize.probe import Probe
from halfbyte.quantize.report import SkippedModule
from halfbyte.quantize.resources import RunSettings
from halfbyte.quantize.rounding import LinearTask, RoundedLinear
from halfbyte.quantize.run_states import BASE_CALIBRATION, BASE_PROBE, CALIBRATION, PROBE, RunStates


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockWalk:
    """What takes a run's text through its model, a block at a time."""

    work: BlockWork
    states: RunStates
    journal: Journal
    probe: Probe
    batches: Sequence[Tensor]
    """Calibration ids, [sequences, tokens] each."""
    settings: RunSettings
    seed: int
    """Orders the batches of a block's tuning, with the block's number."""

    def do_block(self, index: int, writer: BlockWriter) -> None:
        """Round a block, write it, and leave the states behind it.

        Args:
            index: The next block that is not done.
            writer: Gets what is to be written.
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
        # What is freed here is what release_memory gives back.
        del block, exact, tasks, rounded
        weights.drop_block(index)
        release_memory()

    def loader(self, stream: str, position: int) -> LoadBatch:
        """Give what reads a batch as a stream has it in front of a block.

        Args:
            stream: Of the calibration text; see :mod:`halfbyte.quantize.run_states`.
            position: The block; behind the last one at their number.

        Returns:
            Gives input ids, and hidden states but in front of the first block, by the batch's
            number.
        """
        device = self.work.weights.device
        states = self.states.at(stream, position)

        def load(batch: int) -> tuple[Tensor, Tensor | None]:
            ids = self.batches[batch].to(device)
            return ids, states.read(batch).to(device) if position else None

        return load

    def passages(self, stream: str, position: int, *, keep_paused: bool) -> ForwardPasses:
        """Send a stream's batches on their way from in front of a block.

        Args:
            stream: Of the calibration text.
            position: The block.
            keep_paused: See :class:`halfbyte.model.stream.ForwardPasses`.

        Returns:
            The passages, none of which has begun.
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
        """Round, tune, and pass the calibration text on to the next block."""
        work, stream, keep = self.work, self.work.stream, self.settings.keep_paused
        with stream.at(index, work.stages):
            passages = self.passages(CALIBRATION, index, keep_paused=keep)
            base_passages = None
            if work.config.match_base:
                base_passages = self.passages(BASE_CALIBRATION, index, keep_paused=keep)
            rounded = work.round_block(block, tasks, passages, base_passages)
            if base_passages is not None:
                with work.meter.timed("forward and Hessians"), work.base_weights(block):
                    self._pass_on(BASE_CALIBRATION, index, base_passages)
            if work.config.tune_steps and rounded:
                # They went through the block as it was before.
                passages.close()
                with work.meter.timed("tune"):
                    rounded = self._tune(index, block, rounded, exact)
            with work.meter.timed("forward and Hessians"):
                self._pass_on(CALIBRATION, index, passages)
        return rounded

    def _pass_on(self, stream: str, index: int, passages: ForwardPasses) -> None:
        behind = self.states.at(stream, index + 1)
        for batch in range(len(self.batches)):
            behind.write(batch, passages.finish(batch))

    def _tune(
        self,
        index: int,
        block: nn.Module,
        rounded: Sequence[RoundedLinear],
        exact: Mapping[str, LinearTensors],
    ) -> list[RoundedLinear]:
        work = self.work
        load, wanted = self.loader(CALIBRATION, index), self.states.at(BASE_CALIBRATION, index + 1)
        data = TuningData(
            run=lambda batch: work.stream.run(*load(batch)),
            wanted=lambda batch: wanted.read(batch).to(work.weights.device),
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
        # Saving states takes the place of older ones, which a line not yet there may need.
        writer.wait()
        facts = {
            "skipped": [[s.name, s.reason] for s in skipped],
            "stages": [[list(g.linears) for g in stage.groups] for stage in self.work.stages],
            "output_size": self.work.stream.output_sizes[index],
            "states": self.states.save(index + 1),
        }
        writer.submit(lambda: {**shard.write(), **facts})

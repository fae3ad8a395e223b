"""One quantization run: loads the text, plans, and retries with less memory until it is done.

::

    text -> tokens -> plan -> journal -> attempt -> report
                                           └─ out of memory: attempt again from the last saved
                                              block, with settings that need less memory
"""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from halfbyte.machine.memory import limit_device_memory, release_memory
from halfbyte.model.stream import BlockStream
from halfbyte.model.weights import ModelWeights
from halfbyte.quant_config import CalibrationConfig, QuantConfig, ResourceConfig
from halfbyte.quantize.attempt import WEIGHTS_FOLDER, Attempt, RunTask
from halfbyte.quantize.calibration import CalibrationTokens
from halfbyte.quantize.calibration_source import CalibrationSource
from halfbyte.quantize.device_fallbacks import find_device_fallbacks
from halfbyte.quantize.end_to_end_stage import STATE_FILE
from halfbyte.quantize.fingerprint import fingerprint_model
from halfbyte.quantize.journal import SETTINGS, Journal
from halfbyte.quantize.memory_fallback import (
    build_out_of_memory_error,
    is_out_of_memory,
    reduce_memory,
)
from halfbyte.quantize.meter import Meter
from halfbyte.quantize.probe import Probe
from halfbyte.quantize.progress import Progress
from halfbyte.quantize.report import QuantizationReport
from halfbyte.quantize.resources import RunSettings, resolve_resources
from halfbyte.quantize.run_text import generated_text_path, is_self_generated, read_text
from halfbyte.quantize.source import (
    COMPLETE,
    VERSIONS,
    check_same_inputs,
    check_something_to_do,
)
from halfbyte.version import __version__


class Run:
    """One run, with its inputs and state."""

    def __init__(
        self,
        *,
        name: str,
        source: Path,
        journal: Journal,
        config: QuantConfig,
        calibration: CalibrationConfig,
        resources: ResourceConfig,
        device: torch.device,
        progress: Progress,
    ) -> None:
        """Read names and shapes of the model's tensors; nothing is loaded or written yet.

        Args:
            name: The model as the user named it.
            source: The model's folder.
            journal: The journal of the output folder.
            config: How weights are rounded.
            calibration: Amount of calibration text.
            resources: Device, dtype and memory of the run.
            device: Device to compute on.
            progress: Reports the progress of the run.
        """
        self.name = name
        self.journal = journal
        self.config = config
        self.calibration = calibration
        self.resources = resources
        self.progress = progress
        self.start = time.monotonic()
        self.meter = Meter()
        self.source = source
        self.device = device
        self.weights = ModelWeights(source, device)
        self.num_blocks = len(self.weights.blocks.modules)
        self.notes: list[str] = []

    def execute(
        self, text: CalibrationSource, *, resume: bool, quality: bool
    ) -> QuantizationReport:
        """Do all work that is not done yet.

        Args:
            text: Calibration data.
            resume: Resume an unfinished run, if there is one.
            quality: Measure quality on held-out text.

        Returns:
            The report, which is also saved in the output folder.
        """
        check_something_to_do(self.weights, self.config)
        tokens, probe = self._read_text(text, quality)
        if quality and probe.note:
            self.notes.append(probe.note)
        settings = self._begin(tokens, probe, resume=resume)
        task = RunTask(
            name=self.name,
            journal=self.journal,
            config=self.config,
            seed=self.calibration.seed,
            tokens=tokens,
            probe=probe,
            progress=self.progress,
            meter=self.meter,
            notes=self.notes,
            start=self.start,
        )
        weights: ModelWeights | None = self.weights
        del self.weights  # owned by the attempt from here on, so that a failed one frees it
        while True:
            try:
                weights = weights or ModelWeights(self.source, self.device)
                with limit_device_memory(self.device, settings.limit_bytes):
                    return Attempt(task, settings, weights).run()
            except RuntimeError as error:
                reduced, why = self._reduce_memory(error, settings, max(map(len, tokens.sequences)))
            # After the handler, since inside it the traceback still references the tensors.
            weights = None
            release_memory(self.device)
            self._restart_from_journal(settings, reduced, why)
            settings = reduced

    def recall(
        self, finished: QuantizationReport, text: CalibrationSource, *, quality: bool
    ) -> QuantizationReport:
        """Return the report of a complete run, after checking that it had the same inputs.

        Args:
            finished: Its report.
            text: Calibration data.
            quality: As for :meth:`execute`.

        Returns:
            The report.

        Raises:
            JournalError: Its inputs were different; names each difference.
        """
        then = finished.inputs
        if is_self_generated(text):
            # The name identifies the text, which therefore need not be generated again.
            name = generated_text_path(self.weights, self.calibration, self.journal.folder).name
            same = name == finished.calibration.source
            now = self._inputs(finished.calibration.digest if same else name, then.get("probe"))
        else:
            tokens, probe = self._read_text(text, quality)
            now = self._inputs(tokens.digest, _describe_probe(probe))
        check_same_inputs(self.journal.output, then, now)
        self.progress.started((COMPLETE,))
        return finished

    def _read_text(self, text: CalibrationSource, quality: bool) -> tuple[CalibrationTokens, Probe]:
        return read_text(
            text,
            self.weights,
            self.calibration,
            folder=self.journal.folder,
            dtype=self.resources.dtype,
            quality=quality,
            progress=self.progress,
            meter=self.meter,
        )

    def _inputs(self, digest: str, probe: dict[str, Any] | None) -> dict[str, Any]:
        return {
            "model": fingerprint_model(self.weights.files),
            "config": self.config.to_dict(),
            "calibration": {**asdict(self.calibration), "digest": digest},
            "resources": {"device": self.resources.device, "dtype": self.resources.dtype},
            "probe": probe,
            VERSIONS: {"halfbyte": __version__, "torch": torch.__version__},
        }

    def _begin(self, tokens: CalibrationTokens, probe: Probe, *, resume: bool) -> RunSettings:
        """Return the settings in the journal; for a new run, plan them and start a journal."""
        inputs = self._inputs(tokens.digest, _describe_probe(probe))
        if resume and self.journal.exists:
            self.journal.load()
        if self.journal.header:
            self.journal.check_same(inputs)
            settings = RunSettings.from_dict(self.journal.header[SETTINGS])
            done = len(self.journal.blocks)
            self._note_fallbacks(settings)
            self.progress.started(
                (f"resuming after block {done} of {self.num_blocks}", *self.notes)
            )
            return settings
        lengths = [len(sequence) for sequence in tokens.sequences]
        plan = resolve_resources(
            self.weights,
            self.resources,
            self.calibration,
            self.config,
            lengths,
            self._count_state_numbers(),
        )
        self._note_fallbacks(plan.settings)
        self.progress.started((*plan.lines(), *tokens.notes, *self.notes))
        plan.check_disk(self.journal.folder)
        self.journal.start({"inputs": inputs, SETTINGS: plan.settings.to_dict()})
        return plan.settings

    def _count_state_numbers(self) -> int:
        """Count the numbers per token between blocks.

        On the CPU, where weights are memory-mapped: what lay on a GPU before its memory is planned
        would be counted twice, and left out of its limit.
        """
        cpu = torch.device("cpu")
        weights = self.weights if self.device == cpu else ModelWeights(self.source, cpu)
        weights.load_outside()
        stream = BlockStream(weights.model, weights.blocks, weights.dtype)
        return math.prod(stream.token_shape)

    def _note_fallbacks(self, settings: RunSettings) -> None:
        device, dtype = self.weights.device, settings.torch_dtype
        self.notes += find_device_fallbacks(device, dtype, symmetric=self.config.symmetric)

    def _reduce_memory(
        self, error: RuntimeError, settings: RunSettings, longest: int
    ) -> tuple[RunSettings, str]:
        """Choose settings that need less memory; re-raise any error but out of memory."""
        if not is_out_of_memory(error):
            raise error
        done = len(self.journal.blocks)
        where = f"in block {done + 1} of {self.num_blocks}"
        if done == self.num_blocks:
            where = "after the last block"
        # End-to-end training evaluates whole batches, so their size must not change midway.
        trained = (self.journal.folder / STATE_FILE).exists()
        found = None if trained else reduce_memory(settings)
        if found is None:
            raise build_out_of_memory_error(settings, where, longest) from error
        return found[0], f"out of memory {where}: {found[1]} from there on"

    def _restart_from_journal(self, settings: RunSettings, reduced: RunSettings, why: str) -> None:
        """Prepare to continue from the last saved block, as a resumed run does."""
        self.notes.append(why)
        self.progress.phase(why)
        if reduced.batch_size != settings.batch_size:
            # They are stored by portions of the text, whose bounds depend on the batches.
            shutil.rmtree(self.journal.folder / WEIGHTS_FOLDER, ignore_errors=True)
        self.journal.change_settings(reduced.to_dict())


def _describe_probe(probe: Probe) -> dict[str, Any]:
    return {"held_out": probe.is_held_out, "windows": list(probe.shape)}

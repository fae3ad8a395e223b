"""One run: reads its text, decides how, and attempts it until it is done.

::

    text -> tokens -> plan -> journal -> attempt ──────────────────────────────> report
                                            └─ out of memory -> gentler settings ─┘
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import torch

from halfbyte.machine.memory import limit_device_memory, release_memory
from halfbyte.model.weights import ModelWeights
from halfbyte.quant_config import CalibrationConfig, QuantConfig, ResourceConfig
from halfbyte.quantize.attempt import WEIGHTS_FOLDER, Attempt, RunTask
from halfbyte.quantize.calibration import CalibrationTokens
from halfbyte.quantize.calibration_source import CalibrationSource
from halfbyte.quantize.device_fallbacks import find_device_fallbacks
from halfbyte.quantize.end_to_end_stage import STATE_FILE
from halfbyte.quantize.fingerprint import fingerprint_model
from halfbyte.quantize.journal import Journal
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
from halfbyte.quantize.run_text import find_own_text, is_own_text, read_text
from halfbyte.quantize.source import (
    COMPLETE,
    VERSIONS,
    check_same_inputs,
    check_something_to_do,
)
from halfbyte.version import __version__

JOURNAL_VERSION = 2


class Run:
    """One run: what it was given, and where it stands."""

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
        """Read names and shapes of the model; nothing is loaded or written yet.

        Args:
            name: What the user called the model.
            source: Its folder.
            journal: Of the output folder, locked.
            config: How weights are rounded.
            calibration: How much text.
            resources: What the run may use.
            device: Where to compute.
            progress: Told how far the run is.
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
        """Do everything that is not done yet.

        Args:
            text: Calibration data.
            resume: Go on with an unfinished run, where there is one.
            quality: Measure what quantizing costs, on held-out text.

        Returns:
            The report, which also stands in the output folder.
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
        del self.weights  # an attempt's own from here on: one that fails leaves nothing behind
        while True:
            try:
                weights = weights or ModelWeights(self.source, self.device)
                with limit_device_memory(self.device, settings.limit_bytes):
                    return Attempt(task, settings, weights).run()
            except RuntimeError as error:
                gentler, why = self._find_gentler(error, settings, max(map(len, tokens.sequences)))
            # Not in the handler, where the error still holds on to what it was raised among.
            weights = None
            release_memory(self.device)
            self._go_back(settings, gentler, why)
            settings = gentler

    def recall(
        self, finished: QuantizationReport, text: CalibrationSource, *, quality: bool
    ) -> QuantizationReport:
        """Give back what a complete run reported, if it was given the same.

        Args:
            finished: Its report.
            text: Calibration data.
            quality: As for :meth:`execute`.

        Returns:
            The report.

        Raises:
            JournalError: It was given something else; names each difference.
        """
        then = finished.inputs
        if is_own_text(text):
            # Its name tells of which model and settings it is; it is not written once more.
            name = find_own_text(self.weights, self.calibration, self.journal.folder).name
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
            "calibration": {**self.calibration.to_dict(), "digest": digest},
            "resources": {"device": self.resources.device, "dtype": self.resources.dtype},
            "probe": probe,
            VERSIONS: {"halfbyte": __version__, "torch": torch.__version__},
        }

    def _begin(self, tokens: CalibrationTokens, probe: Probe, *, resume: bool) -> RunSettings:
        """Take the settings of the journal, or plan and start one."""
        inputs = self._inputs(tokens.digest, _describe_probe(probe))
        if resume and self.journal.exists:
            self.journal.load()
        if self.journal.header:
            self.journal.check_same(inputs)
            settings = RunSettings.from_dict(self.journal.header["settings"])
            done = len(self.journal.blocks)
            self._note_slow_ways(settings)
            self.progress.started(
                (f"resuming behind block {done} of {self.num_blocks}", *self.notes)
            )
            return settings
        lengths = [len(sequence) for sequence in tokens.sequences]
        plan = resolve_resources(
            self.weights, self.resources, self.calibration, self.config, lengths
        )
        self._note_slow_ways(plan.settings)
        self.progress.started((*plan.lines(), *tokens.notes, *self.notes))
        plan.check_disk(self.journal.folder)
        header = {"version": JOURNAL_VERSION, "inputs": inputs}
        self.journal.start({**header, "settings": plan.settings.to_dict()})
        return plan.settings

    def _note_slow_ways(self, settings: RunSettings) -> None:
        device, dtype = self.weights.device, settings.torch_dtype
        self.notes += find_device_fallbacks(device, dtype, symmetric=self.config.symmetric)

    def _find_gentler(
        self, error: RuntimeError, settings: RunSettings, longest: int
    ) -> tuple[RunSettings, str]:
        """Choose settings that take less memory; anything but a lack of it is raised again."""
        if not is_out_of_memory(error):
            raise error
        done = len(self.journal.blocks)
        where = f"in block {done + 1} of {self.num_blocks}"
        if done == self.num_blocks:
            where = "behind the last block"
        # Training end to end is judged by whole batches: they cannot be others on the way.
        trained = (self.journal.folder / STATE_FILE).exists()
        found = None if trained else reduce_memory(settings)
        if found is None:
            raise build_out_of_memory_error(settings, where, longest) from error
        return found[0], f"out of memory {where}: {found[1]} from there on"

    def _go_back(self, settings: RunSettings, gentler: RunSettings, why: str) -> None:
        """Go back to the last saved block, as a run that was killed does."""
        self.notes.append(why)
        self.progress.phase(why)
        if gentler.batch_size != settings.batch_size:
            # They are kept by parts of the text that begin and end where batches do.
            shutil.rmtree(self.journal.folder / WEIGHTS_FOLDER, ignore_errors=True)
        self.journal.change_settings(gentler.to_dict())


def _describe_probe(probe: Probe) -> dict[str, Any]:
    return {"held_out": probe.is_held_out, "windows": list(probe.shape)}

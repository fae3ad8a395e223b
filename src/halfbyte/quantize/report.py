"""The report of a quantization run, saved as ``quantization_report.json``.

The run fills these dataclasses; the model card, the plot and the command line read them. Every
fallback is recorded in the ``notes`` of the module that it affected.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from halfbyte.errors import CheckpointError

if TYPE_CHECKING:
    from halfbyte.evaluate.divergence import DivergenceResult

REPORT_FILE = "quantization_report.json"

Part = TypeVar("Part")


def block_of(module: str) -> int | None:
    """Return the index of the decoder block in a module's dotted name, or None."""
    return next((int(part) for part in module.split(".") if part.isdigit()), None)


def expert_of(module: str) -> int | None:
    """Return the index of the expert in a module's dotted name, or None."""
    parts = module.split(".")
    after = parts[parts.index("experts") + 1 :] if "experts" in parts else []
    return int(after[0]) if after and after[0].isdigit() else None


def kind_of(module: str) -> str:
    """Return a module's name within its block, with ``*`` for the index of an expert."""
    parts = module.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), -1)
    return ".".join("*" if part.isdigit() else part for part in parts[first + 1 :])


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleReport:
    """How one linear was quantized."""

    name: str
    """Full dotted name, as in the checkpoint."""
    bits: int
    group_size: int
    """Group size used; smaller than requested if that does not divide the width."""
    symmetric: bool
    num_tokens: int
    """Calibration tokens that reached this module."""
    relative_error: float | None
    """Squared error of its outputs relative to their squared norm, on the calibration Hessian that
    the solver used, which is shrunk toward its diagonal. None if all outputs are zero."""
    round_to_nearest_error: float | None
    """The same for round-to-nearest on the min-max grid, as a baseline."""
    damping_used: float
    """As a fraction of the mean diagonal; more than configured if it had to be raised."""
    notes: tuple[str, ...] = ()
    """Descriptions of every fallback for this module."""
    seconds: float = 0.0

    @property
    def block(self) -> int | None:
        """Index of its decoder block; None for the head."""
        return block_of(self.name)

    @property
    def kind(self) -> str:
        """Its name within its block, with ``*`` for the index of an expert."""
        return kind_of(self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class SkippedModule:
    """A linear that was left in 16 bits."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationReport:
    """The text that the Hessians were measured on."""

    source: str
    """File name, or a description of the text."""
    digest: str
    """sha256 of the token ids, in hex; equal digests mean equal calibration data."""
    samples: int
    length: int
    """Maximum tokens per sample."""
    tokens: int
    """Total number of tokens, without padding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityReport:
    """Quality of the quantized model compared with the base model, on held-out text."""

    text: str
    """File name, or a description of the text."""
    text_digest: str
    """sha256 of the text, in hex."""
    windows: int
    window: int
    """Tokens per window."""
    base_perplexity: float
    quantized_perplexity: float
    kl_nats_mean: float
    """Mean of KL(base || quantized) per token. Unit: nats."""
    kl_standard_error: float | None
    """Standard error of ``kl_nats_mean`` over windows; None if there is only one."""
    top1_agreement: float
    """Fraction of positions where both models rank the same token first, 0..1."""

    @classmethod
    def from_divergence(cls, result: DivergenceResult, *, text: str, text_digest: str) -> Self:
        """Create the report from a full comparison of base and quantized model.

        Args:
            result: From :func:`halfbyte.evaluate.divergence.divergence`.
            text: File name, or a description of the text.
            text_digest: sha256 of the text, in hex.

        Returns:
            The report.
        """
        return cls(
            text=text,
            text_digest=text_digest,
            windows=result.num_windows,
            window=result.window,
            base_perplexity=result.base.perplexity,
            quantized_perplexity=result.quantized.perplexity,
            kl_nats_mean=result.kl_nats,
            kl_standard_error=result.kl_standard_error,
            top1_agreement=result.top1_agreement,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertCoverage:
    """Number of calibration tokens that reached the experts of one block."""

    block: int
    tokens: tuple[int, ...]
    """Number of tokens, by expert."""

    @property
    def unreached(self) -> tuple[int, ...]:
        """Experts that no token reached; they were rounded with the statistics of all others."""
        return tuple(expert for expert, count in enumerate(self.tokens) if count == 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class EndToEndReport:
    """Result of end-to-end training of scales and norm gains."""

    steps: int
    """Number of steps taken."""
    kept_step: int
    """The step whose result was kept; 0 if none helped and nothing was changed."""
    kl_before: float
    """KL to the base model in nats per token, on calibration text that was not trained on."""
    kl_after: float
    """The same for the step that was kept."""
    looks: tuple[tuple[int, float], ...]
    """Step and KL of every evaluation."""
    stopped: bool
    """Whether the user stopped the training early."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationReport:
    """The report of one run."""

    model: str
    """The base model, as the user named it."""
    output: str
    config: dict[str, Any]
    """The QuantConfig."""
    calibration: CalibrationReport
    modules: tuple[ModuleReport, ...]
    """In the order in which they were quantized."""
    skipped: tuple[SkippedModule, ...]
    quality: QualityReport | None
    """None if not measured."""
    seconds: float
    """Total wall time; of a resumed run, only that of the last process."""
    seconds_by_phase: dict[str, float]
    peak_memory_bytes: int
    """Peak resident memory of the process."""
    checkpoint_bytes: int
    """Total size of the weight files."""
    bits_per_weight: float
    """Mean over the quantized modules, including scales and zeros."""
    versions: dict[str, str]
    machine: dict[str, str]
    notes: tuple[str, ...] = ()
    """Notes on the whole run."""
    flops: dict[str, float] = field(default_factory=dict)
    """Minimum floating-point operations of the run, by kind of work."""
    end_to_end: EndToEndReport | None = None
    """None if it was not requested or not possible."""
    unquantized_share: float = 0.0
    """Share of the weights in the blocks' matrices that stay in 16 bits."""
    inputs: dict[str, Any] = field(default_factory=dict)
    """Inputs and options of the run, compared when it is resumed."""

    def expert_coverage(self) -> list[ExpertCoverage]:
        """Return the number of tokens that reached each expert, by block; empty without experts."""
        found: dict[int, dict[int, int]] = {}
        for module in self.modules:
            expert = expert_of(module.name)
            if module.block is not None and expert is not None:
                found.setdefault(module.block, {}).setdefault(expert, module.num_tokens)
        return [
            ExpertCoverage(block=block, tokens=tuple(tokens[e] for e in sorted(tokens)))
            for block, tokens in found.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-serializable values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Create a report from the values of :meth:`to_dict`.

        Args:
            values: The values, possibly after a JSON round trip.

        Returns:
            The report.

        Raises:
            CheckpointError: A field is missing or unknown; names it.
        """
        values = dict(values)
        for name, part in (
            ("modules", ModuleReport),
            ("skipped", SkippedModule),
        ):
            values[name] = tuple(_build(part, item) for item in values.get(name, ()))
        values["calibration"] = _build(CalibrationReport, values.get("calibration", {}))
        if values.get("quality") is not None:
            values["quality"] = _build(QualityReport, values["quality"])
        if values.get("end_to_end") is not None:
            tuning = _build(EndToEndReport, values["end_to_end"])
            looks = tuple((int(step), float(kl)) for step, kl in tuning.looks)
            values["end_to_end"] = replace(tuning, looks=looks)
        return _build(cls, values)

    def save(self, folder: Path) -> Path:
        """Write the report into a folder.

        Args:
            folder: The checkpoint's folder, which exists.

        Returns:
            The file.
        """
        path = folder / REPORT_FILE
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        return path


def load_report(folder: Path) -> QuantizationReport:
    """Load the report of a checkpoint that was made by halfbyte.

    Args:
        folder: The checkpoint's folder.

    Returns:
        The report.

    Raises:
        CheckpointError: There is no report, or it is damaged.
    """
    path = folder / REPORT_FILE
    try:
        return QuantizationReport.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} has no {REPORT_FILE}: it was not made by halfbyte, or the run did not "
            "finish. Quantize with halfbyte, or resume the run."
        ) from error
    except ValueError as error:
        raise CheckpointError(
            f"Cannot read {path}: it is not valid JSON ({error}). Copy the file again."
        ) from error


def _build(cls: type[Part], values: Mapping[str, Any]) -> Part:
    """Create a part of the report, converting lists from JSON to tuples."""
    allowed = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(allowed))
    missing = [
        name
        for name, f in allowed.items()
        if name not in values and f.default is MISSING and f.default_factory is MISSING
    ]
    if unknown or missing:
        raise CheckpointError(
            f"Cannot read {cls.__name__} of a quantization report: unknown {unknown}, missing "
            f"{missing}. It was written by another version of halfbyte; read it with that version."
        )
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})

"""What a quantization run did and what it cost, as data: written to ``quantization_report.json``.

The run fills these dataclasses; the model card, the picture and the command line read them. Every
fallback stands in the ``notes`` of the module that it happened to.
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
    """Give the number of the decoder block in a module's dotted name; None where it has none."""
    return next((int(part) for part in module.split(".") if part.isdigit()), None)


def expert_of(module: str) -> int | None:
    """Give the number of the expert in a module's dotted name; None where it has none."""
    parts = module.split(".")
    after = parts[parts.index("experts") + 1 :] if "experts" in parts else []
    return int(after[0]) if after and after[0].isdigit() else None


def kind_of(module: str) -> str:
    """Give a module's name within any block, with ``*`` for the number of an expert."""
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
    """What was used, which is less than what was asked for where that does not divide the width."""
    symmetric: bool
    num_tokens: int
    """Calibration tokens that reached this module."""
    relative_error: float | None
    """Squared error of its outputs over their squared size, 0 at best; on the calibration Hessian
    as the solver saw it, shrunk towards its diagonal. None where all its outputs are zero."""
    round_to_nearest_error: float | None
    """The same measure for plain rounding on the min-max grid: what the solver had to beat."""
    damping_used: float
    """As a fraction of the mean diagonal; more than what was asked for after an escalation."""
    notes: tuple[str, ...] = ()
    """Every fallback that was taken for this module, in words."""
    seconds: float = 0.0

    @property
    def block(self) -> int | None:
        """Number of the decoder block that holds it; None for the head."""
        return block_of(self.name)

    @property
    def kind(self) -> str:
        """Its name within any block, with ``*`` for the number of an expert."""
        return kind_of(self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class SkippedModule:
    """A linear that was left in 16 bits."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationReport:
    """Which text the Hessians were measured on."""

    source: str
    """File name, or what the text was in words."""
    digest: str
    """sha256 of the token ids, in hex: the same digest is the same calibration."""
    samples: int
    length: int
    """Tokens per sample, at most."""
    tokens: int
    """Tokens in all, padding left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityReport:
    """What quantizing cost, measured on a text that was not calibrated on."""

    text: str
    """File name, or what the text was in words."""
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
    """Of ``kl_nats_mean``, over windows; None where there is only one."""
    top1_agreement: float
    """Share of positions where both models rank the same token first, 0..1."""

    @classmethod
    def from_divergence(cls, result: DivergenceResult, *, text: str, text_digest: str) -> Self:
        """Take what the report keeps out of a full comparison of base and quantized model.

        Args:
            result: From :func:`halfbyte.evaluate.divergence.divergence`.
            text: File name, or what the text was in words.
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
    """How much calibration text reached the experts of one block."""

    block: int
    tokens: tuple[int, ...]
    """By expert."""

    @property
    def unreached(self) -> tuple[int, ...]:
        """Experts that no token reached; they were rounded on what all others saw."""
        return tuple(expert for expert, count in enumerate(self.tokens) if count == 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class EndToEndReport:
    """What training scales and norm gains of the whole model brought."""

    steps: int
    """Taken."""
    kept_step: int
    """The step that was kept; 0: none helped, and everything was left as it was."""
    kl_before: float
    """To the base model, nats per token, on calibration text that was not trained on."""
    kl_after: float
    """The same for what was kept."""
    looks: tuple[tuple[int, float], ...]
    """Step and KL of every look."""
    stopped: bool
    """Whether the user ended it early."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationReport:
    """One run, from start to finish."""

    model: str
    """What was quantized, as it was named to the run."""
    output: str
    config: dict[str, Any]
    """The QuantConfig."""
    calibration: CalibrationReport
    modules: tuple[ModuleReport, ...]
    """In the order in which they were quantized."""
    skipped: tuple[SkippedModule, ...]
    quality: QualityReport | None
    """None where it was not measured."""
    seconds: float
    """Wall time in all, of the last run only where it was resumed."""
    seconds_by_phase: dict[str, float]
    peak_memory_bytes: int
    """Largest resident size of the process."""
    checkpoint_bytes: int
    """Size of all weight files."""
    bits_per_weight: float
    """Mean over the quantized modules, with their scales and zeros."""
    versions: dict[str, str]
    machine: dict[str, str]
    notes: tuple[str, ...] = ()
    """What concerns the whole run."""
    flops: dict[str, float] = field(default_factory=dict)
    """Floating-point operations that the run could not do without, by kind of work."""
    end_to_end: EndToEndReport | None = None
    """None where it was not asked for or could not be done."""
    inputs: dict[str, Any] = field(default_factory=dict)
    """What the run was given, by which --resume knows it again."""

    def expert_coverage(self) -> list[ExpertCoverage]:
        """Collect the tokens that reached each expert, block by block; empty without experts."""
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
        """Give plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Undo :meth:`to_dict`.

        Args:
            values: What :meth:`to_dict` gave, perhaps by way of JSON.

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
    """Read the report of a checkpoint that halfbyte made.

    Args:
        folder: The checkpoint's folder.

    Returns:
        The report.

    Raises:
        CheckpointError: There is none, or it is damaged.
    """
    path = folder / REPORT_FILE
    try:
        return QuantizationReport.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} has no {REPORT_FILE}: halfbyte did not make it, or the run did not finish. "
            "Quantize with halfbyte, or resume the run."
        ) from error
    except ValueError as error:
        raise CheckpointError(
            f"Cannot read {path}: it is not JSON ({error}). Copy the file again."
        ) from error


def _build(cls: type[Part], values: Mapping[str, Any]) -> Part:
    """Make a part of the report; lists from JSON become the tuples that the fields are."""
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
            f"{missing}. It comes from another version of halfbyte; read it with that one."
        )
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})

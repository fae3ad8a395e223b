"""How far is a calibration text from the text that the model will see?

::

    two texts -> tokens -> one run of the model over each -> token coverage, perplexity,
              size of every linear's inputs by channel -> a verdict

Each distance is held against the same distance between two halves of the workload: what chance
alone makes of texts of one kind. A text is as good as any other of its kind where it is no further
away than a few times that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.errors import CalibrationError, ModelError
from halfbyte.evaluate.loading import Subject, open_subject
from halfbyte.evaluate.logits import measure_nll
from halfbyte.model.blocks import find_blocks, quantizable_linears
from halfbyte.quant_config import CalibrationConfig
from halfbyte.quantize.calibration import CalibrationTokens, load_calibration
from halfbyte.quantize.calibration_source import CalibrationSource

CLOSE, APART, FAR = "close", "apart", "far"
CLOSE_RATIO, FAR_RATIO = 2.0, 4.0
"""Median distance of the layers over that between halves of the workload (docs/log.md)."""
COVERAGE_LOSS = 0.05
"""Share of the workload's tokens that the calibration lacks, beyond what one half of it lacks."""
FEWEST_SEQUENCES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerDistance:
    """How differently the two texts excite one linear's inputs."""

    name: str
    distance: float
    """Mean of |ln(calibration's mean square / workload's)| over channels, weighted by size."""
    floor: float
    """The same between two halves of the workload."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """A calibration text held against a workload."""

    calibration: str
    workload: str
    calibration_tokens: int
    workload_tokens: int
    coverage: float
    """Share of the workload's tokens that occur in the calibration, 0..1."""
    coverage_floor: float
    """Share of one half of the workload's tokens that occur in the other half."""
    calibration_perplexity: float
    workload_perplexity: float
    layers: tuple[LayerDistance, ...]
    verdict: str
    """CLOSE, APART or FAR."""
    reasons: tuple[str, ...]
    """Why, in words."""

    @property
    def ratio(self) -> float:
        """Median over layers of distance over floor; 1 is another text of the same kind."""
        return _ratio(self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Give plain values for JSON."""
        return {**asdict(self), "ratio": self.ratio}


def inspect_calibration(
    model: Any | str | Path,
    calibration: CalibrationSource,
    workload: CalibrationSource,
    *,
    config: CalibrationConfig | None = None,
    tokenizer: Any = None,
) -> Inspection:
    """Hold a calibration text against the text that the model will see.

    Args:
        model: A loaded model, or its folder.
        calibration: Text in any form that quantizing takes; None: the built-in mix.
        workload: The same, of the kind that the model will see.
        config: How many sequences of what length to look at; default: 32 of 512 tokens.
        tokenizer: Needed with a loaded model and text.

    Returns:
        Distances and a verdict.

    Raises:
        CalibrationError: A text cannot be read, or the workload is too short to be split, or its
            halves are the same.
        ModelError: The model cannot be loaded, or has no linears to look at.
    """
    config = config or CalibrationConfig(samples=32, length=512)
    subject = open_subject(model, tokenizer=tokenizer)
    texts = [
        load_calibration(source, config, subject.tokenizer, subject.longest)
        for source in (calibration, workload)
    ]
    seen = texts[1].sequences
    if len(seen) < FEWEST_SEQUENCES:
        raise CalibrationError(
            f"The workload {texts[1].source} holds {len(seen)} sequences of {config.length} "
            f"tokens; {FEWEST_SEQUENCES} are needed to see how it differs from itself. Give more "
            "text, or a smaller --length."
        )
    # Not every other sequence: neighbours come from one document.
    middle = len(seen) // 2
    halves = [seen[:middle], seen[middle:]]
    parts = [_run(subject, part) for part in (texts[0].sequences, *halves)]
    layers = tuple(
        LayerDistance(
            name=name,
            distance=_distance(parts[0].sizes[name], parts[1].sizes[name] + parts[2].sizes[name]),
            floor=_distance(parts[1].sizes[name], parts[2].sizes[name]),
        )
        for name in parts[0].sizes
        if name in parts[1].sizes and name in parts[2].sizes
    )
    if not layers:
        raise ModelError(f"Cannot inspect with {subject.name}: none of its linears was run.")
    if not all(layer.floor > 0 for layer in layers):
        raise CalibrationError(
            f"The two halves of the workload {texts[1].source} are the same to the model, so there "
            "is nothing to hold a distance against. Give text that does not repeat itself."
        )
    return _judge(texts, halves, parts, layers)


@dataclass(slots=True)
class _Part:
    """What a run over some sequences left."""

    sizes: dict[str, Tensor]
    """Sum of squares by input channel, per linear."""
    nll: float
    predicted: int


@torch.inference_mode()
def _run(subject: Subject, sequences: Sequence[Tensor]) -> _Part:
    part = _Part(sizes={}, nll=0.0, predicted=0)
    with _watch(subject.model, part.sizes):
        for ids in sequences:
            row = ids[None].to(subject.input_device)
            logits = subject.model(input_ids=row, use_cache=False).logits[0, :-1]
            part.nll += float(measure_nll(logits, row[0, 1:]).sum(dtype=torch.float64))
            part.predicted += len(ids) - 1
    return part


@contextmanager
def _watch(model: nn.Module, sizes: dict[str, Tensor]) -> Iterator[None]:
    blocks = find_blocks(model)
    handles = []
    for index, block in enumerate(blocks.modules):
        for name, linear in quantizable_linears(block).items():
            full = f"{blocks.name(index)}.{name}"

            def add(_module: nn.Module, inputs: tuple[Tensor, ...], full: str = full) -> None:
                rows = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float()
                total = rows.square().sum(0).double()
                sizes[full] = sizes[full] + total if full in sizes else total

            handles.append(linear.register_forward_pre_hook(add))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _distance(one: Tensor, other: Tensor) -> float:
    """Compare how two texts share out their signal among channels."""
    first, second = one / one.sum(), other / other.sum()
    both = (first > 0) & (second > 0)
    weight = (first + second)[both] / 2
    return float(((first[both] / second[both]).log().abs() * weight).sum() / weight.sum())


def _judge(
    texts: Sequence[CalibrationTokens],
    halves: Sequence[Sequence[Tensor]],
    parts: Sequence[_Part],
    layers: tuple[LayerDistance, ...],
) -> Inspection:
    coverage = _coverage(texts[0].sequences, texts[1].sequences)
    coverage_floor = _coverage(halves[0], halves[1])
    ratio = _ratio(layers)
    reasons = [
        f"layers see inputs {ratio:.1f} times as far from the workload's as two halves of the "
        "workload are from each other"
    ]
    verdict = CLOSE if ratio <= CLOSE_RATIO else APART if ratio <= FAR_RATIO else FAR
    missing = coverage_floor - coverage
    if missing > COVERAGE_LOSS:
        reasons.append(
            f"{1 - coverage:.0%} of the workload's tokens never occur in the calibration "
            f"({1 - coverage_floor:.0%} of one half of it do not occur in the other)"
        )
        verdict = APART if verdict == CLOSE else verdict
    workload_nll = (parts[1].nll + parts[2].nll) / (parts[1].predicted + parts[2].predicted)
    return Inspection(
        calibration=texts[0].source,
        workload=texts[1].source,
        calibration_tokens=texts[0].num_tokens,
        workload_tokens=texts[1].num_tokens,
        coverage=coverage,
        coverage_floor=coverage_floor,
        calibration_perplexity=math.exp(parts[0].nll / parts[0].predicted),
        workload_perplexity=math.exp(workload_nll),
        layers=layers,
        verdict=verdict,
        reasons=tuple(reasons),
    )


def _ratio(layers: Sequence[LayerDistance]) -> float:
    return median(layer.distance / layer.floor for layer in layers)


def _coverage(known: Sequence[Tensor], seen: Sequence[Tensor]) -> float:
    """Share of tokens of one text that occur in another."""
    vocabulary = torch.unique(torch.cat(list(known)))
    tokens = torch.cat(list(seen))
    return float(torch.isin(tokens, vocabulary).double().mean())


def save_inspection_plot(inspection: Inspection, path: Path) -> Path:
    """Draw the distance of every linear beside its floor.

    Args:
        inspection: What to draw.
        path: A PNG.

    Returns:
        The file.
    """
    # Imported here: it costs half a second, and most commands draw nothing.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    places = range(len(inspection.layers))
    axes.plot(places, [layer.distance for layer in inspection.layers], label="calibration")
    axes.plot(
        places, [layer.floor for layer in inspection.layers], label="the workload's other half"
    )
    axes.set_xlabel("linears, in the order of the model")
    axes.set_ylabel("distance of the inputs")
    axes.set_ylim(bottom=0)
    axes.set_title(
        f"{inspection.calibration} against {inspection.workload}: {inspection.verdict} "
        f"({inspection.ratio:.1f} times)"
    )
    axes.legend()
    figure.savefig(path, dpi=120)
    return path

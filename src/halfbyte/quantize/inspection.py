"""Compare a calibration text with the workload, the text that the model will see.

::

    two texts -> tokens -> one run of the model over each -> token coverage, perplexity,
              energy of every linear's inputs by channel -> a verdict

Each distance is compared with the same distance between two halves of the workload, which is the
variation between texts of the same kind. A calibration text is suitable if its distance is at most
a few times that.
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
"""Thresholds of the verdict on :attr:`Inspection.ratio`; measured in docs/log.md."""
COVERAGE_LOSS = 0.05
"""Tolerated loss of coverage, compared with the coverage of one half of the workload by the
other."""
MIN_SEQUENCES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerDistance:
    """Distance between the inputs of one linear on the two texts."""

    name: str
    distance: float
    """Mean over channels of |ln(calibration's share of energy / workload's share)|, weighted by
    energy."""
    floor: float
    """The same between two halves of the workload."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """The comparison of a calibration text with a workload."""

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
    """Explanation of the verdict."""

    @property
    def ratio(self) -> float:
        """Median over layers of distance over floor; about 1 for another text of the same kind."""
        return _ratio(self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {**asdict(self), "ratio": self.ratio}


def inspect_calibration(
    model: Any | str | Path,
    calibration: CalibrationSource,
    workload: CalibrationSource,
    *,
    config: CalibrationConfig | None = None,
    tokenizer: Any = None,
) -> Inspection:
    """Compare a calibration text with text that the model will see.

    Args:
        model: A loaded model, or its folder.
        calibration: Text in any form that quantization accepts; None: the built-in mix.
        workload: Text of the kind that the model will see, in the same forms.
        config: Number and length of the sequences to use; default: 32 of 512 tokens.
        tokenizer: Needed with a loaded model and text.

    Returns:
        Distances and a verdict.

    Raises:
        CalibrationError: A text cannot be read, or the workload is too short to be split, or its
            halves are the same.
        ModelError: The model cannot be loaded, or none of its linears was run.
    """
    config = config or CalibrationConfig(samples=32, length=512)
    subject = open_subject(model, tokenizer=tokenizer)
    texts = [
        load_calibration(source, config, subject.tokenizer, subject.longest)
        for source in (calibration, workload)
    ]
    workload_sequences = texts[1].sequences
    if len(workload_sequences) < MIN_SEQUENCES:
        raise CalibrationError(
            f"The workload {texts[1].source} holds {len(workload_sequences)} sequences of "
            f"{config.length} tokens; {MIN_SEQUENCES} are needed to compare its halves. Give more "
            "text, or a smaller --length."
        )
    # Not alternating sequences: neighbors come from the same document.
    middle = len(workload_sequences) // 2
    halves = [workload_sequences[:middle], workload_sequences[middle:]]
    runs = [_run(subject, sequences) for sequences in (texts[0].sequences, *halves)]
    calibration_energy, first, second = (run.energy for run in runs)
    layers = tuple(
        LayerDistance(
            name=name,
            distance=_distance(calibration_energy[name], first[name] + second[name]),
            floor=_distance(first[name], second[name]),
        )
        for name in calibration_energy
        if name in first and name in second
    )
    if not layers:
        raise ModelError(f"Cannot inspect with {subject.name}: none of its linears was run.")
    if not all(layer.floor > 0 for layer in layers):
        raise CalibrationError(
            f"The two halves of the workload {texts[1].source} are the same to the model, so there "
            "is no distance to compare with. Give text that does not repeat itself."
        )
    return _evaluate(texts, halves, runs, layers)


@dataclass(slots=True)
class _TextRun:
    """Statistics of a run of the model over some sequences."""

    energy: dict[str, Tensor]
    """Sum of squares by input channel, per linear."""
    nll: float
    num_predictions: int


@torch.inference_mode()
def _run(subject: Subject, sequences: Sequence[Tensor]) -> _TextRun:
    run = _TextRun(energy={}, nll=0.0, num_predictions=0)
    with _record_energy(subject.model, run.energy):
        for ids in sequences:
            row = ids[None].to(subject.input_device)
            logits = subject.model(input_ids=row, use_cache=False).logits[0, :-1]
            run.nll += float(measure_nll(logits, row[0, 1:]).sum(dtype=torch.float64))
            run.num_predictions += len(ids) - 1
    return run


@contextmanager
def _record_energy(model: nn.Module, energy: dict[str, Tensor]) -> Iterator[None]:
    """Sum the squares of every linear's inputs, by channel, while the context is open."""
    blocks = find_blocks(model)
    handles = []
    for index, block in enumerate(blocks.modules):
        for name, linear in quantizable_linears(block).items():
            full = f"{blocks.name(index)}.{name}"

            def add(_module: nn.Module, inputs: tuple[Tensor, ...], full: str = full) -> None:
                rows = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float()
                total = rows.square().sum(0).double()
                energy[full] = energy[full] + total if full in energy else total

            handles.append(linear.register_forward_pre_hook(add))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _distance(one: Tensor, other: Tensor) -> float:
    """Return the distance between two distributions of energy over channels."""
    first, second = one / one.sum(), other / other.sum()
    both = (first > 0) & (second > 0)
    weight = (first + second)[both] / 2
    return float(((first[both] / second[both]).log().abs() * weight).sum() / weight.sum())


def _evaluate(
    texts: Sequence[CalibrationTokens],
    halves: Sequence[Sequence[Tensor]],
    runs: Sequence[_TextRun],
    layers: tuple[LayerDistance, ...],
) -> Inspection:
    coverage = _coverage(texts[0].sequences, texts[1].sequences)
    coverage_floor = _coverage(halves[0], halves[1])
    ratio = _ratio(layers)
    reasons = [
        f"the inputs of the layers are {ratio:.1f} times as far from the workload's as those of "
        "two halves of the workload from each other"
    ]
    verdict = CLOSE if ratio <= CLOSE_RATIO else APART if ratio <= FAR_RATIO else FAR
    if coverage_floor - coverage > COVERAGE_LOSS:
        reasons.append(
            f"{1 - coverage:.0%} of the workload's tokens do not occur in the calibration text "
            f"({1 - coverage_floor:.0%} of those in one half of it do not occur in the other)"
        )
        verdict = APART if verdict == CLOSE else verdict
    calibration, first, second = runs
    workload_nll = (first.nll + second.nll) / (first.num_predictions + second.num_predictions)
    return Inspection(
        calibration=texts[0].source,
        workload=texts[1].source,
        calibration_tokens=texts[0].num_tokens,
        workload_tokens=texts[1].num_tokens,
        coverage=coverage,
        coverage_floor=coverage_floor,
        calibration_perplexity=math.exp(calibration.nll / calibration.num_predictions),
        workload_perplexity=math.exp(workload_nll),
        layers=layers,
        verdict=verdict,
        reasons=tuple(reasons),
    )


def _ratio(layers: Sequence[LayerDistance]) -> float:
    return median(layer.distance / layer.floor for layer in layers)


def _coverage(known: Sequence[Tensor], seen: Sequence[Tensor]) -> float:
    """Return the fraction of a text's tokens that occur in a known one."""
    vocabulary = torch.unique(torch.cat(list(known)))
    tokens = torch.cat(list(seen))
    return float(torch.isin(tokens, vocabulary).double().mean())


def save_inspection_plot(inspection: Inspection, path: Path) -> Path:
    """Plot the distance and the floor of every linear.

    Args:
        inspection: The comparison.
        path: The PNG file to write.

    Returns:
        The path.
    """
    # Imported here: it takes half a second, and most commands draw nothing.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    positions = range(len(inspection.layers))
    axes.plot(positions, [layer.distance for layer in inspection.layers], label="calibration text")
    axes.plot(
        positions, [layer.floor for layer in inspection.layers], label="other half of the workload"
    )
    axes.set_xlabel("linears, in model order")
    axes.set_ylabel("distance of the inputs from the workload")
    axes.set_ylim(bottom=0)
    axes.set_title(
        f"{inspection.calibration} against {inspection.workload}: {inspection.verdict} "
        f"(ratio {inspection.ratio:.1f})"
    )
    axes.legend()
    figure.savefig(path, dpi=120)
    return path

"""An adapter that gives back part of what rounding took, without training.

::

    original weight - dequantized weight = error E [out, in]
    text ──original model──> second moments of each linear's input, H [in, in]
    E in the metric of H ──SVD, rank r──> B [out, r], A [r, in] with B A ~ E

Of all products of that rank, B A is the one that leaves the least squared error in the outputs of
the layer over the text: with H = S Sᵀ, it is the best approximation of E S, times the inverse of S.

Source:
    Liu et al. 2024, "EoRA: Training-free Compensation for Compressed LLM with Eigenspace Low-Rank
    Approximation", https://arxiv.org/abs/2410.21271
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.checkpoint.new_folder import check_new_folder
from halfbyte.errors import ModelError
from halfbyte.evaluate.loading import open_subject
from halfbyte.finetune.adapter import attach_adapter, require_peft
from halfbyte.finetune.config import AdapterConfig
from halfbyte.finetune.merge import stored_dtype
from halfbyte.finetune.third_party_output import quiet_libraries
from halfbyte.machine.devices import resolve_device
from halfbyte.nn.linear import QuantLinear
from halfbyte.nn.replace import quantized_linears
from halfbyte.quant_config import CalibrationConfig
from halfbyte.quantize.calibration import load_calibration
from halfbyte.quantize.calibration_source import CalibrationSource
from halfbyte.quantize.hessian import HessianAccumulator
from halfbyte.quantize.source import find_model

SMALLEST = 1e-6
"""Share of the largest eigenvalue below which a direction of the input counts as this much.

Such directions hardly occur in the text; dividing by less would fill the adapter with noise.
"""
MOMENT_BYTES = 2**30
"""Second moments held at a time; more of them take another pass over the text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairReport:
    """What a repair came to."""

    base: str
    original: str
    output: str
    rank: int
    tokens: int
    kept_error: dict[str, float]
    """By linear: share of its squared output error over the text that is left."""
    seconds: float

    @property
    def mean_kept_error(self) -> float:
        """Mean over the linears."""
        return sum(self.kept_error.values()) / len(self.kept_error)

    def to_dict(self) -> dict[str, Any]:
        """Give plain values for JSON."""
        return {**asdict(self), "mean_kept_error": self.mean_kept_error}


@quiet_libraries()
def repair(
    base: str | Path,
    original: str | Path,
    output: str | Path,
    *,
    rank: int = 16,
    text: CalibrationSource = None,
    calibration: CalibrationConfig | None = None,
    device: str = "cpu",
) -> RepairReport:
    """Make the adapter and write it in PEFT's format.

    Args:
        base: A quantized model.
        original: The 16-bit model that it was made from.
        output: New folder for the adapter.
        rank: Of the adapter.
        text: What the outputs are to be right on; None: the built-in text.
        calibration: How much of it.
        device: Where to compute.

    Returns:
        What it came to.

    Raises:
        MissingExtraError: PEFT is not installed.
        ConfigError: The output is in use, or a setting is wrong.
        ModelError: The two models have other layers.
        CalibrationError: The text cannot be used.
    """
    require_peft("Repairing a quantized model")
    start, target = time.monotonic(), Path(output)
    adapter = AdapterConfig(rank=rank, alpha=float(rank), dropout=0.0)
    check_new_folder(target)
    resolve_device(device)
    folder, source = find_model(base), find_model(original)
    quantized = open_subject(folder, dtype=stored_dtype(folder), device=device)
    dense = open_subject(source, dtype=stored_dtype(source), device=device)
    pairs = _pair(quantized.model, dense.model, folder, source)
    calibration = calibration or CalibrationConfig(length=min(512, dense.longest or 512))
    tokens = load_calibration(text, calibration, dense.tokenizer, dense.longest)
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    kept: dict[str, float] = {}
    for names in _portions(pairs):
        moments = measure_moments(dense.model, names, tokens.batches(4))
        for name in names:
            packed, exact = pairs[name]
            error = exact.weight.detach().float() - packed.dequantize(torch.float32)
            factors[name] = approximate(error, moments[name], rank)
            kept[name] = _kept(error, factors[name], moments[name])
    _write(quantized.model, adapter, factors, target)
    return RepairReport(
        base=str(base),
        original=str(original),
        output=str(target),
        rank=rank,
        tokens=tokens.num_tokens,
        kept_error=kept,
        seconds=time.monotonic() - start,
    )


def approximate(error: Tensor, moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Find the product of two factors that is nearest to an error, over inputs of given moments.

    Args:
        error: [out, in].
        moment: Mean of x xᵀ over the inputs, [in, in].
        rank: Columns of the factors; more than the error has are filled with zeros.

    Returns:
        B [out, rank] and A [rank, in], in the error's dtype.
    """
    values, vectors = torch.linalg.eigh(moment.double())
    values = values.clamp_min(float(values[-1]) * SMALLEST).sqrt()
    left, sizes, right = torch.linalg.svd((error.double() @ vectors) * values, full_matrices=False)
    left, sizes, right = left[:, :rank], sizes[:rank], right[:rank]
    # The size is shared evenly, so that training may go on from both factors.
    root = sizes.sqrt()
    b = left * root
    a = (root[:, None] * right / values) @ vectors.t()
    missing = rank - len(sizes)
    b = nn.functional.pad(b, (0, missing))
    a = nn.functional.pad(a, (0, 0, 0, missing))
    return b.to(error.dtype), a.to(error.dtype)


@torch.no_grad()
def measure_moments(
    model: nn.Module, names: Sequence[str], batches: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Run text through a model and sum x xᵀ of the inputs of some linears.

    Args:
        model: In evaluation mode.
        names: Its linears.
        batches: Token ids [rows, tokens] each.

    Returns:
        [in, in] by name; linears that are given the same tensor share one.
    """
    device = next(model.parameters()).device
    sums: dict[str, HessianAccumulator] = {}
    owner: dict[str, str] = {}
    seen: list[tuple[Tensor, str]] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            (x,) = inputs
            first = next((other for tensor, other in seen if tensor is x), None)
            owner.setdefault(name, first or name)
            if first is not None:
                return
            seen[:] = [*seen[-1:], (x, name)]
            if name not in sums:
                sums[name] = HessianAccumulator(x.shape[-1], x.device)
            sums[name].update(x.reshape(-1, x.shape[-1]))

        return hook

    handles = [model.get_submodule(n).register_forward_pre_hook(watch(n)) for n in names]
    try:
        for ids in batches:
            model(ids.to(device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {name: sums[owner[name]].total() for name in names}


def _pair(
    quantized: nn.Module, dense: nn.Module, folder: Path, source: Path
) -> dict[str, tuple[QuantLinear, nn.Linear]]:
    """By name: each packed linear with its original."""
    modules = dict(dense.named_modules())
    pairs = {}
    for name, packed in quantized_linears(quantized):
        other = modules.get(name)
        if not isinstance(other, nn.Linear) or other.weight.shape != packed.weight.shape:
            raise ModelError(
                f"Cannot repair {folder} with {source}: {name} is "
                f"{packed.in_features} -> {packed.out_features} there, and here "
                f"{'not a linear' if other is None else str(other)}. Give the model that it was "
                "quantized from."
            )
        if isinstance(other, QuantLinear):
            raise ModelError(
                f"Cannot repair {folder} with {source}: that is quantized too. Give the 16-bit "
                "model."
            )
        pairs[name] = (packed, other)
    if not pairs:
        raise ModelError(f"Cannot repair {folder}: no linear in it is quantized.")
    return pairs


def _portions(pairs: Mapping[str, tuple[QuantLinear, nn.Linear]]) -> list[list[str]]:
    """Split the linears, in order, so that the moments of each portion fit."""
    portions: list[list[str]] = [[]]
    held = 0
    for name, (packed, _) in pairs.items():
        size = 4 * packed.in_features**2
        if held + size > MOMENT_BYTES and portions[-1]:
            portions.append([])
            held = 0
        portions[-1].append(name)
        held += size
    return portions


def _kept(error: Tensor, factors: tuple[Tensor, Tensor], moment: Tensor) -> float:
    """Share of the squared output error that the factors leave."""
    b, a = factors
    left = error - b @ a
    before = float(((error @ moment) * error).sum())
    return float(((left @ moment) * left).sum()) / before if before > 0 else 0.0


def _write(
    model: Any,
    adapter: AdapterConfig,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    target: Path,
) -> None:
    targets = tuple(sorted({name.rpartition(".")[2] for name in factors}))
    adapted = attach_adapter(
        model,
        AdapterConfig(
            rank=adapter.rank, alpha=adapter.alpha, dropout=adapter.dropout, targets=targets
        ),
    )
    for name, (b, a) in factors.items():
        layer = adapted.get_base_model().get_submodule(name)
        layer.lora_A["default"].weight.data.copy_(a)
        layer.lora_B["default"].weight.data.copy_(b)
    adapted.save_pretrained(target)

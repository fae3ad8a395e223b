"""Make an adapter that corrects part of the quantization error, without training.

::

    original weight - dequantized weight = error E [out, in]
    text ──original model──> second moments of each linear's input, H [in, in]
    E weighted by H ──SVD, rank r──> B [out, r], A [r, in] with B A ~ E

Among all products of rank r, B A minimizes the squared error of the layer's outputs over the text:
with H = S Sᵀ, it is the best rank-r approximation of E S, times the inverse of S.

Source:
    Liu et al. 2024, "EoRA: Training-free Compensation for Compressed LLM with Eigenspace Low-Rank
    Approximation", https://arxiv.org/abs/2410.21271
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from halfbyte.checkpoint.output_folder import check_new_folder, share_weights
from halfbyte.errors import ModelError
from halfbyte.evaluate.loading import open_subject
from halfbyte.finetune.adapter import attach_adapter, require_peft
from halfbyte.finetune.config import AdapterConfig
from halfbyte.finetune.merge import stored_dtype
from halfbyte.finetune.third_party_output import quiet_libraries
from halfbyte.machine.devices import resolve_device
from halfbyte.model.blocks import linear_weight
from halfbyte.nn.linear import QuantLinear
from halfbyte.nn.replace import quantized_linears
from halfbyte.quant_config import CalibrationConfig
from halfbyte.quantize.calibration import load_calibration
from halfbyte.quantize.calibration_source import CalibrationSource
from halfbyte.quantize.hessian import HessianAccumulator
from halfbyte.quantize.source import find_model

MIN_EIGENVALUE_SHARE = 1e-6
"""Smaller eigenvalues are raised to this share of the largest one.

Such directions of the input hardly occur in the text; dividing by them would amplify noise.
"""
MOMENT_BYTES = 2**30
"""Limit for second moments in memory; more of them take another pass over the text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairReport:
    """Report of a repair."""

    base: str
    original: str
    output: str
    rank: int
    tokens: int
    kept_error: dict[str, float]
    """By linear: remaining share of its squared output error over the text."""
    seconds: float

    @property
    def mean_kept_error(self) -> float:
        """Mean over the linears."""
        return sum(self.kept_error.values()) / len(self.kept_error)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
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
        rank: Rank of the adapter.
        text: Text to minimize the output error on; None: the built-in text.
        calibration: Amount of text.
        device: Device to compute on.

    Returns:
        The report.

    Raises:
        MissingExtraError: PEFT is not installed.
        ConfigError: The output is not empty, or a setting is invalid.
        ModelError: The layers of the two models do not match.
        CalibrationError: The text cannot be used.
    """
    require_peft("Repairing a quantized model")
    start, target = time.monotonic(), Path(output)
    adapter = AdapterConfig(rank=rank, alpha=float(rank), dropout=0.0)
    folder, source = find_model(base), find_model(original)
    check_new_folder(target, folder, source)
    resolve_device(device)
    quantized = open_subject(folder, dtype=stored_dtype(folder), device=device)
    dense = open_subject(source, dtype=stored_dtype(source), device=device)
    pairs = _pair_linears(quantized.model, dense.model, folder, source)
    calibration = calibration or CalibrationConfig(length=min(512, dense.longest or 512))
    tokens = load_calibration(text, calibration, dense.tokenizer, dense.longest)
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    kept: dict[str, float] = {}
    for names in _split_by_memory(pairs):
        moments = measure_moments(dense.model, names, tokens.batches(4))
        for name in names:
            packed, exact = pairs[name]
            error = linear_weight(exact).float() - packed.dequantize(torch.float32)
            factors[name] = approximate(error, moments[name], rank)
            kept[name] = _remaining_error(error, factors[name], moments[name])
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
    """Approximate an error matrix by a low-rank product, weighted by the inputs' second moment.

    Args:
        error: [out, in].
        moment: Mean of x xᵀ over the inputs, [in, in].
        rank: Rank of the product; columns beyond the rank of the error are zero.

    Returns:
        B [out, rank] and A [rank, in], in the error's dtype.
    """
    values, vectors = torch.linalg.eigh(moment.double())
    values = values.clamp_min(float(values[-1]) * MIN_EIGENVALUE_SHARE).sqrt()
    left, sizes, right = torch.linalg.svd((error.double() @ vectors) * values, full_matrices=False)
    left, sizes, right = left[:, :rank], sizes[:rank], right[:rank]
    # Both factors get the same scale, so that training can continue from them.
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
    """Run text through a model and accumulate x xᵀ of the inputs of linears.

    Args:
        model: In evaluation mode.
        names: Names of the linears.
        batches: Token ids [rows, tokens] each.

    Returns:
        [in, in] by name; linears with the same input tensor share one.
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


def _pair_linears(
    quantized: nn.Module, dense: nn.Module, folder: Path, source: Path
) -> dict[str, tuple[QuantLinear, nn.Module]]:
    """Return each packed linear with its original, by name."""
    modules = dict(dense.named_modules())
    pairs = {}
    for name, packed in quantized_linears(quantized):
        other = modules.get(name)
        if isinstance(other, QuantLinear):
            raise ModelError(
                f"Cannot repair {folder} with {source}: the second is quantized too. Use the "
                "16-bit model."
            )
        is_linear = isinstance(other, nn.Linear | Conv1D)
        if other is None or not is_linear or linear_weight(other).shape != packed.weight.shape:
            raise ModelError(
                f"Cannot repair {folder} with {source}: {name} is "
                f"{packed.in_features} -> {packed.out_features} in the first, and in the second "
                f"{'not a linear' if other is None else str(other)}. Use the model that it was "
                "quantized from."
            )
        pairs[name] = (packed, other)
    if not pairs:
        raise ModelError(f"Cannot repair {folder}: no linear in it is quantized. Check the path.")
    return pairs


def _split_by_memory(pairs: Mapping[str, tuple[QuantLinear, nn.Module]]) -> list[list[str]]:
    """Split the linears, in order, so that the moments of each part fit into ``MOMENT_BYTES``."""
    parts: list[list[str]] = [[]]
    held = 0
    for name, (packed, _) in pairs.items():
        size = 4 * packed.in_features**2
        if held + size > MOMENT_BYTES and parts[-1]:
            parts.append([])
            held = 0
        parts[-1].append(name)
        held += size
    return parts


def _remaining_error(error: Tensor, factors: tuple[Tensor, Tensor], moment: Tensor) -> float:
    """Return the share of the squared output error that the factors leave."""
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
    adapted = attach_adapter(model, replace(adapter, targets=targets))
    for name, (b, a) in factors.items():
        layer = adapted.get_base_model().get_submodule(name)
        layer.lora_A["default"].weight.data.copy_(a)
        layer.lora_B["default"].weight.data.copy_(b)
    adapted.save_pretrained(target)
    share_weights(target)

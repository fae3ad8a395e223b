"""Errors of the candidate by layer: per linear and per block.

Each linear of the candidate gets the inputs of the base's own linear, so its outputs differ by
rounding alone, whatever the error of the layers before. A linear that is wrong in another way
(damaged scales, a swapped tensor) is an outlier among its peers.

*error*: relative distance of the outputs. *gain*: projection of the candidate's outputs on the
base's; 1 if the error is uncorrelated with the outputs, 1.03 if all scales are 3% too large.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.errors import ModelError
from halfbyte.judge.local_model import LocalModel
from halfbyte.judge.model_cache import ModelCache, read_tensors, write_tensors
from halfbyte.judge.questions import Passage, digest
from halfbyte.model.blocks import find_blocks, quantizable_linears

PROBE_TOKENS = 192
"""Tokens of running text whose inputs to every linear are saved."""
PROBE_PASSAGES = 6
SUSPECT_SIGMAS = 8.0
"""A linear is suspect if its gain or error is this many robust standard deviations from the median
of its peers,"""
SUSPECT_GAIN_ABOVE = 0.012
"""... and its gain is above the median by this much: rounding shrinks outputs, if anything,"""
SUSPECT_GAIN_BELOW = 0.025
"""... or below it by this much, which rounding alone rarely reaches,"""
SUSPECT_ERROR = 1.5
"""... or its error is this many times the median."""
MIN_MEDIAN_GAIN = 0.5
"""Over a candidate's linears. Rounding reduces the gain slightly, a rotated basis to about 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearError:
    """Error of one of the candidate's linears on the base's inputs."""

    name: str
    block: int
    kind: str
    """Name within the block; linears of the same kind are peers."""
    error: float
    gain: float
    suspect: str = ""
    """Why it is an outlier among its peers; empty if it is not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerErrors:
    """Errors by layer."""

    linears: tuple[LinearError, ...]
    block_errors: tuple[float, ...]
    """Relative distance of the hidden states after each block; errors of earlier blocks add up."""
    missing: int
    """Linears of the base without a linear of the same name in the candidate."""

    @property
    def suspects(self) -> tuple[LinearError, ...]:
        """Linears that are outliers among their peers."""
        return tuple(linear for linear in self.linears if linear.suspect)


def select_probe_ids(passages: Sequence[Passage]) -> list[tuple[int, ...]]:
    """Return a few short pieces of different documents, all of one length."""
    length = PROBE_TOKENS // PROBE_PASSAGES
    first = {p.document: p.ids[:length] for p in reversed(passages) if len(p.ids) >= length}
    pieces = list(first.values())
    step = max(1, len(pieces) // PROBE_PASSAGES)
    return pieces[::step][:PROBE_PASSAGES]


def save_base_layers(
    load: Callable[[], LocalModel], cache: ModelCache, passages: Sequence[Passage]
) -> None:
    """Save the inputs and outputs of every linear of the base, and the outputs of its blocks.

    Args:
        load: Returns the base; called only if nothing is saved yet.
        cache: Cache of the base.
        passages: Source of the probe tokens.
    """
    ids = select_probe_ids(passages)
    path = _probe_path(cache, ids)
    if path.is_file() or not ids:
        return
    model = load()
    blocks = find_blocks(model.model)
    linears = _linears(model.model, blocks.prefix)
    tensors: dict[str, Tensor] = {}
    inputs: dict[tuple[Any, ...], tuple[str, Tensor]] = {}

    def on_linear(name: str, x: Tensor, y: Tensor) -> None:
        if f"out.{name}" in tensors:
            return
        # q, k and v read the same tensor: save it once. `inputs` keeps it alive, so its address is
        # not reused.
        key = (x.data_ptr(), tuple(x.shape))
        source, _ = inputs.setdefault(key, (name, x))
        if source == name:
            tensors[f"in.{name}"] = x.flatten(0, -2).clone()
        tensors[f"same.{name}"] = torch.tensor(list(source.encode()), dtype=torch.uint8)
        tensors[f"out.{name}"] = y.flatten(0, -2).clone()

    hooks = [
        module.register_forward_hook(lambda _, x, y, n=name: on_linear(n, x[0], y))
        for name, module in linears.items()
    ]
    try:
        states = _block_states(model, blocks.modules, ids)
    finally:
        for hook in hooks:
            hook.remove()
    tensors |= {f"block.{index}": state for index, state in enumerate(states)}
    write_tensors(path, tensors)


@torch.inference_mode()
def measure_layers(
    model: LocalModel, base: ModelCache, passages: Sequence[Passage]
) -> LayerErrors | None:
    """Run each linear of the candidate on the base's inputs, and its blocks on the same tokens.

    Args:
        model: The candidate.
        base: Cache of the base.
        passages: The same as in :func:`save_base_layers`.

    Returns:
        The errors, with suspects marked; None if nothing is saved for the base.

    Raises:
        ModelError: The candidate's outputs are unrelated to the base's.
    """
    ids = select_probe_ids(passages)
    path = _probe_path(base, ids)
    if not path.is_file():
        return None
    saved = read_tensors(path)
    blocks = find_blocks(model.model)
    linears = _linears(model.model, blocks.prefix)
    names = [name.removeprefix("out.") for name in saved if name.startswith("out.")]
    errors = []
    for name in sorted(set(names) & set(linears), key=names.index):
        source = bytes(saved[f"same.{name}"].tolist()).decode()
        x = saved[f"in.{source}"].to(model.device, model.model.dtype)
        found = linears[name](x).float().cpu()
        expected = saved[f"out.{name}"].float()
        if found.shape != expected.shape:
            continue
        block, _, kind = name.removeprefix(f"{blocks.prefix}.").partition(".")
        # Normalized per token: the outputs of a few tokens are hundreds of times as large.
        size = expected.norm(dim=1, keepdim=True).clamp(min=1e-12)
        a, b = expected / size, found / size
        errors.append(
            LinearError(
                name=name,
                block=int(block) if block.isdigit() else -1,
                kind=kind,
                error=float((a - b).norm() / a.norm()),
                gain=float((a * b).sum() / (a * a).sum()),
            )
        )
    if errors and median(one.gain for one in errors) < MIN_MEDIAN_GAIN:
        raise ModelError(
            "given the base's inputs, the outputs of the candidate's linears are unrelated to the "
            "base's, as in a model in another basis (halfbyte rotate)"
        )
    states = _block_states(model, blocks.modules, ids)
    distances = []
    for index, state in enumerate(states):
        expected = saved[f"block.{index}"].float()
        size = expected.norm(dim=1).clamp(min=1e-12)
        distances.append(float(((state.float().cpu() - expected).norm(dim=1) / size).mean()))
    return LayerErrors(
        linears=mark_suspects(errors),
        block_errors=tuple(distances),
        missing=len(set(names) - set(linears)),
    )


def _probe_path(cache: ModelCache, ids: Sequence[Sequence[int]]) -> Path:
    return cache.folder / f"layers-{digest(ids)}.safetensors"


def mark_suspects(linears: Sequence[LinearError]) -> tuple[LinearError, ...]:
    """Mark the linears whose gain or error is an outlier among their peers in other blocks.

    Args:
        linears: The measured linears.

    Returns:
        The same linears in order, suspects with a reason. Kinds with fewer than four linears are
        not tested.
    """
    peers: dict[str, list[LinearError]] = {}
    for linear in linears:
        peers.setdefault(linear.kind, []).append(linear)
    return tuple(_with_reason(linear, peers[linear.kind]) for linear in linears)


def _with_reason(linear: LinearError, peers: Sequence[LinearError]) -> LinearError:
    if len(peers) < 4:
        return linear
    reasons = []
    center, spread = _robust_statistics([p.gain for p in peers])
    deviation = linear.gain - center
    is_large = deviation > SUSPECT_GAIN_ABOVE or deviation < -SUSPECT_GAIN_BELOW
    if is_large and abs(deviation) > SUSPECT_SIGMAS * spread:
        reasons.append(
            f"its outputs are {linear.gain:.3f} times the base's, its peers' {center:.3f} times"
        )
    center, spread = _robust_statistics([p.error for p in peers])
    if linear.error > SUSPECT_ERROR * center + 1e-3 and (
        linear.error - center > SUSPECT_SIGMAS * spread
    ):
        reasons.append(f"its error is {linear.error:.3f}, its peers' {center:.3f}")
    return replace(linear, suspect="; ".join(reasons))


def _robust_statistics(values: Sequence[float]) -> tuple[float, float]:
    """Return the median and the scaled median absolute deviation, which resist outliers."""
    center = median(values)
    return center, 1.4826 * median(abs(v - center) for v in values)


def _linears(model: nn.Module, prefix: str) -> Mapping[str, nn.Module]:
    """Return the linears within the blocks, quantized or not, by name."""
    return {
        name: module
        for name, module in quantizable_linears(model).items()
        if name.startswith(f"{prefix}.")
    }


@torch.inference_mode()
def _block_states(
    model: LocalModel, blocks: Sequence[nn.Module], ids: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Return the [tokens, hidden] output of each block, without the first token of each piece."""
    states: list[Tensor] = []

    def on_block(output: Any) -> None:
        hidden: Tensor = output if isinstance(output, Tensor) else output[0]
        # The first token is an attention sink: its states are hundreds of times as large.
        states.append(hidden[:, 1:].flatten(0, 1).clone())

    hooks = [block.register_forward_hook(lambda _, x, y: on_block(y)) for block in blocks]
    try:
        model.predict(ids)
    finally:
        for hook in hooks:
            hook.remove()
    return states

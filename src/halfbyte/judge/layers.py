"""Where in the model the candidate departs from the base, linear by linear and block by block.

Each linear of the candidate gets the very inputs that the base's own linear had. What it makes of
them differs by rounding alone, so a linear that is wrong in another way (damaged scales, a swapped
tensor) stands out from its peers, whatever error has come down from the layers before.

*error*: relative distance of the outputs. *gain*: by which factor the base's outputs are found in
the candidate's; 1 for an error that points nowhere, 1.03 for scales that are 3% too large.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
"""Of running text; their inputs to every linear are kept."""
PROBE_PASSAGES = 6
SUSPECT_SIGMAS = 8.0
"""A linear is suspect where its gain or error lies this many robust deviations from its peers'."""
SUSPECT_GAIN_ABOVE = 0.012
"""... and its gain is above its peers' median by this much: rounding makes outputs smaller, if
anything,"""
SUSPECT_GAIN_BELOW = 0.025
"""... or below it by this much, which rounding alone hardly ever reaches,"""
SUSPECT_ERROR = 1.5
"""... or its error is this many times theirs."""
LEAST_GAIN = 0.5
"""Median of a candidate's linears: rounding takes little off it, another basis nearly all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearError:
    """One linear of the candidate on the base's inputs."""

    name: str
    block: int
    kind: str
    """Its name within the block; linears of a kind are peers."""
    error: float
    gain: float
    suspect: str = ""
    """Why it stands out from its peers; empty where it does not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerErrors:
    """Errors by layer."""

    linears: tuple[LinearError, ...]
    block_errors: tuple[float, ...]
    """Relative distance of the hidden states behind each block, all errors before included."""
    missing: int
    """Linears of the base that the candidate does not have under the same name."""

    @property
    def suspects(self) -> tuple[LinearError, ...]:
        """Linears that stand out from their peers."""
        return tuple(linear for linear in self.linears if linear.suspect)


def probe_ids(passages: Sequence[Passage]) -> list[tuple[int, ...]]:
    """Give a few short pieces of different documents, of one length."""
    length = PROBE_TOKENS // PROBE_PASSAGES
    first = {p.document: p.ids[:length] for p in reversed(passages) if len(p.ids) >= length}
    pieces = list(first.values())
    step = max(1, len(pieces) // PROBE_PASSAGES)
    return pieces[::step][:PROBE_PASSAGES]


def keep_base_layers(
    load: Callable[[], LocalModel], cache: ModelCache, passages: Sequence[Passage]
) -> None:
    """Write down the inputs and outputs of every linear of the base, and the states of its blocks.

    Args:
        load: Gives the base; called only where it was not probed yet.
        cache: Its place.
        passages: Where the tokens come from.
    """
    ids = probe_ids(passages)
    path = _probe_path(cache, ids)
    if path.is_file() or not ids:
        return
    model = load()
    blocks = find_blocks(model.model)
    linears = _linears(model.model, blocks.prefix)
    tensors: dict[str, Tensor] = {}
    inputs: dict[tuple[Any, ...], tuple[str, Tensor]] = {}

    def on_linear(name: str, given: Tensor, made: Tensor) -> None:
        if f"out.{name}" in tensors:
            return
        # q, k and v read the same tensor: kept once, for as long as it lives at this address.
        key = (given.data_ptr(), tuple(given.shape))
        source, _ = inputs.setdefault(key, (name, given))
        if source == name:
            tensors[f"in.{name}"] = given.flatten(0, -2).clone()
        tensors[f"same.{name}"] = torch.tensor(list(source.encode()), dtype=torch.uint8)
        tensors[f"out.{name}"] = made.flatten(0, -2).clone()

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
        base: The base's place.
        passages: The same as those the base was probed on.

    Returns:
        The errors, suspects marked; None where the base was not probed.

    Raises:
        ModelError: The candidate's linears do not take the base's inputs at all.
    """
    ids = probe_ids(passages)
    path = _probe_path(base, ids)
    if not path.is_file():
        return None
    kept = read_tensors(path)
    blocks = find_blocks(model.model)
    linears = _linears(model.model, blocks.prefix)
    names = [name.removeprefix("out.") for name in kept if name.startswith("out.")]
    errors = []
    for name in sorted(set(names) & set(linears), key=names.index):
        source = bytes(kept[f"same.{name}"].tolist()).decode()
        linear = linears[name]
        given = kept[f"in.{source}"].to(model.device, model.model.dtype)
        made = linear(given).float().cpu()
        wanted = kept[f"out.{name}"].float()
        if made.shape != wanted.shape:
            continue
        block, _, kind = name.removeprefix(f"{blocks.prefix}.").partition(".")
        # Token by token of equal weight: a few tokens' outputs are hundreds of times as large.
        size = wanted.norm(dim=1, keepdim=True).clamp(min=1e-12)
        a, b = wanted / size, made / size
        errors.append(
            LinearError(
                name=name,
                block=int(block) if block.isdigit() else -1,
                kind=kind,
                error=float((a - b).norm() / a.norm()),
                gain=float((a * b).sum() / (a * a).sum()),
            )
        )
    if errors and median(one.gain for one in errors) < LEAST_GAIN:
        raise ModelError(
            "given the base's inputs, the candidate's linears give outputs that have nothing of "
            "the base's, as those of a model in another basis do (halfbyte rotate)"
        )
    states = _block_states(model, blocks.modules, ids)
    distances = []
    for index, state in enumerate(states):
        wanted = kept[f"block.{index}"].float()
        size = wanted.norm(dim=1).clamp(min=1e-12)
        distances.append(float(((state.float().cpu() - wanted).norm(dim=1) / size).mean()))
    return LayerErrors(
        linears=mark_suspects(errors),
        block_errors=tuple(distances),
        missing=len(set(names) - set(linears)),
    )


def _probe_path(cache: ModelCache, ids: Sequence[Sequence[int]]) -> Path:
    return cache.folder / f"layers-{digest(ids)}.safetensors"


def mark_suspects(linears: Sequence[LinearError]) -> tuple[LinearError, ...]:
    """Mark the linears whose gain or error stands out from those of their peers in other blocks.

    Args:
        linears: Measured.

    Returns:
        The same, in order, with reasons. Kinds of fewer than four members have no peers.
    """
    peers: dict[str, list[LinearError]] = {}
    for linear in linears:
        peers.setdefault(linear.kind, []).append(linear)
    return tuple(_with_reason(linear, peers[linear.kind]) for linear in linears)


def _with_reason(linear: LinearError, peers: Sequence[LinearError]) -> LinearError:
    if len(peers) < 4:
        return linear
    reasons = []
    middle, spread = _robust([p.gain for p in peers])
    off = linear.gain - middle
    beyond = off > SUSPECT_GAIN_ABOVE or off < -SUSPECT_GAIN_BELOW
    if beyond and abs(off) > SUSPECT_SIGMAS * spread:
        reasons.append(
            f"its outputs are {linear.gain:.3f} times the base's, its peers' {middle:.3f} times"
        )
    middle, spread = _robust([p.error for p in peers])
    if linear.error > SUSPECT_ERROR * middle + 1e-3 and (
        linear.error - middle > SUSPECT_SIGMAS * spread
    ):
        reasons.append(f"its error is {linear.error:.3f}, its peers' {middle:.3f}")
    return LinearError(
        name=linear.name,
        block=linear.block,
        kind=linear.kind,
        error=linear.error,
        gain=linear.gain,
        suspect="; ".join(reasons),
    )


def _robust(values: Sequence[float]) -> tuple[float, float]:
    """Give median and scaled median deviation, which one outlier does not move."""
    middle = median(values)
    return middle, 1.4826 * median(abs(v - middle) for v in values)


def _linears(model: nn.Module, prefix: str) -> Mapping[str, nn.Module]:
    """Linears within the blocks, quantized or not, by name."""
    return {
        name: module
        for name, module in quantizable_linears(model).items()
        if name.startswith(f"{prefix}.")
    }


@torch.inference_mode()
def _block_states(
    model: LocalModel, blocks: Sequence[nn.Module], ids: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Give [tokens, hidden] behind each block, the first token of each piece left out."""
    states: list[Tensor] = []

    def on_block(made: Any) -> None:
        hidden: Tensor = made if isinstance(made, Tensor) else made[0]
        # The first token's states are hundreds of times as large and say nothing of the rest.
        states.append(hidden[:, 1:].flatten(0, 1).clone())

    hooks = [block.register_forward_hook(lambda _, x, y: on_block(y)) for block in blocks]
    try:
        model.predict(ids)
    finally:
        for hook in hooks:
            hook.remove()
    return states

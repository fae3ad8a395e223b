"""A decode step on a GPU in few launches: linears, and three small programs between them.

::

    token -> embedding -> [add, norm -> q, k, v at once -> attend -> o
                           add, norm -> gate, up at once -> gate -> down] x n -> add, norm -> head

Transformers' own forward launches some forty operations a block, this nine. Linears may be of any
kind; those that :mod:`halfbyte.nn.fusion` joined are one product. The cache is in pages;
Transformers' static one, which its own forward fills with the prompt, is a single page.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from halfbyte.kernels.triton_decode import AttentionShape, add_norm, attend, gate
from halfbyte.kernels.triton_linear import DEVICES, find_triton_obstacle
from halfbyte.nn.decoder_parts import (
    NOISE_FACTOR,
    NORMS,
    bare_linear,
    base_of,
    epsilon_of,
    find_moving_angles,
    find_structure_mismatch,
)
from halfbyte.nn.linear import QuantLinear

DTYPES = (torch.float16, torch.bfloat16)

WARM_UPS = 2
"""Steps before recording: what is compiled or allocated at first use must not be recorded."""

MOST_DEVIATION = 0.05
"""Of the logits, as a share of their length; bf16 alone makes about 0.01."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    """What a block is made of; looked up once."""

    norms: tuple[Tensor, Tensor]
    epsilons: tuple[float, float]
    qkv: tuple[nn.Module, ...]
    out: nn.Module
    gate_up: tuple[nn.Module, ...]
    down: nn.Module
    head_norms: tuple[Tensor, Tensor] | None
    cache: tuple[Tensor, Tensor]
    shape: AttentionShape


class GpuStep:
    """One token each of some sequences, whose earlier ones are in the cache."""

    def __init__(
        self,
        model: PreTrainedModel,
        cache: Sequence[tuple[Tensor, Tensor]],
        capacity: int,
        *,
        bare: bool = False,
    ) -> None:
        """Gather the model's parts; its weights are used where they are.

        Args:
            model: One of which :func:`find_mismatch` said None.
            cache: Keys and values of each layer, [pages, key heads, page tokens, head width].
            capacity: Positions that a sequence can have.
            bare: Without the adapters that PEFT put around linears.
        """
        base = base_of(model)
        self._embeddings = model.get_input_embeddings()
        self._head = model.get_output_embeddings()
        self._blocks = [
            _make_block(layer, pair, bare) for layer, pair in zip(base.layers, cache, strict=True)
        ]
        self._last_norm, self._last_epsilon = base.norm.weight, epsilon_of(base.norm)
        keys = cache[0][0]
        positions = torch.arange(capacity, device=keys.device)[None]
        cosines, sines = base.rotary_emb(keys, position_ids=positions)
        self._rotary = cosines[0].contiguous(), sines[0].contiguous()

    def __call__(self, tokens: Tensor, positions: Tensor, tables: Tensor) -> Tensor:
        """Run the tokens; their keys and values are kept.

        Args:
            tokens: int64 [rows], their ids.
            positions: int64 [rows], their places; all before them are in the cache.
            tables: int32 [rows, most pages], the pages of their sequences.

        Returns:
            Logits [rows, vocabulary], in the model's type.
        """
        x, delta = self._embeddings(tokens), None
        for block in self._blocks:
            x, normed = add_norm(x, delta, block.norms[0], block.epsilons[0])
            qkv = multiply_at_once(block.qkv, normed)
            attended = attend(
                qkv, block.head_norms, self._rotary, positions, tables, block.cache, block.shape
            )
            x, normed = add_norm(x, block.out(attended), block.norms[1], block.epsilons[1])
            delta = block.down(gate(multiply_at_once(block.gate_up, normed)))
        _, normed = add_norm(x, delta, self._last_norm, self._last_epsilon)
        logits: Tensor = self._head(normed)
        return logits


@torch.inference_mode()
def record(
    compute: Callable[[], Tensor],
    device: torch.device,
    after_each: Callable[[], None] | None = None,
) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Record what a computation launches.

    Args:
        compute: Reads and writes tensors that stay where they are.
        device: Where these are.
        after_each: Called after each run before the recording.

    Returns:
        The graph, and the tensor that a replay fills.
    """
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    # The stream's device is torch's current one in it.
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            compute()
            if after_each is not None:
                after_each()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            result = compute()
    torch.cuda.current_stream(device).wait_stream(stream)
    return graph, result


def multiply_at_once(linears: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Give the products of linears with the same input, one behind the other.

    Args:
        linears: Fused ones are one product.
        x: [rows, in].

    Returns:
        [rows, sum of out].
    """
    first = linears[0]
    fusion = first.fusion if isinstance(first, QuantLinear) else None
    if fusion is not None and fusion.members == tuple(linears):
        product: Tensor = fusion.whole(x)
        return product
    return torch.cat([linear(x) for linear in linears], dim=-1)


def find_mismatch(model: PreTrainedModel) -> str | None:
    """Say why a model's steps cannot be run this way; None where they can.

    Args:
        model: Loaded and prepared. That it computes what its parts suggest is not looked at.

    Returns:
        The reason.
    """
    reason = find_triton_obstacle() or find_structure_mismatch(model)
    if reason:
        return reason
    base = base_of(model)
    embeddings = model.get_input_embeddings().weight
    dtype = embeddings.dtype
    if embeddings.device.type not in DEVICES:
        return f"it is on {embeddings.device.type}"
    if dtype not in DTYPES:
        return f"it computes in {dtype}"
    for layer in base.layers:
        norms = [getattr(layer, name).weight for name in NORMS]
        if any(norm.dtype != dtype for norm in (*norms, base.norm.weight)):
            return "its norms are not in the type of its embeddings"
        attention = layer.self_attn
        head_norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        sizes = {None if norm is None else tuple(norm.weight.shape) for norm in head_norms}
        if sizes not in ({None}, {(attention.head_dim,)}):
            return "its norms of queries and keys are not over one head each"
        widths = {bare_linear(getattr(attention, f"{name}_proj")).out_features for name in "kv"}
        if len(widths) != 1:
            return "its keys and values differ in width"
    return find_moving_angles(model)


def find_deviation(found: Tensor, expected: Tensor, again: Tensor) -> str | None:
    """Say that logits are too far from the model's own.

    Args:
        found: [vocabulary], by the step.
        expected: [vocabulary], by the model's own forward.
        again: [vocabulary], by the same in other pieces, which shows what rounding does.

    Returns:
        How far; None where it is near enough.
    """
    deviation, noise = (
        float((one.float() - expected.float()).norm() / expected.float().norm())
        for one in (found, again)
    )
    allowed = max(MOST_DEVIATION, NOISE_FACTOR * noise)
    if deviation <= allowed:
        return None
    return f"logits deviate by {deviation:.3f} of their length, allowed are {allowed:.3f}"


def _make_block(layer: Any, cache: tuple[Tensor, Tensor], bare: bool) -> _Block:
    attention, mlp = layer.self_attn, layer.mlp
    take = bare_linear if bare else _as_it_is
    # Both or none: find_mismatch has seen them.
    head_norms: list[Any] = [getattr(attention, f"{name}_norm", None) for name in "qk"]
    has_norms = head_norms[0] is not None
    width = attention.head_dim
    norms = [getattr(layer, name) for name in NORMS]
    return _Block(
        norms=(norms[0].weight, norms[1].weight),
        epsilons=(epsilon_of(norms[0]), epsilon_of(norms[1])),
        qkv=(take(attention.q_proj), take(attention.k_proj), take(attention.v_proj)),
        out=take(attention.o_proj),
        gate_up=(take(mlp.gate_proj), take(mlp.up_proj)),
        down=take(mlp.down_proj),
        head_norms=(head_norms[0].weight, head_norms[1].weight) if has_norms else None,
        cache=cache,
        shape=AttentionShape(
            heads=bare_linear(attention.q_proj).out_features // width,
            key_heads=bare_linear(attention.k_proj).out_features // width,
            width=width,
            scale=float(attention.scaling),
            epsilon=epsilon_of(head_norms[0]) if has_norms else 0.0,
        ),
    )


def _as_it_is(linear: Any) -> Any:
    return linear

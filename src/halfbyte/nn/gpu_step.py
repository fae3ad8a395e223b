"""A decode step on a GPU in few launches: the linears, and three Triton kernels between them.

::

    token -> embedding -> [add, norm -> q, k, v fused -> attend -> o
                           add, norm -> gate, up fused -> gate -> down] x n -> add, norm -> head

Transformers' forward launches some forty operations per block, this step nine. Linears may be of
any kind; those that :mod:`halfbyte.nn.fusion` fused are one product. A mixture of experts in place
of the MLP is run as the model's own module, so its router and shared experts may be of any kind;
:mod:`halfbyte.nn.grouped_experts` runs its experts together. The KV cache is paged; Transformers'
static cache, which its forward fills with the prompt, is used as a single page.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from halfbyte.errors import ModelError
from halfbyte.kernels.triton_decode import AttentionShape, add_norm, attend, gate
from halfbyte.kernels.triton_linear import DEVICES, find_triton_obstacle
from halfbyte.model.experts import UnfusedExperts
from halfbyte.nn.decoder_parts import (
    NOISE_FACTOR,
    NORMS,
    find_rotary_mismatch,
    find_structure_mismatch,
    get_decoder,
    get_epsilon,
    unwrap,
)
from halfbyte.nn.grouped_experts import find_grouping_obstacle
from halfbyte.nn.linear import QuantLinear

DTYPES = (torch.float16, torch.bfloat16)

NUM_WARM_UPS = 2
"""Steps before graph capture, as compilation and allocation at first use cannot be captured."""

MAX_DEVIATION = 0.05
"""Maximum relative deviation (L2) of the logits; bf16 rounding alone causes about 0.01."""


class NotCapturable(ModelError):
    """A computation waits for the GPU, which a CUDA graph cannot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    """The modules and weights of a block, looked up once."""

    norms: tuple[Tensor, Tensor]
    epsilons: tuple[float, float]
    qkv: tuple[nn.Module, ...]
    out: nn.Module
    mlp: Callable[[Tensor], Tensor]
    """[rows, hidden] -> [rows, hidden]."""
    head_norms: tuple[Tensor, Tensor] | None
    cache: tuple[Tensor, Tensor]
    shape: AttentionShape


class GpuStep:
    """A decode step for a batch of sequences, one token each, over a paged KV cache."""

    def __init__(
        self,
        model: PreTrainedModel,
        cache: Sequence[tuple[Tensor, Tensor]],
        capacity: int,
        *,
        bare: bool = False,
    ) -> None:
        """Collect the model's parts; its weights are used in place.

        Args:
            model: A model for which :func:`find_mismatch` returns None.
            cache: Keys and values of each layer, [pages, key heads, page tokens, head dimension].
            capacity: Maximum number of positions of a sequence.
            bare: Leave out the adapters that PEFT wrapped around modules.
        """
        base = get_decoder(model)
        take = unwrap if bare else _identity
        self._embeddings = take(model.get_input_embeddings())
        self._head = take(model.get_output_embeddings())
        self._blocks = [
            _make_block(layer, pair, take) for layer, pair in zip(base.layers, cache, strict=True)
        ]
        self._last_norm, self._last_epsilon = base.norm.weight, get_epsilon(base.norm)
        keys = cache[0][0]
        positions = torch.arange(capacity, device=keys.device)[None]
        cosines, sines = base.rotary_emb(keys, position_ids=positions)
        self._rotary = cosines[0].contiguous(), sines[0].contiguous()

    def __call__(self, tokens: Tensor, positions: Tensor, tables: Tensor) -> Tensor:
        """Run one token per sequence and write its keys and values to the cache.

        Args:
            tokens: int64 [rows], token ids.
            positions: int64 [rows], their positions; all earlier ones are in the cache.
            tables: int32 [rows, max pages], page tables of the sequences.

        Returns:
            Logits [rows, vocabulary], in the model's dtype.
        """
        x, delta = self._embeddings(tokens), None
        for block in self._blocks:
            x, normed = add_norm(x, delta, block.norms[0], block.epsilons[0])
            qkv = multiply_together(block.qkv, normed)
            attended = attend(
                qkv, block.head_norms, self._rotary, positions, tables, block.cache, block.shape
            )
            x, normed = add_norm(x, block.out(attended), block.norms[1], block.epsilons[1])
            delta = block.mlp(normed)
        _, normed = add_norm(x, delta, self._last_norm, self._last_epsilon)
        logits: Tensor = self._head(normed)
        return logits


@torch.inference_mode()
def record(
    compute: Callable[[], Tensor],
    device: torch.device,
    after_each: Callable[[], None] | None = None,
) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Capture a computation as a CUDA graph.

    Args:
        compute: Reads and writes tensors at fixed addresses.
        device: Device of these tensors.
        after_each: Called after each warm-up run.

    Returns:
        The graph, and the tensor that a replay fills.

    Raises:
        NotCapturable: The computation waits for the GPU. Capturing it would fail too, but leave
            torch in the middle of a capture.
    """
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    # Within the block, the device of the stream is torch's current device.
    with torch.cuda.stream(stream):
        for number in range(NUM_WARM_UPS):
            with _forbid_waiting() if number else nullcontext():
                compute()
            if after_each is not None:
                after_each()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            result = compute()
    torch.cuda.current_stream(device).wait_stream(stream)
    return graph, result


@contextmanager
def _forbid_waiting() -> Iterator[None]:
    """Let torch raise an error where it would wait for the GPU."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        raise NotCapturable("the CPU waits for results of the GPU within a step") from error
    finally:
        torch.cuda.set_sync_debug_mode(before)


def multiply_together(linears: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Return the concatenated products of linears that share an input.

    Args:
        linears: Fused linears are a single product.
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
    """Return why a model cannot run these decode steps.

    Args:
        model: Loaded, with its kernels selected. Its results are not compared here.

    Returns:
        The reason; None if the model has all parts.
    """
    reason = find_triton_obstacle() or find_structure_mismatch(model, find_mixture_mismatch)
    if reason:
        return reason
    base = get_decoder(model)
    embeddings = model.get_input_embeddings().weight
    dtype = embeddings.dtype
    if embeddings.device.type not in DEVICES:
        return f"it is on {embeddings.device.type}"
    if dtype not in DTYPES:
        return f"it computes in {dtype}"
    for layer in base.layers:
        norms = [getattr(layer, name).weight for name in NORMS]
        if any(norm.dtype != dtype for norm in (*norms, base.norm.weight)):
            return "its norms and embeddings differ in dtype"
        attention = layer.self_attn
        head_norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        sizes = {None if norm is None else tuple(norm.weight.shape) for norm in head_norms}
        if sizes not in ({None}, {(attention.head_dim,)}):
            return "its query and key norms are not per head"
        widths = {unwrap(getattr(attention, f"{name}_proj")).out_features for name in "kv"}
        if len(widths) != 1:
            return "its keys and values differ in head dimension"
    return find_rotary_mismatch(model)


def find_mixture_mismatch(layer: Any) -> str | None:
    """Return why a block's mixture of experts cannot be part of the step; None if it can."""
    if any(hasattr(module, "base_layer") for module in layer.mlp.modules()):
        return "its mixture of experts has adapters"
    reason = find_grouping_obstacle(layer.mlp.experts)
    return reason and f"its experts run one after the other: {reason}"


def find_deviation(found: Tensor, expected: Tensor, again: Tensor) -> str | None:
    """Check a step's logits against those of the model's forward.

    Args:
        found: [vocabulary], from the step.
        expected: [vocabulary], from the model's forward.
        again: [vocabulary], from the model's forward in other chunks, which shows rounding noise.

    Returns:
        How far the logits deviate; None if within the allowed deviation.
    """
    deviation, noise = (
        float((one.float() - expected.float()).norm() / expected.float().norm())
        for one in (found, again)
    )
    allowed = max(MAX_DEVIATION, NOISE_FACTOR * noise)
    if deviation <= allowed:
        return None
    return f"logits have a relative deviation of {deviation:.3f}, allowed are {allowed:.3f}"


def _make_block(layer: Any, cache: tuple[Tensor, Tensor], take: Callable[[Any], Any]) -> _Block:
    attention = layer.self_attn
    # Both or none, as find_mismatch has checked.
    head_norms: list[Any] = [getattr(attention, f"{name}_norm", None) for name in "qk"]
    has_norms = head_norms[0] is not None
    width = attention.head_dim
    norms = [getattr(layer, name) for name in NORMS]
    return _Block(
        norms=(norms[0].weight, norms[1].weight),
        epsilons=(get_epsilon(norms[0]), get_epsilon(norms[1])),
        qkv=(take(attention.q_proj), take(attention.k_proj), take(attention.v_proj)),
        out=take(attention.o_proj),
        mlp=_make_mlp(layer.mlp, take),
        head_norms=(head_norms[0].weight, head_norms[1].weight) if has_norms else None,
        cache=cache,
        shape=AttentionShape(
            heads=unwrap(attention.q_proj).out_features // width,
            key_heads=unwrap(attention.k_proj).out_features // width,
            width=width,
            scale=float(attention.scaling),
            epsilon=get_epsilon(head_norms[0]) if has_norms else 0.0,
        ),
    )


def _make_mlp(mlp: Any, take: Callable[[Any], Any]) -> Callable[[Tensor], Tensor]:
    if isinstance(getattr(mlp, "experts", None), UnfusedExperts):
        return functools.partial(_run_mixture, mlp)
    gate_up, down = (take(mlp.gate_proj), take(mlp.up_proj)), take(mlp.down_proj)
    return lambda x: down(gate(multiply_together(gate_up, x)))


def _run_mixture(mlp: nn.Module, x: Tensor) -> Tensor:
    # Each row is a sequence of one token. Some mixtures also return their router's scores.
    result = mlp(x[:, None])
    found: Tensor = result if isinstance(result, Tensor) else result[0]
    return found[:, 0]


def _identity(linear: Any) -> Any:
    return linear

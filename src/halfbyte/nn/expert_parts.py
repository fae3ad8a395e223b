"""The mixture of experts of a block, as parts for the compiled decoder.

As in :mod:`halfbyte.nn.decoder_parts`, parts are recognized by structure. Supported are mixtures
with a softmax over the router's logits, the top k experts, no biases and no shared expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from halfbyte.model.experts import UnfusedExperts


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertParts:
    """A mixture of experts: its router and linears."""

    router: Tensor
    """[experts, hidden]."""
    per_token: int
    """Experts that run per token."""
    normalize: bool
    """Whether the weights of these experts are normalized to a sum of one."""
    linears: Mapping[str, Any]
    """Gate, up and down projection of expert 0, 1, …, by name."""


def has_experts(layer: Any) -> bool:
    """Return whether a block has separate linears per expert in place of an MLP."""
    mlp = getattr(layer, "mlp", None)
    return isinstance(getattr(mlp, "experts", None), UnfusedExperts)


def find_experts_mismatch(layer: Any) -> str | None:
    """Return how a block's mixture of experts differs from the supported one.

    Args:
        layer: A block for which :func:`has_experts` is true.

    Returns:
        The first difference; None if there is none.
    """
    others = [name for name, _ in layer.mlp.named_children() if name not in ("gate", "experts")]
    if others:
        return f"a block has {others[0]} beside its experts"
    router = getattr(layer.mlp, "gate", None)
    if router is None or not hasattr(router, "top_k"):
        return "the router of its experts is of an unknown kind"
    tensors = [name for name, _ in (*router.named_parameters(), *router.named_buffers())]
    if tensors != ["weight"]:
        return f"the router of its experts has {', '.join(tensors)}, not just a weight"
    if not layer.mlp.experts.has_gate:
        return "its experts have no gate"
    if any(linear.bias is not None for linear in expert_parts(layer).linears.values()):
        return "its experts have biases"
    return None


def expert_parts(layer: Any) -> ExpertParts:
    """Collect the parts of a block's mixture of experts.

    Args:
        layer: A block for which :func:`has_experts` is true.

    Returns:
        Its router and linears.
    """
    experts: UnfusedExperts = layer.mlp.experts
    router = layer.mlp.gate
    names = (experts.names.gate, experts.names.up, experts.names.down)
    return ExpertParts(
        router=router.weight,
        per_token=int(router.top_k),
        normalize=bool(getattr(router, "norm_topk_prob", True)),
        linears={
            f"experts.{number}.{name}": experts.projection(number, name)
            for number in range(experts.num_experts)
            for name in names
        },
    )

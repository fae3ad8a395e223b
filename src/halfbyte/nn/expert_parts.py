"""The experts of a block, as parts of a faster decode step: a router and three linears per expert.

As in :mod:`halfbyte.nn.decoder_parts`, parts are recognised by structure. Supported is what most
families compute: softmax over the router's logits, the top k experts, no bias, no shared expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from halfbyte.model.experts import UnfusedExperts


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertParts:
    """What a block with experts has in place of an MLP."""

    router: Tensor
    """[experts, hidden]."""
    per_token: int
    """Experts that compute a token."""
    normalise: bool
    """Whether the weights of those sum to one."""
    linears: Mapping[str, Any]
    """Gate, up and down of each expert in turn, by name."""


def has_experts(layer: Any) -> bool:
    """Whether a block has separate experts in place of an MLP."""
    mlp = getattr(layer, "mlp", None)
    return isinstance(getattr(mlp, "experts", None), UnfusedExperts)


def find_experts_mismatch(layer: Any) -> str | None:
    """Name what the experts of a block have besides, or lack.

    Args:
        layer: A block of which :func:`has_experts` is true.

    Returns:
        The first difference; None: :func:`expert_parts` takes them.
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
    """Gather the parts of a block's experts.

    Args:
        layer: A block of which :func:`has_experts` is true.

    Returns:
        Its router and linears.
    """
    experts: UnfusedExperts = layer.mlp.experts
    router = layer.mlp.gate
    names = (experts.names.gate, experts.names.up, experts.names.down)
    return ExpertParts(
        router=router.weight,
        per_token=int(router.top_k),
        normalise=bool(getattr(router, "norm_topk_prob", True)),
        linears={
            f"experts.{number}.{name}": experts.projection(number, name)
            for number in range(experts.num_experts)
            for name in names
        },
    )

"""Fuse linears that share an input into one product: q, k and v; gate and up.

::

    q_proj, k_proj, v_proj ──fuse_linears──> one packed weight [q + k + v, in]; modules stay
    q_proj(x) computes all three products ──> k_proj(x) and v_proj(x) return their parts

Each module still behaves as a separate linear: ``state_dict`` returns its stored tensors and
``weight`` its dequantized weight. A linear that is called with another input multiplies again, so a
model that does not share inputs is slower but still correct.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.nn.linear import PACKED, QuantLinear

FUSED_KERNELS = ("cuda", "triton")
"""Kernels that are faster with few large products than with many small ones."""

NAMES = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Children of one module that models in Transformers call with the same tensor."""


@dataclass(frozen=True, slots=True)
class _Pending:
    """A computed product with parts that not all members have taken yet."""

    x: Tensor
    version: int | None
    with_gradient: bool
    parts: tuple[Tensor, ...]
    remaining: frozenset[int]


class Fusion:
    """Several linears with one fused weight."""

    def __init__(self, members: Sequence[QuantLinear]) -> None:
        """Fuse the weights of linears in place.

        Args:
            members: Linears for which :func:`find_fusion_obstacle` returns None.
        """
        selection = members[0].selection
        assert selection is not None
        for member in members:
            member.restore()
        self.members = tuple(members)
        self.sizes = tuple(member.out_features for member in members)
        self.whole = _join(members)
        self.whole.prepare(kernel=selection.kernel.name)
        self._pending: _Pending | None = None
        for member, scales, zeros in zip(
            members, self._split(self.whole.scales), self._split_zeros(), strict=True
        ):
            member.join(self, scales, zeros)
            member.selection = selection
        # Registered on one member, so that code that counts a model's tensors sees them once.
        names = [PACKED.format(index) for index in range(len(self.whole.weight_names))]
        for name, packed in zip(names, self.whole.weight_names, strict=True):
            members[0].register_buffer(name, getattr(self.whole, packed), persistent=False)

    def multiply(self, member: QuantLinear, x: Tensor) -> Tensor:
        """Return a member's part of the product.

        Args:
            member: One of the members.
            x: [..., in].

        Returns:
            [..., out of the member].
        """
        index = self._index(member)
        pending = self._pending
        if pending is None or index not in pending.remaining or not _is_of(pending, x):
            parts = self.whole(x).split(self.sizes, dim=-1)
            indices = frozenset(range(len(self.members)))
            pending = _Pending(x, _version(x), torch.is_grad_enabled(), parts, indices)
        remaining = pending.remaining - {index}
        # A single assignment, so that other threads see a consistent state.
        self._pending = replace(pending, remaining=remaining) if remaining else None
        # Models may view the result as only a contiguous tensor allows; one row is not copied.
        return pending.parts[index].contiguous()

    def dequantize(self, member: QuantLinear, dtype: torch.dtype | None) -> Tensor:
        """Return a member's dequantized weight [out, in]."""
        return self._part(member, self.whole.dequantize(dtype).t()).t().contiguous()

    def restore_qweight(self, member: QuantLinear) -> Tensor:
        """Return a member's ``qweight`` as stored."""
        return self._part(member, self.whole.stored_qweight()).contiguous()

    def undo(self) -> None:
        """Undo the fusion: give every member its own tensors, as stored."""
        words = self._split(self.whole.stored_qweight())
        self._pending = None
        for member, qweight in zip(self.members, words, strict=True):
            member.leave(qweight.contiguous())

    def _split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return torch.split(tensor, list(self.sizes), dim=1)

    def _split_zeros(self) -> tuple[Tensor, ...]:
        words = [size * self.whole.spec.bits // 32 for size in self.sizes]
        return torch.split(self.whole.qzeros, words, dim=1)

    def _part(self, member: QuantLinear, tensor: Tensor) -> Tensor:
        return self._split(tensor)[self._index(member)]

    def _index(self, member: QuantLinear) -> int:
        return next(i for i, other in enumerate(self.members) if other is member)


def fuse_linears(model: nn.Module) -> int:
    """Fuse the linears of a model that share an input, if their kernel benefits from it.

    Args:
        model: A model with its kernels selected; changed in place.

    Returns:
        The number of fused groups.
    """
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        # In cross-attention q has a different input than k and v.
        return 0
    groups = list(_find_groups(model))
    for group in groups:
        Fusion(group)
    return len(groups)


def find_fusion_obstacle(members: Sequence[QuantLinear]) -> str | None:
    """Return why linears cannot be fused.

    Args:
        members: Two or more linears.

    Returns:
        The reason; None if they can be fused.
    """
    first = members[0]
    if any(member.selection is None for member in members):
        return "not all are prepared"
    if any(tensor.is_meta for member in members for tensor in member.buffers()):
        return "not all are in memory"
    if any(member.offsets is not None for member in members):
        return "one has offsets"
    if any(member.fusion is not None for member in members):
        return "one is already fused"
    properties: dict[str, set[Any]] = {
        "specs": {replace(member.spec, out_features=1) for member in members},
        "kernels": {member.selection.kernel.name for member in members if member.selection},
        "devices": {member.scales.device for member in members},
        "scales' dtypes": {member.scales.dtype for member in members},
        "biases": {None if member.bias is None else member.bias.dtype for member in members},
    }
    for name, values in properties.items():
        if len(values) > 1:
            return f"their {name} differ"
    if any(member.out_features * member.spec.bits % 32 for member in members):
        return "their zeros do not fill whole words"
    if first.spec.act_order:
        orders = [member.g_idx for member in members]
        if not all(o is not None and torch.equal(o, orders[0]) for o in orders):  # type: ignore[arg-type]
            return "their inputs are in different orders"
    return None


def _find_groups(model: nn.Module) -> Iterator[list[QuantLinear]]:
    for module in model.modules():
        for names in NAMES:
            found = [getattr(module, name, None) for name in names]
            members = [child for child in found if isinstance(child, QuantLinear)]
            if len(members) < len(names) or find_fusion_obstacle(members) is not None:
                continue
            selection = members[0].selection
            if selection is not None and selection.kernel.name in FUSED_KERNELS:
                yield members


def _join(members: Sequence[QuantLinear]) -> QuantLinear:
    """Concatenate the stored tensors of several linears to one linear."""
    first = members[0]
    spec = replace(first.spec, out_features=sum(member.out_features for member in members))
    dtypes = {"scales": first.scales.dtype}
    for name in ("g_idx", "bias"):
        tensor = getattr(first, name)
        if tensor is not None:
            dtypes[name] = tensor.dtype
    whole = QuantLinear(spec, dtypes, device=first.scales.device)
    for name in ("qweight", "qzeros", "scales"):
        setattr(whole, name, torch.cat([getattr(member, name) for member in members], dim=1))
    if first.g_idx is not None:
        whole.g_idx = first.g_idx
    if first.bias is not None:
        whole.bias = torch.cat([member.bias for member in members if member.bias is not None])
    whole.train(first.training)
    return whole


def _is_of(pending: _Pending, x: Tensor) -> bool:
    """Whether a pending product was computed from the current value of x."""
    if pending.x is not x or pending.with_gradient != torch.is_grad_enabled():
        return False
    return pending.version == _version(x)


def _version(x: Tensor) -> int | None:
    """Return torch's count of in-place writes to x; None if torch does not count them."""
    if torch.compiler.is_compiling() or x.is_inference():
        return None
    return x._version

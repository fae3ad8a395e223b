"""Linears that read the same input, multiplied at once: q, k and v; gate and up.

::

    q_proj, k_proj, v_proj ──fuse_linears──> one packed weight [q + k + v, in]; all stay in place
    q_proj(x) multiplies for all three ──> k_proj(x) and v_proj(x) take their parts

To all that looks at the model each is still a linear of its own: ``state_dict`` gives its stored
tensors, ``weight`` its numbers. A linear that is called with another input multiplies again, so a
model that does not share inputs is slower, never wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.nn.linear import PACKED, QuantLinear

FUSED_KERNELS = ("cuda", "triton")
"""Kernels that are faster on few large products than on many small ones."""

NAMES = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Children of one module that Transformers' models call with the same tensor."""


@dataclass(frozen=True, slots=True)
class _Kept:
    """A product whose parts have not all been taken."""

    x: Tensor
    version: int | None
    with_gradient: bool
    parts: tuple[Tensor, ...]
    left: frozenset[int]


class Fusion:
    """Several linears as one."""

    def __init__(self, members: Sequence[QuantLinear]) -> None:
        """Join the weights of linears; they are changed in place.

        Args:
            members: :func:`find_difference` has nothing against them.
        """
        selection = members[0].selection
        assert selection is not None
        for member in members:
            member.restore()
        self.members = tuple(members)
        self.sizes = tuple(member.out_features for member in members)
        self.whole = _join(members)
        self.whole.prepare(kernel=selection.kernel.name)
        self._kept: _Kept | None = None
        for member, scales, zeros in zip(
            members, self._split(self.whole.scales), self._split_zeros(), strict=True
        ):
            member.join(self, scales, zeros)
            member.selection = selection
        # Registered once, for all that counts or looks for a model's tensors.
        names = [PACKED.format(index) for index in range(len(self.whole.weight_names))]
        for name, packed in zip(names, self.whole.weight_names, strict=True):
            members[0].register_buffer(name, getattr(self.whole, packed), persistent=False)

    def multiply(self, member: QuantLinear, x: Tensor) -> Tensor:
        """Give a member's part of the product.

        Args:
            member: One of the members.
            x: [..., in].

        Returns:
            [..., out of the member].
        """
        index = next(i for i, other in enumerate(self.members) if other is member)
        kept = self._kept
        if kept is None or index not in kept.left or not _is_of(kept, x):
            everyone = frozenset(range(len(self.members)))
            parts = self.whole(x).split(self.sizes, dim=-1)
            kept = _Kept(x, _version(x), torch.is_grad_enabled(), parts, everyone)
        left = kept.left - {index}
        # In one assignment: another thread sees all of it or nothing.
        self._kept = replace(kept, left=left) if left else None
        # Models take views that a linear's own result allows; of a single row this copies nothing.
        return kept.parts[index].contiguous()

    def dequantize(self, member: QuantLinear, dtype: torch.dtype | None) -> Tensor:
        """Give a member's weight [out, in] as numbers."""
        return self._part(member, self.whole.dequantize(dtype).t()).t().contiguous()

    def restore_qweight(self, member: QuantLinear) -> Tensor:
        """Give a member's ``qweight`` as stored."""
        return self._part(member, self.whole.stored_qweight()).contiguous()

    def undo(self) -> None:
        """Give every member its own tensors, as stored."""
        words = self._split(self.whole.stored_qweight())
        self._kept = None
        for member, qweight in zip(self.members, words, strict=True):
            member.leave(qweight.contiguous())

    def _split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return torch.split(tensor, list(self.sizes), dim=1)

    def _split_zeros(self) -> tuple[Tensor, ...]:
        words = [size * self.whole.spec.bits // 32 for size in self.sizes]
        return torch.split(self.whole.qzeros, words, dim=1)

    def _part(self, member: QuantLinear, tensor: Tensor) -> Tensor:
        index = next(i for i, other in enumerate(self.members) if other is member)
        return self._split(tensor)[index]


def fuse_linears(model: nn.Module) -> int:
    """Fuse the linears of a model that share an input, where their kernel gains by it.

    Args:
        model: With its kernels chosen; changed in place.

    Returns:
        How many groups were fused.
    """
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        # Their cross attention takes q from one input, k and v from another.
        return 0
    groups = list(_find_groups(model))
    for group in groups:
        Fusion(group)
    return len(groups)


def find_difference(members: Sequence[QuantLinear]) -> str | None:
    """Say why linears cannot be one.

    Args:
        members: Two or more.

    Returns:
        What differs between them, or what none of them has; None where nothing is in the way.
    """
    first = members[0]
    if any(member.selection is None for member in members):
        return "not all are prepared"
    if any(tensor.is_meta for member in members for tensor in member.buffers()):
        return "not all are in memory"
    if any(member.offsets is not None for member in members):
        return "one has offsets of its own"
    if any(member.fusion is not None for member in members):
        return "one is part of another group"
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
            if len(members) < len(names) or find_difference(members) is not None:
                continue
            selection = members[0].selection
            if selection is not None and selection.kernel.name in FUSED_KERNELS:
                yield members


def _join(members: Sequence[QuantLinear]) -> QuantLinear:
    """One linear with the stored tensors of several beside each other."""
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


def _is_of(kept: _Kept, x: Tensor) -> bool:
    if kept.x is not x or kept.with_gradient != torch.is_grad_enabled():
        return False
    return kept.version == _version(x)


def _version(x: Tensor) -> int | None:
    """How often x was written to, where torch counts that."""
    if torch.compiler.is_compiling() or x.is_inference():
        return None
    return x._version

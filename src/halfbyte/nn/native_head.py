"""The output head on a CPU, for few hidden states at a time: as stored, or rounded to 8 or 4 bits.

In a small model the head is half of the weights read per token: 56 of 113 MB in SmolLM2-135M at
4 bits.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.errors import ConfigError
from halfbyte.kernels.contract import LinearSpec, Operands
from halfbyte.kernels.cpu_native import CpuNative
from halfbyte.kernels.native_library import DTYPES, check_status, open_library
from halfbyte.nn.linear import QuantLinear
from halfbyte.packing import pack_weight
from halfbyte.run_config import HEAD_BITS

GROUP_SIZES = (64, 32, 16, 8)
"""Candidates for a rounded head: the first that divides the hidden size is used."""


class NativeHead:
    """Computes logits [..., vocabulary] from hidden states."""

    def __init__(self, head: nn.Module, bits: int = 16) -> None:
        """Use a head in place, or round a copy of it.

        Args:
            head: The model's output embeddings.
            bits: One of HEAD_BITS.

        Raises:
            ConfigError: The bits are not supported.
        """
        if bits not in HEAD_BITS:
            raise ConfigError(f"Cannot round the head to {bits} bits; allowed: {HEAD_BITS}.")
        self.head = head
        self.bits = bits
        bias = getattr(head, "bias", None)
        self._weight: Tensor | None = None
        self._kernel = CpuNative()
        self._rounded: tuple[Operands, LinearSpec] | None = None
        if isinstance(head, QuantLinear):
            chosen = head.selection
            plain = bias is None and head.offsets is None
            if plain and chosen is not None and isinstance(chosen.kernel, CpuNative):
                self._kernel = chosen.kernel
                # In float32: bfloat16 results depend on the number of rows.
                self._rounded = head.operands, replace(head.spec, dtype=torch.float32)
            return
        weight = getattr(head, "weight", None)
        if weight is None or bias is not None:
            return
        if bits < 16:
            self._rounded = round_weight(weight.detach(), bits)
        elif weight.dtype in (torch.float32, torch.bfloat16) and weight.is_contiguous():
            self._weight = weight.detach()

    @property
    def read_bytes(self) -> int:
        """Bytes of weights that one call reads."""
        if self._rounded is not None:
            return self._rounded[0].weight[0].nbytes
        tensors = [*self.head.parameters(), *self.head.buffers()]
        return sum(tensor.nbytes for tensor in tensors)

    def __call__(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Compute the logits.

        Args:
            hidden: float32 [..., hidden]; with fewer than ROWS_LIMIT rows, the result of a row does
                not depend on the others.
            out: float32 [..., vocabulary] to write the logits to, instead of a new tensor.

        Returns:
            float32 [..., vocabulary].
        """
        if self._rounded is not None:
            operands, spec = self._rounded
            return _copy_into(self._kernel.apply(hidden, operands, None, spec), out)
        if self._weight is None:
            dtype: Any = getattr(self.head, "spec", None) or self.head.weight
            logits: Tensor = self.head(hidden.to(dtype.dtype))
            return _copy_into(logits.float(), out)
        functions = open_library().functions
        assert functions is not None
        vocabulary, columns = self._weight.shape
        hidden = hidden.contiguous()
        logits = hidden.new_empty(*hidden.shape[:-1], vocabulary) if out is None else out
        status = functions.hb_dense(
            self._weight.data_ptr(),
            DTYPES[self._weight.dtype],
            hidden.data_ptr(),
            hidden.numel() // columns,
            columns,
            vocabulary,
            logits.data_ptr(),
            torch.get_num_threads(),
        )
        check_status(status, f"Cannot run a head {columns} -> {vocabulary}")
        return logits


def _copy_into(logits: Tensor, out: Tensor | None) -> Tensor:
    return logits if out is None else out.copy_(logits)


def round_weight(weight: Tensor, bits: int) -> tuple[Operands, LinearSpec]:
    """Quantize a dense weight by round-to-nearest on a symmetric grid, packed for the CPU kernel.

    Args:
        weight: [out, in].
        bits: 8 or 4.

    Returns:
        The operands and the spec, which computes in float32.

    Raises:
        ConfigError: No group size divides the hidden size.
    """
    out_features, in_features = weight.shape
    group_size = next((size for size in GROUP_SIZES if in_features % size == 0), None)
    if group_size is None:
        raise ConfigError(
            f"Cannot round a head of width {in_features} to {bits} bits: the width is not a "
            f"multiple of {min(GROUP_SIZES)}. Leave the head at 16 bits."
        )
    middle = 2 ** (bits - 1)
    grouped = weight.float().view(out_features, -1, group_size)
    scales = (grouped.abs().amax(-1) / (middle - 1)).clamp(min=1e-8).bfloat16()
    codes = (
        torch.round(grouped / scales[..., None].float()).clamp_(-middle, middle - 1).add_(middle)
    )
    spec = LinearSpec(
        bits=bits,
        group_size=group_size,
        in_features=in_features,
        out_features=out_features,
        symmetric=True,
        act_order=False,
        zero_offset=0,
        dtype=torch.float32,
        device_type="cpu",
    )
    stored = Operands(
        weight=(pack_weight(codes.view(out_features, in_features).to(torch.uint8), bits),),
        qzeros=torch.empty(0, dtype=torch.int32),
        scales=scales.t().contiguous(),
        g_idx=None,
    )
    packed = CpuNative().prepare(stored, spec)
    empty = torch.empty(0)
    return Operands(weight=packed, qzeros=empty, scales=empty, g_idx=None), spec

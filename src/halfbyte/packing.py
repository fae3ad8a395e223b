"""Codes <-> int32 words. The only file that knows bit order.

A word stream is plain little-endian: code ``j`` of a run occupies bits ``[bits*j, bits*j + bits)``
counted from the lowest bit of the first word, so 32 codes fill exactly ``bits`` words. For 2, 4
and 8 bits a word holds whole codes; for 3 bits two codes of every 32 straddle a word boundary.

On disk weights run along ``in`` (:func:`pack_weight`), zeros along ``out`` (:func:`pack_zeros`).

Source:
    AutoGPTQ and GPTQModel ``pack_original``; one routine covers 2, 3, 4 and 8 bits because all of
    them are the same little-endian bit stream.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.errors import CheckpointError

CODES_PER_RUN = 32
"""Codes that fill a whole number of words at every bit width."""


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes along the first axis, 32 codes into ``bits`` words.

    Args:
        codes: Integers 0..2**bits-1, shape [n, columns], n a multiple of 32; any integer dtype.
        bits: 2, 3, 4 or 8.

    Returns:
        int32 words, shape [n * bits / 32, columns].

    Raises:
        CheckpointError: The number of codes does not fill whole words.
    """
    rows, columns = codes.shape
    if rows % CODES_PER_RUN:
        raise CheckpointError(
            f"Cannot pack {rows} codes of {bits} bits: a multiple of {CODES_PER_RUN} is needed."
        )
    runs = codes.reshape(rows // CODES_PER_RUN, CODES_PER_RUN, columns)
    words = torch.zeros(
        rows // CODES_PER_RUN, bits, columns, dtype=torch.int32, device=codes.device
    )
    for j in range(CODES_PER_RUN):
        word, shift = divmod(bits * j, 32)
        code = runs[:, j].to(torch.int32)
        words[:, word] |= code << shift
        if shift + bits > 32:
            words[:, word + 1] |= code >> (32 - shift)
    return words.reshape(rows * bits // 32, columns)


def unpack_codes(words: Tensor, bits: int) -> Tensor:
    """Undo :func:`pack_codes`.

    Args:
        words: int32, shape [n * bits / 32, columns].
        bits: 2, 3, 4 or 8.

    Returns:
        uint8 codes, shape [n, columns].

    Raises:
        CheckpointError: The number of words is not a multiple of ``bits``.
    """
    rows, columns = words.shape
    if rows % bits:
        raise CheckpointError(
            f"Cannot unpack {rows} words of {bits}-bit codes: a multiple of {bits} is needed."
        )
    runs = words.reshape(rows // bits, bits, columns)
    codes = torch.empty(
        rows // bits, CODES_PER_RUN, columns, dtype=torch.uint8, device=words.device
    )
    mask = 2**bits - 1
    for j in range(CODES_PER_RUN):
        word, shift = divmod(bits * j, 32)
        if shift + bits <= 32:
            code = (runs[:, word] >> shift) & mask
        else:
            low_bits = 32 - shift
            low = (runs[:, word] >> shift) & (2**low_bits - 1)
            code = low | ((runs[:, word + 1] << low_bits) & mask)
        codes[:, j] = code.to(torch.uint8)
    return codes.reshape(rows // bits * CODES_PER_RUN, columns)


def pack_weight(codes: Tensor, bits: int) -> Tensor:
    """Pack weight codes [out, in] into the disk layout int32 [in * bits / 32, out]."""
    return pack_codes(codes.t(), bits)


def unpack_weight(qweight: Tensor, bits: int) -> Tensor:
    """Unpack int32 [in * bits / 32, out] from disk into uint8 codes [out, in]."""
    return unpack_codes(qweight, bits).t().contiguous()


def pack_zeros(zeros: Tensor, bits: int, zero_offset: int) -> Tensor:
    """Pack zero points [out, groups] into the disk layout int32 [groups, out * bits / 32].

    Args:
        zeros: Integer zero points, each in zero_offset..2**bits-1+zero_offset.
        bits: 2, 3, 4 or 8.
        zero_offset: What the dialect subtracts before storing: 1 in v1, 0 in v2.

    Returns:
        int32 words.

    Raises:
        CheckpointError: A zero does not fit the dialect; it would borrow from its neighbours.
    """
    stored = zeros.to(torch.int32) - zero_offset
    if stored.numel() and (int(stored.min()) < 0 or int(stored.max()) >= 2**bits):
        raise CheckpointError(
            f"Cannot pack zeros {int(zeros.min())}..{int(zeros.max())} in {bits} bits with offset "
            f"{zero_offset}: allowed are {zero_offset}..{2**bits - 1 + zero_offset}."
        )
    return pack_codes(stored, bits).t().contiguous()


def unpack_zeros(qzeros: Tensor, bits: int, zero_offset: int) -> Tensor:
    """Unpack int32 [groups, out * bits / 32] from disk into int16 zero points [out, groups]."""
    return unpack_codes(qzeros.t().contiguous(), bits).to(torch.int16) + zero_offset

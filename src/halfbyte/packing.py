"""Packing of codes into int32 words. The only module that knows GPTQ's bit order.

A word stream is plain little-endian: code ``j`` of a run occupies bits ``[bits*j, bits*j + bits)``
counted from the lowest bit of the first word. For 2, 4 and 8 bits a word holds whole codes; for 3
bits 32 codes fill 3 words, and two of them straddle a word boundary.

On disk, weights are packed along ``in`` (:func:`pack_weight`) and zeros along ``out``
(:func:`pack_zeros`). :func:`pack_rows` packs the transposed layout, one row of words per output.

Source:
    AutoGPTQ and GPTQModel ``pack_original``; one routine covers 2, 3, 4 and 8 bits because all of
    them are the same little-endian bit stream.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from halfbyte.errors import CheckpointError

WORD_BITS = 32

CACHED_CODES = 2**19
"""Codes unpacked at a time; their int32 intermediates fit a CPU's cache."""
DEVICE_CODES = 2**25
"""The same on a GPU, where each piece costs a kernel launch."""


def codes_per_run(bits: int) -> int:
    """Return the fewest codes that fill whole words: 16, 32, 8 and 4 for 2, 3, 4 and 8 bits."""
    return WORD_BITS // math.gcd(WORD_BITS, bits)


def words_per_run(bits: int) -> int:
    """Return the number of words that :func:`codes_per_run` codes fill: 3 for 3 bits, else 1."""
    return bits // math.gcd(WORD_BITS, bits)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes along the first axis into words.

    Args:
        codes: Integers 0..2**bits-1, shape [n, columns], of any integer dtype.
        bits: 2, 3, 4 or 8.

    Returns:
        int32 words, shape [n * bits / 32, columns].

    Raises:
        CheckpointError: The number of codes does not fill whole words, or a code has more bits.
    """
    run, words_in_run = codes_per_run(bits), words_per_run(bits)
    rows, columns = codes.shape
    if rows % run:
        raise CheckpointError(
            f"Cannot pack {rows} codes of {bits} bits: a multiple of {run} is needed."
        )
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 2**bits):
        raise CheckpointError(
            f"Cannot pack codes {int(codes.min())}..{int(codes.max())} in {bits} bits: allowed are "
            f"0..{2**bits - 1}; larger ones would overwrite neighboring codes."
        )
    runs = codes.reshape(rows // run, run, columns)
    shape = (rows // run, words_in_run, columns)
    words = torch.zeros(shape, dtype=torch.int32, device=codes.device)
    for j in range(run):
        word, shift = divmod(bits * j, WORD_BITS)
        code = runs[:, j].to(torch.int32)
        words[:, word] |= code << shift
        if shift + bits > WORD_BITS:
            words[:, word + 1] |= code >> (WORD_BITS - shift)
    return words.reshape(rows // run * words_in_run, columns)


def unpack_codes(words: Tensor, bits: int) -> Tensor:
    """Unpack words made by :func:`pack_codes`.

    Args:
        words: int32, shape [n * bits / 32, columns].
        bits: 2, 3, 4 or 8.

    Returns:
        uint8 codes, shape [n, columns].

    Raises:
        CheckpointError: The number of words is not a multiple of :func:`words_per_run`.
    """
    run, words_in_run = codes_per_run(bits), words_per_run(bits)
    rows, columns = words.shape
    if rows % words_in_run:
        raise CheckpointError(
            f"Cannot unpack {rows} words of {bits}-bit codes: a multiple of {words_in_run} is "
            "needed."
        )
    if words_in_run == 1:
        return _unpack_whole_words(words, bits)
    runs = words.reshape(rows // words_in_run, words_in_run, columns)
    shape = (rows // words_in_run, run, columns)
    codes = torch.empty(shape, dtype=torch.uint8, device=words.device)
    mask = 2**bits - 1
    for j in range(run):
        word, shift = divmod(bits * j, WORD_BITS)
        # The shift is arithmetic; the mask removes the copies of the sign bit.
        if shift + bits <= WORD_BITS:
            code = (runs[:, word] >> shift) & mask
        else:
            low_bits = WORD_BITS - shift
            low = (runs[:, word] >> shift) & (2**low_bits - 1)
            code = low | ((runs[:, word + 1] << low_bits) & mask)
        codes[:, j] = code.to(torch.uint8)
    return codes.reshape(rows // words_in_run * run, columns)


def _unpack_whole_words(words: Tensor, bits: int) -> Tensor:
    """Unpack words that no code straddles: all codes of a word at once, in cache-sized pieces."""
    rows, columns = words.shape
    run = codes_per_run(bits)
    shifts = torch.arange(0, WORD_BITS, bits, dtype=torch.int32, device=words.device)[:, None]
    codes = torch.empty((rows, run, columns), dtype=torch.uint8, device=words.device)
    codes_at_once = CACHED_CODES if words.device.type == "cpu" else DEVICE_CODES
    step = max(codes_at_once // (run * columns), 1)
    for start in range(0, rows, step):
        part = words[start : start + step, None]
        codes[start : start + step] = (part >> shifts) & (2**bits - 1)
    return codes.view(rows * run, columns)


def pack_weight(codes: Tensor, bits: int) -> Tensor:
    """Pack weight codes [out, in] into the disk layout int32 [in * bits / 32, out]."""
    transposed = codes.t()
    # A GPU needs contiguous (coalesced) reads; a CPU transposes while it packs.
    return pack_codes(transposed if codes.device.type == "cpu" else transposed.contiguous(), bits)


def unpack_weight(qweight: Tensor, bits: int) -> Tensor:
    """Unpack int32 [in * bits / 32, out] from disk into uint8 codes [out, in]."""
    return unpack_codes(qweight, bits).t().contiguous()


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Pack codes [rows, n] along the last axis into int32 [rows, n * bits / 32].

    Args:
        codes: uint8 0..2**bits-1.
        bits: 2 to 8.

    Returns:
        The words, contiguous; as ``pack_codes(codes.t(), bits).t()``, but faster for 4 and 8 bits.

    Raises:
        CheckpointError: The codes of a row do not fill whole words, or a code has more bits.
    """
    if bits not in (4, 8) or codes.shape[1] % codes_per_run(bits) or codes.dtype != torch.uint8:
        return pack_codes(codes.t(), bits).t().contiguous()
    if codes.numel() and int(codes.max()) >= 2**bits:
        raise CheckpointError(
            f"Cannot pack codes up to {int(codes.max())} in {bits} bits: allowed are "
            f"0..{2**bits - 1}."
        )
    if bits == 8:
        return codes.contiguous().view(-1).view(torch.int32).view(codes.shape[0], -1)
    words = torch.empty(codes.shape[0], codes.shape[1] // 8, dtype=torch.int32)
    for rows in row_tiles(codes.shape):
        # Two codes per 16-bit lane, because access to single bytes would be strided.
        pairs = codes[rows].contiguous().view(-1).view(torch.int16)
        packed = ((pairs & 15) | (pairs >> 4)).to(torch.uint8)
        words[rows] = packed.view(torch.int32).view(-1, words.shape[1])
    return words


def unpack_rows(words: Tensor, bits: int) -> Tensor:
    """Unpack words made by :func:`pack_rows` into uint8 codes [rows, n]."""
    if bits not in (4, 8):
        return unpack_codes(words.t(), bits).t().contiguous()
    # Flatten first: a tensor with one column counts as contiguous whatever its stride.
    if bits == 8:
        return words.contiguous().view(-1).view(torch.uint8).view(words.shape[0], -1)
    codes = torch.empty(words.shape[0], words.shape[1] * 8, dtype=torch.uint8)
    for rows in row_tiles(codes.shape):
        packed = words[rows].contiguous().view(-1).view(torch.uint8).to(torch.int16)
        pairs = (packed & 15) | ((packed & 240) << 4)
        codes[rows] = pairs.view(torch.uint8).view(-1, codes.shape[1])
    return codes


def row_tiles(shape: torch.Size | tuple[int, ...], tile: int = CACHED_CODES) -> list[slice]:
    """Split a matrix's rows into slices of about ``tile`` elements, which fit a CPU's cache."""
    rows, columns = shape
    step = max(tile // max(columns, 1) // 8, 1) * 8
    return [slice(start, start + step) for start in range(0, rows, step)]


def pack_zeros(zeros: Tensor, bits: int, zero_offset: int) -> Tensor:
    """Pack zero points [out, groups] into the disk layout int32 [groups, out * bits / 32].

    Args:
        zeros: Integer zero points, each in zero_offset..2**bits-1.
        bits: 2, 3, 4 or 8.
        zero_offset: Subtracted before storing: 1 in dialect v1, 0 in v2.

    Returns:
        int32 words.

    Raises:
        CheckpointError: The dialect cannot represent a zero; readers would disagree on it.
    """
    if zeros.numel() and (int(zeros.min()) < zero_offset or int(zeros.max()) >= 2**bits):
        raise CheckpointError(
            f"Cannot pack zeros {int(zeros.min())}..{int(zeros.max())} in {bits} bits with offset "
            f"{zero_offset}: allowed are {zero_offset}..{2**bits - 1}."
        )
    stored = zeros.to(torch.int32) - zero_offset
    return pack_codes(stored, bits).t().contiguous()


def unpack_zeros(qzeros: Tensor, bits: int, zero_offset: int) -> Tensor:
    """Unpack int32 [groups, out * bits / 32] from disk into int16 zero points [out, groups].

    v1 cannot represent a zero of 0, yet GPTQModel writes it by subtracting 0x1111... from whole
    words, which borrows from neighboring zeros. Adding the same value to whole words restores them
    all, and is also correct if no zero was 0. At 3 bits it subtracts from each zero separately.

    Args:
        qzeros: As on disk.
        bits: 2, 3, 4 or 8.
        zero_offset: 1 in v1, 0 in v2.

    Returns:
        Zero points 0..2**bits-1.

    Source:
        GPTQModel ``utils/model.py``, ``convert_gptq_v2_to_v1_format_module``.
    """
    words = qzeros
    if zero_offset and words_per_run(bits) == 1:
        words = words + sum(zero_offset << shift for shift in range(0, WORD_BITS, bits))
    zeros = unpack_codes(words.t().contiguous(), bits)
    if zero_offset and words_per_run(bits) > 1:
        zeros = (zeros + zero_offset) & (2**bits - 1)
    return zeros.to(torch.int16)

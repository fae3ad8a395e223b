"""Notes of the original bits and group sizes, in files that halfbyte writes.

Formats with blocks of 32, or one group size for the whole model, represent larger groups exactly by
repeating their scales. With the note, converting back restores the original tensors, not only the
same weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

import torch

from halfbyte.checkpoint.header import parse_json_object
from halfbyte.convert.coded_linear import CodedLinear, CodedSpec
from halfbyte.packing import pack_rows
from halfbyte.quant_config import SUPPORTED_BITS

HINT_KEY = "halfbyte.groups"
"""Metadata key of the note: JSON of bits and group size by linear."""
LARGEST_GROUP = 1 << 24


def format_hints(specs: Mapping[str, CodedSpec]) -> str:
    """Make the note.

    Args:
        specs: Properties of the linears whose groups are split.

    Returns:
        JSON.
    """
    return json.dumps({name: [spec.bits, spec.group_size] for name, spec in specs.items()})


def read_hints(text: object, where: str) -> dict[str, tuple[int, int]]:
    """Read the note; invalid entries are ignored.

    Args:
        text: The note; None if there is none.
        where: The file, for messages.

    Returns:
        Bits and group size by linear.

    Raises:
        CheckpointError: It is not JSON.
    """
    if not isinstance(text, str):
        return {}
    hints = {}
    for name, pair in parse_json_object(text, f"{HINT_KEY} of {where}").items():
        if (
            isinstance(pair, list)
            and len(pair) == 2
            and all(type(number) is int for number in pair)
            and pair[0] in SUPPORTED_BITS
            and 0 < pair[1] <= LARGEST_GROUP
            and pair[1] % 32 == 0
        ):
            hints[name] = (pair[0], pair[1])
    return hints


def restore_groups(linear: CodedLinear, bits: int, group_size: int) -> CodedLinear:
    """Restore the original bits and groups of a linear.

    Args:
        linear: The linear with split groups.
        bits: Original bits.
        group_size: Original group size.

    Returns:
        The same weight with these; unchanged if the grids within a group differ, and with its
        current bits if its zeros or codes do not allow the original ones.
    """
    merged_index = torch.arange(0, linear.in_features, linear.group_size) // group_size
    first = torch.arange(0, linear.in_features, group_size) // linear.group_size
    merged = linear.select_groups(first, group_size)
    split_again = merged.select_groups(merged_index, linear.group_size)
    if not (
        torch.equal(split_again.scales, linear.scales)
        and torch.equal(split_again.zeros, linear.zeros)
        and torch.equal(split_again.minima(), linear.minima())
    ):
        return linear
    zeros = merged.zeros
    if bits == linear.bits or bool((zeros != 2 ** (linear.bits - 1)).any()):
        return merged  # only symmetric codes can be shifted to another middle code
    narrow = replace(merged, zeros=torch.full_like(zeros, 2 ** (bits - 1)))
    codes = merged.codes().to(torch.int16) - (2 ** (linear.bits - 1) - 2 ** (bits - 1))
    if int(codes.min()) < 0 or int(codes.max()) >= 2**bits:
        return merged
    return replace(narrow, words=pack_rows(codes.to(torch.uint8), bits), bits=bits)

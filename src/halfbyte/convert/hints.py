"""What linears were before a format cut them finer: a note in our own files, for the way back.

Blocks of 32, or one group size for a whole model, hold larger groups exactly by saying the same
scale several times. With the note the way back gives the very tensors again, not only the same
weights.
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
"""Names the note: JSON of bits and group size by linear."""
LARGEST_GROUP = 1 << 24


def describe_hints(specs: Mapping[str, CodedSpec]) -> str:
    """Write the note.

    Args:
        specs: Facts of the linears that are cut.

    Returns:
        JSON.
    """
    return json.dumps({name: [spec.bits, spec.group_size] for name, spec in specs.items()})


def read_hints(text: object, where: str) -> dict[str, tuple[int, int]]:
    """Read what our own writer noted; anything else there is ignored.

    Args:
        text: The note, or None where there is none.
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


def restore(linear: CodedLinear, bits: int, group_size: int) -> CodedLinear:
    """Give a linear the bits and groups that it had before it was cut finer.

    Args:
        linear: In smaller groups.
        bits: What it had.
        group_size: What it had.

    Returns:
        The same weight with these; as it is where the groups do not agree, and with its own bits
        where its zeros or codes do not.
    """
    of_block = torch.arange(0, linear.in_features, linear.group_size) // group_size
    first = torch.arange(0, linear.in_features, group_size) // linear.group_size
    merged = linear.select_groups(first, group_size)
    again = merged.select_groups(of_block, linear.group_size)
    if not (
        torch.equal(again.scales, linear.scales)
        and torch.equal(again.zeros, linear.zeros)
        and torch.equal(again.minima(), linear.minima())
    ):
        return linear
    zeros = merged.zeros
    if bits == linear.bits or bool((zeros != 2 ** (linear.bits - 1)).any()):
        return merged  # only codes around the middle one can be moved to another middle
    narrow = replace(merged, zeros=torch.full_like(zeros, 2 ** (bits - 1)))
    codes = merged.codes().to(torch.int16) - (2 ** (linear.bits - 1) - 2 ** (bits - 1))
    if int(codes.min()) < 0 or int(codes.max()) >= 2**bits:
        return merged
    return replace(narrow, words=pack_rows(codes.to(torch.uint8), bits), bits=bits)

from __future__ import annotations

from pathlib import Path

import pytest

from halfbyte.checkpoint.consumers import CONSUMERS, Consumer

DOCS = Path(__file__).parents[2] / "docs/concepts/checkpoint.md"


def row_of(consumer: Consumer) -> str:
    if consumer.group_sizes is not None:
        groups = ", ".join(map(str, consumer.group_sizes))
    else:
        groups = f"multiples of {consumer.group_multiple}" if consumer.group_multiple > 1 else "any"
    widths = [
        str(multiple) if multiple > 1 else "any"
        for multiple in (consumer.in_multiple, consumer.out_multiple)
    ]
    cells = [
        consumer.label,
        ", ".join(map(str, consumer.bits)),
        ", ".join(map(str, consumer.symmetric_bits)) or "no",
        *widths,
        groups,
        "yes" if consumer.supports_g_idx else "no",
        consumer.evidence,
    ]
    return f"| {' | '.join(cells)} |"


@pytest.mark.parametrize("consumer", CONSUMERS, ids=lambda consumer: consumer.name)
def test_documented_limits_are_those_of_the_code(consumer):
    assert row_of(consumer) in DOCS.read_text().splitlines()

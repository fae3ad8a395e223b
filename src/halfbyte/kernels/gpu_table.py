"""Measured GPU kernel configurations by architecture; shipped, so nothing is tuned at run time.

``gpu_table/sm_90.json`` is written by ``bench/keep_gpu.py`` and ``keep_gpu_rows.py`` from the
results of ``measure_gpu_kernels.py`` and ``measure_gpu_rows.py``.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

Shape = tuple[int, int]
"""in_features, out_features."""


@dataclass(frozen=True, slots=True)
class GpuTable:
    """The fastest configurations of an architecture; empty if none were measured."""

    triton: Mapping[tuple[Shape, int], Mapping[str, int]] = field(default_factory=dict)
    """By shape and rows bucket: the fields of a TritonConfig."""
    cuda: Mapping[tuple[Shape, int], Mapping[str, int]] = field(default_factory=dict)
    """By shape and rows bucket: the fields of a CudaConfig."""
    cuda_rows: Mapping[Shape, int] = field(default_factory=dict)
    """By shape: the largest number of rows at which the CUDA kernel for few rows is the fastest."""
    many_rows: Mapping[tuple[Shape, int], Mapping[str, int] | None] = field(default_factory=dict)
    """By shape and rows bucket: the fields of a RowsConfig; None if another tier is faster."""
    stream: Mapping[tuple[Shape, int], Mapping[str, int]] = field(default_factory=dict)
    """By shape and rows bucket: the fields of a StreamConfig, if that kernel is the fastest."""


@functools.cache
def load_table(architecture: str) -> GpuTable:
    """Load the measured configurations of an architecture.

    Args:
        architecture: Such as ``sm_90``; any name for other vendors.

    Returns:
        The table; an empty one if none was measured.
    """
    file = resources.files("halfbyte.kernels") / "gpu_table" / f"{architecture}.json"
    if not file.is_file():
        return GpuTable()
    return parse_table(json.loads(file.read_text(encoding="utf-8")))


def parse_table(table: Mapping[str, Any]) -> GpuTable:
    """Parse a table from its JSON form."""

    def shape(entry: Mapping[str, Any]) -> Shape:
        return entry["in_features"], entry["out_features"]

    return GpuTable(
        triton={(shape(entry), entry["rows"]): entry["config"] for entry in table["triton"]},
        cuda={(shape(entry), entry["rows"]): entry["config"] for entry in table["cuda"]},
        cuda_rows={shape(entry): entry["rows"] for entry in table["cuda_rows"]},
        many_rows={
            (shape(entry), entry["rows"]): entry["config"] for entry in table.get("many_rows", ())
        },
        stream={
            (shape(entry), entry["rows"]): entry["config"] for entry in table.get("stream", ())
        },
    )

"""Fold act-order into neighboring layers: sort columns by group, and permute the layer before.

A linear with act-order (``g_idx``) is equivalent to a permutation of the inputs followed by a
linear with contiguous groups. If the inputs come from other linears through elementwise functions
only, the permutation can be applied to the outputs of these:

::

    down_proj(act(gate_proj(x)) * up_proj(x))     rows of gate_proj and up_proj
    o_proj(attention(q, k, v_proj(x)))            rows of v_proj, within each head

The inputs of q, k, v, gate and up are the normalized residual stream, for which each linear would
need another permutation: their act-order cannot be folded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.checkpoint.write import TensorSpec
from halfbyte.convert.coded_linear import CodedLinear, CodedSpec
from halfbyte.convert.source import Source

PRODUCERS: Mapping[str, tuple[str, ...]] = {
    "down_proj": ("gate_proj", "up_proj"),
    "w2": ("w1", "w3"),
    "fc2": ("fc1",),
    "c_proj": ("c_fc",),
    "dense_4h_to_h": ("dense_h_to_4h",),
}
"""Siblings of whose outputs a linear's inputs are elementwise functions, by last name part."""

QUERY, VALUE, OUTPUT = "q_proj", "v_proj", "o_proj"
ATTENTION_PARTS = (QUERY, "k_proj", VALUE, OUTPUT, "q_norm", "k_norm", "rotary_emb")


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldedSource:
    """A source with act-order folded into the neighboring layers; the model computes the same."""

    source: Source
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    """Order of columns by linear: new column c is old column order[c]."""
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    """Order of rows by module, quantized or not: new row r is old row order[r]."""

    @property
    def format(self) -> str:
        """Name of the format."""
        return self.source.format

    @property
    def model_config(self) -> Mapping[str, Any]:
        """``config.json`` without the quantization config."""
        return self.source.model_config

    @property
    def linears(self) -> Mapping[str, object]:
        """Every quantized module."""
        return self.source.linears

    @property
    def others(self) -> Mapping[str, TensorSpec]:
        """Every tensor outside the quantized modules."""
        return self.source.others

    @property
    def notes(self) -> tuple[str, ...]:
        """Choices and rounding while reading."""
        return self.source.notes

    @property
    def tokenizer_folder(self) -> Path:
        """Folder of tokenizer and model card."""
        return self.source.tokenizer_folder

    def describe(self, name: str) -> CodedSpec:
        """Describe a linear after folding."""
        spec = self.source.describe(name)
        return replace(spec, is_ordered=True) if name in self.columns else spec

    def load_linear(self, name: str) -> CodedLinear:
        """Read one linear and reorder it."""
        linear = self.source.load_linear(name)
        if name in self.columns:
            linear = linear.take_columns(self.columns[name])
        return linear.take_rows(self.rows[name]) if name in self.rows else linear

    def load_other(self, name: str) -> Tensor:
        """Read one other tensor and reorder it."""
        tensor = self.source.load_other(name)
        module, _, suffix = name.rpartition(".")
        is_part = module in self.rows and suffix in ("weight", "bias")
        return tensor[self.rows[module]] if is_part else tensor

    def copy_companions(self, output: Path) -> None:
        """Copy tokenizer, chat template and license to a folder."""
        self.source.copy_companions(output)


def fold_act_order(source: Source, specs: Mapping[str, CodedSpec]) -> FoldedSource | None:
    """Fold act-order into the neighboring layers, where possible.

    Args:
        source: The model.
        specs: Properties of its linears.

    Returns:
        The same model with another order of channels; None if nothing can be folded.
    """
    columns: dict[str, Tensor] = {}
    rows: dict[str, Tensor] = {}
    siblings = _list_siblings(source)
    num_rows = _count_rows(source, specs)
    for name, spec in specs.items():
        if spec.is_ordered:
            continue
        parent, _, leaf = name.rpartition(".")
        producers = [f"{parent}.{producer}" for producer in PRODUCERS.get(leaf, ())]
        # Only these under the parent, as a norm between them would mix channels.
        is_alone = siblings[parent] <= {leaf, *PRODUCERS.get(leaf, ())}
        if producers and is_alone and all(num_rows.get(p) == spec.in_features for p in producers):
            order = torch.argsort(source.load_linear(name).groups(), stable=True)
            columns[name] = order
            rows |= dict.fromkeys(producers, order)
        elif leaf == OUTPUT and siblings[parent] <= set(ATTENTION_PARTS):
            groups = source.load_linear(name).groups()
            orders = find_head_order(groups, spec.group_size, source.model_config)
            # If q_proj has more rows, these are output gates, which would need the order too.
            has_no_gate = num_rows.get(f"{parent}.{QUERY}") == spec.in_features
            if orders and has_no_gate and num_rows.get(f"{parent}.{VALUE}") == len(orders[1]):
                columns[name], rows[f"{parent}.{VALUE}"] = orders
    return FoldedSource(source=source, columns=columns, rows=rows) if columns else None


def find_head_order(
    groups: Tensor, group_size: int, config: Mapping[str, Any]
) -> tuple[Tensor, Tensor] | None:
    """Find an order of channels within the heads that makes the groups contiguous.

    Args:
        groups: Group of each input of the output projection, int64 [heads * head_dim].
        group_size: Size of every group.
        config: The model config: numbers of heads and of key and value heads.

    Returns:
        The orders of the projection's columns and of the value's rows; None if the query heads of
        a value head have no common order, or layers share values.
    """
    if config.get("num_kv_shared_layers"):
        return None  # the output projections of other layers read these values, too
    heads = config.get("num_attention_heads")
    if not isinstance(heads, int) or heads < 1 or len(groups) % heads:
        return None
    value_heads = config.get("num_key_value_heads") or heads
    width = len(groups) // heads
    if heads % value_heads or (width % group_size and group_size % width):
        return None
    shape = (value_heads, heads // value_heads, width)
    by_head = groups.view(shape)
    # One order per value head, taken from its first query head.
    within = torch.argsort(by_head[:, 0], dim=-1, stable=True)
    column = torch.arange(len(groups)).view(shape)
    columns = column.gather(-1, within[:, None].expand(shape)).flatten()
    labels = groups[columns].view(-1, group_size)
    if bool((labels != labels[:, :1]).any()):
        return None
    row = torch.arange(value_heads * width).view(value_heads, width)
    return columns, row.gather(-1, within).flatten()


def _list_siblings(source: Source) -> dict[str, set[str]]:
    """Map each parent to the names of its children that have tensors."""
    children: dict[str, set[str]] = {}
    for name in [*source.linears, *(other.rpartition(".")[0] for other in source.others)]:
        parent, _, leaf = name.rpartition(".")
        children.setdefault(parent, set()).add(leaf)
    return children


def _count_rows(source: Source, specs: Mapping[str, CodedSpec]) -> dict[str, int]:
    """Count the outputs of each module, except GPT-2's dense ones, whose outputs are columns."""
    dense = {
        name.removesuffix(".weight"): tensor.shape[0]
        for name, tensor in source.others.items()
        if name.endswith(".weight") and not name.endswith(".c_fc.weight") and tensor.shape
    }
    return dense | {name: spec.out_features for name, spec in specs.items()}

"""Per-module overrides of a quantization config: its ``dynamic`` section.

A key is a regular expression, matched from the start of a module's full name. With the prefix
``-:`` the module is not quantized; with ``+:`` or no prefix, the value overrides the top-level
settings. The first matching pattern wins.

Source:
    vLLM ``quantization/utils/gptq_utils.py`` (``get_dynamic_override``) and GPTQModel
    ``quantization/config.py`` (``_resolve_dynamic_override``): both match from the start, and
    both take the first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from halfbyte.checkpoint.foreign_patterns import (
    PatternError,
    check_expanded_chars,
    count_expanded_chars,
    match_pattern,
)
from halfbyte.errors import CheckpointError

SKIP = "-:"
OVERRIDE = "+:"

FUSED_LINEARS: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
    "w13": ("w1", "w3"),
}
"""Linears that vLLM fuses, by the fused name, which it matches against the patterns.

Source:
    vLLM ``model_executor/models``, the ``packed_modules_mapping`` of its model classes.
"""

Rule = tuple[tuple[str, Any], ...] | None
"""The overrides of one module as sorted items; None if it is not quantized."""

_ANY_EXPERT = ".*"
"""Suffix of a parent name that stands for all experts of a layer."""

_EXPERTS = re.compile(r"(?P<container>.+\.experts)\.\d+\.(?P<leaf>[^.]+)")


def resolve_dynamic(
    dynamic: Mapping[str, Mapping[str, Any]], module: str
) -> Mapping[str, Any] | None:
    """Find the overrides of one module, by the rules of vLLM and GPTQModel.

    Args:
        dynamic: Overrides by pattern.
        module: Full dotted name.

    Returns:
        The overrides of the first matching pattern, empty if none matches; None if that pattern
        excludes the module from quantization.

    Raises:
        CheckpointError: A pattern is not a regular expression, or takes too much time or memory.
    """
    expanded_chars = 0
    for key, overrides in dynamic.items():
        pattern = key.removeprefix(SKIP).removeprefix(OVERRIDE)
        expanded_chars += count_expanded_chars(pattern)
        try:
            check_expanded_chars(expanded_chars)
            matched = match_pattern(pattern, module)
        except PatternError as error:
            raise CheckpointError(
                f"Cannot use dynamic of the quantization config: '{key[:80]}' {error}. "
                "Correct the config, or remove the entry."
            ) from error
        if matched:
            return None if key.startswith(SKIP) else overrides
    return {}


def build_dynamic(rules: Mapping[str, Rule], base: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Build ``dynamic`` from the settings of every linear, with as few patterns as possible.

    Modules that differ only in their block number share a pattern, and so do modules with the same
    parent. If these include all linears that vLLM fuses, the fused name is added; if all experts
    of a layer are alike, the name of their container is added.

    Args:
        rules: Settings by linear, None if it is not quantized. Linears with the settings of
            ``base`` get no pattern.
        base: The top-level settings, by the same keys.

    Returns:
        ``dynamic``: exclusions first, then overrides, each with only the keys that differ from
        ``base``.
    """
    differing: dict[str, Rule] = {}
    for module, rule in rules.items():
        differing[module] = rule and tuple((k, v) for k, v in rule if base.get(k) != v)
    dynamic: dict[str, dict[str, Any]] = {}
    for rule in sorted(set(differing.values()) - {()}, key=lambda rule: (rule is not None, rule)):
        members = [module for module, other in differing.items() if other == rule]
        sign = SKIP if rule is None else OVERRIDE
        for pattern in _make_patterns(members, differing):
            dynamic[sign + pattern] = dict(rule or ())
    return dynamic


def _make_patterns(members: list[str], all_modules: Iterable[str]) -> list[str]:
    """Make anchored patterns that match the members and no other module.

    They are in the order of the members, not of a set: the output must be deterministic.
    """
    templates = _group_by_template(all_modules)
    chosen = _group_by_template(members)
    # parent with its index pattern -> the names of its children
    children: dict[tuple[str, str], list[str]] = {}
    containers = _find_whole_containers(set(members), all_modules)
    for template, indices in chosen.items():
        experts = _EXPERTS.fullmatch(template)
        whole = {
            i for i in indices if experts and experts["container"].replace("{}", i) in containers
        }
        for part in (whole, indices - whole):
            if not part:
                continue
            parent, _, leaf = template.rpartition(".")
            if experts and part is whole:
                parent, leaf = experts["container"] + _ANY_EXPERT, experts["leaf"]
            numbers = _make_number_pattern(part, templates[template])
            leaves = children.setdefault((parent, numbers), [])
            if leaf not in leaves:
                leaves.append(leaf)
    return [_join_pattern(parent, number, leaves) for (parent, number), leaves in children.items()]


def _group_by_template(modules: Iterable[str]) -> dict[str, set[str]]:
    """Map each name with its first number replaced by ``{}`` to the set of these numbers."""
    groups: dict[str, set[str]] = {}
    for module in modules:
        parts = module.split(".")
        place = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        number = "" if place is None else parts[place]
        if place is not None:
            parts[place] = "{}"
        groups.setdefault(".".join(parts), set()).add(number)
    return groups


def _find_whole_containers(members: set[str], all_modules: Iterable[str]) -> set[str]:
    """Find the expert containers all of whose linears are members."""
    is_whole: dict[str, bool] = {}
    for module in all_modules:
        experts = _EXPERTS.fullmatch(module)
        if experts:
            container = experts["container"]
            is_whole[container] = is_whole.get(container, True) and module in members
    return {container for container, whole in is_whole.items() if whole}


def _make_number_pattern(chosen: set[str], existing: set[str]) -> str:
    if chosen == existing:
        return "" if chosen == {""} else r"\d+"
    numbers = sorted(chosen, key=int)
    return numbers[0] if len(numbers) == 1 else f"(?:{'|'.join(numbers)})"


def _join_pattern(parent: str, numbers: str, leaves: list[str]) -> str:
    for fused, parts in FUSED_LINEARS.items():
        if set(parts) <= set(leaves):
            leaves = [*leaves, fused]
    path, last = re.escape(parent.removesuffix(_ANY_EXPERT)), _join_alternatives(leaves)
    if parent.endswith(_ANY_EXPERT):
        pattern = rf"{path}(?:\.\d+\.{last})?"
    else:
        pattern = rf"{path}\.{last}" if path else last
    return f"^{pattern.replace(re.escape('{}'), numbers, 1)}$"


def _join_alternatives(names: list[str]) -> str:
    escaped = [re.escape(name) for name in names]
    return escaped[0] if len(escaped) == 1 else f"(?:{'|'.join(escaped)})"

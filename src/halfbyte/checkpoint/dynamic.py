"""The ``dynamic`` rules of a quantization config: which module differs from the rest, and how.

A key is a regular expression, matched from the start of a module's full name; ``-:`` before it
means that the module is not quantized, ``+:`` or nothing that the value overrides the top-level
settings. The first pattern that matches counts.

Source:
    vLLM ``quantization/utils/gptq_utils.py`` (``get_dynamic_override``) and GPTQModel
    ``quantization/config.py`` (``_resolve_dynamic_override``): both match from the start, and
    both take the first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import regex

from halfbyte.errors import CheckpointError

SKIP = "-:"
OVERRIDE = "+:"
SECONDS = 1
"""Longest time for one pattern and one name; some patterns would take years."""

FUSED_LINEARS: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
    "w13": ("w1", "w3"),
}
"""Linears that vLLM runs as one, under a name of its own which its patterns are matched against.

Source:
    vLLM ``model_executor/models``, the ``packed_modules_mapping`` of its model classes.
"""

Rule = tuple[tuple[str, Any], ...] | None
"""The overrides of one module as sorted items; None: it is not quantized."""

_ANY_EXPERT = ".*"
"""Ends a parent that stands for a layer's experts, one and all."""

_EXPERTS = re.compile(r"(?P<container>.+\.experts)\.\d+\.(?P<leaf>[^.]+)")


def resolve_dynamic(
    dynamic: Mapping[str, Mapping[str, Any]], module: str
) -> Mapping[str, Any] | None:
    """Say what the rules make of a module, as vLLM and GPTQModel do.

    Args:
        dynamic: The rules.
        module: Full dotted name.

    Returns:
        The overrides of the first pattern that matches, empty where none does; None where that
        pattern says that the module is not quantized.

    Raises:
        CheckpointError: A pattern is not a regular expression, or takes too long.
    """
    for key, overrides in dynamic.items():
        pattern = key.removeprefix(SKIP).removeprefix(OVERRIDE)
        try:
            # vLLM's library too; Python's own knows no time limit.
            matched = regex.match(pattern, module, timeout=SECONDS)
        except TimeoutError as error:
            raise CheckpointError(
                f"Cannot use dynamic of the quantization config: '{key[:80]}' takes more than "
                f"{SECONDS} s to match {module[:80]}. Correct the config, or remove the entry."
            ) from error
        except (regex.error, OverflowError, RecursionError) as error:
            raise CheckpointError(
                f"Cannot use dynamic of the quantization config: '{key[:80]}' is not a regular "
                f"expression: {error}. Correct the config, or remove the entry."
            ) from error
        if matched:
            return None if key.startswith(SKIP) else overrides
    return {}


def build_dynamic(rules: Mapping[str, Rule], base: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Write the rules that make every module what it is, in as few patterns as its names allow.

    Modules that differ only in the number of their block share a pattern. So do those of one
    parent, and where all linears that vLLM fuses are among them, the fused name is added; where
    all experts of a layer are alike, so is the name of their container.

    Args:
        rules: For every linear: its settings, or None where it is not quantized. Linears whose
            settings are those of ``base`` get no pattern.
        base: The top-level settings, by the same keys.

    Returns:
        ``dynamic``: skips first, then overrides, each with only the keys that differ from base.
    """
    differing: dict[str, Rule] = {}
    for module, rule in rules.items():
        differing[module] = rule and tuple((k, v) for k, v in rule if base.get(k) != v)
    dynamic: dict[str, dict[str, Any]] = {}
    for rule in sorted(set(differing.values()) - {()}, key=lambda rule: (rule is not None, rule)):
        members = [module for module, other in differing.items() if other == rule]
        sign = SKIP if rule is None else OVERRIDE
        for pattern in _patterns_for(members, differing):
            dynamic[sign + pattern] = dict(rule or ())
    return dynamic


def _patterns_for(members: list[str], everything: Iterable[str]) -> list[str]:
    """Give anchored patterns that match exactly the members among everything.

    In the members' order, never a set's: the same checkpoint must give the same bytes.
    """
    templates = _group_by_template(everything)
    chosen = _group_by_template(members)
    # parent with its index pattern -> the names of its children
    children: dict[tuple[str, str], list[str]] = {}
    containers = _whole_containers(set(members), everything)
    for template, indices in chosen.items():
        experts = _EXPERTS.fullmatch(template)
        whole = {i for i in indices if experts and _fill(experts["container"], i) in containers}
        for part in (whole, indices - whole):
            if not part:
                continue
            parent, _, leaf = template.rpartition(".")
            if experts and part is whole:
                parent, leaf = experts["container"] + _ANY_EXPERT, experts["leaf"]
            numbers = _number_pattern(part, templates[template])
            leaves = children.setdefault((parent, numbers), [])
            if leaf not in leaves:
                leaves.append(leaf)
    return [_write_pattern(parent, number, leaves) for (parent, number), leaves in children.items()]


def _group_by_template(modules: Iterable[str]) -> dict[str, set[str]]:
    """Map each name without its first number to the numbers that stand there."""
    groups: dict[str, set[str]] = {}
    for module in modules:
        parts = module.split(".")
        place = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        number = "" if place is None else parts[place]
        if place is not None:
            parts[place] = "{}"
        groups.setdefault(".".join(parts), set()).add(number)
    return groups


def _whole_containers(members: set[str], everything: Iterable[str]) -> set[str]:
    """List the expert containers all of whose linears are members."""
    all_in: dict[str, bool] = {}
    for module in everything:
        experts = _EXPERTS.fullmatch(module)
        if experts:
            container = experts["container"]
            all_in[container] = all_in.get(container, True) and module in members
    return {container for container, whole in all_in.items() if whole}


def _number_pattern(chosen: set[str], existing: set[str]) -> str:
    if chosen == existing:
        return "" if chosen == {""} else r"\d+"
    numbers = sorted(chosen, key=int)
    return numbers[0] if len(numbers) == 1 else f"(?:{'|'.join(numbers)})"


def _fill(template: str, number: str) -> str:
    return template.replace("{}", number, 1)


def _write_pattern(parent: str, numbers: str, leaves: list[str]) -> str:
    for fused, parts in FUSED_LINEARS.items():
        if set(parts) <= set(leaves):
            leaves = [*leaves, fused]
    path, last = re.escape(parent.removesuffix(_ANY_EXPERT)), _alternatives(leaves)
    if parent.endswith(_ANY_EXPERT):
        pattern = rf"{path}(?:\.\d+\.{last})?"
    else:
        pattern = rf"{path}\.{last}" if path else last
    return f"^{pattern.replace(re.escape('{}'), numbers, 1)}$"


def _alternatives(names: list[str]) -> str:
    escaped = [re.escape(name) for name in names]
    return escaped[0] if len(escaped) == 1 else f"(?:{'|'.join(escaped)})"

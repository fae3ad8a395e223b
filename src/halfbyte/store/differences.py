"""In what two versions differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from halfbyte.store.store import Store


def diff_versions(store: Store, first: str, second: str) -> dict[str, Any]:
    """Say in what two versions differ.

    Args:
        store: The store.
        first: The older one.
        second: The newer one.

    Returns:
        Files with their sizes, and settings of recipe, base and tools: [before, after] for each
        that differs, None where it is not there; both sizes, both calibrations.
    """
    one, two = (store.manifest(store.resolve(reference)[1]) for reference in (first, second))
    return {
        "files": diff_mappings(one.files, two.files, lambda record: record.bytes),
        "recipe": diff_mappings(one.recipe, two.recipe),
        "base": diff_mappings(asdict(one.base), asdict(two.base)),
        "tools": diff_mappings(one.tools, two.tools),
        "calibration": [one.calibration, two.calibration],
        "bytes": [one.num_bytes, two.num_bytes],
    }


def diff_mappings(
    one: Mapping[str, Any], two: Mapping[str, Any], show: Callable[[Any], Any] = lambda value: value
) -> dict[str, Any]:
    """Give [before, after] for each key whose values differ; None where it is not there."""

    def pairs() -> Iterator[tuple[str, list[Any]]]:
        for key in sorted({*one, *two}):
            left, right = one.get(key), two.get(key)
            if left != right:
                yield key, [None if v is None else show(v) for v in (left, right)]

    return dict(pairs())

"""Differences between two versions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from halfbyte.store.store import Store


def diff_versions(store: Store, first: str, second: str) -> dict[str, Any]:
    """Compare the manifests of two versions.

    Args:
        store: The store.
        first: Reference of the older version.
        second: Reference of the newer version.

    Returns:
        [before, after] for each file (its size) and each setting of recipe, base and tools that
        differs, with None where it does not exist; and the total size and calibration of both.
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
    """Return [before, after] by key where the values differ; None stands for a missing key."""

    def pairs() -> Iterator[tuple[str, list[Any]]]:
        for key in sorted({*one, *two}):
            left, right = one.get(key), two.get(key)
            if left != right:
                yield key, [None if v is None else show(v) for v in (left, right)]

    return dict(pairs())

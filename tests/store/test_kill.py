"""Processes that add, promote, roll back and collect at once, and are killed at any moment."""

from __future__ import annotations

import random

import pytest
from tests.helpers.stores import check_store, kill_while_at_work, write_folder

from halfbyte.store.garbage import collect_garbage
from halfbyte.store.store import Store

ACTS = "add add promote promote rollback gc checkout"


@pytest.mark.parametrize(("part", "rounds"), [(0, 4), pytest.param(1, 40, marks=pytest.mark.slow)])
def test_killed_processes_leave_a_consistent_store(tmp_path, part, rounds):
    place = tmp_path / "store"
    folders = [write_folder(tmp_path / f"model{n}", n) for n in range(3)]
    store = Store(place)
    first = store.add(folders[0], "m").version
    store.promote("m", force_reason="test")
    rng = random.Random(part)
    for number in range(rounds):
        seeds = [f"{part}{number}{n}" for n in range(2)]
        kill_while_at_work(str(place), ACTS, seeds, folders, rng.uniform(0.01, 0.4))
        check_store(store)
    collect_garbage(store, keep=1)
    check_store(store)
    assert list((place / "tmp").iterdir()) == []
    assert store.history("m").entries[0].version == first

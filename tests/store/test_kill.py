"""Processes that add, promote, roll back and collect at once, and are killed at any moment."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time

import pytest
from tests.helpers.stores import write_folder

from halfbyte.store.checkout import checkout
from halfbyte.store.garbage import collect_garbage
from halfbyte.store.store import Store

WORKER = """
import random, sys
from halfbyte.errors import StoreError
from halfbyte.store.checkout import checkout
from halfbyte.store.garbage import collect_garbage
from halfbyte.store.store import Store

place, folders, seed = sys.argv[1], sys.argv[2:-1], int(sys.argv[-1])
store, rng = Store(place), random.Random(seed)
print("ready", flush=True)
while True:
    what = rng.choice(["add", "add", "promote", "promote", "rollback", "gc", "checkout"])
    try:
        if what == "add":
            store.add(rng.choice(folders), "m")
        elif what == "gc":
            collect_garbage(store, keep=2)
        elif what == "rollback":
            store.rollback("m")
        elif what == "checkout":
            checkout(store, "m")
        else:
            versions = store.history("m").versions
            store.promote("m@" + rng.choice(versions), force_reason="test")
    except StoreError as error:
        # A version may be collected between the choice and the act; nothing else may fail.
        text = str(error)
        allowed = ("was removed meanwhile", "no such version", "no earlier version", "is removed",
                   "Cannot read manifests/", "has no model", "has no version any more")
        if not any(part in text for part in allowed):
            print("FAILED", what, text, flush=True)
            raise
"""


@pytest.mark.parametrize(("part", "rounds"), [(0, 4), pytest.param(1, 40, marks=pytest.mark.slow)])
def test_killed_processes_leave_a_store_that_is_whole(tmp_path, part, rounds):
    place = tmp_path / "store"
    folders = [str(write_folder(tmp_path / f"model{n}", n)) for n in range(3)]
    store = Store(place)
    first = store.add(folders[0], "m").version
    store.promote("m", force_reason="test")
    rng = random.Random(part)
    for number in range(rounds):
        seeds = [f"{part}{number}{n}" for n in range(2)]
        workers = [
            subprocess.Popen(
                [sys.executable, "-c", WORKER, str(place), *folders, seed],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for seed in seeds
        ]
        for worker in workers:
            assert worker.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0.01, 0.4))
        for worker in workers:
            worker.send_signal(signal.SIGKILL)
            out, err = worker.communicate()
            assert worker.returncode == -signal.SIGKILL, err
            assert "FAILED" not in out, out + err
        check(store)
    collect_garbage(store, keep=1)
    check(store)
    assert list((place / "tmp").iterdir()) == []
    assert store.history("m").entries[0].version == first


def check(store):
    """No dangling alias, no lost version, nothing half-written that counts."""
    history = store.history("m")
    assert set(history.aliases.values()) <= set(history.versions)
    assert store.verify() == history.versions
    champion = history.aliases["champion"]
    assert checkout(store, "m@champion").name == champion
    held = set()
    for entry in history.entries:
        # What was collected may be added again: a version is its content.
        if entry.event == "add":
            held.add(entry.version)
        elif entry.event == "remove":
            held.discard(entry.version)
    assert held == set(history.versions)

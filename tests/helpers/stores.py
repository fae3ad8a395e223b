"""Small model folders for a store, and processes that are killed while using it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from halfbyte.store.checkout import checkout
from halfbyte.store.manifest import Manifest
from halfbyte.store.store import Store

CARD = "---\nlicense: mit\nbase_model: org/base\n---\n\n# Model\n"


def write_folder(folder: Path, seed: int = 0, *, card: str | None = CARD) -> Path:
    """Write 1 kB of weights, a config, a report and a model card."""
    folder.mkdir(parents=True, exist_ok=True)
    values = torch.randn(256, generator=torch.Generator().manual_seed(seed))
    save_file({"x": values}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    report = {
        "config": {"bits": 4, "group_size": 64 + seed},
        "calibration": {"digest": f"{seed:064x}"},
        "versions": {"torch": "2.13.0"},
    }
    (folder / "quantization_report.json").write_text(json.dumps(report))
    if card is not None:
        (folder / "README.md").write_text(card)
    return folder


def add(store: Store, tmp_path: Path, seed: int = 0, **options: Any) -> Manifest:
    """Add a new folder ``tmp_path / f"model{seed}"`` as a version of "m"."""
    return store.add(write_folder(tmp_path / f"model{seed}", seed), "m", **options)


def write_verdict(path: Path, verdict: str) -> Path:
    path.write_text(json.dumps({"verdict": verdict, "flips": 3}))
    return path


def make_champion_and_candidate(tmp_path: Path) -> Store:
    """A store with two versions of "tiny": the first is the champion, the second the candidate."""
    store = Store(tmp_path / "store")
    for seed in (0, 1):
        store.add(write_folder(tmp_path / str(seed), seed), "tiny")
    first, second = store.history("tiny").versions
    store.judge(f"tiny@{first}", write_verdict(tmp_path / "v.json", "pass"))
    store.promote(f"tiny@{first}")
    store.promote(f"tiny@{second}", "candidate")
    return store


WORKER = """
import random, sys
from halfbyte.errors import StoreError
from halfbyte.store.checkout import checkout
from halfbyte.store.garbage import collect_garbage
from halfbyte.store.store import Store

place, actions, seed, *folders = sys.argv[1:]
store, rng = Store(place), random.Random(seed)
print("ready", flush=True)
while True:
    action = rng.choice(actions.split())
    try:
        if action == "add":
            store.add(rng.choice(folders), "m")
        elif action == "gc":
            collect_garbage(store, keep=2)
        elif action == "rollback":
            store.rollback("m")
        elif action == "checkout":
            checkout(store, "m")
        else:
            versions = store.history("m").versions
            store.promote("m@" + rng.choice(versions), force_reason="test")
    except StoreError as error:
        # A version may be collected before it is used; no other error is allowed.
        text = str(error)
        allowed = ("was removed meanwhile", "no such version", "no earlier version", "is removed",
                   "Cannot read manifests/", "has no model", "has no version any more")
        if not any(part in text for part in allowed):
            print("FAILED", action, text, flush=True)
            raise
"""


def kill_while_at_work(
    place: str, actions: str, seeds: Sequence[str], folders: Sequence[Path], seconds: float
) -> None:
    """Run one process per seed with random actions on a store, then kill all of them."""
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, place, actions, seed, *map(str, folders)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in seeds
    ]
    for worker in workers:
        assert worker.stdout.readline() == "ready\n"
    time.sleep(seconds)
    for worker in workers:
        worker.send_signal(signal.SIGKILL)
        out, err = worker.communicate()
        assert worker.returncode == -signal.SIGKILL, err
        assert "FAILED" not in out, out + err


def check_store(store: Store, output: Path | None = None) -> None:
    """Assert that no alias dangles, no version is lost and no version is incomplete."""
    history = store.history("m")
    assert set(history.aliases.values()) <= set(history.versions)
    assert store.verify() == history.versions
    champion = history.aliases["champion"]
    folder = checkout(store, "m@champion", output)
    assert folder.name == (champion if output is None else output.name)
    held = set()
    for entry in history.entries:
        # A removed version may be added again: a version is a digest of its content.
        if entry.event == "add":
            held.add(entry.version)
        elif entry.event == "remove":
            held.discard(entry.version)
    assert held == set(history.versions)

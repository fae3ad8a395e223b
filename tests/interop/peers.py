"""Run the programs of ``bench/peers`` in the environments of other tools."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from bench.peers.environments import PEERS, PROGRAMS, Peer


def need(name: str) -> Peer:
    """Give a peer, or skip the test where its environment is not there."""
    peer = PEERS[name]
    if not peer.is_installed():
        pytest.skip(f"no environment of {peer.package} in {peer.folder.parent.name}/: make interop")
    return peer


def peer_environ(**settings: str) -> dict[str, str]:
    """Give the environment variables for a peer's process: nothing of ours, nothing online."""
    ours = ("PYTHONPATH", "VIRTUAL_ENV")
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return kept | {"HF_HUB_OFFLINE": "1"} | settings


def run_program(peer: Peer, program: str, job: dict[str, Any], folder: Path) -> str:
    """Run a program to its end; gives what it said."""
    file = folder / f"{program}.json"
    file.write_text(json.dumps(job, default=str), encoding="utf-8")
    done = subprocess.run(
        [peer.python, PROGRAMS / f"{program}.py", file],
        cwd=folder,
        env=peer_environ(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1500,
        check=False,
    )
    assert done.returncode == 0, f"{program} in {peer.name}:\n{done.stdout[-4000:]}"
    return done.stdout

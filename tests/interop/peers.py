"""Run the programs of ``bench/peers`` in the environments of other tools."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from bench.peers.environments import PEERS, PROGRAMS, Peer


def needs(name: str) -> pytest.MarkDecorator:
    """Skip a module's tests, before anything is made for them, where a peer is not there."""
    peer = PEERS[name]
    place = f"{peer.folder.parent.name}/{name}"
    return pytest.mark.skipif(
        not peer.is_installed(), reason=f"no environment of {peer.package} in {place}: make interop"
    )


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

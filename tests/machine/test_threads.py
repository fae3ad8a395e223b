"""How many threads torch has, and how long they spin, as OpenMP itself says."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from halfbyte.machine import threads
from halfbyte.machine.threads import SPIN_ROUNDS, configure_threads


@pytest.mark.skipif(sys.platform != "linux", reason="torch uses GNU OpenMP on Linux only")
@pytest.mark.parametrize(
    ("given", "rounds"),
    [
        ({}, SPIN_ROUNDS),
        ({"GOMP_SPINCOUNT": "7"}, 7),
        ({"OMP_WAIT_POLICY": "passive"}, 0),
    ],
)
def test_threads_of_the_command_spin_as_the_user_says_or_shortly(
    given: dict[str, str], rounds: int
) -> None:
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    done = subprocess.run(
        [sys.executable, "-m", "halfbyte", "doctor"],
        env=inherited | {"OMP_DISPLAY_ENV": "verbose"} | given,
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"GOMP_SPINCOUNT = '{rounds}'" in done.stderr


@pytest.mark.parametrize(("given", "expected"), [(None, "2"), ("5", "5")])
def test_as_many_threads_as_a_container_has_processors(
    monkeypatch: pytest.MonkeyPatch, given: str | None, expected: str
) -> None:
    monkeypatch.setattr(threads, "allowed_processors", lambda: 64)
    monkeypatch.setattr(threads, "usable_processors", lambda: 2)
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    monkeypatch.setenv("OMP_NUM_THREADS", given or "")
    if given is None:
        monkeypatch.delenv("OMP_NUM_THREADS")
    configure_threads()
    assert os.environ["OMP_NUM_THREADS"] == expected


def test_without_a_limit_threads_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "allowed_processors", lambda: 64)
    monkeypatch.setattr(threads, "usable_processors", lambda: 64)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    configure_threads()
    assert "OMP_NUM_THREADS" not in os.environ

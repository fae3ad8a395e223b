"""How long torch's threads spin, as OpenMP itself says."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from halfbyte.machine.waiting import SPIN_ROUNDS


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

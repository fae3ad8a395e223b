"""How long threads that share a computation spin while they wait for each other."""

from __future__ import annotations

import os

SPIN_ROUNDS = 3000
"""About 0.1 ms on an Intel Xeon, where a round takes 140 cycles."""


def limit_spinning() -> None:
    """Let torch's threads sleep after a short wait, unless the environment says how they wait.

    GNU OpenMP, which torch's wheels for Linux use, spins 300,000 rounds by default: longer than a
    time slice of the system. Beside other busy processes, a thread that waits for one without a
    core takes the core that this one needs, and work takes many times as long as its share of the
    machine explains (``bench/measure_busy_machine.py``).

    OpenMP reads the environment when it is loaded, so call this before torch is imported. Programs
    call it, not the library: the environment of a process belongs to its program.

    Source:
        https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_ROUNDS)

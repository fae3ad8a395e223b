"""How many threads share a computation, and how long they spin while they wait for each other."""

from __future__ import annotations

import os

from halfbyte.machine.limits import allowed_processors, usable_processors

SPIN_ROUNDS = 3000
"""About 0.1 ms on an Intel Xeon, where a round takes 140 cycles."""


def configure_threads() -> None:
    """Fit torch's threads to a machine that other work uses too.

    What the environment sets already is kept. OpenMP reads it when it is loaded, so call this
    before torch is imported. Programs call it, not the library: the environment of a process
    belongs to its program.

    - GNU OpenMP, which torch's wheels for Linux use, spins 300,000 rounds by default: longer than
      a time slice of the system. Beside other busy processes, a thread that waits for one without
      a core takes the core that this one needs, and work takes many times as long as its share of
      the machine explains (``bench/measure_busy_machine.py``).
    - It starts a thread for each processor, also where a container may only use the time of a few.

    Source:
        https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_ROUNDS)
    if usable_processors() < allowed_processors():
        os.environ.setdefault("OMP_NUM_THREADS", str(usable_processors()))

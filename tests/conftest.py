"""What holds for all tests.

One thread for each process: tiny models gain nothing from more, and the tests run in two processes
at a time (``make test``). What threads share has tests of its own (kernels/test_threads.py).
"""

from __future__ import annotations

import os

# Before anybody imports torch; processes that tests start have it too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

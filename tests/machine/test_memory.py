from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HOLDER = """
import torch
from halfbyte.machine.memory import peak_memory_bytes, resident_memory_bytes
before = resident_memory_bytes()
held = torch.ones(50_000_000, dtype=torch.uint8)
print(before, resident_memory_bytes(), peak_memory_bytes())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_resident_memory_grows_with_allocations():
    # In a process of its own: here, what earlier tests freed might serve for it.
    found = subprocess.run(
        [sys.executable, "-c", HOLDER], capture_output=True, text=True, check=True
    )
    before, after, peak = map(int, found.stdout.split())
    assert 45e6 < after - before < 80e6
    assert peak >= 0.95 * after


CHILD = "from halfbyte.machine.memory import peak_memory_bytes; print(peak_memory_bytes())"
PARENT = f"""
import subprocess, sys
large = b"x" * 1_500_000_000
print(subprocess.run([sys.executable, "-c", {CHILD!r}], capture_output=True, text=True).stdout)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_peak_memory_is_not_inherited_from_the_parent_process():
    done = subprocess.run(
        [sys.executable, "-c", PARENT], capture_output=True, text=True, check=True
    )
    assert 0 < int(done.stdout) < 1_000_000_000

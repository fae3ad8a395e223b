"""Limits of containers, as Linux shows them in files, of both versions of control groups."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from halfbyte.machine import limits

GB = 10**9


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write control groups: the process's membership, and files by path."""
    monkeypatch.setattr(limits, "GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(limits, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(limits, "allowed_processors", lambda: 16)

    class Memory:
        available = 60 * GB

    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory)

    def write(membership: str, files: dict[str, str]) -> None:
        (tmp_path / "membership").write_text(membership)
        for name, text in files.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")

    return write


def test_without_control_groups_all_of_the_machine_can_be_used(groups) -> None:
    assert limits.usable_processors() == 16
    assert limits.available_memory_bytes() == 60 * GB


def test_this_process_can_use_what_the_system_says() -> None:
    assert 1 <= limits.usable_processors() <= limits.allowed_processors()
    assert 0 < limits.available_memory_bytes() <= psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("quota", "processors"),
    [
        ("200000 100000", 2),
        ("250000 100000", 2),
        ("50000 100000", 1),
        ("3200000 100000", 16),
        ("max 100000", 16),
    ],
)
def test_processor_time_in_whole_processors(groups, quota: str, processors: int) -> None:
    groups("0::/\n", {"cpu.max": quota})
    assert limits.usable_processors() == processors


def test_older_version_has_a_folder_for_each_controller(groups) -> None:
    files = {
        "cpu,cpuacct/cpu.cfs_quota_us": "100000",  # not ours: Linux links "cpu" to it
        "cpu/job/cpu.cfs_quota_us": "400000",
        "cpu/job/cpu.cfs_period_us": "100000",
        "cpu/cpu.cfs_quota_us": "-1",
        "cpu/cpu.cfs_period_us": "100000",
        "memory/job/memory.limit_in_bytes": str(8 * GB),
        "memory/job/memory.usage_in_bytes": str(5 * GB),
        "memory/job/memory.stat": f"inactive_file 7\ntotal_inactive_file {GB}\n"
        f"total_active_file {GB}",
        "memory/memory.limit_in_bytes": "9223372036854771712",
        "memory/memory.usage_in_bytes": str(30 * GB),
    }
    groups("5:cpuacct,cpu:/job\n4:memory:/job\n1:name=systemd:/job\n0::/job\n", files)
    assert limits.usable_processors() == 4
    assert limits.available_memory_bytes() == 5 * GB


def test_groups_around_count_too(groups) -> None:
    files = {
        "service/unit/cpu.max": "1000000 100000",
        "service/cpu.max": "300000 100000",
        "service/unit/memory.max": "max",
        "service/unit/memory.current": str(GB),
        "service/memory.max": str(4 * GB),
        "service/memory.current": str(3 * GB),
        "service/memory.stat": "anon 5\ninactive_file 0\nactive_file 0",
    }
    groups("0::/service/unit\n", files)
    assert limits.usable_processors() == 3
    assert limits.available_memory_bytes() == GB


def test_container_that_sees_only_its_own_group_at_the_top(groups) -> None:
    files = {
        "cpu.max": "100000 100000",
        "memory.max": str(2 * GB),
        "memory.current": str(3 * GB),
        "memory.stat": "inactive_file 0",
    }
    groups("0::/../../kubepods/pod1/container2\n", files)
    assert limits.usable_processors() == 1
    assert limits.available_memory_bytes() == 0

"""What this process may use of the computer: processors and memory.

Containers and service managers limit both by Linux's control groups. A process is bound by the
limits of its own group and of all groups around it.

Source:
    https://docs.kernel.org/admin-guide/cgroup-v2.html, and cgroup-v1/memory.html,
    scheduler/sched-bwc.html for the older version, which many hosts still use.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def usable_processors() -> int:
    """Return how many processors can work for this process at the same time, at least 1."""
    allowed = allowed_processors()
    for folder in _groups("cpu"):
        quota, period = _read_quota(folder)
        if quota is not None and period:
            allowed = min(allowed, max(quota // period, 1))
    return allowed


def allowed_processors() -> int:
    """Return how many processors this process may run on, whatever share of their time it gets."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory_bytes() -> int:
    """Return how much memory this process can still take without swapping. Unit: bytes."""
    import psutil

    available = int(psutil.virtual_memory().available)
    for folder in _groups("memory"):
        limit = _read_number(folder, "memory.max", "memory.limit_in_bytes")
        used = _read_number(folder, "memory.current", "memory.usage_in_bytes")
        if limit is not None and used is not None:
            available = min(available, limit - used + _cached_bytes(folder))
    return max(available, 0)


def _groups(controller: str) -> Iterator[Path]:
    """Yield the folders of this process's groups, its own first.

    Within a container the path may be that of the host; then only the last folder exists, where
    the container's own group is mounted.
    """
    try:
        lines = MEMBERSHIP.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = GROUPS / controller if controllers else GROUPS
        own = root / path.lstrip("/")
        yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(root))


def _read_quota(folder: Path) -> tuple[int | None, int | None]:
    """Return the microseconds of processor time and of the period in which they may be used."""
    words = _read(folder, "cpu.max").split()
    if len(words) != 2:
        words = [_read(folder, f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
    quota, period = (int(word) if word.isdigit() else None for word in words)
    return quota, period


def _cached_bytes(folder: Path) -> int:
    """Return the group's cached files, which count as used, but make room when it is needed."""
    fields = dict(line.split(" ", 1) for line in _read(folder, "memory.stat").splitlines())
    # The older version's fields without "total" leave out the groups within.
    prefix = "total_" if "total_inactive_file" in fields else ""
    return sum(int(fields.get(f"{prefix}{kind}_file", 0)) for kind in ("inactive", "active"))


def _read_number(folder: Path, *names: str) -> int | None:
    texts = (_read(folder, name).strip() for name in names)
    return next((int(text) for text in texts if text.isdigit()), None)


def _read(folder: Path, name: str) -> str:
    try:
        return (folder / name).read_text(encoding="ascii")
    except OSError:
        return ""

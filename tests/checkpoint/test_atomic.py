from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from halfbyte.checkpoint import atomic
from halfbyte.checkpoint.atomic import PARTIAL_SUFFIX, write_atomically
from halfbyte.errors import CheckpointError

WRITER = """
import sys
from pathlib import Path
from halfbyte.checkpoint.atomic import write_atomically
path = Path(sys.argv[1])
print("ready", flush=True)
number = 0
while True:
    number += 1
    write_atomically(path, [bytes([number % 251]) * 4096 for _ in range(64)])
"""


def test_write_replaces_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "x"
    write_atomically(path, [b"old"])
    write_atomically(path, [b"new", memoryview(b"er")])
    assert path.read_bytes() == b"newer"
    assert list(tmp_path.iterdir()) == [path]


def test_content_synced_during_writing_is_complete(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "SYNC_BYTES", 1000)
    parts = [os.urandom(700) for _ in range(200)]
    write_atomically(tmp_path / "x", parts)
    assert (tmp_path / "x").read_bytes() == b"".join(parts)


def test_failed_sync_during_writing_is_reported(tmp_path, monkeypatch):
    """The system reports an error only once, so the sync that gets it must raise it."""
    monkeypatch.setattr(atomic, "SYNC_BYTES", 1000)
    calls, sync = [], os.fsync

    def fail_once(descriptor):
        calls.append(descriptor)
        if len(calls) == 1:
            raise OSError(5, "Input/output error")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fail_once)
    with pytest.raises(CheckpointError, match=r"Cannot write .*x: Input/output error"):
        write_atomically(tmp_path / "x", [b"x" * 700] * 200)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (OSError(28, "No space left on device"), r"Cannot write .*x: No space left on device"),
        (CheckpointError("a.scales has 1 value that is not a number"), "a.scales has 1 value"),
    ],
)
def test_content_that_fails_half_way_leaves_the_old_file(tmp_path, failure, expected):
    path = tmp_path / "x"
    write_atomically(path, [b"old"])

    def chunks():
        yield b"new"
        raise failure

    with pytest.raises(CheckpointError, match=expected):
        write_atomically(path, chunks())
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_missing_folder_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"Cannot write .*none/x: No such file"):
        write_atomically(tmp_path / "none" / "x", [b""])


def test_kill_at_any_point_leaves_a_whole_file_or_none(tmp_path):
    path, rng = tmp_path / "x", random.Random(0)
    for _ in range(4):
        command = [sys.executable, "-c", WRITER, str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(rng.uniform(0.0, 0.05))
            process.send_signal(signal.SIGKILL)
        if path.exists():
            content = path.read_bytes()
            assert len(content) == 64 * 4096
            assert len(set(content)) == 1
        assert {file.name for file in tmp_path.iterdir()} <= {"x", "x" + PARTIAL_SUFFIX}

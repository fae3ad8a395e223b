from __future__ import annotations

import asyncio
import json
import shutil
import sqlite3
import stat
import subprocess
import time
import tracemalloc

import pytest
from tests.serve.helpers_quality import ScriptedBackend, answer, collect, failure, make_call

from halfbyte.errors import ConfigError
from halfbyte.serve.routing.router import Router
from halfbyte.serve.watch.request_log import RequestLog, redact

GOOD = answer("Write to jane.doe@example.org or call +49 170 1234567 .")


def ask(log, count=1, text="Say something.", script=GOOD, **call):
    router = Router(
        ScriptedBackend("small", [failure()] if script is None else script),
        fallbacks=[ScriptedBackend("large", GOOD, models=("big",), version="v7")],
        observers=[log.observe],
    )

    async def run():
        for _ in range(count):
            await collect(router, make_call(text, **call))

    asyncio.run(run())


def rows(path):
    connection = sqlite3.connect(path)
    connection.row_factory = sqlite3.Row
    try:
        return [dict(row) for row in connection.execute("select * from requests order by rowid")]
    finally:
        connection.close()


def count_rows(path):
    """Return the rows of a log that may not exist yet."""
    try:
        return len(rows(path)) if path.exists() else 0
    except sqlite3.OperationalError:
        return 0


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_requests_are_redacted_and_readable_by_the_owner_only(tmp_path):
    path = tmp_path / "log.sqlite"
    log = RequestLog(path)
    ask(log, text="My key is sk-abcdefghijklmnop1234 and I am at bob@example.com", script=None)
    log.close()
    (row,) = rows(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert (row["backend"], row["model"], row["version"], row["reason"]) == (
        "large", "big", "v7", "error",
    )  # fmt: skip
    assert (row["status"], row["prompt_tokens"], row["completion_tokens"]) == (200, 5, 9)
    assert [a["cause"] for a in json.loads(row["attempts"])] == ["error", ""]
    asked = json.loads(row["request"])["messages"][0]["content"]
    assert asked == "My key is [secret] and I am at [email]"
    assert json.loads(row["answer"])["0"] == "Write to [email] or call [phone] ."


def test_without_texts_only_numbers_are_stored(tmp_path):
    log = RequestLog(tmp_path / "log.sqlite", texts=False)
    ask(log)
    log.close()
    (row,) = rows(tmp_path / "log.sqlite")
    assert (row["request"], row["answer"], row["completion_tokens"]) == (None, None, 9)


@pytest.mark.parametrize("moved", [("log.sqlite",), ("log.sqlite", "log.sqlite-wal")])
def test_a_file_moved_away_keeps_its_rows_and_a_new_one_is_begun(tmp_path, moved):
    path, old = tmp_path / "log.sqlite", tmp_path / "old"
    old.mkdir()
    log = RequestLog(path)
    ask(log, count=3)
    wait_for(lambda: count_rows(path) == 3)
    for name in moved:
        (tmp_path / name).rename(old / name)
    ask(log, count=2)
    wait_for(lambda: count_rows(path) == 2)
    assert count_rows(old / "log.sqlite") == 3
    path.unlink()
    ask(log)
    log.close()
    assert len(rows(path)) == 1
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a@b.co, c.d+e@mail.example.org", "[email], [email]"),
        ("DE89 3704 0044 0532 0130 00 is mine", "[iban] is mine"),
        ("4111 1111 1111 1111", "[card]"),
        ("call (030) 901820 11 or 555-123-4567", "call [phone] or [phone]"),
        ("Authorization: Bearer abc.def-123456", "Authorization: Bearer [secret]"),
        ("hf_AbCdEfGhIjKlMnOpQr", "[secret]"),
        ("eyJhbGciOiJI.eyJzdWIiOiIx.SflKxwRJSMeK", "[secret]"),
        ("10.0.0.12", "[address]"),
        (r'{"x": "key:\nsk-abcdefghijklmnop1234"}', r'{"x": "key:\n[secret]"}'),
        (r"call\n0170-1234-5678 or\t10.0.0.12", r"call\n[phone] or\t[address]"),
        ("In 2024 there were 12 apples, 3.14 and 1,000.", None),
        ("on 2024-01-15 at 10:30", None),
        ("version 1.2.3", None),
    ],
)
def test_redaction_matches_patterns_and_leaves_plain_numbers(text, expected):
    assert redact(text) == (text if expected is None else expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("key:\nsk-abcdefghijklmnop1234", "key:\n[secret]"),
        ("cards\n4111 1111 1111 1111", "cards\n[card]"),
        ("call\n0170-1234-5678", "call\n[phone]"),
        ("hosts:\t192.168.1.77", "hosts:\t[address]"),
        ("mail\nbob@example.com", "mail\n[email]"),
    ],
)
def test_redaction_at_the_start_of_a_line_keeps_the_row_valid_json(tmp_path, text, expected):
    log = RequestLog(tmp_path / "log.sqlite")
    ask(log, text=text, script=answer(text))
    log.close()
    (row,) = rows(tmp_path / "log.sqlite")
    assert json.loads(row["request"])["messages"][0]["content"] == expected
    assert json.loads(row["answer"])["0"] == expected


def test_long_requests_are_cut_before_they_are_redacted_and_stay_valid_json(tmp_path):
    log = RequestLog(tmp_path / "log.sqlite")
    secret = "sk-abcdefghijklmnop1234"
    for text in ("1" * 4_000_000, "word " * 19_998 + secret * 10_000, "a@b.co " * 100_000):
        ask(log, text=text)
    ask(log, text="after")
    log.close()
    asked = [json.loads(row["request"])["messages"][0] for row in rows(tmp_path / "log.sqlite")]
    assert 90_000 < len(asked[0]["content"]) < 100_000
    assert asked[1]["content"].startswith("word word")
    assert "sk-" not in asked[1]["content"]
    assert 50_000 < len(asked[2]["content"]) < 150_000
    assert set(asked[2]["content"].split()) == {"[email]"}
    assert asked[3]["content"] == "after"


def test_row_that_cannot_be_written_is_dropped_and_counted(tmp_path):
    dropped = []
    log = RequestLog(tmp_path / "log.sqlite", dropped=dropped.append)
    for number in (1, 2):
        ask(log, script=answer("half \ud83d"))
        while sum(dropped) < number:
            time.sleep(0.01)
    ask(log)
    log.close()
    assert sum(dropped) == 2
    assert len(rows(tmp_path / "log.sqlite")) == 1


def test_full_queue_does_not_block_shutdown(tmp_path, monkeypatch):
    monkeypatch.setattr("halfbyte.serve.watch.request_log.CLOSE_SECONDS", 0.2)
    monkeypatch.setattr("halfbyte.serve.watch.request_log.MAX_QUEUE", 1)
    monkeypatch.setattr(RequestLog, "_write_all", lambda self: time.sleep(0.1))
    log = RequestLog(tmp_path / "log.sqlite")
    ask(log, 3)
    start = time.perf_counter()
    log.close()
    assert time.perf_counter() - start < 2


def test_oldest_rows_are_deleted(tmp_path):
    log = RequestLog(tmp_path / "log.sqlite", rows=10)
    ask(log, 35)
    log.close()
    # It is looked at every so many rows: a few more than asked may be there.
    found = rows(tmp_path / "log.sqlite")
    assert 10 <= len(found) <= 20
    assert found[-1]["id"] > found[0]["id"]


def test_full_disk_drops_rows_but_fails_no_request(tmp_path):
    dropped, path = [], tmp_path / "log.sqlite"
    log = RequestLog(path, dropped=dropped.append, max_pages=12)
    ask(log, 5)
    # Rows that come together are written together: on a busy machine all of them might fail.
    deadline = time.monotonic() + 30
    while count_rows(path) < 5:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    ask(log, 395, text="word " * 100)
    log.close()
    kept = count_rows(path)
    assert kept >= 5
    assert sum(dropped) == 400 - kept > 100


@pytest.fixture
def small_disk(tmp_path):
    """A real, nearly full file system."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a small disk here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_log_continues_when_there_is_space_again(small_disk):
    dropped = []
    log = RequestLog(small_disk / "log.sqlite", dropped=dropped.append)
    filler = small_disk / "filler"
    ask(log, 5)
    time.sleep(0.2)
    fill = ["dd", "if=/dev/zero", f"of={filler}", "bs=4096"]
    assert b"No space left" in subprocess.run(fill, capture_output=True).stderr
    start = time.perf_counter()
    # Few enough to fit, should the writer come to them only when there is room again.
    for _ in range(6):
        ask(log, 5, text="word " * 200)
    assert time.perf_counter() - start < 5
    for _ in range(100):
        if sum(dropped):
            break
        time.sleep(0.05)
    assert sum(dropped) > 0
    filler.unlink()
    time.sleep(0.2)
    ask(log, 3, text="after")
    log.close()
    assert "after" in rows(small_disk / "log.sqlite")[-1]["request"]


def test_log_that_cannot_be_created_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"Cannot write the request log .*none/log"):
        RequestLog(tmp_path / "none" / "log.sqlite")


def test_slow_disk_fills_the_queue_and_blocks_no_request(tmp_path, monkeypatch):
    dropped = []
    log = RequestLog(tmp_path / "log.sqlite", dropped=dropped.append)
    blocker = sqlite3.connect(tmp_path / "log.sqlite")
    blocker.execute("begin exclusive")
    start = time.perf_counter()
    ask(log, 1500)
    assert time.perf_counter() - start < 5
    assert sum(dropped) >= 250
    blocker.rollback()
    blocker.close()
    log.close()
    assert len(rows(tmp_path / "log.sqlite")) + sum(dropped) == 1500


def test_queued_rows_do_not_hold_whole_bodies(tmp_path):
    log = RequestLog(tmp_path / "log.sqlite")
    blocker = sqlite3.connect(tmp_path / "log.sqlite")
    blocker.execute("begin exclusive")
    tracemalloc.start()
    for number in range(50):
        ask(log, text=f"{number} " + "word " * 400_000)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    blocker.rollback()
    blocker.close()
    log.close()
    assert len(rows(tmp_path / "log.sqlite")) == 50
    assert held < 20e6


def test_closing_reports_rows_that_were_not_written(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("halfbyte.serve.watch.request_log.CLOSE_SECONDS", 0.1)
    log = RequestLog(tmp_path / "log.sqlite", dropped=lambda _: None)
    blocker = sqlite3.connect(tmp_path / "log.sqlite")
    blocker.execute("begin exclusive")
    ask(log, 3)
    log.close()
    blocker.rollback()
    blocker.close()
    assert "requests were not written" in caplog.text

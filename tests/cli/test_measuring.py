import argparse
import io
from pathlib import Path

import pytest
from rich.console import Console

from halfbyte.cli import output
from halfbyte.cli.measuring import (
    add_measuring_arguments,
    describe_text,
    format_nats,
    format_standard_error,
    measuring_keywords,
    read_text,
    window_progress,
)
from halfbyte.errors import ConfigError


def parse(*words):
    parser = argparse.ArgumentParser()
    add_measuring_arguments(parser)
    return parser.parse_args(words)


def test_defaults_leave_the_choice_to_the_function():
    assert measuring_keywords(parse()) == {
        "text": None,
        "window": None,
        "windows": None,
        "batch_size": 1,
        "add_bos": False,
        "dtype": "auto",
        "device": "auto",
    }


def test_options_reach_the_function(tmp_path):
    text = tmp_path / "t.txt"
    text.write_text("w1 w2", encoding="utf-8")
    words = "--window 16 --windows 2 --batch-size 3 --add-bos --dtype bfloat16 --device cpu"
    assert measuring_keywords(parse("--text", str(text), *words.split())) == {
        "text": "w1 w2",
        "window": 16,
        "windows": 2,
        "batch_size": 3,
        "add_bos": True,
        "dtype": "bfloat16",
        "device": "cpu",
    }


def test_line_endings_are_converted_to_lf(tmp_path):
    (tmp_path / "t.txt").write_bytes(b"a\r\nb\n")
    assert read_text(tmp_path / "t.txt") == "a\nb\n"


def test_unreadable_texts_are_rejected_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"Cannot read the text '.*no\.txt': No such file"):
        read_text(tmp_path / "no.txt")
    (tmp_path / "latin.txt").write_bytes(b"abc\xe9")
    with pytest.raises(ConfigError, match=r"'.*latin\.txt': byte 3 is not UTF-8"):
        read_text(tmp_path / "latin.txt")
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ConfigError, match=r"t\.jsonl': it holds JSON lines.*jq -r \.text t\.jsonl"):
        read_text(tmp_path / "t.jsonl")


def test_progress_is_a_line_per_stage_in_a_pipe(capsys):
    with window_progress("perplexity") as progress:
        for done in range(1, 4):
            progress(done, 9)
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line.partition(" (")[0] for line in captured.err.splitlines()]
    assert lines == ["loading", "perplexity, 1 of 9"]


def test_progress_is_a_bar_per_stage_on_a_terminal(monkeypatch):
    terminal = Console(file=io.StringIO(), force_terminal=True, width=80)
    monkeypatch.setattr(output, "err_console", terminal)
    with window_progress("perplexity") as progress:
        progress(3, 9)
    assert "loading" in terminal.file.getvalue()
    assert "3/9" in terminal.file.getvalue()


def test_small_divergences_are_formatted_in_scientific_notation():
    assert [format_nats(v) for v in (0, 0.17432, 0.00012, -0.00012)] == [
        "0.0000",
        "0.1743",
        "1.20e-04",
        "-1.20e-04",
    ]
    assert [format_standard_error(v, 2) for v in (None, 1.234)] == ["–", "± 1.23"]


def test_text_is_named():
    assert describe_text(Path("a.txt")) == "a.txt"
    assert "WikiText-2" in describe_text(None)

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from halfbyte.cli.output import console, make_console, print_json


@dataclass
class Point:
    x: float
    where: Path


class Card:
    def to_dict(self) -> dict[str, object]:
        return {"points": (Point(1.5, Path("a/b")), Point(float("nan"), Path("c")))}


def test_json_takes_dataclasses_paths_and_tuples(capsys):
    print_json({1: Card(), "none": None, "inf": float("-inf"), "yes": True})
    read = json.loads(capsys.readouterr().out)
    assert read == {
        "1": {"points": [{"x": 1.5, "where": "a/b"}, {"x": None, "where": "c"}]},
        "none": None,
        "inf": None,
        "yes": True,
    }


def test_brackets_and_colons_come_out_as_they_are(capsys):
    console.print("shape [3, 4] of :smile: [bold]x[/bold]")
    assert capsys.readouterr().out == "shape [3, 4] of :smile: [bold]x[/bold]\n"


def test_output_to_a_pipe_is_plain_and_wide(capsys):
    make_console(stderr=True).print("word " * 30, style="red")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.rstrip() == ("word " * 30).rstrip()

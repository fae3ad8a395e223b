from __future__ import annotations

import errno
import json
from pathlib import Path
from unittest.mock import create_autospec

import pytest
from tests.judge.examples import make_comparison

from halfbyte.cli.main import main
from halfbyte.judge import compare as module
from halfbyte.judge.compare import compare


@pytest.fixture
def compared(monkeypatch):
    fake = create_autospec(compare, return_value=make_comparison())
    monkeypatch.setattr(module, "compare", fake)
    return fake


@pytest.mark.parametrize(("harmful", "code"), [(60, 1), (9, 2)])
def test_exit_code_is_the_verdict(monkeypatch, harmful, code, capsys):
    fake = create_autospec(compare, return_value=make_comparison(harmful=harmful))
    monkeypatch.setattr(module, "compare", fake)
    assert main(["compare", "base", "small"]) == code
    out = capsys.readouterr().out
    assert ("Fail." if code == 1 else "Inconclusive.") in out
    assert "model.layers.7.mlp.down_proj" in out


@pytest.mark.parametrize("words", [["compare", "base"], ["compare", "a", "b", "--windows", "x"]])
def test_wrong_options_do_not_exit_with_a_verdicts_code(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 3


def test_errors_do_not_exit_with_a_verdicts_code(capsys):
    assert main(["compare", "no-such-folder", "b"]) == 3
    assert "Cannot load the model 'no-such-folder'" in capsys.readouterr().err
    assert main(["compare", "a", "b", "--margin", "200"]) == 3
    assert "margin of accuracy is 2.0" in capsys.readouterr().err


def test_options_reach_the_comparison(compared, tmp_path, capsys):
    tasks = tmp_path / "mine.jsonl"
    tasks.write_text('{"prompt": "x", "answer": "1", "kind": "k"}\n')
    text = tmp_path / "held.txt"
    text.write_text("words")
    main(
        f"compare base small --tasks {tasks} --slice kind --builtin 2 --text {text} --margin 1 "
        "--perplexity-margin 5 --windows 0 --resume --cache c --json".split()
    )
    assert json.loads(capsys.readouterr().out)["outcome"] == "inconclusive"
    args, more = compared.call_args
    assert args == ("base", "small")
    assert [item.name for item in more["items"]][:2] == ["mine:1", "arithmetic:0:1"]
    assert len(more["items"]) == 11
    assert more["items"][0].slices == {"task": "mine", "kind": "k"}
    assert more["documents"] == {"held": ["words"]}
    assert (more["config"].margins.accuracy, more["config"].margins.perplexity) == (0.01, 0.05)
    assert more["config"].windows is None
    assert (more["resume"], more["cache"]) == (True, Path("c"))


def test_progress_in_a_pipe_goes_to_stderr_as_lines(monkeypatch, capsys):
    def working(base, candidate, *, progress, **more):
        progress("base: loading", 0, 1)
        progress("base: tasks", 0, 300)
        progress("base: tasks", 8, 300)
        return make_comparison()

    monkeypatch.setattr(module, "compare", working)
    main(["compare", "base", "small", "--json"])
    captured = capsys.readouterr()
    assert json.loads(captured.out)["outcome"] == "inconclusive"
    first, second = captured.err.splitlines()
    assert first.startswith("base: loading (")
    assert second.startswith("base: tasks, 0 of 300 (")
    assert "base: " not in captured.out


def test_texts_with_the_same_stem_are_named_by_path_and_windows_must_be_positive(
    compared, tmp_path, capsys
):
    texts = [tmp_path / language / "held.txt" for language in ("en", "de")]
    for path in texts:
        path.parent.mkdir()
        path.write_text(path.parent.name)
    main(["compare", "base", "small", "--text", str(texts[0]), "--text", str(texts[1])])
    documents = compared.call_args.kwargs["documents"]
    assert documents == {texts[0].as_posix(): ["en"], texts[1].as_posix(): ["de"]}
    assert main(["compare", "base", "small", "--windows", "-3"]) == 3
    assert "windows is -3; it must be 1 or more" in capsys.readouterr().err


def test_defaults_use_all_builtin_tasks_and_texts(compared):
    main(["compare", "base", "small"])
    more = compared.call_args.kwargs
    assert (more["items"], more["documents"], more["config"].builtin_items) == (None, None, 60)
    main(["compare", "base", "small", "--no-text"])
    assert compared.call_args.kwargs["documents"] == {}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--builtin -3", "builtin_items is -3; it must be 0 or more"),
        ("--slice kind", "--slice kind applies to task files, and none is given"),
        ("-o here/file", "Cannot create the report folder 'here/file'"),
        ("-o small/report", "output small/report is inside the model's own folder small, which"),
    ],
)
def test_invalid_options_are_rejected_before_the_comparison(
    compared, tmp_path, monkeypatch, capsys, words, told
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").touch()
    assert main(["compare", "base", "small", *words.split()]) == 3
    assert told in capsys.readouterr().err
    compared.assert_not_called()


def test_text_and_no_text_exclude_each_other(compared, capsys):
    with pytest.raises(SystemExit):
        main(["compare", "base", "small", "--text", "mine.txt", "--no-text"])
    assert "not allowed with argument --text" in capsys.readouterr().err


def test_output_folder_gets_every_format(compared, tmp_path, capsys):
    main(["compare", "base", "small", "-o", str(tmp_path / "out"), "--format", "md"])
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"report.html", "report.json", "report.md", "junit.xml"}
    captured = capsys.readouterr()
    assert captured.out.startswith("### ❔")
    assert "wrote" in captured.err


def test_a_comparison_that_fails_leaves_no_folder(tmp_path, capsys):
    (tmp_path / "reports").mkdir()
    assert main(["compare", "no", "b", "-o", str(tmp_path / "reports" / "new" / "one")]) == 3
    assert not list((tmp_path / "reports").iterdir())
    assert main(["compare", "no", "b", "-o", str(tmp_path / "reports")]) == 3
    assert (tmp_path / "reports").is_dir()


def test_a_report_that_cannot_be_written_does_not_hide_the_verdict(
    compared, tmp_path, monkeypatch, capsys
):
    def full(path, chunks):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("halfbyte.judge.report.write_atomically", full)
    assert main(["compare", "base", "small", "-o", str(tmp_path / "report")]) == 3
    captured = capsys.readouterr()
    assert "Inconclusive." in captured.out
    assert "No space left on device" in captured.err

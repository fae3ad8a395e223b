from __future__ import annotations

import argparse
import errno
import os
import subprocess
import sys
import types

import pytest

from halfbyte.cli import main as cli
from halfbyte.errors import CheckpointError, ConfigError, MissingExtraError
from halfbyte.version import __version__


@pytest.fixture
def verb(monkeypatch):
    """A verb `try` that does what the test says."""
    module = types.ModuleType("halfbyte_test_verb")
    module.HELP = "try it"
    module.add_arguments = lambda parser: parser.add_argument("--number", type=int, default=3)
    module.run = lambda args: 0
    monkeypatch.setitem(sys.modules, "halfbyte_test_verb", module)
    monkeypatch.setattr(cli, "VERBS", {"try": "halfbyte_test_verb", "other": "not.imported"})
    return module


def raising(error: BaseException):
    def run(args: argparse.Namespace) -> int:
        raise error

    return run


def test_verb_gets_its_options_and_gives_the_exit_code(verb):
    verb.run = lambda args: args.number
    assert cli.main(["try", "--number", "7"]) == 7


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("bits is 5; allowed are 2, 3, 4, 8."), 2),
        (CheckpointError("x.scales has 3 columns, but x.qweight has [4]."), 1),
        (MissingExtraError('needs gguf: pip install "halfbyte[convert]"'), 1),
    ],
)
def test_halfbyte_error_is_one_line_without_traceback(verb, capsys, error, code):
    verb.run = raising(error)
    assert cli.main(["try"]) == code
    captured = capsys.readouterr()
    assert captured.err == f"halfbyte: {error}\n"
    assert captured.out == ""


@pytest.mark.parametrize("words", [["--debug", "try"], ["try", "--debug"]])
def test_debug_shows_the_traceback(verb, capsys, words):
    verb.run = raising(CheckpointError("broken"))
    assert cli.main(words) == 1
    assert "Traceback" in capsys.readouterr().err


def test_interrupt_exits_with_130(verb, capsys):
    verb.run = raising(KeyboardInterrupt())
    assert cli.main(["try"]) == 130
    assert capsys.readouterr().err == "halfbyte: Interrupted.\n"


def test_interrupt_hints_at_resume(verb, capsys):
    verb.add_arguments = lambda parser: parser.add_argument("--resume", action="store_true")
    verb.run = raising(KeyboardInterrupt())
    assert cli.main(["try"]) == 130
    assert "Run the same command with --resume to continue." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device."),
        (PermissionError(errno.EACCES, "Permission denied", "a/b"),
         "Cannot use a/b: Permission denied."),
    ],
)  # fmt: skip
def test_os_error_names_the_file(verb, capsys, error, told):
    verb.run = raising(error)
    assert cli.main(["try"]) == 1
    assert capsys.readouterr().err == f"halfbyte: {told}\n"


@pytest.mark.parametrize("code", [1, 3])
def test_bug_shows_its_traceback_and_uses_the_verbs_exit_code(verb, capsys, code):
    if code != 1:
        verb.EXIT_ERROR = code
    verb.run = raising(ZeroDivisionError("ours"))
    assert cli.main(["try"]) == code
    told = capsys.readouterr().err
    assert "Traceback" in told
    assert "ZeroDivisionError: ours" in told
    assert "a bug in halfbyte" in told


def test_unknown_verb_names_the_nearest(capsys):
    assert cli.main(["quantise", "model"]) == 2
    error = capsys.readouterr().err
    assert "Unknown verb 'quantise'. Did you mean 'quantize'?" in error
    assert "perplexity" in error


def test_unknown_option_is_a_usage_error(verb, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["try", "--numbr", "7"])
    assert exit_.value.code == 2
    told = capsys.readouterr().err
    assert "unrecognized arguments: --numbr 7. Did you mean --number?" in told
    assert told.startswith("usage: halfbyte try"), "how to use the verb, not the whole command"


def test_no_verb_prints_help_and_exits_with_2(capsys):
    assert cli.main([]) == 2
    error = capsys.readouterr().err
    assert all(name in error for name in cli.VERBS)


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"halfbyte {__version__}\n"


@pytest.mark.parametrize("words", [["--help"], *([name, "--help"] for name in cli.VERBS)])
def test_help_imports_neither_torch_nor_transformers(words):
    program = (
        "import sys\nfrom halfbyte.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as exit_:\n    code = exit_.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(code or (f'imported {sorted(heavy)}' if heavy else 0))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "usage: halfbyte" in done.stdout


@pytest.mark.parametrize("code", [1, 3])
def test_closed_pipe_is_no_error_and_no_verdict(code):
    program = (
        "import sys, types\n"
        "from halfbyte.cli import main as cli\n"
        "verb = types.ModuleType('v')\n"
        f"verb.EXIT_ERROR = {code}\n"
        "verb.HELP = ''\n"
        "verb.add_arguments = lambda parser: None\n"
        "verb.run = lambda args: [print('x' * 100) for _ in range(10000)] and 0\n"
        "sys.modules['v'] = verb\n"
        "cli.VERBS['v'] = 'v'\n"
        "sys.exit(cli.main(['v']))\n"
    )
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=write_end, stderr=subprocess.PIPE, check=False
    )
    os.close(write_end)
    assert done.returncode == code
    assert done.stderr == b""


def test_verb_of_two_words_is_found_and_its_first_word_stays_a_verb(capsys):
    assert cli.main(["serve", "calibrate", "no-such-report.json"]) == 2
    assert "no-such-report.json" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["--debug", "serve", "calibrate", "--help"])
    assert "usage: halfbyte serve calibrate" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    assert "usage: halfbyte serve [-h]" in capsys.readouterr().out

"""`halfbyte quantize`: its fixed option names, its output, its exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.families import token_lists, write_family

from halfbyte.cli import main as cli
from halfbyte.cli.main import build_parser
from halfbyte.quant_config import CalibrationConfig, Override, QuantConfig, ResourceConfig
from halfbyte.quantize.report import load_report


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_family(tmp_path / "model", "llama", num_hidden_layers=2)
    lines = [json.dumps({"input_ids": ids}) for ids in token_lists(6, 32)]
    (tmp_path / "ids.jsonl").write_text("\n".join(lines))
    return tmp_path / "model"


def arguments(model: Path, *more: str) -> list[str]:
    folder = model.parent
    return [
        "quantize",
        str(model),
        "-o",
        str(folder / "out"),
        "--calibration",
        str(folder / "ids.jsonl"),
        *("--group-size", "32", "--length", "32"),
        *more,
    ]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the command line hands to the pipeline, which is interrupted at once."""
    seen: dict[str, Any] = {}

    def quantize(model: object, output: object, **keywords: Any) -> None:
        seen.update(model=model, output=output, **keywords)
        raise KeyboardInterrupt

    monkeypatch.setattr("halfbyte.quantize.pipeline.quantize", quantize)
    return seen


def test_every_option_reaches_the_configs(asked: dict[str, Any]) -> None:
    words = (
        "quantize some/model -o out --bits 3 --group-size 64 --asymmetric --desc-act "
        "--calibration text.jsonl --samples 7 --length 99 --batch-size 5 --damping 0.05 "
        "--skip lm_head --skip v_proj --override down_proj=bits:8,group_size:32 "
        "--override q_proj=symmetric:true --lm-head --seed 11 --resume --json"
    )
    assert cli.main(words.split()) == 130
    assert asked["model"] == "some/model"
    assert asked["output"] == Path("out")
    assert asked["text"] == "text.jsonl"
    assert asked["resume"] is True
    assert asked["quality"] is True
    assert asked["config"] == QuantConfig(
        bits=3,
        group_size=64,
        symmetric=False,
        desc_act=True,
        damping=0.05,
        skip=("lm_head", "v_proj"),
        overrides=(
            Override(pattern="down_proj", bits=8, group_size=32),
            Override(pattern="q_proj", symmetric=True),
        ),
        lm_head=True,
    )
    assert asked["calibration"] == CalibrationConfig(samples=7, length=99, batch_size=5, seed=11)
    assert asked["resources"] == ResourceConfig()


def test_further_options_reach_the_configs(asked: dict[str, Any]) -> None:
    words = (
        "quantize m --output out --group-size -1 --no-act-order --ragged-groups --memory 8GB "
        "--device cuda:1 --dtype bfloat16 --no-quality"
    )
    assert cli.main(words.split()) == 130
    assert asked["config"] == QuantConfig(group_size=-1, act_order=False, ragged_groups=True)
    assert asked["resources"] == ResourceConfig(memory="8GB", device="cuda:1", dtype="bfloat16")
    assert asked["quality"] is False
    assert asked["text"] is None


def test_defaults_are_those_of_the_dataclasses(asked: dict[str, Any]) -> None:
    cli.main(["quantize", "m", "-o", "out"])
    assert asked["config"] == QuantConfig()
    assert asked["calibration"] == CalibrationConfig(samples=128, length=2048, seed=0)
    assert asked["resume"] is False
    assert (asked["config"].bits, asked["config"].group_size) == (4, 128)
    assert asked["config"].damping == 0.01


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        build_parser(("quantize",)).parse_args(["quantize", "--help"])
    text = capsys.readouterr().out
    fixed = (
        "--bits --group-size --asymmetric --desc-act --calibration --samples --length --batch-size "
        "--damping --skip --override --lm-head --seed --resume --json"
    )
    assert all(name in text for name in fixed.split())


def test_json_is_the_report(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments(model, "--json")) == 0
    printed = json.loads(capsys.readouterr().out)
    saved = load_report(model.parent / "out").to_dict()
    assert printed == json.loads(json.dumps(saved))
    assert len(printed["modules"]) == 14
    assert printed["config"]["group_size"] == 32


def test_table_says_what_it_cost(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments(model)) == 0
    captured = capsys.readouterr()
    assert "14 quantized, 0 in 16 bits" in captured.out
    assert "bits per weight" in captured.out
    assert "peak memory" in captured.out
    # The plan stands on the other stream, before the work.
    for fact in ("memory  ", "disk    ", "time    at least"):
        assert fact.strip() in captured.err


def test_table_says_how_much_was_left(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments(model, "--skip", "mlp")) == 0
    left = 3 * 64 * 96
    share = left / (left + 2 * 64 * 64 + 2 * 32 * 64)
    assert f"8 quantized, 6 in 16 bits, {share:.0%} of the blocks' weights" in " ".join(
        capsys.readouterr().out.split()
    )


def test_resume_of_a_complete_run_gives_its_report(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments(model, "--json")) == 0
    first = capsys.readouterr().out
    assert cli.main(arguments(model, "--json", "--resume")) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(first)


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (("--damping", "2"), 2, "halfbyte: damping is 2.0; allowed is 0 < damping < 1"),
        (("--group-size", "0"), 2, "halfbyte: group_size is 0; allowed are -1"),
        (("--skip", "("), 2, "halfbyte: The skip pattern '(' is not a regular expression"),
        (("--samples", "0"), 2, "halfbyte: samples is 0; it must be a whole number, 1 or more"),
        (("--memory", "much"), 2, "halfbyte: memory is 'much'; write a number and a unit"),
        (("--device", "abacus"), 2, "halfbyte: device is 'abacus', which this machine"),
        (("--calibration", "no.txt"), 1, "halfbyte: Cannot read calibration file no.txt"),
        (("--skip", "."), 2, "halfbyte: The skip patterns match all 14 linears of model"),
    ],
)
def test_wrong_value_is_one_message_and_a_code(
    more: tuple[str, ...],
    code: int,
    message: str,
    model: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(arguments(model, *more)) == code
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--bits", "5"), "argument --bits: invalid choice"),
        (("--bits", "four"), "argument --bits: invalid int value: 'four'"),
        (("--override", "q_proj"), "it has no 'PATTERN=KEY:VALUE'"),
        (("--override", "q_proj=bit:8"), "Allowed keys: bits, group_size, symmetric"),
        (("--dtype", "int8"), "argument --dtype: invalid choice"),
        (("--group", "32"), "unrecognized arguments: --group 32"),
    ],
)
def test_wrong_usage_is_refused_by_the_parser(
    more: tuple[str, ...], message: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments(model, *more))
    assert message in capsys.readouterr().err


def test_output_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["quantize", "model"])
    assert "the following arguments are required: -o/--output" in capsys.readouterr().err


def test_missing_model_and_used_output(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments(model.parent / "gone")) == 1
    assert "halfbyte: There is no model folder" in capsys.readouterr().err
    (model.parent / "out").mkdir(exist_ok=True)
    (model.parent / "out" / "mine.txt").write_text("keep")
    assert cli.main(arguments(model)) == 2
    assert "is not empty (1 files, such as mine.txt)" in capsys.readouterr().err

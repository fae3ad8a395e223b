"""From a model folder to a checkpoint: what is refused, and before what."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.families import token_lists, write_family
from tests.helpers.runs import SMALL, quantize, run

import halfbyte
from halfbyte.errors import (
    CalibrationError,
    CheckpointError,
    ConfigError,
    JournalError,
    ModelError,
)
from halfbyte.quant_config import QuantConfig, ResourceConfig
from halfbyte.quantize.progress import SilentProgress
from halfbyte.quantize.report import load_report


@pytest.mark.parametrize("name", ["config", "calibration", "resources"])
def test_dict_of_settings_is_refused(tmp_path: Path, name: str) -> None:
    message = r"\{'bits': 4\} is a dict; a \w+Config is needed\. Make one with halfbyte\.\w+Config"
    with pytest.raises(ConfigError, match=message):
        halfbyte.quantize(tmp_path, tmp_path / "out", **{name: {"bits": 4}})


def test_everything_skipped_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"match all 14 linears of .*nothing is left to quantize"):
        run(tmp_path, QuantConfig(skip=(".",)))
    with pytest.raises(CheckpointError, match=r"no linear is quantized\. Loosen the skip patterns"):
        run(tmp_path, QuantConfig(skip=(".",)), family="mixtral")


def test_group_size_that_fits_no_layer_is_refused_before_the_run(tmp_path: Path) -> None:
    found = r"group_size is 7, but none of the 14 linears .* 7 divides \d+ inputs\. .*--group-size"
    with pytest.raises(ConfigError, match=found):
        run(tmp_path, QuantConfig(group_size=7))
    assert not (tmp_path / "out" / ".halfbyte" / "journal.jsonl").exists()


def test_a_disk_that_is_too_small_is_refused_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=3000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    with pytest.raises(
        ConfigError, match=r"has 3\.0 kB free; the checkpoint needs \d.* temporarily"
    ):
        run(tmp_path, QuantConfig())
    monkeypatch.undo()
    # and nothing stands in the way of the next try
    run(tmp_path, QuantConfig())


def test_output_inside_the_models_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(ConfigError, match=r"model/4bit is inside the model's own folder .*model"):
        halfbyte.quantize(tmp_path / "model", tmp_path / "model" / "4bit")


def test_output_folder_in_use_is_refused(tmp_path: Path) -> None:
    write_family(tmp_path / "base", "llama", **SMALL)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("irreplaceable")
    with pytest.raises(ConfigError, match=r"out is not empty \(1 files, such as thesis\.tex\)"):
        quantize(tmp_path / "base", tmp_path / "out", QuantConfig())
    inside = tmp_path / "out" / "thesis.tex" / "x" / "y"
    with pytest.raises(ConfigError, match=r"x/y lies in .*thesis\.tex, which is a file\. Name"):
        quantize(tmp_path / "base", inside, QuantConfig())
    with pytest.raises(ConfigError, match=r"thesis\.tex is a file. Name a folder"):
        quantize(tmp_path / "base", tmp_path / "out" / "thesis.tex", QuantConfig())
    assert (tmp_path / "out" / "thesis.tex").read_text() == "irreplaceable"


@pytest.mark.parametrize("name", ["no-such-folder-here", "./no/where", "a/b/c", "~/no-such-folder"])
def test_missing_model_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="There is no model folder"):
        halfbyte.quantize(name, tmp_path / "o")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("name", "found"), [("model.safetensors", r"it is a file\."), ("m.gguf", "it is a GGUF file")]
)
def test_file_given_as_a_model_is_said_to_be_one(name: str, found: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ModelError, match=rf"Cannot use .*{name} as a model: {found}"):
        halfbyte.quantize(tmp_path / name, tmp_path / "o")


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "meta"])
def test_missing_device_is_refused(device: str, tmp_path: Path) -> None:
    write_family(tmp_path / "base", "llama", **SMALL)
    with pytest.raises(ConfigError, match=f"device is '{device}', which this machine"):
        quantize(
            tmp_path / "base",
            tmp_path / "out",
            QuantConfig(),
            resources=ResourceConfig(device=device),
        )


def test_ids_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"token ids 5\.\.500; .* embedding has 128 rows"):
        run(tmp_path, QuantConfig(), text=[[5, 500]])


def test_failed_run_can_be_restarted_in_the_same_folder(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError):
        run(tmp_path, QuantConfig(group_size=32), text=[[5, 500]])
    assert quantize(tmp_path / "base", tmp_path / "out", QuantConfig(group_size=32)).modules


def test_complete_run_is_returned_only_for_the_same_inputs(tmp_path: Path) -> None:
    config = QuantConfig(group_size=32)
    _, report, _ = run(tmp_path, config, changes={"num_hidden_layers": 1})
    plans: list[str] = []
    progress = SilentProgress()
    progress.started = plans.extend  # type: ignore[method-assign,assignment]
    base, out = tmp_path / "base", tmp_path / "out"
    again = quantize(base, out, config, resume=True, progress=progress)
    assert again == load_report(out)
    assert again.modules == report.modules
    assert plans == ["complete already; nothing was done"]
    write_family(tmp_path / "other", "llama", num_hidden_layers=1, intermediate_size=128)
    same: dict[str, Any] = {"model": base, "config": config}
    for change, told in (
        ({"config": QuantConfig(bits=3, group_size=32)}, r"config\.bits: 4 then, 3 now"),
        ({"text": token_lists(6, 32, seed=9)}, r"calibration\.digest: \".*\.\.\. then, \""),
        ({"text": "self"}, r"calibration\.digest: \".*\.\.\. then, \"input-self-"),
        ({"model": tmp_path / "other"}, r"model: \".*\.\.\. then, \""),
        (
            {"resources": ResourceConfig(dtype="bfloat16")},
            r"resources\.dtype: \"auto\" then, \"bfloat16\" now",
        ),
    ):
        given = {**same, **change}
        with pytest.raises(JournalError, match=rf"is complete and was made with .* \({told}"):
            quantize(given.pop("model"), out, given.pop("config"), resume=True, **given)


def test_quantized_model_is_not_quantized_again(tmp_path: Path) -> None:
    run(tmp_path, QuantConfig(group_size=32))
    with pytest.raises(ModelError, match=r"is already quantized \(gptq\)"):
        quantize(tmp_path / "out", tmp_path / "again", QuantConfig())


def test_license_that_cannot_be_copied_is_refused_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "LICENSE").symlink_to("../elsewhere")
    with pytest.raises(CheckpointError, match=r"missing the file LICENSE, which is a link to"):
        halfbyte.quantize(tmp_path / "base", tmp_path / "out")
    assert not (tmp_path / "out").exists()

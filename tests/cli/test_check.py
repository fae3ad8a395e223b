from __future__ import annotations

import json

import pytest
from tests.helpers.tiny_gptq import TinyLinear, write_model

from halfbyte.checkpoint.consumers import CONSUMERS
from halfbyte.cli.main import main

NAME = "model.layers.0.mlp.down_proj"


def test_table_has_every_program_and_reason(tmp_path, capsys):
    write_model(tmp_path, {NAME: TinyLinear(bits=3)})
    assert main(["check", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for consumer in CONSUMERS:
        assert consumer.label in out
    assert "1 quantized linears (1 x 3 bits, group 32, symmetric)" in out
    assert "this one has 3" in out


def test_json_has_one_verdict_for_each_program_and_size(tmp_path, capsys):
    write_model(tmp_path, {NAME: TinyLinear(zero_offset=0)}, labels={"checkpoint_format": "gptq"})
    assert main(["check", str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    keys = [(v["consumer"], v["tensor_parallel"]) for v in report["verdicts"]]
    assert len(keys) == len(set(keys)) == 3 + 3 * 4
    assert report["verified_tensors"] is None
    assert "stores 8 everywhere" in report["notes"][0]


@pytest.mark.parametrize(
    ("names", "code"), [([], 0), (["transformers"], 0), (["gguf", "vllm-marlin"], 1)]
)
def test_exit_code_follows_what_is_required(tmp_path, capsys, names, code):
    write_model(tmp_path, {NAME: TinyLinear(bits=3)})
    options = [word for name in names for word in ("--require", name)]
    assert main(["check", str(tmp_path), *options]) == code
    capsys.readouterr()


def test_verify_without_digests_fails_with_its_reason(tmp_path, capsys):
    write_model(tmp_path, {NAME: TinyLinear()})
    assert main(["check", str(tmp_path), "--verify"]) == 1
    assert "it has no checksums.json" in capsys.readouterr().err


def test_damaged_checkpoint_fails_without_traceback(tmp_path, capsys):
    write_model(tmp_path, {NAME: TinyLinear()})
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    assert main(["check", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("halfbyte: Cannot read")

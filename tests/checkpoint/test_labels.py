from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from halfbyte.checkpoint.labels import describe_missing_config, read_labels, read_model_config
from halfbyte.errors import CheckpointError

FULL = {"bits": 4, "group_size": 128, "sym": True, "desc_act": False, "quant_method": "gptq"}


def write(folder: Path, **files: Any) -> Path:
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / f"{name}.json").write_text(text)
    return folder


def as_section(labels: dict[str, Any]) -> dict[str, Any]:
    return {"model_type": "llama", "quantization_config": labels}


@pytest.mark.parametrize("name", ["config", "quantize_config", "quant_config"])
def test_config_is_found_in_every_place(tmp_path, name):
    labels = read_labels(write(tmp_path, **{name: as_section(FULL) if name == "config" else FULL}))
    assert labels.source == f"{name}.json"
    assert (labels.bits, labels.group_size, labels.symmetric) == (4, 128, True)
    assert labels.desc_act is False
    assert labels.zero_offset == 1
    assert labels.notes == ()
    assert labels.raw == FULL


def test_config_inside_text_config_is_found(tmp_path):
    write(tmp_path, config={"text_config": {"quantization_config": FULL | {"bits": 8}}})
    labels = read_labels(tmp_path)
    assert (labels.source, labels.bits) == ("config.json[text_config]", 8)


def test_aliases_of_older_tools_are_taken(tmp_path):
    old = {"w_bit": 4, "q_group_size": 64, "format": "GPTQ_V2", "method": "gptq"}
    labels = read_labels(write(tmp_path, quant_config=old))
    assert (labels.bits, labels.group_size, labels.checkpoint_format) == (4, 64, "gptq_v2")
    assert labels.zero_offset == 0


def test_name_of_the_format_beats_its_alias(tmp_path):
    write(tmp_path, quantize_config=FULL | {"checkpoint_format": "gptq", "format": "gptq_v2"})
    assert read_labels(tmp_path).checkpoint_format == "gptq"


def test_lists_of_modules_are_flattened(tmp_path):
    modules = [["self_attn.q_proj", "self_attn.k_proj"], ["mlp.down_proj"]]
    write(tmp_path, quantize_config=FULL | {"modules_in_block_to_quantize": modules})
    assert read_labels(tmp_path).modules_in_block == (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "mlp.down_proj",
    )


def test_no_config_gives_no_labels_and_a_note(tmp_path):
    labels = read_labels(tmp_path)
    assert (labels.source, labels.bits, labels.zero_offset) == (None, None, 1)
    assert "No quantization config" in labels.notes[0]


def test_where_files_disagree_config_json_wins_with_a_note(tmp_path):
    write(
        tmp_path,
        config=as_section(FULL | {"group_size": 64}),
        quantize_config=FULL | {"checkpoint_format": "gptq_v2"},
    )
    labels = read_labels(tmp_path)
    assert labels.group_size == 64
    assert list(labels.disagreements) == ["group_size"]
    assert "group_size is 64 in config.json and 128 in quantize_config.json" in labels.notes[0]
    assert labels.checkpoint_format == "gptq_v2"  # the one file that says it


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            {"quant_method": "awq"},
            "method in quantize_config.json is 'awq'; only 'gptq' is supported",
        ),
        (
            {"w_bit": 4, "q_group_size": 128, "version": "GEMM"},
            "method in quantize_config.json is 'awq'",
        ),
        (
            FULL | {"quant_method": "bitsandbytes"},
            "method in quantize_config.json is 'bitsandbytes'",
        ),
        (FULL | {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'; allowed are gptq, "),
        (FULL | {"pack_dtype": "int16"}, "pack_dtype 'int16'; only int32"),
        (FULL | {"bits": "four"}, "Cannot use bits of quantize_config.json: it is 'four'; a int"),
        (FULL | {"bits": True}, "Cannot use bits .* 'True'"),
        (FULL | {"sym": 1}, "Cannot use sym .* '1'; a bool"),
        (FULL | {"group_size": 0}, "Cannot use group_size .* it is 0; allowed are -1 or"),
        (FULL | {"dynamic": []}, "Cannot use dynamic"),
        (FULL | {"dynamic": {"-:x": 3}}, "the value of '-:x' is '3'"),
        (FULL | {"modules_in_block_to_quantize": [["a", 1]]}, "modules_in_block_to_quantize of"),
    ],
)
def test_configs_that_cannot_be_used_are_refused(tmp_path, labels, message):
    with pytest.raises(CheckpointError, match=message):
        read_labels(write(tmp_path, quantize_config=labels))


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1, "a": 2}', "\x00"])
@pytest.mark.parametrize("name", ["config", "quantize_config"])
def test_damaged_json_is_refused_with_its_name(tmp_path, name, text):
    with pytest.raises(CheckpointError, match=rf"{name}\.json"):
        read_labels(write(tmp_path, **{name: text}))


def test_section_that_is_no_object_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"quantization_config of config.json .* it is a str"):
        read_labels(write(tmp_path, config={"quantization_config": "gptq"}))


def test_model_config_is_empty_where_there_is_none(tmp_path):
    assert read_model_config(tmp_path) == {}


def test_folder_without_a_model_config_is_described(tmp_path):
    assert describe_missing_config(tmp_path / "nowhere") == "no such folder"
    (tmp_path / "file").write_text("")
    assert describe_missing_config(tmp_path / "file") == "it is a file"
    assert describe_missing_config(tmp_path) == "it has no config.json"
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    advice = (
        f"GGUF file. To make a folder of it: halfbyte convert {tmp_path / 'm.gguf'} --to hf -o OUT"
    )
    assert describe_missing_config(tmp_path / "m.gguf") == f"it is a {advice}"
    assert describe_missing_config(tmp_path) == f"it has no config.json, only a {advice}"
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "me/base"}')
    found = describe_missing_config(tmp_path)
    assert found.startswith("it is an adapter on me/base (adapter_config.json and no config.json)")
    assert found.endswith(f"halfbyte merge BASE {tmp_path} -o OUT")

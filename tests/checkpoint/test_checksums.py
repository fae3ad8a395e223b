from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from halfbyte.checkpoint.checksums import digest_config, verify_checksums, write_checksums
from halfbyte.checkpoint.shards import TensorFiles
from halfbyte.checkpoint.write import shard_name, write_index, write_shard
from halfbyte.errors import CheckpointError

CONFIG = {"bits": 4, "sym": True}
TENSORS = {"a": torch.arange(5), "b": torch.arange(7, dtype=torch.int16), "c": torch.ones(3)}


@pytest.fixture
def folder(tmp_path) -> Path:
    weight_map = {name: shard_name(i, 3) for i, name in enumerate(TENSORS, start=1)}
    weight_map["d"] = weight_map["c"]
    digests = []
    for name, tensor in TENSORS.items():
        tensors = {name: tensor} | ({"d": torch.zeros(4)} if name == "c" else {})
        digests.append(write_shard(tmp_path / weight_map[name], tensors))
    write_index(tmp_path, weight_map, 0)
    write_checksums(tmp_path, digests, CONFIG)
    return tmp_path


def verify(folder, config=CONFIG):
    return verify_checksums(TensorFiles.open(folder), config)


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def test_untouched_checkpoint_verifies(folder):
    assert verify(folder) == 4
    assert verify(folder, dict(reversed(CONFIG.items()))) == 4


def test_digest_of_a_file_is_the_one_that_sha256sum_prints(folder):
    recorded = json.loads((folder / "checksums.json").read_text())
    assert recorded["version"] == 1
    assert set(recorded["files"]) == {shard_name(i, 3) for i in (1, 2, 3)}
    for name, record in recorded["files"].items():
        assert record["sha256"] == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    data = TENSORS["a"].numpy().tobytes()
    digest = recorded["files"][shard_name(1, 3)]["tensors"]["a"]
    assert digest == hashlib.sha256(data).hexdigest()[:16]


@pytest.mark.parametrize("name", ["c", "d"])
def test_one_flipped_bit_is_found_in_its_tensor(folder, name):
    info = TensorFiles.open(folder).infos[name]
    flip(info.file, info.offset + 5)
    with pytest.raises(CheckpointError, match=rf"Tensor {name} of .*00003-of-00003.safetensors"):
        verify(folder)


def test_change_of_the_header_alone_is_found(folder):
    file = folder / shard_name(2, 3)
    file.write_bytes(file.read_bytes().replace(b'"pt"', b'"np"'))
    with pytest.raises(CheckpointError, match=r"The header of .*00002-of-00003.safetensors"):
        verify(folder)


def test_changed_config_is_found(folder):
    with pytest.raises(
        CheckpointError, match=r"The quantization config .* was changed after writing"
    ):
        verify(folder, CONFIG | {"sym": False})
    assert digest_config({}) != digest_config(CONFIG)


def test_other_weight_files_are_found(folder):
    (folder / "model.safetensors.index.json").unlink()
    for number in (1, 2, 3):
        (folder / shard_name(number, 3)).rename(folder / f"x-0000{number}-of-00003.safetensors")
    with pytest.raises(
        CheckpointError, match=r"does not list the same weight files as the folder \(model-00001"
    ):
        verify(folder)


def test_missing_digests_are_explained(folder):
    (folder / "checksums.json").unlink()
    with pytest.raises(CheckpointError, match=r"it has no checksums\.json"):
        verify(folder)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"version": 2, "quantization_config": "", "files": {}}',
        '{"version": 1, "quantization_config": 1, "files": {}}',
        '{"version": 1, "quantization_config": "", "files": {"x": 1}}',
        '{"version": 1, "quantization_config": "", "files": {"x": {"sha256": 1, "tensors": {}}}}',
    ],
)
def test_damaged_digests_are_refused(folder, text):
    (folder / "checksums.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"checksums\.json"):
        verify(folder)

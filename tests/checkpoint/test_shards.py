from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from halfbyte.checkpoint.shards import TensorFiles
from halfbyte.errors import CheckpointError

A, B = torch.arange(6.0).reshape(2, 3), torch.arange(4, dtype=torch.int32)
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def write_sharded(folder: Path, weight_map: dict[str, str] | None = None) -> Path:
    save_file({"a": A}, folder / SHARDS[0])
    save_file({"b": B}, folder / SHARDS[1])
    index = {"metadata": {}, "weight_map": weight_map or {"a": SHARDS[0], "b": SHARDS[1]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def assert_loads(folder: Path, expected: dict[str, Tensor]) -> TensorFiles:
    files = TensorFiles.open(folder)
    assert set(files.infos) == set(expected)
    loaded = files.load(reversed(expected))
    assert list(loaded) == list(reversed(expected))
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor)
        assert loaded[name].dtype == tensor.dtype
    return files


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "gptq_model-4bit-128g.safetensors", "anything_else.safetensors"],
)
def test_single_file_of_any_name_is_found(tmp_path, name):
    save_file({"a": A, "b": B}, tmp_path / name)
    assert_loads(tmp_path, {"a": A, "b": B})


def test_shards_with_index_are_found(tmp_path):
    files = assert_loads(write_sharded(tmp_path), {"a": A, "b": B})
    assert [file.name for file in files.files] == list(SHARDS)


def test_index_of_another_name_is_found(tmp_path):
    write_sharded(tmp_path)
    (tmp_path / "model.safetensors.index.json").rename(
        tmp_path / "gptq_model-4bit-128g.safetensors.index.json"
    )
    assert_loads(tmp_path, {"a": A, "b": B})


def test_whole_set_of_shards_without_index_is_read(tmp_path):
    write_sharded(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert_loads(tmp_path, {"a": A, "b": B})


def test_single_model_file_beside_an_index_of_the_same_tensors_is_read(tmp_path):
    write_sharded(tmp_path)
    save_file({"a": A + 1, "b": B}, tmp_path / "model.safetensors")
    assert_loads(tmp_path, {"a": A + 1, "b": B})


def test_single_model_file_beside_the_index_of_another_model_is_refused(tmp_path):
    write_sharded(tmp_path)
    save_file({"c": A}, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"has 1 tensors and model.*index.json lists 2, .* not"
    ):
        TensorFiles.open(tmp_path)


@pytest.mark.parametrize("other", ["adapter_model.safetensors", "consolidated.safetensors"])
def test_files_of_known_other_purpose_are_passed_over(tmp_path, other):
    save_file({"a": A}, tmp_path / "weights.safetensors")
    save_file({"z": B}, tmp_path / other)
    assert_loads(tmp_path, {"a": A})


def test_autogptq_name_wins_among_odd_ones(tmp_path):
    save_file({"a": A}, tmp_path / "gptq_model-4bit-128g.safetensors")
    save_file({"z": B}, tmp_path / "extra.safetensors")
    assert_loads(tmp_path, {"a": A})


def test_consolidated_alone_is_read(tmp_path):
    save_file({"a": A}, tmp_path / "consolidated.safetensors")
    assert_loads(tmp_path, {"a": A})


def test_scalars_and_empty_tensors_are_loaded(tmp_path):
    tensors = {"scalar": torch.tensor(3.5, dtype=torch.float64), "empty": torch.zeros(0, 2)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert_loads(tmp_path, tensors)


def test_loaded_tensors_are_copies_that_outlive_the_file(tmp_path):
    save_file({"a": A}, tmp_path / "model.safetensors")
    files = TensorFiles.open(tmp_path)
    loaded = files.load(["a"])["a"]
    with (tmp_path / "model.safetensors").open("r+b") as handle:
        handle.write(bytes((tmp_path / "model.safetensors").stat().st_size))
    assert torch.equal(loaded, A)
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(tmp_path) not in maps.read_text()


def test_missing_tensor_is_named(tmp_path):
    save_file({"a": A}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="has no tensor nothing; it has 1 others"):
        TensorFiles.open(tmp_path).load(["nothing"])


def test_file_cut_after_opening_is_refused(tmp_path):
    save_file({"a": A}, tmp_path / "model.safetensors")
    files = TensorFiles.open(tmp_path)
    os.truncate(tmp_path / "model.safetensors", files.infos["a"].offset + 5)
    with pytest.raises(CheckpointError, match=r"tensor a of .* ends after 5 of 24 bytes"):
        files.load(["a"])


def test_missing_folder_and_file_in_its_place_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        TensorFiles.open(tmp_path / "none")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match=r"file: it is a file\. Give a model folder"):
        TensorFiles.open(tmp_path / "file")


def test_folder_that_may_not_be_listed_is_refused(tmp_path, monkeypatch):
    def refuse(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(CheckpointError, match=r"Cannot open checkpoint .*: Permission denied"):
        TensorFiles.open(tmp_path)


def test_adapter_is_called_one(tmp_path):
    save_file({"a": A}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "me/base"}')
    with pytest.raises(CheckpointError, match="it is an adapter on me/base"):
        TensorFiles.open(tmp_path)


def test_path_may_be_a_string(tmp_path):
    save_file({"a": A}, tmp_path / "model.safetensors")
    assert list(TensorFiles.open(str(tmp_path)).infos) == ["a"]


def test_folder_without_weights_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no .safetensors file among its 1 files"):
        TensorFiles.open(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "x.pth"])
def test_pickles_are_refused_with_conversion_instructions(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match="stored only as pickles") as caught:
        TensorFiles.open(tmp_path)
    assert name in str(caught.value)
    assert "weights_only=True" in str(caught.value)


def test_printed_conversion_of_pickles_works(tmp_path):
    torch.save({"a": A, "b": A.t()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError) as caught:
        TensorFiles.open(tmp_path)
    code = str(caught.value).partition('python -c "')[2].removesuffix('"')
    here = Path.cwd()
    os.chdir(tmp_path)
    try:
        exec(code, {})
    finally:
        os.chdir(here)
    assert_loads(tmp_path, {"a": A, "b": A.t()})


def test_several_odd_files_are_refused(tmp_path):
    for name in ("one", "two"):
        save_file({name: A}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"2 safetensors files \(one.safetensors, two"):
        TensorFiles.open(tmp_path)


def test_incomplete_set_of_shards_without_index_is_refused(tmp_path):
    save_file({"a": A}, tmp_path / "model-00001-of-00003.safetensors")
    save_file({"b": B}, tmp_path / "model-00003-of-00003.safetensors")
    with pytest.raises(CheckpointError, match=r"2 shards and no index, .* parts 1\.\.3"):
        TensorFiles.open(tmp_path)


def test_two_indexes_without_a_standard_one_are_refused(tmp_path):
    for name in ("x", "y"):
        (tmp_path / f"{name}.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="it has 2 indexes"):
        TensorFiles.open(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "a/../../x.safetensors",
        "x.bin",
        "",
        3,
        "a\\b.safetensors",
    ],
)
def test_index_that_leaves_the_folder_is_refused(tmp_path, name):
    write_sharded(tmp_path, {"a": name, "b": SHARDS[1]})
    with pytest.raises(CheckpointError, match=r"Refusing .*tensor a is in .*only the name"):
        TensorFiles.open(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": SHARDS[0], "b": SHARDS[0]}, "tensor b is in .*which does not have it"),
        ({"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[1]}, "tensor c is in .*does not have it"),
        ({"a": SHARDS[1], "b": SHARDS[0]}, "tensor a is in .*00002.*, but it is in .*00001"),
        ({"a": SHARDS[0]}, None),
        ({"a": SHARDS[0], "b": "gone.safetensors"}, "is missing the file gone.safetensors"),
    ],
)
def test_index_and_shards_must_agree(tmp_path, weight_map, message):
    write_sharded(tmp_path, weight_map)
    if message is None:
        # A shard that the index does not name is a leftover, and not part of the model.
        assert set(TensorFiles.open(tmp_path).infos) == {"a"}
        return
    with pytest.raises(CheckpointError, match=message):
        TensorFiles.open(tmp_path)


def test_tensor_that_the_index_does_not_name_is_refused(tmp_path):
    write_sharded(tmp_path)
    save_file({"b": B, "extra": A}, tmp_path / SHARDS[1])
    with pytest.raises(
        CheckpointError, match=r"has tensor extra, which .* does not list .3 tensors"
    ):
        TensorFiles.open(tmp_path)


def test_tensor_in_two_shards_is_refused(tmp_path):
    write_sharded(tmp_path)
    save_file({"a": A, "b": B}, tmp_path / SHARDS[1])
    with pytest.raises(CheckpointError, match="Tensor a is in two files"):
        TensorFiles.open(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": []}', '{"weight_map": {}}', "{}"])
def test_damaged_index_is_refused(tmp_path, text):
    write_sharded(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"model.safetensors.index.json"):
        TensorFiles.open(tmp_path)


def test_hub_cache_of_links_into_blobs_is_read(tmp_path):
    blobs, snapshot = tmp_path / "models--x/blobs", tmp_path / "models--x/snapshots/abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    save_file({"a": A}, blobs / "0123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    assert_loads(snapshot, {"a": A})
    (tmp_path / "alias").symlink_to(snapshot)
    assert_loads(tmp_path / "alias", {"a": A})


def test_link_out_of_the_folder_is_refused(tmp_path):
    save_file({"a": A}, tmp_path / "secret.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to("../secret.safetensors")
    with pytest.raises(CheckpointError, match=r"it is a link to .*secret.safetensors, outside"):
        TensorFiles.open(folder)

from __future__ import annotations

import json

import pytest
from tests.helpers.stores import add, write_folder

from halfbyte.errors import CheckpointError, StoreError


@pytest.mark.parametrize("name", ["weights.bin", "modeling_x.py", "x.pkl", "x.safetensors.partial"])
def test_files_that_can_run_or_are_unfinished_are_refused(local, tmp_path, name):
    folder = write_folder(tmp_path / "model")
    (folder / name).write_bytes(b"x")
    with pytest.raises(StoreError, match=name):
        local.add(folder, "m")
    assert local.names() == []


@pytest.mark.parametrize("name", ["a.PY", "train 12:30.txt", "a\\b.txt"])
def test_a_folder_is_added_only_if_its_manifest_can_be_read(local, tmp_path, name):
    folder = write_folder(tmp_path / "model")
    (folder / name).write_bytes(b"x")
    with pytest.raises(StoreError, match=r"no plain path|can run a program"):
        local.add(folder, "m")
    assert local.names() == []


def test_links_out_of_the_folder_are_refused_and_those_of_the_hubs_cache_are_not(local, tmp_path):
    (tmp_path / "id_rsa").write_text("PRIVATE")
    folder = write_folder(tmp_path / "model")
    (folder / "LICENSE").symlink_to(tmp_path / "id_rsa")
    with pytest.raises(CheckpointError, match=r"Refusing .*LICENSE: it is a link to .*id_rsa"):
        local.add(folder, "m")
    (folder / "LICENSE").unlink()
    (folder / "more").symlink_to(tmp_path)
    with pytest.raises(CheckpointError, match="is missing the file more, which is a link to"):
        local.add(folder, "m")
    blobs = write_folder(tmp_path / "models--a--b" / "blobs")
    snapshot = tmp_path / "models--a--b" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert len(local.add(snapshot, "m").files) == 4


def test_a_shard_that_an_index_names_is_there_or_the_folder_is_refused(local, tmp_path):
    folder = write_folder(tmp_path / "model")
    first, second = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    (folder / "model.safetensors").rename(folder / first)
    index = {"weight_map": {"x": first, "y": second}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"is missing the file {second}"):
        local.add(folder, "m")
    (folder / second).symlink_to("../blobs/gone")
    with pytest.raises(CheckpointError, match=f"{second}, which is a link to ../blobs/gone"):
        local.add(folder, "m")


def test_a_manifest_cannot_name_a_file_outside_its_folder(local, tmp_path):
    manifest = add(local, tmp_path)
    content = json.loads(manifest.to_bytes())
    for bad in ("../x", "/etc/passwd", "a//b", "a\\b", "C:x", "", ".git/hooks/x", "a\nb"):
        content["files"] = {bad: {"sha256": "0" * 64, "bytes": 1}}
        text = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
        with pytest.raises(StoreError, match="no plain path"):
            type(manifest).from_bytes(text, "x")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"created": None}, "created is 'None'"),
        ({"name": 5}, "name is '5'"),
        ({"recipe": "x"}, "recipe is 'x'"),
        ({"parent": 7}, "parent is '7'"),
        ({"base": {"id": 1, "revision": None, "digest": None}}, "id is '1'"),
        ({"files": {"x": {"sha256": "0" * 64, "bytes": "1"}}}, "bytes is '1'"),
        ({"files": {"x": {"sha256": "../../x", "bytes": 1}}}, "sha256 is '../../x'"),
        ({"verdict": {"verdict": "pass", "sha256": "../../../x"}}, "sha256 is '../../../x'"),
    ],
)
def test_a_manifests_fields_have_their_types(local, tmp_path, change, found):
    manifest = add(local, tmp_path)
    content = {**json.loads(manifest.to_bytes()), **change}
    text = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    with pytest.raises(StoreError, match=f"x is no manifest: {found}"):
        type(manifest).from_bytes(text, "x")

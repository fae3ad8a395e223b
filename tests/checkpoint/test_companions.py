from __future__ import annotations

import pytest

from halfbyte.checkpoint.companions import copy_companions
from halfbyte.checkpoint.front_matter import read_front_matter
from halfbyte.checkpoint.identity import MANIFEST_FILE, digest_files
from halfbyte.errors import CheckpointError


def write_model(folder):
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "modeling.py").write_text("")
    (folder / MANIFEST_FILE).write_text("{}")
    return folder


def test_tokenizer_and_license_are_copied_but_no_store_manifest(tmp_path):
    source = write_model(tmp_path / "model")
    (source / "LICENSE").write_text("MIT")
    (tmp_path / "out").mkdir()
    copy_companions(source, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"LICENSE", "tokenizer.json"}
    assert set(digest_files(source)) == {"model.safetensors", "tokenizer.json"}


@pytest.mark.parametrize("name", ["LICENSE", "notes.txt"])
def test_link_out_of_the_folder_is_refused_as_companion(tmp_path, name):
    source = write_model(tmp_path / "model")
    (tmp_path / "id_rsa").write_text("PRIVATE")
    (source / name).symlink_to(tmp_path / "id_rsa")
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=rf"Refusing .*{name}: it is a link to .*id_rsa, out"):
        copy_companions(source, tmp_path / "out")
    (tmp_path / "id_rsa").unlink()
    with pytest.raises(CheckpointError, match=rf"missing the file {name}, which is a link to .*id"):
        copy_companions(source, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_links_in_the_hub_cache_are_accepted(tmp_path):
    write_model(tmp_path / "models--a--b" / "blobs")
    snapshot = tmp_path / "models--a--b" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "LICENSE").symlink_to("../../blobs/tokenizer.json")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/tokenizer.json")
    (tmp_path / "out").mkdir()
    copy_companions(snapshot, tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()
    assert (tmp_path / "out" / "LICENSE").read_text() == "{}"


@pytest.mark.parametrize(
    ("card", "found"),
    [
        (b"---\nlicense: mit\n1: x\n---\n# A\n", {"license": "mit", "1": "x"}),
        (b"---\r\nlicense: mit\r\n---\r\n", {"license": "mit"}),
        (b"---\ntitle: a: b\n---\n", {}),
        (b"---\n- a\n---\n", {}),
        (b"---\nlicense: mit\n---\ncaf\xe9\n", {}),
        (b"# A\n", {}),
    ],
)
def test_invalid_front_matter_is_empty(tmp_path, card, found):
    (tmp_path / "README.md").write_bytes(card)
    assert read_front_matter(tmp_path) == found

from __future__ import annotations

import pytest
from tests.helpers.stores import add

from halfbyte.errors import StoreError
from halfbyte.store import garbage
from halfbyte.store.checkout import checkout
from halfbyte.store.garbage import collect_garbage


def test_garbage_collection_keeps_recent_and_aliased_versions(local, tmp_path):
    versions = [add(local, tmp_path, seed).version for seed in range(6)]
    for version in versions[:2]:
        local.promote(f"m@{version}", force_reason="test")
    (local.backend.root / "tmp" / "left-over").write_bytes(b"x" * 10)
    local.backend.put_new("blobs/00/0000", b"orphan")
    checkout(local, f"m@{versions[3]}")
    found = collect_garbage(local, keep=1)
    # champion 1, what it was before (0), the newest (5)
    assert list(found.versions) == versions[2:5]
    assert local.history("m").versions == [versions[0], versions[1], versions[5]]
    assert found.blobs == 3 * 2 + 1
    assert list((local.backend.root / "tmp").iterdir()) == []
    assert list((local.backend.root / "checkouts").iterdir()) == []
    assert local.verify() == [versions[0], versions[1], versions[5]]
    assert local.rollback("m").version == versions[0]
    # what was rolled back from is needed no more
    assert collect_garbage(local, keep=1).versions == (versions[1],)


def test_bucket_is_collected_only_with_no_other_writers(tmp_path, bucket):
    versions = [add(bucket, tmp_path, seed).version for seed in range(3)]
    with pytest.raises(StoreError, match="--no-other-writers"):
        collect_garbage(bucket, keep=1)
    assert list(collect_garbage(bucket, keep=1, no_other_writers=True).versions) == versions[:2]
    assert bucket.verify() == versions[2:]


def test_stray_files_are_ignored(local, tmp_path):
    version = add(local, tmp_path).version
    for folder in ("logs", "logs/m", "logs/.Trash", "manifests", "blobs", "checkouts"):
        (local.backend.root / folder).mkdir(exist_ok=True)
        (local.backend.root / folder / ".DS_Store").write_bytes(b"x")
    assert local.names() == ["m"]
    assert local.verify() == [version]
    collect_garbage(local)
    assert local.verify() == [version]


def test_nothing_is_collected_while_a_kept_manifest_is_unreadable(local, tmp_path):
    versions = [add(local, tmp_path, seed).version for seed in range(4)]
    path = local.backend.root / "manifests" / f"{versions[2]}.json"
    path.chmod(0o644)
    path.write_bytes(b"{}")
    before = local.backend.list("")
    with pytest.raises(StoreError, match=f"m@{versions[2][:12]} is to be kept, and its manifest"):
        collect_garbage(local, keep=2)
    assert local.backend.list("") == before
    assert collect_garbage(local, keep=1).versions == tuple(versions[:3])
    assert local.verify() == [versions[3]]


def test_checkout_is_complete_after_killed_garbage_collection(local, tmp_path, monkeypatch):
    manifests = [add(local, tmp_path, seed) for seed in range(2)]
    folder = checkout(local, f"m@{manifests[0].version}")

    def remove_half(path):
        (path / "model.safetensors").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(garbage.shutil, "rmtree", remove_half)
    with pytest.raises(KeyboardInterrupt):
        collect_garbage(local, keep=1)
    monkeypatch.undo()
    assert not folder.exists()

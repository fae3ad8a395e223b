from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.helpers.stores import write_folder, write_verdict
from tests.judge.examples import make_comparison

from halfbyte.checkpoint.identity import digest_files, digest_weights
from halfbyte.errors import StoreError
from halfbyte.judge.report import write_report
from halfbyte.store.backend import FolderBackend
from halfbyte.store.checkout import checkout
from halfbyte.store.differences import diff_versions
from halfbyte.store.garbage import collect_garbage
from halfbyte.store.manifest import BaseModel
from halfbyte.store.store import Store


@pytest.fixture(params=["folder", "bucket"])
def store(request, tmp_path):
    """The same store in a folder, and in fsspec's memory, which stands for a bucket."""
    if request.param == "folder":
        yield Store(tmp_path / "store")
        return
    from fsspec.implementations.memory import MemoryFileSystem

    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    yield Store("memory://bucket/store")


@pytest.fixture
def local(tmp_path):
    return Store(tmp_path / "store")


def add(store, tmp_path, seed=0, **options):
    return store.add(write_folder(tmp_path / f"model{seed}", seed), "m", **options)


def test_a_version_is_all_that_it_is_made_of(store, tmp_path):
    base = write_folder(tmp_path / "base", 9)
    verdict = write_verdict(tmp_path / "v.json", "pass")
    manifest = add(store, tmp_path, base_folder=base, verdict=verdict)
    again = store.manifest(manifest.version)
    assert again == manifest
    assert set(again.files) == {
        "README.md", "config.json", "model.safetensors", "quantization_report.json",
    }  # fmt: skip
    assert again.base == BaseModel(id="org/base", digest=digest_weights(digest_files(base)))
    assert again.recipe == {"bits": 4, "group_size": 64}
    assert again.calibration == "0" * 64
    assert again.tools == {"torch": "2.13.0"}
    assert again.verdict.verdict == "pass"
    assert store.verify() == [manifest.version]


def test_the_card_says_which_model_was_quantized(local, tmp_path):
    manifest = add(local, tmp_path)
    card = (checkout(local, "m") / "README.md").read_text()
    assert "base_model: org/base" in card
    assert "base_model_relation: quantized" in card
    assert "license: mit" in card
    assert card.endswith("# Model\n")
    # a card that says both stays as it is, byte for byte
    write_folder(tmp_path / "model1", 1, card=card)
    second = local.add(tmp_path / "model1", "m")
    assert second.files["README.md"] == manifest.files["README.md"]


def test_same_files_are_kept_once(local, tmp_path):
    add(local, tmp_path)
    before = local.backend.list("blobs")
    add(local, tmp_path)
    assert local.backend.list("blobs") == before


def test_promotion_needs_a_passing_verdict_or_a_reason(store, tmp_path):
    first = add(store, tmp_path)
    with pytest.raises(StoreError, match="its verdict is missing, and 'pass' is needed"):
        store.promote("m")
    store.judge("m", write_verdict(tmp_path / "v.json", "inconclusive"))
    with pytest.raises(StoreError, match="its verdict is inconclusive"):
        store.promote("m")
    assert store.promote("m", "candidate").alias == "candidate"
    store.judge("m", write_verdict(tmp_path / "v.json", "pass"))
    assert store.promote("m").version == first.version
    second = add(store, tmp_path, 1)
    assert second.parent == first.version
    entry = store.promote(f"m@{second.version[:8]}", force_reason="the old one is on fire")
    assert entry.reason == "the old one is on fire"
    assert store.resolve("store:m@champion") == ("m", second.version)
    assert store.resolve("m") == ("m", second.version)
    assert store.rollback("m").version == first.version
    assert store.resolve("m@champion")[1] == first.version
    events = [entry.event for entry in store.history("m").entries]
    assert events == ["add", "verdict", "promote", "verdict", "promote", "add", "promote",
                      "rollback"]  # fmt: skip


def test_rolling_back_twice_goes_two_steps_and_no_further(store, tmp_path):
    versions = [add(store, tmp_path, seed).version for seed in range(3)]
    for version in versions:
        store.promote(f"m@{version}", force_reason="test")
    assert [store.rollback("m").version for _ in range(2)] == [versions[1], versions[0]]
    with pytest.raises(StoreError, match="no earlier version"):
        store.rollback("m")
    store.promote(f"m@{versions[2]}", force_reason="test")
    assert store.rollback("m").version == versions[0]


def test_differences_are_told_by_file_and_setting(store, tmp_path):
    one, two = add(store, tmp_path), add(store, tmp_path, 1)
    found = diff_versions(store, f"m@{one.version}", f"m@{two.version}")
    assert set(found["files"]) == {"model.safetensors", "quantization_report.json"}
    assert found["recipe"] == {"group_size": [64, 65]}
    assert found["base"] == {}


def test_references_that_mean_nothing_say_what_there_is(store, tmp_path):
    with pytest.raises(StoreError, match="has no model 'm'; it has: none yet"):
        store.resolve("m")
    version = add(store, tmp_path).version
    with pytest.raises(StoreError, match=f"no such version. 'm' has: {version[:12]}"):
        store.resolve("m@champion")
    with pytest.raises(StoreError, match="has no model 'n'; it has: m"):
        store.resolve("n")


@pytest.mark.parametrize("name", ["", "..", "a/b", "-x", "a b", "x" * 97, "é"])
def test_names_are_plain_words(local, tmp_path, name):
    with pytest.raises(StoreError, match="cannot be a name"):
        local.add(write_folder(tmp_path / "model"), name)


def test_a_version_never_has_its_bases_name(local, tmp_path):
    with pytest.raises(StoreError, match="'base' is the name of the base model"):
        local.add(write_folder(tmp_path / "model"), "base", base=BaseModel(id="base"))


@pytest.mark.parametrize("name", ["weights.bin", "modeling_x.py", "x.pkl", "x.safetensors.partial"])
def test_files_that_can_run_or_are_unfinished_are_refused(local, tmp_path, name):
    folder = write_folder(tmp_path / "model")
    (folder / name).write_bytes(b"x")
    with pytest.raises(StoreError, match=name):
        local.add(folder, "m")
    assert local.names() == []


def test_a_changed_byte_is_found(local, tmp_path):
    manifest = add(local, tmp_path)
    blob = local.backend.root / "blobs" / manifest.files["model.safetensors"].sha256[:2]
    path = next(blob.iterdir())
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreError, match=r"model.safetensors of m@.* is not as it was added"):
        local.verify("m")
    with pytest.raises(StoreError, match=r"model.safetensors of .* is damaged"):
        checkout(local, "m", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    path.unlink()
    with pytest.raises(StoreError, match="is missing from the store"):
        local.verify("m")
    with pytest.raises(StoreError, match="is missing from the store"):
        local.promote("m", force_reason="test")


def test_a_changed_manifest_or_log_is_found(local, tmp_path):
    manifest = add(local, tmp_path)
    add(local, tmp_path, 1)
    path = local.backend.root / "logs" / "m" / "00000001.json"
    path.chmod(0o644)
    kept = path.read_bytes()
    path.write_bytes(kept.replace(b'"event":"add"', b'"event":"sign"'))
    with pytest.raises(StoreError, match=r"00000002.json does not follow from the entry before"):
        local.history("m")
    path.unlink()
    with pytest.raises(StoreError, match=r"has logs/m/00000002.json where logs/m/00000001.json"):
        local.history("m")
    path.write_bytes(kept)
    manifest_path = local.backend.root / "manifests" / f"{manifest.version}.json"
    manifest_path.chmod(0o644)
    manifest_path.write_bytes(manifest_path.read_bytes() + b" ")
    with pytest.raises(StoreError, match="is not what its name says"):
        local.verify()


def test_a_manifest_cannot_name_a_file_outside_its_folder(local, tmp_path):
    manifest = add(local, tmp_path)
    content = json.loads(manifest.to_bytes())
    for bad in ("../x", "/etc/passwd", "a//b", "a\\b", "C:x", ""):
        content["files"] = {bad: {"sha256": "0" * 64, "bytes": 1}}
        text = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
        with pytest.raises(StoreError, match="no plain path"):
            type(manifest).from_bytes(text, "x")


def test_garbage_is_what_no_alias_and_no_recent_version_needs(local, tmp_path):
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


def test_a_bucket_is_collected_only_when_nobody_writes(tmp_path, store):
    if isinstance(store.backend, FolderBackend):
        pytest.skip("a folder has a lock")
    versions = [add(store, tmp_path, seed).version for seed in range(3)]
    with pytest.raises(StoreError, match="--nobody-writes"):
        collect_garbage(store, keep=1)
    assert list(collect_garbage(store, keep=1, nobody_writes=True).versions) == versions[:2]
    assert store.verify() == versions[2:]


def test_a_checkout_is_the_folder_and_is_made_once(store, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    add(store, tmp_path)
    folder = checkout(store, "m")
    place = "store" if isinstance(store.backend, FolderBackend) else "cache/halfbyte"
    assert folder.parent == tmp_path / place / "checkouts"
    assert (folder / "model.safetensors").read_bytes() == (
        tmp_path / "model0" / "model.safetensors"
    ).read_bytes()
    stamp = folder.stat().st_mtime_ns
    assert checkout(store, "m") == folder
    assert folder.stat().st_mtime_ns == stamp
    assert isinstance(folder, Path)
    with pytest.raises(StoreError, match=r"exists. Choose a new folder"):
        checkout(store, "m", folder)


def test_what_compare_reports_is_a_verdict(local, tmp_path):
    comparison = make_comparison()
    write_report(comparison, tmp_path / "report")
    add(local, tmp_path)
    found = local.judge("m", tmp_path / "report" / "report.json")
    assert found == comparison.verdict.outcome.value
    assert local.verdict("m", local.resolve("m")[1]) == found


def write_report_of(path, folder, base):
    report = {
        "outcome": "pass",
        "candidate_files": digest_files(folder),
        "base_files": digest_files(base),
    }
    path.write_text(json.dumps(report))
    return path


def test_a_verdict_is_of_this_version_or_refused(local, tmp_path):
    base, other = (write_folder(tmp_path / name, seed) for name, seed in (("b", 8), ("o", 9)))
    version = add(local, tmp_path, base_folder=base).version
    folder = tmp_path / "model0"
    report = tmp_path / "report.json"
    with pytest.raises(StoreError, match=r"report.json is no verdict of this version: model.safe"):
        local.judge("m", write_report_of(report, other, base))
    with pytest.raises(StoreError, match="compares with another base: its weights and config"):
        local.judge("m", write_report_of(report, folder, other))
    assert local.verdict("m", version) is None
    (folder / "added.safetensors").write_bytes(b"weights that nobody judged")
    with pytest.raises(StoreError, match=r"added.safetensors is not in it"):
        local.judge("m", write_report_of(report, folder, base))
    (folder / "added.safetensors").unlink()
    assert local.judge("m", write_report_of(report, folder, base)) == "pass"
    assert local.history("m").entries[-1].details["of"] == "these files"
    # a version with more weights than were judged
    (folder / "added.safetensors").write_bytes(b"weights that nobody judged")
    with pytest.raises(StoreError, match=r"added.safetensors was not there"):
        local.add(folder, "m", verdict=report)
    (folder / "added.safetensors").unlink()
    assert local.add(folder, "m", verdict=report).verdict.verdict == "pass"
    local.judge("m", write_verdict(tmp_path / "v.json", "fail"))
    assert local.history("m").entries[-1].details["of"] == "files that are not named"


def test_a_base_without_weights_has_no_digest(local, tmp_path):
    with pytest.raises(StoreError, match=r"The base model .*none has no weights in safetensors"):
        add(local, tmp_path, base_folder=tmp_path / "none")


def test_verdicts_are_one_of_three(local, tmp_path):
    add(local, tmp_path)
    with pytest.raises(StoreError, match="'maybe'; allowed are pass, fail, inconclusive"):
        local.judge("m", write_verdict(tmp_path / "v.json", "maybe"))
    with pytest.raises(StoreError, match="There is no verdict file"):
        local.judge("m", tmp_path / "none.json")


def test_a_conversion_has_the_base_and_recipe_of_what_it_was_made_of(store, tmp_path):
    origin = add(store, tmp_path, base_folder=write_folder(tmp_path / "base", 9))
    folder = tmp_path / "gguf"
    folder.mkdir()
    (folder / "model.gguf").write_bytes(b"GGUF")
    manifest = store.add(folder, "m-gguf", like=f"m@{origin.version[:10]}")
    assert manifest.base == origin.base
    assert manifest.recipe == {**origin.recipe, "converted_from": origin.version}
    assert manifest.calibration == origin.calibration
    assert set(manifest.files) == {"model.gguf", "README.md"}

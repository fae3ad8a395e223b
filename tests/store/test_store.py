from __future__ import annotations

import errno
import fcntl
import json

import pytest
from tests.helpers.stores import add, write_folder, write_verdict
from tests.judge.examples import make_comparison

from halfbyte.checkpoint.identity import digest_file, digest_files, digest_weights
from halfbyte.errors import StoreError
from halfbyte.judge.report import write_report
from halfbyte.store import blobs, log
from halfbyte.store.checkout import checkout
from halfbyte.store.differences import diff_versions
from halfbyte.store.manifest import BaseModel
from halfbyte.store.store import Store


def test_manifest_describes_the_version(store, tmp_path):
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


def test_equal_files_are_stored_once(local, tmp_path):
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


def test_rollback_goes_back_one_step_each_time(store, tmp_path):
    versions = [add(store, tmp_path, seed).version for seed in range(3)]
    for version in versions:
        store.promote(f"m@{version}", force_reason="test")
    assert [store.rollback("m").version for _ in range(2)] == [versions[1], versions[0]]
    with pytest.raises(StoreError, match="no earlier version"):
        store.rollback("m")
    store.promote(f"m@{versions[2]}", force_reason="test")
    assert store.rollback("m").version == versions[0]


def test_diff_lists_files_and_settings(store, tmp_path):
    one, two = add(store, tmp_path), add(store, tmp_path, 1)
    found = diff_versions(store, f"m@{one.version}", f"m@{two.version}")
    assert set(found["files"]) == {"model.safetensors", "quantization_report.json"}
    assert found["recipe"] == {"group_size": [64, 65]}
    assert found["base"] == {}


def test_unknown_reference_lists_the_known_ones(store, tmp_path):
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


def test_name_of_the_base_is_refused(local, tmp_path):
    with pytest.raises(StoreError, match="'base' is the name of the base model"):
        local.add(write_folder(tmp_path / "model"), "base", base=BaseModel(id="base"))


def test_a_file_that_changes_while_it_is_added_leaves_no_wrong_blob(store, tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "model0")
    before = (folder / "config.json").read_bytes()

    def digest_and_change(path):
        digest = digest_file(path)
        if path.name == "config.json":
            path.write_bytes(b"half-written")
        return digest

    monkeypatch.setattr(blobs, "digest_file", digest_and_change)
    with pytest.raises(StoreError, match=r"config.json changed while it was added"):
        store.add(folder, "m")
    monkeypatch.undo()
    (folder / "config.json").write_bytes(before)
    version = store.add(folder, "m").version
    assert store.verify() == [version]


def test_a_card_that_names_several_bases_keeps_them(local, tmp_path):
    folder = write_folder(tmp_path / "model", card="---\nbase_model:\n- org/a\n- org/b\n---\n# M\n")
    assert local.add(folder, "m").base.id == "org/a"
    card = (checkout(local, "m") / "README.md").read_text()
    assert "base_model:\n- org/a\n- org/b\nbase_model_relation: quantized\n" in card
    write_folder(tmp_path / "again", card=card)
    local.add(tmp_path / "again", "m")
    assert (checkout(local, "m") / "README.md").read_text() == card


@pytest.mark.parametrize("card", [b"---\ntitle: a: b\n---\nText\n", b"# caf\xe9\n"])
def test_a_card_that_cannot_be_read_is_kept_below_the_front_matter(local, tmp_path, card):
    folder = write_folder(tmp_path / "model")
    (folder / "README.md").write_bytes(card)
    local.add(folder, "m", base=BaseModel(id="org/base"))
    kept = (checkout(local, "m") / "README.md").read_bytes()
    assert kept.startswith(b"---\nbase_model: org/base\n")
    assert kept.endswith(b"---\n" + card)
    assert local.add(folder, "m").base == BaseModel()


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
    with pytest.raises(StoreError, match=r"model.safetensors of .* is missing from the store"):
        checkout(local, "m", tmp_path / "out")


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
    with pytest.raises(StoreError, match="is damaged: its sha256 is not the one in its name"):
        local.verify()


def test_a_file_system_without_locks_is_named(local, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(StoreError, match=r"Cannot lock .*: No locks available. .*supports locks"):
        add(local, tmp_path)


def test_a_store_is_made_when_something_is_added(local, tmp_path):
    assert local.names() == []
    assert not local.backend.root.exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"Cannot lock .*file/store: Not a directory"):
        add(Store(tmp_path / "file" / "store"), tmp_path)


def test_verdict_in_an_old_manifest_counts_if_its_report_is_stored(local, tmp_path):
    verdict = write_verdict(tmp_path / "v.json", "pass")
    manifest = add(local, tmp_path, verdict=verdict)
    assert local.history("m").entries[0].details["verdict"] == "pass"
    old = Store(tmp_path / "old")
    for path in (tmp_path / "model0").iterdir():
        blobs.put_blob(old.backend, path)
    old.backend.put_new(f"manifests/{manifest.version}.json", manifest.to_bytes())
    log.append_entry(old.backend, "m", lambda _: log.Entry(event="add", version=manifest.version))
    assert old.verdict("m", manifest.version) is None
    blobs.put_blob(old.backend, verdict)
    assert old.verdict("m", manifest.version) == "pass"


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


def test_verdict_of_another_version_is_refused(local, tmp_path):
    base, other = (write_folder(tmp_path / name, seed) for name, seed in (("b", 8), ("o", 9)))
    version = add(local, tmp_path, base_folder=base).version
    folder = tmp_path / "model0"
    report = tmp_path / "report.json"
    with pytest.raises(StoreError, match=r"report.json is not a verdict of this version: model"):
        local.judge("m", write_report_of(report, other, base))
    with pytest.raises(StoreError, match="compares with another base: its weights and config"):
        local.judge("m", write_report_of(report, folder, other))
    assert local.verdict("m", version) is None
    (folder / "added.safetensors").write_bytes(b"weights that nobody judged")
    with pytest.raises(StoreError, match=r"added.safetensors is not in this version"):
        local.judge("m", write_report_of(report, folder, base))
    (folder / "added.safetensors").unlink()
    assert local.judge("m", write_report_of(report, folder, base)) == "pass"
    assert local.history("m").entries[-1].details["of"] == "these files"
    # a version with more weights than were judged
    (folder / "added.safetensors").write_bytes(b"weights that nobody judged")
    with pytest.raises(StoreError, match=r"added.safetensors was not judged"):
        local.add(folder, "m", verdict=report)
    (folder / "added.safetensors").unlink()
    assert local.add(folder, "m", verdict=report).verdict.verdict == "pass"
    local.judge("m", write_verdict(tmp_path / "v.json", "fail"))
    assert local.history("m").entries[-1].details["of"] == "files that are not named"


def test_a_base_without_weights_has_no_digest(local, tmp_path):
    with pytest.raises(StoreError, match=r"The base model .*none has no .safetensors weights"):
        add(local, tmp_path, base_folder=tmp_path / "none")


def test_verdicts_are_one_of_three(local, tmp_path):
    add(local, tmp_path)
    with pytest.raises(StoreError, match="'maybe'; allowed are pass, fail, inconclusive"):
        local.judge("m", write_verdict(tmp_path / "v.json", "maybe"))
    with pytest.raises(StoreError, match="There is no verdict file"):
        local.judge("m", tmp_path / "none.json")


def test_conversion_takes_over_base_and_recipe(store, tmp_path):
    origin = add(store, tmp_path, base_folder=write_folder(tmp_path / "base", 9))
    folder = tmp_path / "gguf"
    folder.mkdir()
    (folder / "model.gguf").write_bytes(b"GGUF")
    manifest = store.add(folder, "m-gguf", like=f"m@{origin.version[:10]}")
    assert manifest.base == origin.base
    assert manifest.recipe == {**origin.recipe, "converted_from": origin.version}
    assert manifest.calibration == origin.calibration
    assert set(manifest.files) == {"model.gguf", "README.md"}

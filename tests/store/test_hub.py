from __future__ import annotations

import hashlib
import json

import pytest
from tests.helpers.hub import run_hub
from tests.helpers.stores import write_folder, write_verdict

from halfbyte.checkpoint.identity import MANIFEST_FILE, VERDICT_FILE, digest_files
from halfbyte.cli.main import main
from halfbyte.errors import StoreError
from halfbyte.store.checkout import checkout
from halfbyte.store.hub import pull, push
from halfbyte.store.store import Store

# huggingface_hub's own, about its HTTP client
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    with run_hub() as found:
        yield found


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "store")
    store.add(write_folder(tmp_path / "model"), "m")
    return store


def test_push_and_pull_keep_the_version(hub, store, tmp_path):
    version = store.resolve("m")[1]
    commit = push(store, "m", "me/small", endpoint=hub.url, token="hf_x")
    assert commit == hub.commits["me/small"][-1]
    assert hub.private["me/small"]
    manifest = store.manifest(version)
    assert set(hub.repositories["me/small"]) >= {*manifest.files, MANIFEST_FILE}
    assert len(hub.large) == 1
    other = Store(tmp_path / "other")
    assert pull(other, "me/small", endpoint=hub.url, token="hf_x").version == version
    assert other.resolve("m") == ("m", version)
    assert other.verify() == [version]
    # a second time changes nothing
    pull(other, "me/small", endpoint=hub.url, token="hf_x")
    assert other.history("m").versions == [version]


def test_push_replaces_the_files_of_an_older_version(hub, store, tmp_path):
    push(store, "m", "me/small", endpoint=hub.url, token="hf_x")
    folder = write_folder(tmp_path / "model1", 1, card=None)
    second = store.add(folder, "m")
    push(store, f"m@{second.version}", "me/small", endpoint=hub.url, token="hf_x")
    assert "README.md" not in hub.repositories["me/small"]
    assert pull(Store(tmp_path / "o"), "me/small", endpoint=hub.url).version == second.version


def test_pull_refuses_a_changed_file(hub, store, tmp_path):
    push(store, "m", "me/small", endpoint=hub.url, token="hf_x")
    hub.repositories["me/small"]["config.json"] = b"{}"
    other = Store(tmp_path / "other")
    with pytest.raises(StoreError, match=r"me/small: config.json has another sha256"):
        pull(other, "me/small", endpoint=hub.url)
    assert other.names() == []


def test_pull_refuses_a_repository_without_a_manifest(hub, store, tmp_path):
    push(store, "m", "me/small", endpoint=hub.url, token="hf_x")
    del hub.repositories["me/small"][MANIFEST_FILE]
    with pytest.raises(StoreError, match=f"me/small has no {MANIFEST_FILE}"):
        pull(Store(tmp_path / "other"), "me/small", endpoint=hub.url)


def test_verdict_in_a_pulled_manifest_does_not_count(hub, store, tmp_path):
    verdict = write_verdict(tmp_path / "v.json", "pass")
    version = store.add(tmp_path / "model", "m", verdict=verdict).version
    assert store.verdict("m", version) == "pass"
    push(store, f"m@{version}", "me/small", endpoint=hub.url, token="hf_x")
    other = Store(tmp_path / "other")
    pull(other, "me/small", endpoint=hub.url)
    assert other.history("m").entries[0].details == {"from": "me/small"}
    with pytest.raises(StoreError, match="its verdict is missing, and 'pass' is needed"):
        other.promote("m")
    other.judge("m", verdict)
    assert other.promote("m").version == version


def write_report(path, folder, verdict="pass"):
    """A report of `compare` on a folder, with an answer that must not be published."""
    report = {
        "outcome": verdict,
        "candidate_files": digest_files(folder),
        "base_files": {},
        "items": [{"question": "SECRET"}],
    }
    path.write_text(json.dumps(report))
    return path


def test_push_publishes_the_verdict_without_its_report_and_it_does_not_count_elsewhere(
    hub, store, tmp_path, capsys
):
    version = store.resolve("m")[1]
    store.judge("m", write_report(tmp_path / "report.json", tmp_path / "model"))
    push(store, "m", "me/small", endpoint=hub.url, token="hf_x")
    pushed = hub.repositories["me/small"][VERDICT_FILE]
    assert b"SECRET" not in pushed
    assert json.loads(pushed)["candidate_files"] == digest_files(tmp_path / "model")
    other = Store(tmp_path / "other")
    place = ["--store", str(tmp_path / "other")]
    assert main(["store", "pull", "me/small", "--endpoint", hub.url, *place]) == 0
    assert "verified; not judged here (elsewhere: pass)" in capsys.readouterr().out
    assert other.history("m").entries[0].details == {"from": "me/small", "judged_elsewhere": "pass"}
    assert other.verdict("m", version) is None
    with pytest.raises(StoreError, match=r"is missing \('pass' from elsewhere does not count\)"):
        other.promote("m")
    assert main(["store", "show", "m", *place]) == 0
    shown = capsys.readouterr().out
    assert "verdict  not judged here (elsewhere: pass)" in shown
    assert "add from me/small (judged pass there)" in shown
    assert main(["store", "list", *place]) == 0
    assert "not judged here (elsewhere: pass)" in capsys.readouterr().out
    # A store pushes its own verdict only, and this one has none; the older file is deleted.
    push(other, "m", "me/small", endpoint=hub.url, token="hf_x")
    assert VERDICT_FILE not in hub.repositories["me/small"]
    # The file is one that `store judge` takes.
    (tmp_path / VERDICT_FILE).write_bytes(pushed)
    assert other.judge("m", tmp_path / VERDICT_FILE) == "pass"
    assert other.promote("m").version == version


def test_pulling_again_updates_the_verdict_from_elsewhere(hub, store, tmp_path):
    other = Store(tmp_path / "other")
    for verdict in (None, "pass", "pass", "fail"):
        if verdict is not None:
            store.judge("m", write_report(tmp_path / "r.json", tmp_path / "model", verdict))
        push(store, "m", "me/small", endpoint=hub.url, token="hf_x")
        version = pull(other, "me/small", endpoint=hub.url).version
        history = other.history("m")
        assert history.verdict_elsewhere(version) == verdict
        assert history.versions == [version]
        assert other.verdict("m", version) is None
    assert [entry.event for entry in other.history("m").entries] == ["add"] * 3


def test_pull_refuses_a_verdict_of_other_files(hub, store, tmp_path):
    report = write_report(tmp_path / "r.json", write_folder(tmp_path / "other-model", 1))
    push(store, "m", "me/small", endpoint=hub.url, token="hf_x")
    hub.repositories["me/small"][VERDICT_FILE] = report.read_bytes()
    other = Store(tmp_path / "other")
    expected = f"{VERDICT_FILE} of me/small is not a verdict of this version: model.safetensors has"
    with pytest.raises(StoreError, match=expected):
        pull(other, "me/small", endpoint=hub.url)
    assert other.names() == []


def test_verdict_without_file_names_is_neither_pushed_nor_pulled(hub, store, tmp_path):
    store.judge("m", write_verdict(tmp_path / "v.json", "pass"))
    push(store, "m", "me/small", endpoint=hub.url, token="hf_x")
    assert VERDICT_FILE not in hub.repositories["me/small"]
    hub.repositories["me/small"][VERDICT_FILE] = b'{"verdict": "pass"}'
    other = Store(tmp_path / "other")
    version = pull(other, "me/small", endpoint=hub.url).version
    assert other.history("m").verdict_elsewhere(version) is None


def test_push_refuses_a_damaged_report(hub, store, tmp_path):
    store.judge("m", write_report(tmp_path / "r.json", tmp_path / "model"))
    digest = store.history("m").entries[-1].details["sha256"]
    path = store.backend.root / "blobs" / digest[:2] / digest
    path.chmod(0o644)
    path.write_bytes(b"{}")
    with pytest.raises(StoreError, match=f"report blobs/{digest[:2]}/{digest}: its sha256 differs"):
        push(store, "m", "me/small", endpoint=hub.url, token="hf_x")


@pytest.mark.parametrize("name", ["modeling_x.py", "a.PY", "x.bin", ".git/hooks/post-checkout"])
def test_pull_refuses_code_and_pickles(hub, store, tmp_path, name):
    push(store, "m", "me/small", endpoint=hub.url, token="hf_x")
    files = hub.repositories["me/small"]
    files[name] = b"import os"
    content = json.loads(files[MANIFEST_FILE])
    digest = hashlib.sha256(files[name]).hexdigest()
    content["files"][name] = {"bytes": len(files[name]), "sha256": digest}
    files[MANIFEST_FILE] = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    other = Store(tmp_path / "other")
    with pytest.raises(StoreError, match=r"Refusing m@.*: .*(no plain path|run a progr)"):
        pull(other, "me/small", endpoint=hub.url)
    assert other.names() == []


def test_downloaded_folder_can_be_added_and_pushed(hub, store, tmp_path):
    push(store, "m", "me/small", endpoint=hub.url, token="hf_x")
    folder = tmp_path / "downloaded"
    folder.mkdir()
    for name, content in hub.repositories["me/small"].items():
        (folder / name).write_bytes(content)
    version = store.add(folder, "again").version
    push(store, "again", "me/again", endpoint=hub.url, token="hf_x")
    assert pull(Store(tmp_path / "other"), "me/again", endpoint=hub.url).version == version


def test_push_deletes_other_files_only_with_replace(hub, store):
    files = {".gitattributes": b"", "precious.gguf": b"GGUF", "README.md": b"by hand"}
    hub.repositories["me/other"], hub.commits["me/other"] = dict(files), ["0" * 40]
    with pytest.raises(StoreError, match=r"files \(README.md, precious.gguf\) .* pass --replace"):
        push(store, "m", "me/other", endpoint=hub.url, token="hf_x")
    assert hub.repositories["me/other"] == files
    push(store, "m", "me/other", replace=True, endpoint=hub.url, token="hf_x")
    assert "precious.gguf" not in hub.repositories["me/other"]


def test_push_resolves_its_reference_once(hub, store, tmp_path, monkeypatch):
    first = store.resolve("m")[1]
    store.promote("m", force_reason="test")
    second = store.add(write_folder(tmp_path / "model1", 1), "m").version

    def promote_before(store, reference, output):
        store.promote(f"m@{second}", force_reason="by somebody else")
        return checkout(store, reference, output)

    monkeypatch.setattr("halfbyte.store.hub.checkout", promote_before)
    push(store, "m@champion", "me/small", endpoint=hub.url, token="hf_x")
    assert pull(Store(tmp_path / "other"), "me/small", endpoint=hub.url).version == first


def test_errors_name_the_repository(hub, store, tmp_path):
    with pytest.raises(StoreError, match="me/none: there is no such repository, or it is priv"):
        pull(Store(tmp_path / "other"), "me/none", endpoint=hub.url)
    with pytest.raises(StoreError, match="Refusing to push over the base model org/base"):
        push(store, "m", "org/base", endpoint=hub.url)
    with pytest.raises(StoreError, match="Refusing to push over the base model Org/Base"):
        push(store, "m", "Org/Base", endpoint=hub.url)


def test_unreachable_hub_is_reported(store, hub, tmp_path):
    nowhere = "http://127.0.0.1:9"
    with pytest.raises(StoreError, match=r"^Cannot push to me/small: .*refused"):
        push(store, "m", "me/small", endpoint=nowhere, token="hf_x")
    with pytest.raises(StoreError, match=r"^Cannot pull me/small: \w"):
        pull(Store(tmp_path / "other"), "me/small", endpoint=nowhere, token="hf_x")

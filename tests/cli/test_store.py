from __future__ import annotations

import json
import re

import pytest
from tests.helpers.stores import write_folder, write_verdict

from halfbyte.cli.main import main


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HALFBYTE_STORE", str(tmp_path / "store"))

    def run(*words, code=0):
        assert main(["store", *map(str, words)]) == code
        out = capsys.readouterr()
        return out.err if code else out.out

    return run


def test_the_life_of_a_version(call, tmp_path):
    folder = write_folder(tmp_path / "model")
    assert f"There is no store {tmp_path / 'store'}. Check --store and" in call("list", code=1)
    assert not (tmp_path / "store").exists()
    (tmp_path / "store").mkdir()
    assert call("list") == f"{tmp_path / 'store'} has no versions.\n"
    assert "nothing to verify" in call("verify", code=1)
    assert "m@" in call("add", folder, "--name", "m", "--base-id", "org/base")
    assert "is missing, and 'pass' is needed" in call("promote", "m", code=1)
    call("judge", "m", "--verdict", write_verdict(tmp_path / "v.json", "pass"))
    assert "champion is now" in call("promote", "m")
    assert "champion" in call("list", "m")
    added = json.loads(call("add", write_folder(tmp_path / "b", 1), "--name", "m", "--json"))
    second = added["version"]
    assert added["manifest"]["parent"] is not None
    changes = call("diff", "m@champion", f"m@{second}").splitlines()
    assert "recipe   group_size: 64 -> 65" in changes
    assert call("diff", "m@champion", "m@champion") == "no difference\n"
    # Of one size and other bytes.
    assert any(re.fullmatch(r"changed  model\.safetensors, [\d.]+ k?B", line) for line in changes)
    (tmp_path / "b" / "model.safetensors").rename(tmp_path / "b" / "other.safetensors")
    call("add", tmp_path / "b", "--name", "n", "--base-id", "org/base")
    changes = call("diff", "m@champion", "n")
    assert "\ngone     model.safetensors, " in "\n" + changes
    assert "\nnew      other.safetensors, " in "\n" + changes
    call("promote", f"m@{second}", "--force", "a test")
    assert "champion is back at" in call("rollback", "m@champion", "--reason", "a test")
    assert "m@candidate: it has no earlier version" in call("rollback", "m@candidate", code=1)
    shown = call("show", f"m@{second}")
    assert "promote champion" in shown
    assert "a test" in shown
    assert "3 versions verified" in call("verify")
    assert "1 version verified" in call("verify", "m")
    assert "of one version. Name the version" in call("verify", "--public-key", "k.pub", code=2)
    assert "removed 0 versions and 0 files" in call("gc")
    assert (tmp_path / "out").exists() is False
    call("get", "m", "-o", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert json.loads(call("bom", "m"))["bomFormat"] == "CycloneDX"
    assert list(json.loads(call("list", "--json"))) == ["m", "n"]


def test_unreadable_version_does_not_stop_the_list(call, tmp_path):
    for seed in range(2):
        call("add", write_folder(tmp_path / "model", seed), "--name", "m")
    path = next((tmp_path / "store" / "manifests").iterdir())
    path.chmod(0o644)
    path.write_bytes(b"{}")
    lines = call("list").splitlines()
    assert len(lines) == 3
    told = f"  {path.name[:12]}  cannot be read: manifests/{path.name} is damaged: its sha256"
    assert sum(line.startswith(told) for line in lines) == 1
    assert sum("no verdict" in line for line in lines) == 1


def test_missing_store_setting_is_a_usage_error(call, monkeypatch):
    monkeypatch.delenv("HALFBYTE_STORE")
    assert "Use --store, or set HALFBYTE_STORE" in call("list", code=2)

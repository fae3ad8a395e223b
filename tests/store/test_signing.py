from __future__ import annotations

import subprocess

import pytest
from tests.helpers.stores import write_folder

from halfbyte.errors import StoreError
from halfbyte.store.checkout import checkout
from halfbyte.store.signing import sign, verify_signature
from halfbyte.store.store import Store

pytest.importorskip("model_signing.signing")


def make_keys(folder, name):
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    subprocess.run(
        ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", private],
        check=True,
    )
    subprocess.run(["openssl", "ec", "-in", private, "-pubout", "-out", public],
                   check=True, capture_output=True)  # fmt: skip
    return private, public


def test_a_signature_holds_for_its_key_and_its_files_only(tmp_path):
    store = Store(tmp_path / "store")
    first = store.add(write_folder(tmp_path / "a"), "m").version
    store.add(write_folder(tmp_path / "b", 1), "m")
    private, public = make_keys(tmp_path, "one")
    _, other = make_keys(tmp_path, "two")
    with pytest.raises(StoreError, match="is not signed"):
        verify_signature(store, f"m@{first}", public)
    digest = sign(store, f"m@{first}", private)
    verify_signature(store, f"m@{first}", public)
    with pytest.raises(StoreError, match=r"does not hold for .*two.pub"):
        verify_signature(store, f"m@{first}", other)
    # the same signature under another version: other files
    from halfbyte.store.garbage import collect_garbage

    collect_garbage(store, keep=5)
    second = store.history("m").versions[1]
    store.append("m", second, "sign", details={"sha256": digest})
    with pytest.raises(StoreError, match="does not hold"):
        verify_signature(store, f"m@{second}", public)
    with pytest.raises(StoreError, match="Cannot sign with"):
        sign(store, "m", public)
    with pytest.raises(StoreError, match=r"There is no key .*nowhere.pem.* openssl ecparam"):
        sign(store, "m", tmp_path / "nowhere.pem")


def test_sign_resolves_its_reference_once(tmp_path, monkeypatch):
    store = Store(tmp_path / "store")
    first = store.add(write_folder(tmp_path / "a"), "m").version
    store.promote("m", force_reason="test")
    second = store.add(write_folder(tmp_path / "b", 1), "m").version
    private, public = make_keys(tmp_path, "one")

    def promote_after(store, reference, output):
        folder = checkout(store, reference, output)
        store.promote(f"m@{second}", force_reason="by somebody else")
        return folder

    monkeypatch.setattr("halfbyte.store.signing.checkout", promote_after)
    sign(store, "m@champion", private)
    monkeypatch.undo()
    verify_signature(store, f"m@{first}", public)

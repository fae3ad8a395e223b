from __future__ import annotations

import pytest
from tests.helpers.hub import run_hub
from tests.helpers.stores import write_folder

from halfbyte.errors import StoreError
from halfbyte.store.hub import MANIFEST_FILE, pull, push
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


def test_a_version_goes_there_and_comes_back_as_the_same(hub, store, tmp_path):
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


def test_a_newer_version_takes_the_place_of_the_older_files(hub, store, tmp_path):
    push(store, "m", "me/small", endpoint=hub.url, token="hf_x")
    folder = write_folder(tmp_path / "model1", 1, card=None)
    second = store.add(folder, "m")
    push(store, f"m@{second.version}", "me/small", endpoint=hub.url, token="hf_x")
    assert "README.md" not in hub.repositories["me/small"]
    assert pull(Store(tmp_path / "o"), "me/small", endpoint=hub.url).version == second.version


def test_a_file_that_was_changed_on_the_way_is_refused(hub, store, tmp_path):
    push(store, "m", "me/small", endpoint=hub.url, token="hf_x")
    hub.repositories["me/small"]["config.json"] = b"{}"
    other = Store(tmp_path / "other")
    with pytest.raises(StoreError, match=r"config.json of me/small has another sha256"):
        pull(other, "me/small", endpoint=hub.url)
    assert other.names() == []


def test_what_was_not_pushed_from_a_store_is_refused(hub, store, tmp_path):
    push(store, "m", "me/small", endpoint=hub.url, token="hf_x")
    del hub.repositories["me/small"][MANIFEST_FILE]
    with pytest.raises(StoreError, match=f"me/small has no {MANIFEST_FILE}"):
        pull(Store(tmp_path / "other"), "me/small", endpoint=hub.url)


def test_failures_name_the_repository(hub, store, tmp_path):
    with pytest.raises(StoreError, match="me/none: there is no such repository, or it is priv"):
        pull(Store(tmp_path / "other"), "me/none", endpoint=hub.url)
    with pytest.raises(StoreError, match="Refusing to push over the base model org/base"):
        push(store, "m", "org/base", endpoint=hub.url)

from __future__ import annotations

from pathlib import Path

import pytest

from halfbyte.errors import ConfigError
from halfbyte.machine.cache import cache_folder


def test_cache_folder_follows_xdg_cache_home(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "halfbyte"


@pytest.mark.parametrize("said", ["", "  ", "relative/path"])
def test_relative_or_empty_xdg_cache_home_is_ignored(monkeypatch, said):
    monkeypatch.setenv("XDG_CACHE_HOME", said)
    assert cache_folder() == Path.home() / ".cache" / "halfbyte"


def test_missing_home_folder_names_the_variable_to_set(monkeypatch):
    def refuse():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", refuse)
    with pytest.raises(ConfigError, match=r"no home folder\. Set XDG_CACHE_HOME"):
        cache_folder()

from __future__ import annotations

from pathlib import Path

import pytest

from halfbyte.machine.cache import cache_folder


def test_the_user_says_where(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "halfbyte"


@pytest.mark.parametrize("said", ["", "  ", "relative/path"])
def test_what_is_no_absolute_path_does_not_count(monkeypatch, said):
    monkeypatch.setenv("XDG_CACHE_HOME", said)
    assert cache_folder() == Path.home() / ".cache" / "halfbyte"

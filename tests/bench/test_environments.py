"""Tests of peers/environments.py: an environment that cannot run does not count as installed."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from bench.peers import environments

ROOT = Path(__file__).parents[2]


@pytest.fixture
def peer(monkeypatch, tmp_path):
    """A peer whose environment is an interpreter and a stamp, installed into tmp_path/first."""

    def run(command):
        if "venv" in command:
            (Path(command[-1]) / "bin").mkdir(parents=True)
            (Path(command[-1]) / "bin" / "python").symlink_to(sys.executable)

    monkeypatch.setattr(environments, "_run", run)
    monkeypatch.setattr(environments, "FOLDER", tmp_path / "first")
    peer = environments.PEERS["ray"]
    assert environments.install(peer)
    assert peer.is_installed()
    return peer


def test_a_moved_environment_is_not_installed(peer, monkeypatch, tmp_path):
    """Its scripts and programs name files of the old folder."""
    environments.FOLDER.rename(tmp_path / "second")
    monkeypatch.setattr(environments, "FOLDER", tmp_path / "second")
    assert peer.python.exists()
    assert not peer.is_installed()


def test_an_environment_without_its_interpreter_is_not_installed(peer):
    peer.python.unlink()
    peer.python.symlink_to("/no/such/python")
    assert not peer.is_installed()


def test_other_build_options_make_another_environment(monkeypatch):
    llamacpp = environments.PEERS["llamacpp"]
    before = llamacpp.recipe
    monkeypatch.setattr(environments, "LLAMACPP_OPTIONS", ("-DGGML_NATIVE=ON",))
    assert llamacpp.recipe != before


def test_make_interop_creates_every_environment_that_its_tests_need():
    (created,) = re.findall(r"-m bench\.peers\.environments (.+)", (ROOT / "Makefile").read_text())
    tests = [file.read_text() for file in (ROOT / "tests" / "interop").glob("test_*.py")]
    needed = {name for text in tests for name in re.findall(r'needs\("(\w+)"\)', text)}
    assert set(created.split()) == needed

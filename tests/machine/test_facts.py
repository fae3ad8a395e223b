from __future__ import annotations

import sys

import torch

from halfbyte.machine import facts
from halfbyte.version import __version__


def test_versions_name_halfbyte_python_and_relevant_packages(monkeypatch):
    monkeypatch.setattr(facts, "PACKAGES", ("torch", "no-such-package"))
    versions = facts.installed_versions()
    assert versions["halfbyte"] == __version__
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert versions["no-such-package"] == "not installed"


def test_machine_facts_are_text_and_name_cores_and_threads():
    told = facts.machine_facts()
    assert all(isinstance(value, str) for value in told.values())
    assert int(told["cores"]) >= 1
    assert told["threads"] == str(torch.get_num_threads())

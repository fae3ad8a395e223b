from __future__ import annotations

import os
import subprocess
import sys

import pytest

from halfbyte.environment import KERNEL, TRANSFORMERS, VARIABLES, read_variable
from halfbyte.errors import ConfigError


def test_unset_and_empty_give_the_default(monkeypatch):
    for variable in VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)
        assert read_variable(variable) == variable.default
        monkeypatch.setenv(variable.name, "  ")
        assert read_variable(variable) == variable.default


def test_value_is_read_without_its_blanks(monkeypatch):
    monkeypatch.setenv("HALFBYTE_KERNEL", " torch_reference ")
    assert read_variable(KERNEL) == "torch_reference"


def test_value_that_is_not_allowed_is_an_error_with_the_allowed_ones(monkeypatch):
    monkeypatch.setenv("HALFBYTE_TRANSFORMERS", "yes")
    with pytest.raises(
        ConfigError, match=r"HALFBYTE_TRANSFORMERS is 'yes'; allowed are auto, on, off"
    ):
        read_variable(TRANSFORMERS)


def test_import_survives_a_wrong_setting_and_the_commands_refuse_it() -> None:
    environment = {**os.environ, "HALFBYTE_TRANSFORMERS": "maybe"}
    code = "import halfbyte; print(halfbyte.__version__)"
    imported = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert "'maybe'; allowed are auto, on, off" in imported.stderr
    command = subprocess.run(
        [sys.executable, "-m", "halfbyte", "doctor"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert command.returncode == 2
    assert "halfbyte: The environment variable HALFBYTE_TRANSFORMERS is 'maybe'" in command.stderr
    assert "Traceback" not in command.stderr

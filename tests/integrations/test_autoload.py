from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
from transformers import modeling_utils
from transformers.quantizers import auto
from transformers.quantizers.quantizer_gptq import GptqHfQuantizer
from transformers.utils import quantization_config as stock

import halfbyte
from halfbyte.errors import ConfigError
from halfbyte.integrations import autoload
from halfbyte.integrations.transformers import GPTQConfig, GptqQuantizer


@pytest.fixture(autouse=True)
def _put_back():
    yield
    halfbyte.install_transformers()


def run_python(code: str, **environment: str) -> str:
    """Run in a fresh interpreter; give what it prints."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()


def test_fills_the_table_whenever_transformers_is_imported():
    code = (
        "import sys, halfbyte; from halfbyte.integrations.autoload import is_installed;"
        "before = is_installed(), 'transformers' in sys.modules;"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as table;"
        "print(*before, table['gptq'].__module__, is_installed())"
    )
    assert run_python(code, HALFBYTE_TRANSFORMERS="on") == (
        "True False halfbyte.integrations.transformers True"
    )


def test_can_be_switched_off_by_the_environment():
    code = (
        "import halfbyte; from halfbyte.integrations.autoload import is_installed;"
        "print(is_installed())"
    )
    assert run_python(code, HALFBYTE_TRANSFORMERS="off") == "False"


def test_installs_and_uninstalls_both_entries():
    halfbyte.install_transformers()
    assert auto.AUTO_QUANTIZER_MAPPING["gptq"] is GptqQuantizer
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"] is GPTQConfig
    assert autoload.is_installed()
    assert modeling_utils.get_hf_quantizer is auto.get_hf_quantizer
    halfbyte.uninstall_transformers()
    assert modeling_utils.get_hf_quantizer is auto.get_hf_quantizer
    assert auto.get_hf_quantizer.__module__ == "transformers.quantizers.auto"
    assert not hasattr(auto.get_hf_quantizer, "__wrapped__")
    assert auto.AUTO_QUANTIZER_MAPPING["gptq"] is GptqHfQuantizer
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"] is stock.GPTQConfig
    assert not autoload.is_installed()
    halfbyte.uninstall_transformers()
    assert auto.AUTO_QUANTIZER_MAPPING["gptq"] is GptqHfQuantizer


def test_gives_back_the_loader_of_a_third_package(monkeypatch):
    halfbyte.uninstall_transformers()
    third = type("Third", (), {})
    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "gptq", third)
    halfbyte.install_transformers()
    halfbyte.install_transformers()
    halfbyte.uninstall_transformers()
    assert auto.AUTO_QUANTIZER_MAPPING["gptq"] is third


def test_finder_waits_until_the_table_is_loaded(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.delitem(sys.modules, autoload.TABLE)
    autoload.install()
    autoload.install()
    assert autoload.is_installed()
    finders = [f for f in sys.meta_path if isinstance(f, autoload._TableFinder)]
    assert len(finders) == 1
    assert finders[0].find_spec("transformers.quantizers.base", None) is None
    autoload.uninstall()
    assert not autoload.is_installed()


@pytest.mark.parametrize(
    ("setting", "installed", "decision", "reason"),
    [
        ("on", (), True, "HALFBYTE_TRANSFORMERS is 'on'"),
        ("off", (), False, "HALFBYTE_TRANSFORMERS is 'off'"),
        ("auto", (), True, "own GPTQ loader needs optimum and gptqmodel, not installed"),
        ("auto", ("optimum",), True, "own GPTQ loader needs gptqmodel, not installed"),
        ("auto", ("optimum", "gptqmodel"), False, "own GPTQ loader works; set HALFBYTE_TRANSF"),
    ],
)
def test_policy_depends_on_the_setting_and_the_stock_packages(
    monkeypatch, setting, installed, decision, reason
):
    monkeypatch.setenv("HALFBYTE_TRANSFORMERS", setting)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: object() if name in installed else None
    )
    decided, why = autoload.decide()
    assert decided is decision
    assert reason in why


def test_wrong_setting_is_an_error(monkeypatch):
    monkeypatch.setenv("HALFBYTE_TRANSFORMERS", "maybe")
    with pytest.raises(ConfigError, match="HALFBYTE_TRANSFORMERS is 'maybe'"):
        autoload.install_by_policy()

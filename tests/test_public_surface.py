"""What users import: complete, sorted, there, and cheap."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from importlib import resources

import pytest

import halfbyte

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(halfbyte.__path__, "halfbyte.")
    if not module.name.endswith("__main__")
)


def test_public_names_are_sorted_and_there():
    assert halfbyte.__all__ == sorted(halfbyte.__all__)
    assert len(set(halfbyte.__all__)) == len(halfbyte.__all__)
    assert [name for name in halfbyte.__all__ if not hasattr(halfbyte, name)] == []


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'quantise'"):
        _ = halfbyte.quantise


@pytest.mark.parametrize("name", MODULES)
def test_every_module_imports_and_its_all_is_sorted_and_true(name):
    module = importlib.import_module(name)
    public = getattr(module, "__all__", [])
    assert list(public) == sorted(public)
    assert [item for item in public if not hasattr(module, item)] == []
    assert module.__doc__


def test_import_is_cheap():
    program = (
        "import sys, halfbyte\n"
        "sys.exit(str({'torch', 'transformers', 'numpy', 'rich'} & set(sys.modules) or '') or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_types_and_texts_are_shipped():
    package = resources.files("halfbyte")
    assert (package / "py.typed").is_file()
    assert (package / "data" / "NOTICE").is_file()


def test_quantize_is_a_function_and_a_package(monkeypatch):
    from halfbyte.quantize import pipeline

    monkeypatch.setattr(pipeline, "quantize", lambda *args, **kwargs: (args, kwargs))
    assert halfbyte.quantize("model", "out", resume=True) == (("model", "out"), {"resume": True})
    assert importlib.import_module("halfbyte.quantize") is halfbyte.quantize

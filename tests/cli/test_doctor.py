from __future__ import annotations

import json

import pytest

import halfbyte
from halfbyte.cli.main import main
from halfbyte.kernels import cpu_native, native_library
from halfbyte.kernels.registry import KERNELS, ON_REQUEST


@pytest.fixture
def examined(capsys):
    def run() -> dict:
        assert main(["doctor", "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def test_json_has_every_section(examined):
    found = examined()
    assert found["versions"]["halfbyte"] == halfbyte.__version__
    assert found["versions"]["torch"]
    assert found["machine"]["instructions of torch"]
    library = native_library.open_library()
    assert found["machine"]["instructions of cpu_native"] == (library.isa or "none")
    assert found["kernels"].keys() == {entry.name for entry in (*KERNELS, *ON_REQUEST)}
    assert found["kernels"]["torch_reference"] is None
    assert found["environment"]["HALFBYTE_TRANSFORMERS"] in ("auto", "on", "off")


def test_each_case_has_a_kernel_and_the_reasons_against_others(examined, monkeypatch):
    absent = native_library.NativeLibrary(functions=None, obstacle="not built", isa="")
    monkeypatch.setattr(cpu_native, "open_library", lambda: absent)
    cases = {case["layer"]: case for case in examined()["cases"] if case["device"] == "cpu"}
    assert cases["3 bits"]["kernel"] == "torch_reference"
    assert cases["3 bits"]["rejected"]["cpu_native"] == "not built"
    assert cases["3 bits"]["rejected"]["torch_int4"] == "supports 4 bits, not 3"
    assert (
        "does not divide 576"
        in (cases["4 bits, group size 128 that does not divide"]["rejected"]["torch_int4"])
    )
    assert all(case["kernel"] for case in cases.values())


def test_forced_kernel_that_cannot_run_is_shown(examined, monkeypatch):
    monkeypatch.setenv("HALFBYTE_KERNEL", "torch_int4")
    found = examined()
    assert found["environment"]["HALFBYTE_KERNEL"] == "torch_int4"
    (case,) = (c for c in found["cases"] if c["layer"] == "3 bits" and c["device"] == "cpu")
    assert case["kernel"] is None
    assert "forced by HALFBYTE_KERNEL: torch_int4" in case["reason"]


@pytest.mark.parametrize("installed", [True, False])
def test_says_whether_transformers_loads_through_halfbyte(examined, installed):
    try:
        (halfbyte.install_transformers if installed else halfbyte.uninstall_transformers)()
        assert examined()["transformers"]["loads_gptq_through_halfbyte"] is installed
    finally:
        halfbyte.install_transformers()


def test_table_shows_versions_kernels_and_the_loader(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for part in (halfbyte.__version__, "torch_reference", "HALFBYTE_KERNEL", "not set", "3 bits"):
        assert part in out
    assert "Transformers loads GPTQ through halfbyte: yes" in out

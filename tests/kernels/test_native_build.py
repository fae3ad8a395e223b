"""Other builds of the library: with a sanitizer, for ARM, and without a compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ARM = "aarch64-linux-gnu-g++"
EMULATOR = "qemu-aarch64-static"

pytestmark = [
    pytest.mark.native,
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("cmake") is None, reason="needs CMake"),
]


def build_check(folder, *settings):
    """Build the program that checks the library, and give its path."""
    flags = ("-DHALFBYTE_CHECK=ON", *settings)
    subprocess.run(["cmake", "-S", ROOT, "-B", folder, *flags], check=True)
    subprocess.run(["cmake", "--build", folder, "--parallel", "2"], check=True)
    return folder / "check_library"


def test_touches_no_memory_that_is_not_its_own(tmp_path):
    program = build_check(tmp_path, "-DCMAKE_CXX_FLAGS=-fsanitize=address -g1")
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "respellings are the same" in done.stdout
    assert "serial: largest error 0." in done.stdout
    assert "serial: a decoder's states deviate by" in done.stdout


@pytest.mark.skipif(
    shutil.which(ARM) is None or shutil.which(EMULATOR) is None,
    reason=f"needs {ARM} and {EMULATOR} (Debian: g++-aarch64-linux-gnu, qemu-user-static)",
)
def test_arm_computes_the_same(tmp_path):
    target = ("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64")
    program = build_check(tmp_path, *target, f"-DCMAKE_CXX_COMPILER={ARM}")
    done = subprocess.run(
        [EMULATOR, "-L", "/usr/aarch64-linux-gnu", program],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "respellings are the same" in done.stdout
    assert "neon: largest error 0." in done.stdout
    assert "neon: a decoder's states deviate by" in done.stdout


@pytest.mark.parametrize("compiler", [True, False])
def test_a_wheel_is_built_with_and_without_a_compiler(tmp_path, compiler):
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".*", "*.so", "build", "bench", "dist", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignored)
    environment = os.environ | {} if compiler else os.environ | {"CC": "false", "CXX": "false"}
    environment.pop("HALFBYTE_REQUIRE_NATIVE", None)
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "-w", tmp_path, source],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "halfbyte/data/wikitext2_valid.txt" in names
    assert "halfbyte/py.typed" in names
    library = [name for name in names if name.startswith("halfbyte/kernels/lib/libhalfbyte_cpu")]
    assert bool(library) == compiler
    said = "the CPU kernel was compiled" if compiler else "no usable C++ compiler; installed with"
    assert said in done.stdout + done.stderr


def test_where_it_is_required_the_install_fails_without_a_compiler(tmp_path):
    environment = os.environ | {"CC": "false", "CXX": "false", "HALFBYTE_REQUIRE_NATIVE": "1"}
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".*", "*.so", "build", "bench", "dist", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignored)
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "-w", tmp_path, source],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode != 0
    assert "the CPU kernel was required" in done.stdout + done.stderr

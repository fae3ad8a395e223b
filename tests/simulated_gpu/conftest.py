"""Tests on a simulated GPU, in a process that has one: ``pytest -m simulated_gpu``."""

from __future__ import annotations

import sys

import pytest
import torch
from tests.helpers.simulated_gpu import install
from torch.nn.attention import SDPBackend, sdpa_kernel


@pytest.fixture(scope="session", autouse=True)
def _gpu(request):
    if sys.platform != "linux" or torch.version.cuda is not None:
        pytest.skip("a GPU is simulated on Linux, in a build of torch without CUDA")
    if not all(item.get_closest_marker("simulated_gpu") for item in request.session.items):
        # It changes torch for all tests of a process.
        pytest.fail("Run these tests in a process of their own: pytest -m simulated_gpu")
    install()


@pytest.fixture(autouse=True)
def _same_arithmetic(monkeypatch):
    """Let the CPU choose what the simulated GPU chooses, so that results are equal bit for bit."""
    from halfbyte.machine import arithmetic
    from halfbyte.quantize import hessian, resources

    monkeypatch.setenv("HALFBYTE_KERNEL", "torch_reference")
    monkeypatch.setattr(arithmetic, "has_fast_bf16", lambda: True)
    monkeypatch.setattr(hessian, "sums_bf16_in_fp32", lambda: False)
    # A product of 4096 x 4096 takes a GPU no time.
    monkeypatch.setattr(resources, "measure_gemm_rate", lambda dtype, device: 1e12)
    with sdpa_kernel(SDPBackend.MATH):
        yield

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from tests.helpers.packed import make_linear

from halfbyte.errors import KernelUnavailable
from halfbyte.kernels import registry
from halfbyte.kernels.registry import KERNELS, KernelEntry, describe_spec, find_kernel, select

SPEC = make_linear().spec


@dataclass(frozen=True)
class FakeKernel:
    name: str
    obstacle: str | None = None
    mismatch: str | None = None
    repacks: bool = False

    def find_obstacle(self):
        return self.obstacle

    def find_mismatch(self, spec):
        return self.mismatch


@pytest.fixture
def fakes(monkeypatch):
    """Kernels with made-up abilities, in order of preference."""

    def make(*kernels):
        by_name = {kernel.name: kernel for kernel in kernels}
        monkeypatch.setattr(registry, "load_kernel", lambda entry: by_name[entry.name])
        return [KernelEntry(name=k.name, module="", class_name="", summary="") for k in kernels]

    monkeypatch.delenv("HALFBYTE_KERNEL", raising=False)
    return make


def test_first_that_can_is_chosen_and_the_others_say_why_not(fakes):
    entries = fakes(
        FakeKernel("gpu", obstacle="needs a CUDA device"),
        FakeKernel("narrow", mismatch="supports 8 bits, not 4"),
        FakeKernel("wide"),
        FakeKernel("slow"),
    )
    choice = select(SPEC, kernels=entries)
    assert choice.kernel.name == "wide"
    assert choice.reason == "the fastest one that fits"
    assert choice.rejected == {"gpu": "needs a CUDA device", "narrow": "supports 8 bits, not 4"}


def test_offloaded_layers_keep_their_layout(fakes):
    entries = fakes(FakeKernel("repacking", repacks=True), FakeKernel("plain"))
    choice = select(SPEC, stored_layout=True, kernels=entries)
    assert choice.kernel.name == "plain"
    assert "those of this layer are offloaded" in choice.rejected["repacking"]


def test_environment_forces_a_kernel(fakes, monkeypatch):
    entries = fakes(FakeKernel("fast"), FakeKernel("slow"))
    monkeypatch.setenv("HALFBYTE_KERNEL", "slow")
    choice = select(SPEC, kernels=entries)
    assert (choice.kernel.name, choice.reason) == ("slow", "forced by HALFBYTE_KERNEL")


def test_caller_beats_the_environment(fakes, monkeypatch):
    entries = fakes(FakeKernel("fast"), FakeKernel("slow"))
    monkeypatch.setenv("HALFBYTE_KERNEL", "slow")
    choice = select(SPEC, kernels=entries, forced="fast")
    assert (choice.kernel.name, choice.reason) == ("fast", "forced by the caller")


def test_forced_kernel_that_cannot_is_an_error_with_a_line_for_each(fakes, monkeypatch):
    entries = fakes(FakeKernel("gpu", obstacle="needs a CUDA device"), FakeKernel("plain"))
    monkeypatch.setenv("HALFBYTE_KERNEL", "gpu")
    with pytest.raises(KernelUnavailable) as caught:
        select(SPEC, kernels=entries)
    assert str(caught.value).splitlines() == [
        "Cannot run bits=4, group_size=32, 128 -> 64, float32 on cpu "
        "(forced by HALFBYTE_KERNEL: gpu).",
        "  gpu: needs a CUDA device",
        "  plain: can run it",
    ]


def test_unknown_kernel_is_an_error_with_a_suggestion(monkeypatch):
    monkeypatch.setenv("HALFBYTE_KERNEL", "torch_int5")
    with pytest.raises(
        KernelUnavailable,
        match=r"no kernel 'torch_int5'. Did you mean 'torch_int4'\? Available: .*cpu_native, tor",
    ):
        select(SPEC)


def test_no_kernel_at_all_lists_every_reason(fakes):
    entries = fakes(FakeKernel("gpu", obstacle="needs a CUDA device"))
    with pytest.raises(KernelUnavailable, match=r"\(no kernel fits\).\n  gpu: needs a CUDA device"):
        select(SPEC, kernels=entries)


def test_every_entry_loads_and_knows_its_name():
    for entry in KERNELS:
        assert find_kernel(entry.name).name == entry.name


def test_the_last_kernel_runs_everything():
    last = find_kernel(KERNELS[-1].name)
    for changes in ({"bits": 3}, {"act_order": True, "symmetric": False}, {"group_size": 80}):
        assert last.find_mismatch(make_linear(**changes).spec) is None


def test_description_names_what_decides():
    spec = make_linear(bits=3, symmetric=False, act_order=True, dtype=torch.bfloat16).spec
    assert describe_spec(spec) == (
        "bits=3, group_size=32, asymmetric, act-order, 128 -> 64, bfloat16 on cpu"
    )

"""Device queries with fake GPUs: arrival counters, the current device, early start."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from halfbyte.kernels import gpu_device, triton_decode, triton_decode_kernels
from halfbyte.nn import gpu_step


@pytest.fixture
def device(monkeypatch):
    """Two GPUs, the first of which is the current one; tensors of theirs are on the CPU."""
    state = SimpleNamespace(current=0, stream=0, entered=[])

    @contextmanager
    def on(index):
        before, state.current = state.current, torch.device(index).index
        yield
        state.current = before

    plain = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *a, device=None, **k: plain(*a, **k))
    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: state.current)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda *_: SimpleNamespace(stream_id=state.stream)
    )
    monkeypatch.setattr(gpu_device, "_counters", {})
    monkeypatch.setattr(gpu_device, "_spare", {})
    return state


def test_every_stream_has_counters_of_its_own(device):
    found = {}
    for index in range(2):
        gpu = torch.device("cuda", index)
        gpu_device.make_arrivals(gpu)
        for device.stream in range(2 * gpu_device.STREAMS + 2):
            found[index, device.stream] = gpu_device.find_arrivals(gpu)
    assert len({counters.data_ptr() for counters in found.values()}) == len(found)
    assert all(counters.shape == (gpu_device.ARRIVALS,) for counters in found.values())
    device.stream = 70
    again = gpu_device.find_arrivals(torch.device("cuda", 0))
    assert again.data_ptr() == found[0, 70].data_ptr()


def test_a_device_is_the_current_one_where_it_is_not_already(device):
    for index in (1, 0):
        with gpu_device.on_device(torch.device("cuda", index)):
            assert device.current == index
        assert device.current == 0
    with gpu_device.on_device(torch.device("cpu")):
        assert device.current == 0


def test_a_triton_kernel_is_launched_on_the_device_of_its_tensors(monkeypatch):
    entered = []

    @contextmanager
    def note(device):
        entered.append(device)
        yield
        entered.append("left")

    class Kernel:
        def __getitem__(self, grid):
            return lambda *_, **__: entered.append("launched")

    monkeypatch.setattr(triton_decode, "on_device", note)
    monkeypatch.setattr(triton_decode_kernels, "gate_kernel", Kernel())
    triton_decode.gate(torch.zeros(1, 8))
    assert entered == [torch.device("cpu"), "launched", "left"]


@pytest.mark.parametrize(
    ("capability", "early"), [((8, 9), False), ((9, 0), True), ((10, 0), True), ((12, 0), True)]
)
def test_launches_start_early_from_9_0_on(monkeypatch, capability, early):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    gpu_device.is_nvidia.cache_clear()
    gpu_device.starts_early.cache_clear()
    assert gpu_device.starts_early(torch.device("cuda", 3)) == early
    gpu_device.starts_early.cache_clear()
    gpu_device.is_nvidia.cache_clear()


@pytest.fixture
def recording(monkeypatch):
    """What the parts of torch.cuda that record() uses were called with."""
    told = []

    class Stream:
        def __init__(self, device):
            told.append(device)

        def wait_stream(self, other):
            pass

    @contextmanager
    def nothing(*_, **__):
        yield

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(device))
    monkeypatch.setattr(torch.cuda, "stream", nothing)
    monkeypatch.setattr(torch.cuda, "graph", nothing)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: "graph")
    modes = [0]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    return told, modes


def test_a_step_is_recorded_on_a_stream_of_its_device(recording):
    told, modes = recording
    second = torch.device("cuda", 1)
    assert gpu_step.record(lambda: "result", second) == ("graph", "result")
    assert told == [second] * 3
    assert modes == [0, "error", 0]


def test_a_step_that_waits_is_not_recorded(recording):
    _, modes = recording

    def compute():
        # Compiling at the first call may wait.
        if modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(gpu_step.NotCapturable, match="waits for results of the GPU"):
        gpu_step.record(compute, torch.device("cuda", 1))
    assert modes[-1] == 0

    def fail():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        gpu_step.record(fail, torch.device("cuda", 1))

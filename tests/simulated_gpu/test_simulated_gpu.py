"""The simulated GPU itself: results of the CPU, and refusals of CUDA."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.helpers.tiny_llama import build_model

pytestmark = pytest.mark.simulated_gpu

OTHER_DEVICE = "Expected all tensors to be on the same device"
IDS = torch.tensor([[5, 9, 33, 7, 12]])


def test_a_model_has_the_logits_and_gradients_of_the_cpu():
    found = []
    for device in ("cpu", "cuda"):
        model = build_model().to(device)
        logits = model(IDS.to(device)).logits
        logits.square().mean().backward()
        assert logits.is_cuda == (device == "cuda")
        found.append([logits, *(p.grad for p in model.parameters())])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other.cpu())


def test_tensors_move_there_and_back(tmp_path):
    x = torch.arange(12.0).reshape(3, 4)[:, 1:]
    y = x.cuda()
    assert (y.device, y.dtype, y.shape) == (torch.device("cuda", 0), x.dtype, x.shape)
    assert torch.equal(y.cpu(), x)
    save_file({"y": y}, tmp_path / "y.safetensors")
    assert torch.equal(load_file(tmp_path / "y.safetensors", device="cuda:0")["y"].to("cpu"), x)
    pinned = torch.empty(3, 3, pin_memory=True).copy_(y, non_blocking=True)
    assert torch.equal(pinned, x)


def test_views_share_memory_and_copies_do_not():
    x = torch.zeros(2, 3, device="cuda")
    copied = copy.deepcopy(x)
    x.t()[1].add_(1)
    x.view(-1)[0] = 5
    assert x.tolist() == [[5, 1, 0], [0, 1, 0]]
    assert x.t().untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert not bool(copied.any())


@pytest.mark.parametrize(
    "mix",
    [
        lambda cpu, gpu: gpu + cpu,
        lambda cpu, gpu: cpu @ gpu,
        lambda cpu, gpu: torch.cat([gpu, cpu]),
        lambda cpu, gpu: torch.nn.functional.linear(gpu, cpu),
        lambda cpu, gpu: torch.add(gpu, gpu, out=cpu),
        lambda cpu, gpu: cpu.add_(gpu),
        lambda cpu, gpu: cpu[gpu.long()],
        lambda cpu, gpu: gpu.index_select(0, torch.tensor([0])),
    ],
)
def test_devices_do_not_mix(mix):
    with pytest.raises(RuntimeError, match=OTHER_DEVICE):
        mix(torch.ones(2, 2), torch.ones(2, 2, device="cuda"))


def test_numbers_and_indices_may_be_on_the_cpu():
    x = torch.arange(4.0, device="cuda")
    assert (x * torch.tensor(2.0)).tolist() == [0, 2, 4, 6]
    assert x[torch.tensor([1, 3])].tolist() == [1, 3]
    assert x[torch.tensor([True, False, False, True])].tolist() == [0, 3]
    assert (15 & x.int()).dtype == torch.int32
    assert (x.double() * 0.1).tolist() == (torch.arange(4.0).double() * 0.1).tolist()


def test_numpy_is_refused():
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        torch.ones(2, device="cuda").numpy()


@pytest.mark.parametrize(("device", "other"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_generators_belong_to_a_device(device, other):
    generator = torch.Generator(device).manual_seed(3)
    assert torch.randn(3, generator=generator, device=device).device.type == device
    for draw in (
        lambda: torch.randn(3, generator=generator, device=other),
        lambda: torch.multinomial(torch.ones(3, device=other), 1, generator=generator),
    ):
        with pytest.raises(RuntimeError, match=f"Expected a '{other}' device type for generator"):
            draw()


def test_a_graph_repeats_what_was_captured():
    x, number = torch.ones(2, device="cuda"), 2
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = torch.cat([x, x]) * number
        x.add_(1)
    assert y.tolist() == [2, 2, 2, 2]
    number = 100
    graph.replay()
    assert y.tolist() == [4, 4, 4, 4], "the number was frozen, the tensor was not"
    assert x.tolist() == [3, 3]


def test_what_does_not_wait_can_be_captured():
    x, index = torch.arange(4.0, device="cuda"), torch.tensor([2, 0], device="cuda")
    pinned = torch.zeros(2, pin_memory=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x[index] + 1
        pinned.copy_(y, non_blocking=True)
    x.mul_(10)
    graph.replay()
    assert pinned.tolist() == y.tolist() == [21, 1]


@pytest.mark.parametrize(
    "wait", [torch.Tensor.item, torch.nonzero, torch.Tensor.cpu, lambda x: x.copy_(torch.ones(1))]
)
def test_what_waits_cannot_be_captured(wait):
    x = torch.ones(1, device="cuda")
    with (
        pytest.raises(RuntimeError, match="not permitted when stream is capturing"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        wait(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="called a synchronizing CUDA operation"):
            wait(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    wait(x)

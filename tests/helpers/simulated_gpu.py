"""A simulated GPU: tensors on ``cuda:0`` whose memory and arithmetic are the CPU's.

:func:`install` changes torch for the rest of the process, in a build of torch without CUDA; the
tests in ``tests/simulated_gpu`` have a process of their own::

    torch.zeros(2, device="cuda")    torch's dispatcher looks for a kernel for CUDA
      └── simulated_kernels.compute  takes the memory of the arguments for that of CPU tensors,
                                     runs the CPU's kernel, takes its results for CUDA tensors

Tensors, views and storages are torch's own, so autograd (in the device's thread), safetensors,
``from_pretrained``, accelerate and Trainer work as on a GPU. Results are those of the CPU, bit for
bit, where the code chooses the same operations.

What it shows: tensors of both devices in one operation, generators of the other device and
``numpy()`` on a GPU tensor, which raise as in CUDA; whatever waits for the GPU or copies from the
CPU while a CUDA graph is captured, and Python values that a graph freezes; code that runs on GPUs
only, such as copies to pinned memory and background threads.

What it does not show: other rounding, missing dtypes, missing synchronization (every operation has
finished when it returns), memory that runs out, several GPUs, and processes that are started anew.
Triton and CUDA kernels do not run, and attention is computed by its formula (``SDPBackend.MATH``).
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from tests.helpers.simulated_kernels import (
    GPU,
    SYNC_MODES,
    CUDAGraph,
    graph,
    install_kernels,
    is_capturing,
)
from torch import Tensor

DRAWING: dict[Any, tuple[str, ...]] = {
    torch: ("rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial"),
    Tensor: ("normal_", "uniform_", "exponential_", "random_", "bernoulli_", "multinomial"),
}
"""Functions that take a generator."""
TOTAL_BYTES = 8 << 30

_kept: list[object] = []
"""What torch refers to by address."""


def install() -> None:
    """Give this process a simulated GPU, until it ends."""
    if torch.version.cuda is not None:
        raise RuntimeError("Cannot simulate a GPU: this build of torch has CUDA.")
    if not torch.cuda.is_available():
        _install_device()
        install_kernels()
        _install_functions()
        _refuse_compiled_kernels()


class Guard(torch._C._acc.DeviceGuard):
    """Tells torch CUDA's current device and stream: the only ones there are."""

    def type_(self) -> Any:
        """Return the type of device."""
        return torch._C._autograd.DeviceType.CUDA


def _install_device() -> None:
    """Make torch's core believe in a CUDA device.

    Autograd asks whether CUDA was built in, and pinned memory for an allocator, of an object whose
    class is in C++: its methods are replaced in a copy of its virtual table, whose order is that of
    the header that torch ships. Guards of devices can be written in Python for the device type
    PrivateUse1; such a one is moved to CUDA's place.
    """
    root = Path(torch.__file__).parent
    core, c10 = (ctypes.CDLL(str(root / "lib" / f"lib{n}.so")) for n in ("torch_cpu", "c10"))
    header = root / "include" / "ATen" / "detail" / "AcceleratorHooksInterface.h"
    # The destructor has the first two places.
    methods = ["", "", *re.findall(r"virtual [^~;{]*?(\w+)\(", header.read_text(encoding="utf-8"))]
    allocator = _call(c10._ZN3c1015GetCPUAllocatorEv)
    answers = {
        "isBuilt": (ctypes.c_bool, True),
        "isAvailable": (ctypes.c_bool, True),
        "hasPrimaryContext": (ctypes.c_bool, True),
        "init": (None, None),
        "deviceCount": (ctypes.c_int8, 1),
        "getCurrentDevice": (ctypes.c_int8, 0),
        "getPinnedMemoryAllocator": (ctypes.c_void_p, allocator),
    }
    hooks = ctypes.c_void_p.from_address(_call(core._ZN2at6detail12getCUDAHooksEv))
    whole = ctypes.c_void_p * (len(methods) + 64)  # CUDA's own methods follow
    table = whole(*whole.from_address(hooks.value))
    for name, (kind, answer) in answers.items():
        function = ctypes.CFUNCTYPE(kind, ctypes.c_void_p)(lambda _, answer=answer: answer)
        table[methods.index(name)] = ctypes.cast(function, ctypes.c_void_p).value
        _kept.append(function)
    hooks.value = ctypes.addressof(table)
    # Autograd counts devices at its first use, and then starts their threads if told to.
    torch.zeros((), requires_grad=True).backward()
    guard, types = Guard(), torch._C._autograd.DeviceType
    torch._C._acc.register_python_privateuseone_device_guard(guard)
    guards = (ctypes.c_void_p * 32).in_dll(c10, "_ZN3c104impl26device_guard_impl_registryE")
    guards[int(types.CUDA)] = guards[int(types.PrivateUse1)]
    guards[int(types.PrivateUse1)] = None
    engine = _call(core._ZN5torch8autograd6Engine18get_default_engineEv)
    core._ZN5torch8autograd6Engine20start_device_threadsEv(ctypes.c_void_p(engine))
    _kept.extend((table, guard))


def _call(function: Any) -> int:
    """Call a C function that returns an address."""
    function.restype = ctypes.c_void_p
    return function()


class Generator(torch.Generator):
    """The CPU's generator, with the name of either device."""

    def __new__(cls, device: str | torch.device = "cpu") -> Generator:
        self = super().__new__(cls)
        self.label = torch.device(device)
        return self

    @property
    def device(self) -> torch.device:
        return self.label


def _check_generator(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make a function refuse a GPU's generator for the CPU, as :func:`compute` does the reverse."""

    @functools.wraps(draw)
    def checked(*args: Any, generator: torch.Generator | None = None, **kwargs: Any) -> Tensor:
        found = draw(*args, generator=generator, **kwargs)
        if generator is not None and generator.device.type != found.device.type:
            raise RuntimeError(
                f"Expected a '{found.device.type}' device type for generator but found "
                f"'{generator.device.type}'"
            )
        return found

    return checked


class Stream:
    """A stream of a device that finishes everything at once."""

    device, stream_id, cuda_stream = GPU, 0, 0

    def __init__(self, *_: object, **__: object) -> None: ...
    def wait_stream(self, stream: Stream) -> None: ...
    def synchronize(self) -> None: ...


class Event:
    """An event that has happened already."""

    def __init__(self, *_: object, **__: object) -> None: ...
    def record(self, stream: Stream | None = None) -> None: ...
    def synchronize(self) -> None: ...


def _clone_storage(clone: Callable[..., Any], storage: torch.UntypedStorage) -> Any:
    if storage.device.type != "cuda":
        return clone(storage)
    return torch.empty(0, dtype=torch.uint8, device=GPU).set_(storage).clone().untyped_storage()


def _install_functions() -> None:
    """Replace the functions of ``torch.cuda`` that ask the driver, and torch's generators."""
    properties = SimpleNamespace(
        name="simulated GPU", major=7, minor=5, total_memory=TOTAL_BYTES, multi_processor_count=4
    )
    cuda: Any = torch.cuda
    for names, value in {
        ("is_available", "is_initialized", "is_bf16_supported"): True,
        ("device_count",): 1,
        ("current_device", "memory_reserved", "memory_allocated", "max_memory_allocated"): 0,
        ("_lazy_init", "init", "set_device", "synchronize", "empty_cache", "ipc_collect"): None,
        ("set_per_process_memory_fraction", "reset_peak_memory_stats"): None,
        ("manual_seed", "manual_seed_all"): None,  # torch.manual_seed seeds the CPU beside them
        ("mem_get_info",): (TOTAL_BYTES, TOTAL_BYTES),
        ("get_device_capability",): (properties.major, properties.minor),
        ("get_device_name",): properties.name,
        ("get_device_properties",): properties,
        ("current_stream", "default_stream"): Stream(),
        ("stream", "device"): nullcontext(),
    }.items():
        for name in names:
            setattr(cuda, name, lambda *_, value=value, **__: value)
    for replacement in (Stream, Event, CUDAGraph, graph):
        setattr(cuda, replacement.__name__, replacement)
    cuda.is_current_stream_capturing = is_capturing
    mode = SimpleNamespace(now=SYNC_MODES["default"])
    cuda.get_sync_debug_mode = lambda: mode.now
    cuda.set_sync_debug_mode = lambda new: setattr(mode, "now", SYNC_MODES.get(new, new))
    for module in (cuda, cuda.random):
        module.get_rng_state = lambda device=GPU: torch.get_rng_state()
        module.set_rng_state = lambda state, device=GPU: torch.set_rng_state(state)
    for owner, drawing in DRAWING.items():
        for name in drawing:
            setattr(owner, name, _check_generator(getattr(owner, name)))
    changed: Any = torch
    changed.Generator = Generator
    clone = torch.UntypedStorage.clone
    changed.UntypedStorage.clone = lambda self: _clone_storage(clone, self)


def _refuse_compiled_kernels() -> None:
    """Let halfbyte miss Triton; for its CUDA kernels the GPU's capability is too low."""
    from halfbyte.kernels.triton_linear import find_triton_obstacle

    find_triton_obstacle.cache_clear()
    with patch.object(importlib.util, "find_spec", lambda name: None):
        assert find_triton_obstacle() is not None

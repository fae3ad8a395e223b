"""Kernels of the simulated GPU: the CPU's, on tensors that share their memory.

Source:
    DLPack's structures: https://dmlc.github.io/dlpack/latest/c_api.html
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, library

aten = torch.ops.aten
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
DLPACK_TYPES = {"cpu": 1, "cuda": 2}
"""DLPack's numbers for types of devices."""
CPU_KEY = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
METADATA = (
    aten.as_strided.default,
    aten.view.default,
    aten.view_as_complex.default,
    aten.view_as_real.default,
    aten._reshape_alias.default,
    aten.unfold.default,
    aten.set_.source_Storage,
    aten.set_.source_Storage_storage_offset,
    aten.set_.source_Tensor,
)
"""Operations that touch no values: the CPU's kernels take CUDA tensors for them."""
ANY_INDEX = {"aten::index", "aten::_unsafe_index", "aten::index_put_", "aten::_index_put_impl_"}
"""Operations on a GPU whose indices may be on the CPU."""
WAITS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
"""Tags of operations whose result the CPU has to know."""
ALLOCATIONS = {"aten::empty", "aten::empty_strided"}
"""Operations that a CUDA graph does not repeat."""
SYNC_MODES = {"default": 0, "warn": 1, "error": 2}
"""What torch does where the CPU waits for the GPU."""

_find_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_find_pointer.restype, _find_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
_kept: list[object] = []
"""What torch refers to by address."""
_capture: list[Callable[[], object]] | None = None
"""The operations so far of the CUDA graph that is being captured."""


def relabel(tensor: Tensor, device: str) -> Tensor:
    """Return a tensor of another device with the same memory, which it keeps alive."""
    capsule = torch._C._to_dlpack(tensor)
    # DLTensor: void* data; the type of the device and its index.
    place = _find_pointer(capsule, b"dltensor") + ctypes.sizeof(ctypes.c_void_p)
    ctypes.c_int32.from_address(place).value = DLPACK_TYPES[device]
    return torch._C._from_dlpack(capsule)


def to_cpu(value: Any) -> Any:
    """Relabel an argument for the CPU."""
    if isinstance(value, Tensor):
        return relabel(value, "cpu") if value.is_cuda else value
    if isinstance(value, list | tuple):
        return type(value)(to_cpu(item) for item in value)
    return CPU if isinstance(value, torch.device) else value


def to_gpu(value: Any) -> Any:
    """Relabel a result for the GPU."""
    if isinstance(value, Tensor):
        return relabel(value, "cuda")
    return [to_gpu(item) for item in value] if isinstance(value, list) else value


@dataclass(frozen=True, slots=True)
class Signature:
    """What :func:`compute` has to know of an operation."""

    name: str
    names: tuple[str, ...]
    """Of all arguments, in order."""
    positional: tuple[str, ...]
    outs: tuple[str, ...]
    """Arguments that are filled with the results, whatever their size."""
    tensors: tuple[str, ...]
    """Arguments that are a single tensor."""
    waits: bool
    """Whether the CPU waits for the result, or at least for its size."""
    written: tuple[str | None, ...]
    """For each result, the argument that it is; None for a new tensor."""


@functools.cache
def read_signature(op: Any) -> Signature:
    """Read an operation's schema."""
    arguments, returns = op._schema.arguments, op._schema.returns
    owners = {str(a.alias_info.before_set): a.name for a in arguments if a.alias_info}
    aliases = [returned.alias_info for returned in returns]
    return Signature(
        name=op._schema.name,
        names=tuple(a.name for a in arguments),
        positional=tuple(a.name for a in arguments if not a.kwarg_only),
        outs=tuple(a.name for a in arguments if a.is_out),
        tensors=tuple(a.name for a in arguments if isinstance(a.type, torch.TensorType)),
        waits=bool(WAITS & set(op.tags)),
        written=tuple(owners[str(a.before_set)] if a and a.is_write else None for a in aliases),
    )


def compute(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operation on the GPU's tensors by the CPU's kernel."""
    signature = read_signature(op)
    values = dict(zip(signature.names, args, strict=False)) | kwargs
    check_devices(signature, values)
    if signature.waits and not _knows_size(values):
        note_wait()
    host = {name: to_cpu(value) for name, value in values.items()}
    # DLPack's memory cannot be resized.
    host |= {name: torch.empty(0, dtype=values[name].dtype) for name in signature.outs}
    # Numbers arrive as such, although this overload has them as tensors.
    numbers = any(isinstance(values.get(name), int | float) for name in signature.tensors)
    positional = [host.pop(name) for name in signature.positional if name in host]
    run = partial(op.overloadpacket if numbers else op, *positional, **host)
    results = _list_results(run(), signature)
    targets = [None if name is None else values[name] for name in signature.written]
    placed = tuple(map(_place, results, targets))
    if _capture is not None and signature.name not in ALLOCATIONS:
        _capture.append(lambda: _repeat(results, _list_results(run(), signature), targets))
    return placed if len(placed) > 1 else next(iter(placed), None)


def _knows_size(values: dict[str, Any]) -> bool:
    """Whether the size of a result follows from these arguments' sizes, which is an exception."""
    masks = (torch.bool, torch.uint8)
    indices = values.get("indices")
    by_number = indices is not None and all(i is None or i.dtype not in masks for i in indices)
    return by_number or values.get("output_size") is not None


def _list_results(found: Any, signature: Signature) -> Sequence[Any]:
    return found if len(signature.written) > 1 else [found][: len(signature.written)]


def _place(found: Any, target: Tensor | None) -> Any:
    """Return a result on the GPU: as a new tensor, or in the argument that it is written to."""
    if target is None:
        return to_gpu(found)
    if found.data_ptr() != target.data_ptr():
        if target.shape != found.shape:
            target.resize_(found.shape)
        aten.copy_.default(relabel(target, "cpu"), found)
    return target


def _repeat(old: Sequence[Any], new: Sequence[Any], targets: Sequence[Tensor | None]) -> None:
    """Put the results of a captured operation into the memory of those that it had first."""
    for first, again, target in zip(old, new, targets, strict=True):
        place = first if target is None else relabel(target, "cpu")
        pairs = zip(place, again, strict=True) if isinstance(again, list) else [(place, again)]
        for one, other in pairs:
            if one.data_ptr() != other.data_ptr():
                aten.copy_.default(one, other)


def check_devices(signature: Signature, values: dict[str, Any]) -> None:
    """Raise what CUDA raises for arguments on the CPU; tensors of one number are allowed."""
    for name, value in values.items():
        if isinstance(value, torch.Generator) and value.device.type != "cuda":
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        if name == "indices" and signature.name in ANY_INDEX:
            continue
        for tensor in value if isinstance(value, list | tuple) else [value]:
            if isinstance(tensor, Tensor) and not tensor.is_cuda and tensor.dim():
                raise RuntimeError(
                    "Expected all tensors to be on the same device, but found at least two "
                    f"devices, cuda:0 and cpu! (argument {name} of {signature.name})"
                )


def note_wait() -> None:
    """Raise what CUDA raises where the CPU would wait for the GPU and must not."""
    if _capture is not None:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
    if torch.cuda.get_sync_debug_mode() == SYNC_MODES["error"]:
        raise RuntimeError("called a synchronizing CUDA operation")


def copy_(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """Copy between devices, or on the GPU."""
    if not (non_blocking or (target.is_cuda and source.is_cuda)):
        note_wait()
    run = partial(aten.copy_.default, to_cpu(target), to_cpu(source))
    run()
    if _capture is not None:
        _capture.append(run)
    return target


def resize_(tensor: Tensor, size: list[int], *, memory_format: object = None) -> Tensor:
    """Resize a tensor, with another storage where its own is too small."""
    room = tensor.untyped_storage().nbytes() // tensor.element_size() - tensor.storage_offset()
    if torch.Size(size).numel() > room:
        return tensor.set_(torch.empty(size, dtype=tensor.dtype, device=GPU))
    return aten.resize_.default.redispatch(CPU_KEY, tensor, size)


def mm(left: Tensor, right: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Multiply without rounding the sums, for which CPUs have no kernel."""
    return left.to(out_dtype) @ right.to(out_dtype)


def histc(values: Tensor, bins: int, low: float, high: float) -> Tensor:
    """Count numbers, integers included, for which CPUs have no kernel."""
    return compute(aten.histc.default, values.double(), bins, low, high).to(values.dtype)


def install_kernels() -> None:
    """Register a kernel for CUDA wherever there is one for the CPU."""
    kernels: dict[Any, Any] = {op: partial(op.redispatch, CPU_KEY) for op in METADATA}
    kernels |= {
        aten.copy_.default: copy_,
        aten.resize_.default: resize_,
        aten.mm.dtype: mm,
        aten.histc.default: histc,
    }
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("aten::") and torch._C._dispatch_has_kernel_for_dispatch_key(
            name, "CPU"
        ):
            packet, _, overload = name.removeprefix("aten::").partition(".")
            op = getattr(getattr(aten, packet), overload or "default")
            kernels.setdefault(op, partial(compute, op))
    implementations = library.Library("aten", "IMPL")
    for op, kernel in kernels.items():
        implementations.impl(op, kernel, "CUDA")
    _kept.append(implementations)


class CUDAGraph:
    """Operations of the time when it was captured, on the tensors that they had."""

    operations: list[Callable[[], object]]

    @torch.inference_mode()
    def replay(self) -> None:
        """Run the operations again; autograd takes no notice."""
        for operation in self.operations:
            operation()


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured."""
    return _capture is not None


@contextmanager
def graph(captured: CUDAGraph, *_: object, **__: object) -> Iterator[None]:
    """Capture what runs inside."""
    global _capture
    _capture = captured.operations = []
    try:
        yield
    finally:
        _capture = None

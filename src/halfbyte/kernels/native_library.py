"""Load the compiled library of ``csrc/`` once per process, or record why it cannot be loaded.

Its interface is ``csrc/halfbyte_cpu.h``: plain C, so one build works with every Python and torch.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path

import torch

import halfbyte.kernels
from halfbyte.environment import CPU_ISA, read_variable
from halfbyte.errors import ConfigError

ABI_VERSION = 5
"""HB_ABI_VERSION of the header that this code was written against."""

FILE_NAMES = ("libhalfbyte_cpu.so", "libhalfbyte_cpu.dylib")

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""hb_dtype."""

_VOID, _INT, _LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64

STATUSES = {
    1: "the packed layout does not support these sizes or types",
    2: "the bytes are not a packed weight of this version",
    3: "out of memory",
}
"""Meaning of each hb_status."""


class LinearShape(ctypes.Structure):
    """hb_linear_shape."""

    _fields_ = tuple(
        (name, ctypes.c_int32)
        for name in (
            "bits",
            "in_features",
            "out_features",
            "group_size",
            "scale_dtype",
            "symmetric",
            "has_order",
        )
    )


class Block(ctypes.Structure):
    """hb_block."""

    _fields_ = tuple(
        (name, ctypes.c_void_p)
        for name in (
            *("q", "k", "v", "o", "gate", "up", "down"),
            *("q_bias", "k_bias", "v_bias", "o_bias", "gate_bias", "up_bias", "down_bias"),
            *("attention_norm", "mlp_norm", "q_norm", "k_norm", "keys", "values"),
            *("experts", "router"),
        )
    )


class Decoder(ctypes.Structure):
    """hb_decoder."""

    _fields_ = (
        ("blocks", ctypes.c_int32),
        ("hidden", ctypes.c_int32),
        ("heads", ctypes.c_int32),
        ("kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("rotary_dim", ctypes.c_int32),
        ("intermediate", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("activation_bits", ctypes.c_int32),
        ("experts", ctypes.c_int32),
        ("expert_width", ctypes.c_int32),
        ("experts_per_token", ctypes.c_int32),
        ("normalize_weights", ctypes.c_int32),
        ("pages", ctypes.c_int64),
        ("page_tokens", ctypes.c_int64),
        ("capacity", ctypes.c_int64),
        ("epsilon", ctypes.c_float),
        ("scale", ctypes.c_float),
        ("cosines", ctypes.c_void_p),
        ("sines", ctypes.c_void_p),
        ("last_norm", ctypes.c_void_p),
        ("block", ctypes.POINTER(Block)),
    )


class Rows(ctypes.Structure):
    """hb_rows."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("prompt", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("x", "positions", "tables", "starts", "out")),
    )


class Blocks(ctypes.Structure):
    """hb_blocks."""

    _fields_ = (
        ("count", ctypes.c_int64),
        ("per_group", ctypes.c_int64),
        ("grid_bytes", ctypes.c_int32),
        ("bits", ctypes.c_int32),
    )


class Codes(ctypes.Structure):
    """hb_codes."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("words", "scales", "zeros")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "groups", "group_size")),
        *((name, ctypes.c_int32) for name in ("bits", "scale_dtype")),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeLibrary:
    """The loaded library, or why there is none."""

    functions: ctypes.CDLL | None
    obstacle: str | None
    isa: str
    """The instruction set in use; empty without a library."""


@functools.cache
def open_library() -> NativeLibrary:
    """Load the library, share torch's thread pool with it, and select the instruction set.

    Returns:
        The library; if it cannot be used, the reason.

    Raises:
        ConfigError: ``HALFBYTE_CPU_ISA`` names an instruction set that this CPU cannot use.
    """
    path = _find_file()
    if path is None:
        return _absent(
            "not built: halfbyte was installed without a C++ compiler; install one, then "
            "reinstall halfbyte"
        )
    try:
        functions = ctypes.CDLL(str(path))
        found = int(functions.hb_abi_version())
    except (OSError, AttributeError) as error:
        return _absent(f"{path.name} cannot be opened: {error}")
    if found != ABI_VERSION:
        return _absent(
            f"{path.name} has ABI version {found}, expected {ABI_VERSION}; reinstall halfbyte"
        )
    _declare(functions)
    functions.hb_use_openmp(_find_openmp())
    _select_isa(functions)
    isa = functions.hb_isa().decode()
    return NativeLibrary(functions=functions, obstacle=None, isa=isa)


def has_tiles() -> bool:
    """Return whether the library has matrix units for many bf16 rows."""
    functions = open_library().functions
    return functions is not None and bool(functions.hb_tiles())


def check_status(status: int, action: str) -> None:
    """Raise an exception if a library call failed.

    Args:
        status: Return value of the call.
        action: What was being done, the start of the message.

    Raises:
        MemoryError: The library ran out of memory.
        ConfigError: The library does not support the arguments.
    """
    if status == 0:
        return
    reason = STATUSES.get(status, f"the library returned status {status}")
    if status == 3:
        raise MemoryError(f"{action}: {reason}.")
    raise ConfigError(f"{action}: {reason}.")


def _absent(obstacle: str) -> NativeLibrary:
    return NativeLibrary(functions=None, obstacle=obstacle, isa="")


def _find_file() -> Path | None:
    # An editable install keeps build products in another folder of the same package.
    folders = [Path(folder) for folder in halfbyte.kernels.__path__]
    paths = (folder / "lib" / name for folder in folders for name in FILE_NAMES)
    return next((path for path in paths if path.is_file()), None)


def _declare(functions: ctypes.CDLL) -> None:
    shape = ctypes.POINTER(LinearShape)
    signatures: dict[str, tuple[object, tuple[object, ...]]] = {
        "hb_isa": (ctypes.c_char_p, ()),
        "hb_isas": (ctypes.c_char_p, ()),
        "hb_select_isa": (_INT, (ctypes.c_char_p,)),
        "hb_use_openmp": (None, (_VOID,)),
        "hb_packed_bytes": (_LONG, (shape,)),
        "hb_pack": (_INT, (shape, _VOID, _VOID, _VOID, _VOID, _VOID, _INT)),
        "hb_unpack": (_INT, (_VOID, _VOID, _INT)),
        "hb_linear": (_INT, (_VOID, _INT, _VOID, _LONG, _VOID, _VOID, _INT, _INT)),
        "hb_dense": (_INT, (_VOID, _INT, _VOID, _LONG, _LONG, _LONG, _VOID, _INT)),
        "hb_decode": (_INT, (ctypes.POINTER(Decoder), ctypes.POINTER(Rows), _INT)),
        "hb_read": (ctypes.c_uint64, (_VOID, _LONG, _INT)),
        "hb_tiles": (_INT, ()),
        "hb_dequantize": (_INT, (_VOID, _LONG, _LONG, _INT, _VOID, _INT)),
        "hb_transpose": (None, (_VOID, _LONG, _LONG, _VOID)),
        "hb_to_awq": (None, (_VOID, _LONG, _LONG, _VOID)),
        "hb_from_awq": (None, (_VOID, _LONG, _LONG, _VOID)),
        "hb_to_blocks": (None, (ctypes.POINTER(Blocks), _VOID, _VOID, _VOID)),
        "hb_from_blocks": (None, (ctypes.POINTER(Blocks), _VOID, _VOID)),
        "hb_expand": (None, (ctypes.POINTER(Codes), _INT, _VOID)),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(functions, name)
        function.restype, function.argtypes = result, arguments


def _find_openmp() -> int | None:
    """Return the address of ``GOMP_parallel`` in the OpenMP runtime that torch uses.

    Two thread pools that wait by spinning slow each other down, so torch's pool is shared.
    """
    folder = Path(torch.__file__).parent / "lib"
    for path in (*folder.glob("libgomp*"), *folder.glob("libomp*"), *folder.glob("libiomp*")):
        try:
            start = ctypes.CDLL(str(path)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        return ctypes.cast(start, _VOID).value
    return None


def _select_isa(functions: ctypes.CDLL) -> None:
    wanted = read_variable(CPU_ISA)
    if wanted is None or functions.hb_select_isa(wanted.encode()) == 0:
        return
    usable = functions.hb_isas().decode().replace(",", ", ")
    raise ConfigError(
        f"The environment variable {CPU_ISA.name} is '{wanted}'; this CPU can use {usable}. "
        "Unset the variable to use the last of these."
    )

"""The few PTX instructions that the Triton kernels use inline, on numpy arrays."""

from __future__ import annotations

import re

import numpy as np
import torch


def run_ptx(text: str, inputs: list[np.ndarray], num_outputs: int) -> list[np.ndarray]:
    """Run inline assembly whose outputs come first; one element of each array at a time.

    Returns:
        uint32, or uint16 where the output is half of a ``mov.b32``.
    """
    registers: dict[str, np.ndarray] = {
        f"${num_outputs + index}": value.astype(np.uint32) for index, value in enumerate(inputs)
    }

    def read(name: str) -> np.ndarray:
        return registers[name] if name in registers else np.uint32(int(name, 0))

    for statement in re.split(r";\s*", text.strip().removeprefix("{").removesuffix("}")):
        if not statement.strip() or ".reg" in statement:
            continue
        name, _, rest = statement.strip().partition(" ")
        halves = re.match(r"\{(\S+), (\S+)\}, (\S+)", rest)
        if halves:
            value = read(halves[3])
            registers[halves[1]] = (value & 0xFFFF).astype(np.uint16)
            registers[halves[2]] = (value >> 16).astype(np.uint16)
            continue
        target, *sources = (word.strip() for word in rest.split(","))
        if name == "mov.b32":
            registers[target] = read(sources[0])
        elif name == "shr.u32":
            registers[target] = read(sources[0]) >> read(sources[1])
        elif name == "lop3.b32":
            assert int(sources[3], 0) == 0xEA, "only (a & b) | c"
            registers[target] = (read(sources[0]) & read(sources[1])) | read(sources[2])
        elif name.startswith("fma.rn."):
            dtype = {"f16x2": torch.float16, "bf16x2": torch.bfloat16}[name.rpartition(".")[2]]
            registers[target] = _multiply_add(*map(read, sources), dtype)
        else:
            raise NotImplementedError(statement)
    return [registers[f"${index}"] for index in range(num_outputs)]


def _multiply_add(a, b, c, dtype: torch.dtype) -> np.ndarray:
    shape = np.broadcast_shapes(np.shape(a), np.shape(b), np.shape(c))

    def widen(value) -> torch.Tensor:
        whole = np.ascontiguousarray(np.broadcast_to(value, shape).astype(np.uint32))
        return torch.from_numpy(whole.view(np.int16)).view(dtype).double()

    result = (widen(a) * widen(b) + widen(c)).to(dtype).contiguous()
    return result.view(torch.int16).numpy().view(np.uint32).reshape(shape)

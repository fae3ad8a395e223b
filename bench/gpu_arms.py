"""Kernels to compare on one layer on a GPU: halfbyte's, cuBLAS and those of other tools.

Each arm cycles through enough copies of its weight that none is still cached when it is read again.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional

from halfbyte.kernels import cuda_linear, triton_linear
from halfbyte.kernels.contract import LinearSpec, Operands
from halfbyte.kernels.cuda_linear import CudaConfig
from halfbyte.kernels.cuda_rows import RowsConfig
from halfbyte.kernels.cuda_stream import StreamConfig
from halfbyte.kernels.fragments import unpack_fragments
from halfbyte.kernels.triton_configs import TritonConfig
from halfbyte.packing import pack_codes

COLD_BYTES = 300e6
"""Total size of an arm's copies: more than twice the cache of any GPU."""

UINT4B8 = 1125899907892224
"""vLLM's identifier of unsigned 4-bit codes with a bias of 8 (its scalar_type.py)."""

Run = Callable[[Tensor], list[Tensor]]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A random 4-bit layer on the GPU."""

    spec: LinearSpec
    copies: list[Operands]
    dense: list[Tensor]
    """Copies of the dequantized weight [out, in], in the spec's dtype."""


def make_layer(
    in_features: int, out_features: int, dtype: torch.dtype, *, cold: bool = True
) -> Layer:
    """Make a layer of random codes: every 32-bit word is eight valid ones."""
    spec = LinearSpec(
        bits=4,
        group_size=128,
        in_features=in_features,
        out_features=out_features,
        symmetric=True,
        act_order=False,
        zero_offset=1,
        dtype=dtype,
        device_type="cuda",
    )
    shape = (in_features // 64, out_features // 16, 128)
    words = torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device="cuda")
    scales = torch.rand(spec.num_groups, out_features, device="cuda") * 0.01 + 0.005
    # Exact in both 16-bit dtypes, so that peers that cast the scales compute the same result.
    scales = scales.to(torch.bfloat16).to(dtype)
    zeros = torch.empty(0, dtype=torch.int32, device="cuda")
    first = Operands(weight=(words,), qzeros=zeros, scales=scales, g_idx=None)
    copies = [first] + [
        replace(first, weight=(words.clone(),), scales=scales.clone())
        for _ in range(count_copies(words.nbytes) - 1 if cold else 0)
    ]
    weight = triton_linear.dequantize_fragments(first, spec, dtype)
    dense = [weight] + [
        weight.clone() for _ in range(count_copies(weight.nbytes) - 1 if cold else 0)
    ]
    return Layer(spec=spec, copies=copies, dense=dense)


def count_copies(num_bytes: int) -> int:
    """Return how many copies of a weight exceed the cache together."""
    return max(int(COLD_BYTES / num_bytes) + 1, 2)


def run_dense(layer: Layer) -> Run:
    """Run cuBLAS on the dense weight."""
    return lambda x: [functional.linear(x, weight) for weight in layer.dense]


def run_triton(layer: Layer, config: TritonConfig | None = None) -> Run:
    """Run halfbyte's Triton kernel; ``config`` None: the configuration it selects itself."""
    kernel = triton_linear.TritonLinear()
    if config is None:
        return lambda x: [kernel.apply(x, part, None, layer.spec) for part in layer.copies]
    return lambda x: [
        triton_linear.multiply(x, part, None, layer.spec, config) for part in layer.copies
    ]


def run_cuda(layer: Layer, config: CudaConfig | None = None, early_start: bool = True) -> Run:
    """Run halfbyte's CUDA kernel; ``config`` None: the configuration it selects itself."""
    kernel = cuda_linear.CudaLinear()
    if config is None:
        return lambda x: [kernel.apply(x, part, None, layer.spec) for part in layer.copies]
    return lambda x: [
        cuda_linear.multiply(x, part, None, layer.spec, config, early_start=early_start)
        for part in layer.copies
    ]


def run_config(
    module: ModuleType, layer: Layer, config: RowsConfig | StreamConfig, early_start: bool
) -> Run:
    """Run a CUDA kernel for compute capability 9.0: ``cuda_rows`` or ``cuda_stream``."""
    return lambda x: [
        module.multiply(x, part, None, layer.spec, config, early_start=early_start)
        for part in layer.copies
    ]


def dequantize_exactly(layer: Layer) -> Tensor:
    """Return the weight in fp32: the reference for kernels that round it to 16 bits."""
    return triton_linear.dequantize_fragments(layer.copies[0], layer.spec, torch.float32)


def run_dequantized(layer: Layer) -> Run:
    """Dequantize the weight, then run cuBLAS."""

    def multiply(x: Tensor, part: Operands) -> Tensor:
        dense = triton_linear.dequantize_fragments(part, layer.spec, layer.spec.dtype)
        return functional.linear(x, dense)

    return lambda x: [multiply(x, part) for part in layer.copies]


def load_vllm(folder: Path) -> None:
    """Load vLLM's kernels from its library in a folder."""
    torch.ops.load_library(str(folder / "_C_stable_libtorch.abi3.so"))


def unpack_to_disk_layout(layer: Layer) -> Tensor:
    """Return the layer's qweight in its on-disk layout."""
    return pack_codes(unpack_fragments(layer.copies[0].weight[0], 4), 4)


def run_marlin(layer: Layer) -> Run:
    """Run vLLM's Marlin, as vLLM's ``apply_gptq_marlin_linear`` calls it."""
    spec = layer.spec
    k, n = spec.in_features, spec.out_features
    empty = torch.empty(0, dtype=torch.int32, device="cuda")
    packed = torch.ops._C.gptq_marlin_repack(unpack_to_disk_layout(layer), empty, k, n, 4, False)
    order = [i + 8 * j for i in range(8) for j in range(8)]
    scales = layer.copies[0].scales.reshape(-1, 64)[:, order].reshape(-1, n).contiguous()
    weights = [packed.clone() for _ in layer.copies]
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    workspace = torch.zeros(processors, dtype=torch.int32, device="cuda")

    def multiply(x: Tensor, weight: Tensor) -> Tensor:
        return torch.ops._C.marlin_gemm(
            x, None, weight, None, scales, None, None, None, empty, empty, workspace, UINT4B8,
            x.shape[0], n, k, True, False, True, False,
        )  # fmt: skip

    return lambda x: [multiply(x, weight) for weight in weights]


def run_machete(layer: Layer) -> Run:
    """Run vLLM's Machete with the schedule that it selects itself."""
    spec = layer.spec
    words = unpack_to_disk_layout(layer).t().contiguous().t()
    packed = torch.ops._C.machete_prepack_B(words, spec.dtype, UINT4B8, spec.dtype)
    weights = [packed.clone(memory_format=torch.preserve_format) for _ in layer.copies]
    scales = layer.copies[0].scales

    def multiply(x: Tensor, weight: Tensor) -> Tensor:
        return torch.ops._C.machete_mm(
            x, weight, UINT4B8, None, scales, None, spec.group_size, None, None, None
        )

    return lambda x: [multiply(x, weight) for weight in weights]


def run_tinygemm(layer: Layer) -> Run:
    """Run torch's int4 matrix product."""
    codes = unpack_fragments(layer.copies[0].weight[0], 4).t().contiguous()
    pairs = (codes[:, ::2] << 4) | codes[:, 1::2]
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs, 8)
    scales = layer.copies[0].scales
    grid = torch.stack([scales, torch.zeros_like(scales)], dim=-1).contiguous()
    weights = [packed.clone() for _ in layer.copies]
    group = layer.spec.group_size
    return lambda x: [
        torch.ops.aten._weight_int4pack_mm(x, weight, group, grid) for weight in weights
    ]


def run_humming(layer: Layer, folder: Path) -> Run:
    """Run Humming, which quantizes the dense weight itself: only its time is comparable."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
        sys.path.append(str(folder.parent / "extra"))  # its dependencies, if not installed
    from humming.layer import HummingLayer

    spec = layer.spec
    first = HummingLayer(
        shape_n=spec.out_features,
        shape_k=spec.in_features,
        weight_config={"dtype": "uint4", "group_size": spec.group_size},
        torch_dtype=spec.dtype,
    ).cuda()
    first.load_from_unquantized(layer.dense[0])
    first.transform()
    layers = [first] + [copy.deepcopy(first) for _ in layer.copies[1:]]
    return lambda x: [one(x) for one in layers]

"""Is what the kernels for GPUs compute right? Against float64, for every kind of layer.

Every combination of bits, group size, dtype, zeros and order, each with every configuration that
is shipped: a compiler that gets one of them wrong gets it wrong silently (docs/log.md, 2026-11-26).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from halfbyte.kernels import cuda_linear, cuda_stream, triton_configs, triton_linear
from halfbyte.kernels.contract import LinearSpec, Operands
from halfbyte.kernels.cuda_linear import CudaConfig, CudaLinear
from halfbyte.kernels.cuda_stream import StreamConfig
from halfbyte.kernels.fragments import find_order, prepare_fragments, restore_fragments
from halfbyte.kernels.gpu_table import load_table
from halfbyte.kernels.registry import describe_spec
from halfbyte.kernels.torch_reference import dequantize_weight
from halfbyte.kernels.triton_configs import TritonConfig
from halfbyte.kernels.triton_linear import TritonLinear
from halfbyte.packing import pack_weight, pack_zeros

DTYPES = (torch.bfloat16, torch.float16)
SIZES = {"in_features": 1152, "out_features": 1056}
"""Divided by no block of any configuration."""

Config = TritonConfig | CudaConfig | StreamConfig
Product = Callable[[Tensor, Tensor], Tensor]
"""x, bias -> x @ weight.T + bias."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One kind of layer, and the configurations to check on it; none: the kernels' own choice."""

    spec: LinearSpec
    configs: tuple[Config, ...] = ()


def list_jobs(architecture: str) -> list[Job]:
    """List every kind of layer: first with the kernels' own choice, then with every configuration.

    Args:
        architecture: Whose shipped table; ``sm_90``.

    Returns:
        In the order of what is wanted most; 4 bits before the others.
    """
    specs = list(_list_specs())
    configs = [
        *list_triton_configs(architecture),
        *list_cuda_configs(architecture),
        *list_stream_configs(architecture),
    ]
    quick = [Job(spec=spec) for spec in specs]
    large = [replace(spec, in_features=4096, out_features=4096) for spec in specs[:8]]
    full = [
        Job(spec=spec, configs=tuple(configs[start : start + 8]))
        for spec in specs
        for start in range(0, len(configs), 8)
    ]
    return [*quick, *(Job(spec=spec) for spec in large), *full]


def make_spec(**changed: Any) -> LinearSpec:
    """A layer of no round size: 4 bits, groups of 128, symmetric, bf16; or what is changed."""
    base = LinearSpec(
        bits=4,
        group_size=128,
        symmetric=True,
        act_order=False,
        zero_offset=1,
        dtype=torch.bfloat16,
        device_type="cuda",
        **SIZES,
    )
    return replace(base, **changed)


def _list_specs() -> Iterator[LinearSpec]:
    for bits, group_size, symmetric, act_order, dtype in itertools.product(
        (4, 8, 3, 2), (128, 32, 64, 256, 1152), (True, False), (False, True), DTYPES
    ):
        yield make_spec(
            bits=bits,
            group_size=group_size,
            symmetric=symmetric,
            act_order=act_order,
            dtype=dtype,
        )


def list_triton_configs(architecture: str) -> list[TritonConfig]:
    """Every configuration that may be chosen."""
    measured = [TritonConfig(**config) for config in load_table(architecture).triton.values()]
    by_rule = [
        TritonConfig(rule.block_out, rule.block_rows, splits, rule.warps, rule.stages)
        for rule in triton_configs.RULES.values()
        for splits in (1, 2, 4, 8)
    ]
    return list(dict.fromkeys([*measured, *by_rule]))


def list_cuda_configs(architecture: str) -> list[CudaConfig]:
    """Every configuration that may be chosen."""
    measured = [CudaConfig(**config) for config in load_table(architecture).cuda.values()]
    return list(dict.fromkeys([*measured, *cuda_linear.PREFERRED]))


def list_stream_configs(architecture: str) -> list[StreamConfig]:
    """Every configuration that may be chosen."""
    measured = load_table(architecture).stream.values()
    return list(dict.fromkeys(StreamConfig(**config) for config in measured))


def make_operands(spec: LinearSpec, seed: int) -> tuple[Operands, Tensor]:
    """Random stored tensors on the GPU, and the weight in float64 by torch alone."""
    generator = torch.Generator().manual_seed(seed)
    high = 2**spec.bits
    codes = torch.randint(0, high, (spec.out_features, spec.in_features), generator=generator)
    shape = (spec.out_features, spec.num_groups)
    zeros = torch.full(shape, high // 2)
    if not spec.symmetric:
        zeros = torch.randint(spec.zero_offset, high, shape, generator=generator)
    scales = (torch.rand(shape[::-1], generator=generator) * 0.02 + 0.01).half()
    g_idx = torch.arange(spec.in_features, dtype=torch.int32) // spec.group_size
    g_idx = g_idx[torch.randperm(spec.in_features, generator=generator)]
    stored = Operands(
        weight=(pack_weight(codes, spec.bits).cuda(),),
        qzeros=pack_zeros(zeros, spec.bits, spec.zero_offset).cuda(),
        scales=scales.cuda(),
        g_idx=g_idx.cuda() if spec.act_order else None,
    )
    weight = dequantize_weight(
        stored.weight[0],
        stored.qzeros,
        stored.scales,
        stored.g_idx,
        bits=spec.bits,
        zero_offset=spec.zero_offset,
        group_size=spec.group_size,
        dtype=torch.float64,
    )
    return stored, weight


def check_job(job: Job) -> list[dict[str, Any]]:
    """Compare the kernels with float64 on one kind of layer, and with themselves."""
    spec = job.spec
    stored, weight = make_operands(spec, spec.group_size + spec.bits)
    operands = replace(stored, weight=prepare_fragments(stored, spec))
    layer = {"layer": describe_spec(spec)}
    if not job.configs:
        restored = torch.equal(restore_fragments(operands, spec), stored.weight[0])
        return [
            {"kernel": kernel.name, **layer, "restores_bits": restored}
            | _check_exact(kernel, operands, weight, spec)
            | check_product(
                _own_choice(kernel, operands, spec), weight, spec, (1, 7, 16, 33, 64, 100, 200)
            )
            for kernel in (CudaLinear(), TritonLinear())
        ]
    return [
        {"kernel": str(config), **layer}
        | check_product(_with_config(config, operands, spec), weight, spec, _rows_of(config))
        for config in job.configs
        if _fits(config, operands, spec)
    ]


def _own_choice(kernel: TritonLinear, operands: Operands, spec: LinearSpec) -> Product:
    return lambda x, bias: kernel.apply(x, operands, bias, spec)


def _with_config(config: Config, operands: Operands, spec: LinearSpec) -> Product:
    if isinstance(config, TritonConfig):
        return lambda x, bias: triton_linear.multiply(x, operands, bias, spec, config)
    order = find_order(operands, spec)

    def multiply(x: Tensor, bias: Tensor) -> Tensor:
        rows = x if order is None else x.index_select(1, order)
        if isinstance(config, StreamConfig):
            smaller = cuda_stream.fit_memory(config, spec, operands.scales.dtype)
            return cuda_stream.multiply(rows, operands, bias, spec, smaller)
        return cuda_linear.multiply(rows, operands, bias, spec, config)

    return multiply


def _fits(config: Config, operands: Operands, spec: LinearSpec) -> bool:
    if isinstance(config, TritonConfig):
        return True
    if isinstance(config, StreamConfig):
        return cuda_stream.find_mismatch(config, spec) is None
    size = config.count_shared_bytes(spec, operands.scales.dtype)
    return size <= cuda_linear.SHARED_LIMIT["sm_90"]


def _rows_of(config: Config) -> tuple[int, ...]:
    if isinstance(config, TritonConfig):
        return 1, config.block_rows - 1, config.block_rows + 1, 2 * config.block_rows
    return 1, 8 * config.row_tiles - 1, 8 * config.row_tiles


def _check_exact(
    kernel: TritonLinear, operands: Operands, weight: Tensor, spec: LinearSpec
) -> dict[str, Any]:
    exact = torch.equal(kernel.dequantize(operands, spec, torch.float64), weight)
    return {"dequantizes_exactly": exact}


def check_product(
    product: Product, weight: Tensor, spec: LinearSpec, rows_list: tuple[int, ...]
) -> dict[str, Any]:
    """Compare a product with float64 at several numbers of rows, and with itself five times."""
    worst, same = 0.0, True
    try:
        for rows in rows_list:
            x = torch.randn(rows, spec.in_features, device="cuda").to(spec.dtype)
            bias = torch.randn(spec.out_features, device="cuda").to(spec.dtype)
            found = product(x, bias)
            for _ in range(5):
                same &= torch.equal(found, product(x, bias))
            true = x.double() @ weight.t() + bias.double()
            size = x.double().abs() @ weight.abs().t() + bias.double().abs()
            bound = TritonLinear().error_bound(spec)
            ratio = ((found.double() - true).abs() / size).max() / bound
            # Not-a-number must not pass for small.
            worst = max(worst, float(ratio)) if bool(torch.isfinite(ratio)) else math.inf
        problem = None
    except Exception as error:  # noqa: BLE001 - reported as this case's outcome
        problem = f"{type(error).__name__}: {str(error)[:400]}"
    return {"error_over_bound": worst, "repeats_bit_for_bit": same, "problem": problem}


def is_good(outcome: dict[str, Any]) -> bool:
    """Whether nothing is wrong with an outcome."""
    return (
        outcome.get("problem") is None
        and outcome.get("error_over_bound", math.inf) <= 1
        and all(outcome.get(key, True) for key in ("repeats_bit_for_bit", "restores_bits"))
        and outcome.get("dequantizes_exactly", True)
    )

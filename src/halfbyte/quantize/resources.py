"""Plans a run's settings (dtype, batch size, memory use) and its needs (memory, disk, time).

All settings are decided once, with reasons, before the run starts, and are kept in the journal, so
that a resumed run uses the same ones whatever the state of the machine.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch

from halfbyte.errors import ConfigError
from halfbyte.machine.arithmetic import has_fast_bf16
from halfbyte.machine.limits import available_memory_bytes
from halfbyte.model.weights import ModelWeights
from halfbyte.quant_config import SUPPORTED_BITS, CalibrationConfig, QuantConfig, ResourceConfig
from halfbyte.quantize.block_sizes import Sizes, measure_sizes
from halfbyte.quantize.target import CHECK_EVERY
from halfbyte.units import format_bytes, format_seconds, parse_size

TOKENS_PER_BATCH = 4096
"""Tokens for which matrix products reach their full rate; more would only need more memory."""
DEVICE_TOKENS_PER_BATCH = 16384
"""The same on a GPU, where a batch must take longer than Python needs to launch its kernels."""
ACHIEVED_RATE = 0.45
"""Fraction of the rate of large matrix products that whole runs achieve (docs/log.md, floor)."""
FREE_MEMORY_SHARE = 0.6
"""Fraction of the free memory that a run uses by default."""
PROGRAM_BYTES = 600_000_000
"""Python, torch and Transformers themselves, as measured."""
TUNING_COPIES = 8
"""fp32 copies of a block's weights that training the block needs."""
TUNING_ACTIVATIONS = 4
"""Activation memory of training a block, relative to that of a forward pass."""
LOGITS_COPIES = 5
"""fp32 copies of a sequence's logits during training and sensitivity analysis."""
HESSIAN_SHARE = 0.5
"""Fraction of the remaining memory for the Hessians of one stage; experts that exceed it are
processed in portions."""
SMALLEST_HESSIAN_BYTES = 1 << 28
"""Minimum memory for the Hessians of one stage."""
BACKWARD_TOKENS = 8192
"""Tokens per backward pass through the base model; enough to rank modules by sensitivity."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """Settings of a run that its numerical results may depend on, at least in the last bit."""

    dtype: str
    """Dtype of the model's computation."""
    device: str
    threads: int
    batch_size: int
    keep_paused: bool
    """Whether forward passes pause in memory between stages, instead of running once per stage."""
    hessian_bytes: int
    """Memory for the Hessians that are collected at the same time."""
    hold_states: bool = False
    """Whether hidden states stay on the device between blocks, instead of in files."""
    keep_codes: bool = False
    """Whether end-to-end training keeps all codes in memory, instead of reading them by block."""
    limit_bytes: int | None = None
    """Limit of the device's memory for the run, if the user set one and the plan fits."""
    reasons: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-serializable values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Create settings from the values of :meth:`to_dict`."""
        return cls(**{**values, "reasons": tuple(values["reasons"])})

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as a ``torch.dtype``."""
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """Settings and estimated needs of a run."""

    settings: RunSettings
    memory_bytes: int
    budget_bytes: int
    work_bytes: int
    """Temporary disk space for hidden states and token weights."""
    output_bytes: int
    flops: float
    seconds: float

    def lines(self) -> tuple[str, ...]:
        """Describe the plan, one fact per line."""
        settings = self.settings
        excess: tuple[str, ...] = ()
        if self.memory_bytes > self.budget_bytes:
            excess = ("more than allowed, so the system may end the run",)
        return (
            f"memory  {format_bytes(self.memory_bytes)} of {format_bytes(self.budget_bytes)}; "
            + "; ".join((*excess, *settings.reasons)),
            f"disk    {format_bytes(self.output_bytes)} for the checkpoint, "
            f"{format_bytes(self.work_bytes)} while it runs",
            f"time    at least {format_seconds(self.seconds)} "
            f"({self.flops / 1e12:.1f} TFLOP on {settings.threads} threads)",
        )

    def check_disk(self, folder: Path) -> None:
        """Check that the disk has enough free space.

        Args:
            folder: A folder on the output's disk.

        Raises:
            ConfigError: There is too little space; the message says how much is needed.
        """
        free = shutil.disk_usage(folder).free
        if free < self.output_bytes + self.work_bytes:
            raise ConfigError(
                f"The disk of {folder} has {format_bytes(free)} free; the checkpoint needs "
                f"{format_bytes(self.output_bytes)}, and the run another "
                f"{format_bytes(self.work_bytes)} temporarily. Free some space, or choose an "
                "output folder on another disk."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Workload:
    """The quantities that the needs of a run are computed from."""

    sizes: Sizes
    config: QuantConfig
    dtype: torch.dtype
    on_device: bool
    lengths: Sequence[int]
    """Length of every calibration sequence."""
    num_blocks: int
    vocabulary: int

    @property
    def streams(self) -> int:
        """Number of models that the calibration text runs through."""
        return 2 if self.config.match_base else 1

    @property
    def tokens(self) -> int:
        """Total number of calibration tokens."""
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        """Length of the longest sequence."""
        return max(self.lengths)

    @property
    def survey_tokens(self) -> int:
        """Tokens of the sensitivity analysis; 0 if it is not needed."""
        return min(BACKWARD_TOKENS, self.tokens) if self.config.chooses_bits else 0

    @property
    def backward_tokens(self) -> int:
        """Tokens per backward pass through the base model; 0 if none is needed."""
        backward = self.config.chooses_bits or self.config.weigh_tokens
        return min(BACKWARD_TOKENS, self.tokens) if backward else 0

    @property
    def bytes_per_token(self) -> int:
        """Activation memory per token while a batch runs through a block."""
        sizes = self.sizes
        return self.dtype.itemsize * (4 * sizes.hidden + 4 * sizes.widest_input * sizes.routed)

    @property
    def state_bytes(self) -> int:
        """Size of all hidden states between two blocks."""
        return self.streams * self.tokens * self.sizes.hidden * self.dtype.itemsize

    @property
    def weight_bytes(self) -> int:
        """Size of the token weights of each linear, in fp32."""
        return 4 * self.tokens * self.sizes.linears if self.config.weigh_tokens else 0

    @property
    def paused_bytes(self) -> int:
        """Memory of the paused forward passes of all batches."""
        sizes = self.sizes
        per_token = self.dtype.itemsize * (3 * sizes.hidden + sizes.widest_input * sizes.routed)
        return self.streams * self.tokens * per_token


def resolve_resources(
    weights: ModelWeights,
    resources: ResourceConfig,
    calibration: CalibrationConfig,
    config: QuantConfig,
    lengths: Sequence[int],
    hidden: int,
) -> RunPlan:
    """Choose the settings of a run and plan its needs.

    Args:
        weights: The model; nothing needs to be loaded.
        resources: Requested device, dtype and memory.
        calibration: Requested batch size.
        config: Which optional steps the run has.
        lengths: Length of every calibration sequence.
        hidden: Numbers per token between blocks.

    Returns:
        The plan.
    """
    dtype, dtype_reason = resolve_dtype(resources.dtype, weights.dtype, weights.device)
    budget, budget_reason = _resolve_budget(resources.memory, weights.device)
    matrices = 3 * (1 + config.match_base) if config.needs_check else 0
    workload = _Workload(
        sizes=measure_sizes(weights, hidden=hidden, matrices=matrices),
        config=config,
        dtype=dtype,
        on_device=weights.device.type != "cpu",
        lengths=lengths,
        num_blocks=len(weights.blocks.modules),
        vocabulary=int(weights.config.get_text_config().vocab_size),
    )
    fixed, hold_states = _fixed_bytes(workload, weights, budget)
    batch_size = calibration.batch_size or _choose_batch_size(workload, budget - fixed)
    batch, keep_codes = _batch_bytes(workload, batch_size, budget - fixed)
    if workload.on_device:
        # On a device, memory freed by the solver is reused for the next batch.
        fixed -= min(batch, workload.sizes.solver_bytes)
    keep = fixed + batch + workload.paused_bytes <= budget
    needed = fixed + batch + (workload.paused_bytes if keep else 0)
    passes = "each block runs once" if keep else "each block runs once per stage, to save memory"
    settings = RunSettings(
        dtype=str(dtype).removeprefix("torch."),
        device=str(weights.device),
        threads=torch.get_num_threads(),
        batch_size=int(batch_size),
        keep_paused=keep,
        hessian_bytes=max(int((budget - needed) * HESSIAN_SHARE), SMALLEST_HESSIAN_BYTES),
        hold_states=hold_states,
        keep_codes=keep_codes,
        limit_bytes=budget - PROGRAM_BYTES if resources.memory and needed <= budget else None,
        reasons=(
            budget_reason,
            f"computes in {dtype_reason}",
            f"{batch_size} sequences per batch",
            passes,
        ),
    )
    flops = _count_flops(workload, batch_size, keep=keep)
    return RunPlan(
        settings=settings,
        memory_bytes=needed,
        budget_bytes=budget,
        work_bytes=2 * workload.state_bytes + workload.weight_bytes,
        output_bytes=_output_bytes(weights, workload.sizes, config.bits),
        flops=flops,
        seconds=flops / (ACHIEVED_RATE * measure_gemm_rate(dtype, weights.device)),
    )


def _fixed_bytes(workload: _Workload, weights: ModelWeights, budget: int) -> tuple[int, bool]:
    """Return the memory that does not depend on the batch size, and whether it holds the states."""
    relative_size = workload.dtype.itemsize / weights.dtype.itemsize
    copies = 1 if workload.dtype == weights.dtype else 1 + relative_size
    copies += (workload.streams - 1) * relative_size
    fixed = PROGRAM_BYTES + int(workload.sizes.block_bytes * copies) + workload.sizes.solver_bytes
    if not workload.on_device:
        return fixed, False
    fixed += _outside_bytes(weights)
    # End-to-end training reads the states from the files.
    hold = not workload.config.end_to_end_steps and fixed + workload.state_bytes <= budget
    return fixed + (workload.state_bytes if hold else 0), hold


def _choose_batch_size(workload: _Workload, free: int) -> int:
    """Return a batch size that keeps the processor busy, as far as memory allows."""
    tokens = DEVICE_TOKENS_PER_BATCH if workload.on_device else TOKENS_PER_BATCH
    size = max(1, tokens // workload.longest)
    if workload.config.needs_check:
        # Checking uses whole batches, so there must be enough of them.
        size = max(1, min(size, len(workload.lengths) // (2 * CHECK_EVERY)))
    usable = max(free + (workload.sizes.solver_bytes if workload.on_device else 0), 0) // 2
    return max(1, min(size, usable // (workload.bytes_per_token * workload.longest)))


def _batch_bytes(workload: _Workload, batch_size: int, free: int) -> tuple[int, bool]:
    """Return the peak memory of a batch, and whether training keeps all codes in memory."""
    sizes, config = workload.sizes, workload.config
    forward = workload.bytes_per_token * workload.longest * batch_size
    training = TUNING_ACTIVATIONS * forward
    per_state = workload.dtype.itemsize * sizes.hidden
    peak = forward
    if config.tune_steps:
        # Latents, their gradients and bounds in fp32, and saved activations.
        peak = max(peak, TUNING_COPIES * 4 * sizes.block_numbers + training)
    keep_codes = False
    if config.end_to_end_steps:
        # The states between all blocks, and the logits of one sequence: base, student, gradient.
        between = batch_size * workload.longest * per_state * workload.num_blocks
        whole = between + LOGITS_COPIES * 4 * workload.vocabulary * workload.longest + training
        codes = sizes.block_numbers * workload.num_blocks
        keep_codes = whole + codes <= free
        peak = max(peak, whole + (codes if keep_codes else 0))
    if workload.backward_tokens:
        between = workload.backward_tokens * per_state * workload.num_blocks
        head = LOGITS_COPIES * 4 * workload.vocabulary * workload.longest
        peak = max(peak, between + head + training)
    return peak, keep_codes


def _count_flops(workload: _Workload, batch_size: int, *, keep: bool) -> float:
    """Return the floating-point operations of the whole run."""
    sizes, config = workload.sizes, workload.config
    passes = workload.streams * (1.0 if keep else 2.2)
    # A Hessian costs half a matrix product, being symmetric; a drift costs a whole one.
    products = 1.5 if config.match_base else 0.5
    forward = 2.0 * workload.tokens * (sizes.numbers * passes + sizes.hessian_macs * products)
    solve = sizes.solve_macs * (4 + 4 * config.polish)
    batch = batch_size * workload.longest
    tune = 6.0 * config.tune_steps * batch * sizes.numbers
    # Forward, recomputation, and a backward pass of twice the cost; the head for both models.
    per_token = 8.0 * sizes.numbers + 8.0 * workload.vocabulary * sizes.hidden
    tune += config.end_to_end_steps * batch * per_token
    survey = 0.0
    if workload.survey_tokens:
        survey = workload.survey_tokens * (per_token + 2.0 * sizes.hessian_macs)
        survey += 4 * len(SUPPORTED_BITS) * sizes.solve_macs
    if config.weigh_tokens:
        # Forward, recomputation, and a backward pass for activations only.
        survey += 6.0 * workload.tokens * (sizes.numbers + workload.vocabulary * sizes.hidden)
    return forward + solve + tune + survey


def resolve_dtype(
    requested: str, stored: torch.dtype, device: torch.device
) -> tuple[torch.dtype, str]:
    """Choose the dtype of the model's computation.

    Args:
        requested: "auto" or the name of a dtype.
        stored: Dtype of the stored weights.
        device: Device to compute on.

    Returns:
        The dtype, and the reason as text.
    """
    if requested != "auto":
        dtype = getattr(torch, requested)
        assert isinstance(dtype, torch.dtype)
        return dtype, f"{requested}, as requested"
    if stored == torch.float32:
        return stored, "float32, as the model is stored"
    if device.type != "cpu":
        return stored, f"{str(stored).removeprefix('torch.')}, as the model is stored"
    if has_fast_bf16():
        return torch.bfloat16, "bfloat16, which this processor multiplies fast"
    return torch.float32, "float32: this processor has no fast 16-bit arithmetic"


def measure_gemm_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Measure the rate of matrix products in FLOP/s by a short benchmark of typical sizes."""
    size = 1024 if device.type == "cpu" else 4096
    left = torch.ones(size, size, dtype=dtype, device=device)
    right = torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        (left @ right)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _resolve_budget(requested: str | None, device: torch.device) -> tuple[int, str]:
    if requested is not None:
        return parse_size(requested, "memory"), "the requested limit"
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * FREE_MEMORY_SHARE), f"{FREE_MEMORY_SHARE:.0%} of the GPU's free memory"
    free = int(available_memory_bytes() * FREE_MEMORY_SHARE)
    return free, f"{FREE_MEMORY_SHARE:.0%} of the free memory"


def _outside_bytes(weights: ModelWeights) -> int:
    return sum(weights.files.infos[key].num_bytes for key in weights.outside_keys)


def _output_bytes(weights: ModelWeights, sizes: Sizes, bits: int) -> int:
    """Estimate the checkpoint's size: codes, plus 0.03 bytes per weight for scales and zeros."""
    rounded = sizes.block_numbers * len(weights.blocks.modules)
    return _outside_bytes(weights) + int((bits / 8 + 0.03) * rounded)

"""What a run may use and what it will need: memory, disk, time; planned before it starts.

Everything that would otherwise be decided along the way is decided here once, with its reason, and
kept in the journal: a resumed run takes the same decisions whatever the machine's state.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import psutil
import torch
from torch import Tensor

from halfbyte.errors import ConfigError
from halfbyte.model.blocks import linear_weight, quantizable_linears
from halfbyte.model.experts import find_fused_experts
from halfbyte.model.weights import ModelWeights
from halfbyte.quant_config import SUPPORTED_BITS, CalibrationConfig, QuantConfig, ResourceConfig
from halfbyte.quantize.hardware import has_fast_bf16
from halfbyte.quantize.rounding import rows_at_a_time
from halfbyte.quantize.target import CHECK_EVERY
from halfbyte.units import format_bytes, format_seconds

TOKENS_PER_BATCH = 4096
"""Enough for matrix products at full rate; more only costs memory."""
DEVICE_TOKENS_PER_BATCH = 16384
"""The same on a GPU, where a batch must take longer than Python takes to send it there."""
REACHED_RATE = 0.45
"""Share of the rate of large matrix products that whole runs reached (docs/log.md, floor)."""
SHARE_OF_FREE_MEMORY = 0.6
PROGRAM_BYTES = 600_000_000
"""Python, torch and Transformers themselves, as measured."""
SOLVER_COPIES = 8
"""Matrices of a weight's size in fp32 that the solver holds at its peak, as measured."""
HESSIAN_COPIES = 5
"""Matrices of a Hessian's size in fp32 that factoring holds at its peak."""
TUNING_COPIES = 8
TUNING_ACTIVATIONS = 4
"""Activations that training a block holds, in those of a forward pass."""
LOGITS_COPIES = 5
HESSIAN_SHARE = 0.5
"""Of the memory that is left, for the Hessians of one stage; more experts go in portions."""
SMALLEST_HESSIAN_BYTES = 1 << 28

SURVEY_TOKENS = 8192
"""Enough to rank modules by what their bits cost."""

_UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """Decisions that the numbers may depend on, in the last bit at least."""

    dtype: str
    """In which the model computes."""
    device: str
    threads: int
    batch_size: int
    keep_paused: bool
    """Whether batches wait in memory in the middle of a block, or start it again per stage."""
    hessian_bytes: int
    """For the Hessians that are collected at the same time."""
    hold_states: bool = False
    """Whether hidden states stay on the device between blocks, or go through files."""
    keep_codes: bool = False
    """Whether training the whole model holds all codes in memory, or reads block by block."""
    reasons: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Give plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Undo :meth:`to_dict`."""
        return cls(**{**values, "reasons": tuple(values["reasons"])})

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch's."""
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """What the run will need."""

    settings: RunSettings
    memory_bytes: int
    budget_bytes: int
    work_bytes: int
    """Disk for hidden states, given back at the end."""
    output_bytes: int
    flops: float
    seconds: float

    def lines(self) -> tuple[str, ...]:
        """Put the plan into words, one fact per line."""
        settings = self.settings
        return (
            f"memory  {format_bytes(self.memory_bytes)} of {format_bytes(self.budget_bytes)}; "
            + "; ".join(settings.reasons),
            f"disk    {format_bytes(self.output_bytes)} for the checkpoint, "
            f"{format_bytes(self.work_bytes)} while it runs",
            f"time    about {format_seconds(self.seconds)} "
            f"({self.flops / 1e12:.1f} TFLOP on {settings.threads} threads)",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sizes:
    """Sizes of the widest block, which is what memory depends on."""

    hidden: int
    block_bytes: int
    block_numbers: int
    widest_input: int
    solver_bytes: int
    routed: int
    """Experts that a token goes through; 1 without experts."""
    numbers: int
    """Weights of all linears in all blocks that a token goes through."""
    hessian_macs: int
    """in² over all inputs: multiply-adds per token for the Hessians."""
    solve_macs: int


def resolve_resources(
    weights: ModelWeights,
    resources: ResourceConfig,
    calibration: CalibrationConfig,
    config: QuantConfig,
    lengths: Sequence[int],
) -> RunPlan:
    """Decide type, batch size and way of running, and plan what they need.

    Args:
        weights: The model, nothing of it loaded.
        resources: What was asked for.
        calibration: For the batch size that was asked for.
        config: For what runs beside.
        lengths: Tokens of every calibration sequence.

    Returns:
        The plan.
    """
    dtype, why_dtype = resolve_dtype(resources.dtype, weights.dtype, weights.device)
    streams = 2 if config.match_base else 1
    sizes = _measure_sizes(weights, matrices=(3 * streams if config.needs_check else 0))
    on_device = weights.device.type != "cpu"
    budget, why_budget = _budget(resources.memory, weights.device)
    longest, tokens = max(lengths), sum(lengths)
    computed = dtype.itemsize / weights.dtype.itemsize
    copies = 1 if dtype == weights.dtype else 1 + computed
    copies += (streams - 1) * computed
    fixed = PROGRAM_BYTES + int(sizes.block_bytes * copies) + sizes.solver_bytes
    states = streams * tokens * sizes.hidden * dtype.itemsize
    outside = _outside_bytes(weights)
    hold = False
    if on_device:
        fixed += outside
        # Training goes through the states of all blocks by way of the files.
        hold = not config.end_to_end_steps and fixed + states <= budget
        fixed += states if hold else 0
    wanted = DEVICE_TOKENS_PER_BATCH if on_device else TOKENS_PER_BATCH
    per_token = dtype.itemsize * (4 * sizes.hidden + 4 * sizes.widest_input * sizes.routed)
    batch_size = calibration.batch_size or max(1, wanted // longest)
    if calibration.batch_size is None:
        if config.needs_check:
            # Whole batches are kept apart to confirm: there must be some.
            batch_size = max(1, min(batch_size, len(lengths) // (2 * CHECK_EVERY)))
        # A device's memory is one heap: what the solver has given back serves the next batch.
        room = max(budget - fixed + (sizes.solver_bytes if on_device else 0), 0) // 2
        batch_size = max(1, min(batch_size, room // (per_token * longest)))
    batch = per_token * longest * batch_size
    tuning = 0
    tuning_batch = TUNING_ACTIVATIONS * batch
    if config.tune_steps:
        # Latents, their gradients and bounds in fp32, and what a backward pass remembers.
        tuning = TUNING_COPIES * 4 * sizes.block_numbers + tuning_batch
    batch = max(batch, tuning)
    vocabulary = int(weights.config.get_text_config().vocab_size)
    num_blocks = len(weights.blocks.modules)
    keep_codes = False
    if config.end_to_end_steps:
        # The states between all blocks, and the logits of one sequence: base, own, gradient.
        between = batch_size * longest * dtype.itemsize * sizes.hidden * num_blocks
        whole = between + LOGITS_COPIES * 4 * vocabulary * longest + tuning_batch
        codes = sizes.block_numbers * num_blocks
        keep_codes = fixed + whole + codes <= budget
        batch = max(batch, whole + (codes if keep_codes else 0))
    survey_tokens = min(SURVEY_TOKENS, tokens) if config.chooses_bits else 0
    if survey_tokens:
        between = survey_tokens * dtype.itemsize * sizes.hidden * num_blocks
        batch = max(batch, tuning_batch + between)
    waiting = tokens * dtype.itemsize * (3 * sizes.hidden + sizes.widest_input * sizes.routed)
    waiting *= streams
    if on_device:
        fixed -= min(batch, sizes.solver_bytes)
    keep = fixed + batch + waiting <= budget
    left = budget - fixed - batch - (waiting if keep else 0)
    how = "each block runs once" if keep else "each block runs once per stage, to save memory"
    settings = RunSettings(
        dtype=str(dtype).removeprefix("torch."),
        device=str(weights.device),
        threads=torch.get_num_threads(),
        batch_size=int(batch_size),
        keep_paused=keep,
        hessian_bytes=max(int(left * HESSIAN_SHARE), SMALLEST_HESSIAN_BYTES),
        hold_states=hold,
        keep_codes=keep_codes,
        reasons=(why_budget, f"computes in {why_dtype}", f"{batch_size} sequences a batch", how),
    )
    passes = streams * (1.0 if keep else 2.2)
    # Hessians cost half a product each, drifts a whole one.
    products = 1.5 if config.match_base else 0.5
    solve = sizes.solve_macs * (4 + 4 * config.polish)
    tune = 6.0 * config.tune_steps * batch_size * longest * sizes.numbers
    # Forwards, forwards again and twice that backwards; the head for both models.
    per_step = 8.0 * sizes.numbers + 8.0 * vocabulary * sizes.hidden
    tune += config.end_to_end_steps * batch_size * longest * per_step
    if survey_tokens:
        tune += survey_tokens * per_step + 2.0 * survey_tokens * sizes.hessian_macs
        tune += 4 * len(SUPPORTED_BITS) * sizes.solve_macs
    flops = 2.0 * tokens * (sizes.numbers * passes + sizes.hessian_macs * products) + solve + tune
    return RunPlan(
        settings=settings,
        memory_bytes=fixed + batch + (waiting if keep else 0),
        budget_bytes=budget,
        work_bytes=2 * states,
        output_bytes=_output_bytes(weights, sizes),
        flops=flops,
        seconds=flops / (REACHED_RATE * measure_gemm_rate(dtype, weights.device)),
    )


def resolve_dtype(asked: str, stored: torch.dtype, device: torch.device) -> tuple[torch.dtype, str]:
    """Choose the type in which the model computes.

    Args:
        asked: "auto" or a type's name.
        stored: What the weights are stored in.
        device: Where it computes.

    Returns:
        The type, and why in words.
    """
    if asked != "auto":
        dtype = getattr(torch, asked)
        assert isinstance(dtype, torch.dtype)
        return dtype, f"{asked}, as asked for"
    if stored == torch.float32:
        return stored, "float32, as the model is stored"
    if device.type != "cpu":
        return stored, f"{str(stored).removeprefix('torch.')}, as the model is stored"
    if has_fast_bf16():
        return torch.bfloat16, "bfloat16, which this processor multiplies fast"
    return torch.float32, "float32: this processor has no fast 16-bit arithmetic"


def measure_gemm_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Measure the rate of matrix products in FLOP/s, on sizes like a model's, in a moment."""
    size = 1024 if device.type == "cpu" else 4096
    left = torch.ones(size, size, dtype=dtype, device=device)
    right = torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        (left @ right)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def parse_size(text: str, name: str) -> int:
    """Read a size such as ``4GB`` or ``800 MB``.

    Args:
        text: Number and unit.
        name: Of the option, for messages.

    Returns:
        Bytes.

    Raises:
        ConfigError: It is not of that form.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kKmMgGtT][bB])\s*", text)
    if match is None:
        raise ConfigError(f"{name} is '{text}'; write a number and a unit, such as 4GB or 800MB.")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def _budget(asked: str | None, device: torch.device) -> tuple[int, str]:
    if asked is not None:
        return parse_size(asked, "memory"), "the limit is yours"
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(
            free * SHARE_OF_FREE_MEMORY
        ), f"{SHARE_OF_FREE_MEMORY:.0%} of the GPU's that is free"
    free = psutil.virtual_memory().available
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text(encoding="ascii").strip()).isdigit():
        free = min(free, int(text))
    return int(free * SHARE_OF_FREE_MEMORY), f"{SHARE_OF_FREE_MEMORY:.0%} of what is free"


def _measure_sizes(weights: ModelWeights, *, matrices: int) -> _Sizes:
    """Measure shapes; ``matrices`` of a Hessian's size are held beside those of factoring."""
    config = weights.config.get_text_config()
    widest = routed = 1
    solver = numbers = hessian = solve = block_numbers = 0
    for block in weights.blocks.modules:
        block_numbers = max(block_numbers, sum(p.numel() for p in block.parameters()))
        shapes = [_shape(linear_weight(m)) for m in quantizable_linears(block).values()]
        active = float(sum(o * i for o, i in shapes))
        for fused in find_fused_experts(block).values():
            routed = int(getattr(config, "num_experts_per_tok", None) or 1)
            share = routed / int(fused.num_experts)  # type: ignore[arg-type]
            for parameter in fused.parameters():
                if parameter.dim() == 3:
                    shapes.append(_shape(parameter[0]))
                    active += parameter.numel() * share
        numbers += int(active)
        inputs = {(o, i) for o, i in shapes}
        hessian += sum(i * i for _, i in inputs)
        solve += sum(o * i * i for o, i in shapes)
        widest = max([widest, *(i for _, i in shapes)])
        for o, i in shapes:
            rows = min(3 * o, rows_at_a_time(weights.device, i))
            squares = (HESSIAN_COPIES + matrices) * i * i
            solver = max(solver, 4 * (SOLVER_COPIES * rows * i + squares))
    return _Sizes(
        hidden=int(config.hidden_size),
        block_bytes=block_numbers * weights.dtype.itemsize,
        block_numbers=block_numbers,
        widest_input=widest,
        solver_bytes=solver,
        routed=routed,
        numbers=numbers,
        hessian_macs=hessian,
        solve_macs=solve,
    )


def _shape(weight: Tensor) -> tuple[int, int]:
    rows, columns = weight.shape
    return rows, columns


def _outside_bytes(weights: ModelWeights) -> int:
    return sum(weights.files.infos[key].num_bytes for key in weights.outside_keys)


def _output_bytes(weights: ModelWeights, sizes: _Sizes) -> int:
    """Near enough to see whether the disk will do: half a byte and a bit per weight."""
    return _outside_bytes(weights) + int(0.53 * sizes.block_numbers * len(weights.blocks.modules))

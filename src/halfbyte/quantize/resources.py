"""What a run may use and what it will need: memory, disk, time; planned before it starts.

Everything that would otherwise be decided along the way is decided here once, with its reason, and
kept in the journal: a resumed run takes the same decisions whatever the machine's state.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import psutil
import torch

from halfbyte.errors import ConfigError
from halfbyte.machine.arithmetic import has_fast_bf16
from halfbyte.model.weights import ModelWeights
from halfbyte.quant_config import SUPPORTED_BITS, CalibrationConfig, QuantConfig, ResourceConfig
from halfbyte.quantize.block_sizes import Sizes, measure_sizes
from halfbyte.quantize.target import CHECK_EVERY
from halfbyte.units import format_bytes, format_seconds, parse_size

TOKENS_PER_BATCH = 4096
"""Enough for matrix products at full rate; more only costs memory."""
DEVICE_TOKENS_PER_BATCH = 16384
"""The same on a GPU, where a batch must take longer than Python takes to send it there."""
REACHED_RATE = 0.45
"""Share of the rate of large matrix products that whole runs reached (docs/log.md, floor)."""
SHARE_OF_FREE_MEMORY = 0.6
PROGRAM_BYTES = 600_000_000
"""Python, torch and Transformers themselves, as measured."""
TUNING_COPIES = 8
TUNING_ACTIVATIONS = 4
"""Activations that training a block holds, in those of a forward pass."""
LOGITS_COPIES = 5
HESSIAN_SHARE = 0.5
"""Of the memory that is left, for the Hessians of one stage; more experts go in portions."""
SMALLEST_HESSIAN_BYTES = 1 << 28

BACKWARD_TOKENS = 8192
"""That go backwards through the base model at a time; enough to rank modules by what their bits
cost."""


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
    limit_bytes: int | None = None
    """What a device's memory is limited to for the run, where the user asked and the plan fits."""
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
    """Disk for hidden states and token weights, given back at the end."""
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
            f"time    at least {format_seconds(self.seconds)} "
            f"({self.flops / 1e12:.1f} TFLOP on {settings.threads} threads)",
        )

    def check_disk(self, folder: Path) -> None:
        """Refuse to begin what the disk cannot hold.

        Args:
            folder: On the disk of the output.

        Raises:
            ConfigError: There is too little space; says how much is needed.
        """
        free = shutil.disk_usage(folder).free
        if free < self.output_bytes + self.work_bytes:
            raise ConfigError(
                f"The disk of {folder} has {format_bytes(free)} free; the checkpoint takes "
                f"{format_bytes(self.output_bytes)}, and the run {format_bytes(self.work_bytes)} "
                "beside it. Free some space, or choose an output on another disk."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """What is to be computed, in numbers."""

    sizes: Sizes
    config: QuantConfig
    dtype: torch.dtype
    on_device: bool
    lengths: Sequence[int]
    """Tokens of every calibration sequence."""
    num_blocks: int
    vocabulary: int

    @property
    def streams(self) -> int:
        """Models that the calibration text goes through."""
        return 2 if self.config.match_base else 1

    @property
    def tokens(self) -> int:
        """Of all calibration sequences."""
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths)

    @property
    def survey_tokens(self) -> int:
        """That bits are chosen by; 0 where they are given."""
        return min(BACKWARD_TOKENS, self.tokens) if self.config.chooses_bits else 0

    @property
    def backward_tokens(self) -> int:
        """That go backwards through the base model at a time."""
        backward = self.config.chooses_bits or self.config.weigh_tokens
        return min(BACKWARD_TOKENS, self.tokens) if backward else 0

    @property
    def bytes_per_token(self) -> int:
        """Of activations while a batch goes through a block."""
        sizes = self.sizes
        return self.dtype.itemsize * (4 * sizes.hidden + 4 * sizes.widest_input * sizes.routed)

    @property
    def state_bytes(self) -> int:
        """Of all hidden states in front of a block."""
        return self.streams * self.tokens * self.sizes.hidden * self.dtype.itemsize

    @property
    def weight_bytes(self) -> int:
        """Of what the tokens count at each linear, in fp32."""
        return 4 * self.tokens * self.sizes.linears if self.config.weigh_tokens else 0

    @property
    def waiting_bytes(self) -> int:
        """Of all batches where they wait in the middle of a block."""
        sizes = self.sizes
        per_token = self.dtype.itemsize * (3 * sizes.hidden + sizes.widest_input * sizes.routed)
        return self.streams * self.tokens * per_token


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
    budget, why_budget = _budget(resources.memory, weights.device)
    streams = 2 if config.match_base else 1
    task = _Task(
        sizes=measure_sizes(weights, matrices=(3 * streams if config.needs_check else 0)),
        config=config,
        dtype=dtype,
        on_device=weights.device.type != "cpu",
        lengths=lengths,
        num_blocks=len(weights.blocks.modules),
        vocabulary=int(weights.config.get_text_config().vocab_size),
    )
    fixed, hold = _fixed_bytes(task, weights, budget)
    batch_size = calibration.batch_size or _choose_batch_size(task, budget - fixed)
    batch, keep_codes = _batch_bytes(task, batch_size, budget - fixed)
    if task.on_device:
        # A device's memory is one heap: what the solver has given back serves the next batch.
        fixed -= min(batch, task.sizes.solver_bytes)
    keep = fixed + batch + task.waiting_bytes <= budget
    needed = fixed + batch + (task.waiting_bytes if keep else 0)
    how = "each block runs once" if keep else "each block runs once per stage, to save memory"
    settings = RunSettings(
        dtype=str(dtype).removeprefix("torch."),
        device=str(weights.device),
        threads=torch.get_num_threads(),
        batch_size=int(batch_size),
        keep_paused=keep,
        hessian_bytes=max(int((budget - needed) * HESSIAN_SHARE), SMALLEST_HESSIAN_BYTES),
        hold_states=hold,
        keep_codes=keep_codes,
        limit_bytes=budget - PROGRAM_BYTES if resources.memory and needed <= budget else None,
        reasons=(why_budget, f"computes in {why_dtype}", f"{batch_size} sequences a batch", how),
    )
    flops = _count_flops(task, batch_size, keep=keep)
    return RunPlan(
        settings=settings,
        memory_bytes=needed,
        budget_bytes=budget,
        work_bytes=2 * task.state_bytes + task.weight_bytes,
        output_bytes=_output_bytes(weights, task.sizes, config.bits),
        flops=flops,
        seconds=flops / (REACHED_RATE * measure_gemm_rate(dtype, weights.device)),
    )


def _fixed_bytes(task: _Task, weights: ModelWeights, budget: int) -> tuple[int, bool]:
    """Memory that no batch changes; and whether hidden states stay on the device in it."""
    computed = task.dtype.itemsize / weights.dtype.itemsize
    copies = 1 if task.dtype == weights.dtype else 1 + computed
    copies += (task.streams - 1) * computed
    fixed = PROGRAM_BYTES + int(task.sizes.block_bytes * copies) + task.sizes.solver_bytes
    if not task.on_device:
        return fixed, False
    fixed += _outside_bytes(weights)
    # Training goes through the states of all blocks by way of the files.
    hold = not task.config.end_to_end_steps and fixed + task.state_bytes <= budget
    return fixed + (task.state_bytes if hold else 0), hold


def _choose_batch_size(task: _Task, left: int) -> int:
    """Sequences that keep the processor busy, as far as memory allows."""
    wanted = DEVICE_TOKENS_PER_BATCH if task.on_device else TOKENS_PER_BATCH
    size = max(1, wanted // task.longest)
    if task.config.needs_check:
        # Whole batches are kept apart to confirm: there must be some.
        size = max(1, min(size, len(task.lengths) // (2 * CHECK_EVERY)))
    room = max(left + (task.sizes.solver_bytes if task.on_device else 0), 0) // 2
    return max(1, min(size, room // (task.bytes_per_token * task.longest)))


def _batch_bytes(task: _Task, batch_size: int, left: int) -> tuple[int, bool]:
    """Memory that a batch takes at most; and whether training keeps all codes in what is left."""
    sizes, config = task.sizes, task.config
    forward = task.bytes_per_token * task.longest * batch_size
    training = TUNING_ACTIVATIONS * forward
    per_state = task.dtype.itemsize * sizes.hidden
    found = forward
    if config.tune_steps:
        # Latents, their gradients and bounds in fp32, and what a backward pass remembers.
        found = max(found, TUNING_COPIES * 4 * sizes.block_numbers + training)
    keep_codes = False
    if config.end_to_end_steps:
        # The states between all blocks, and the logits of one sequence: base, own, gradient.
        between = batch_size * task.longest * per_state * task.num_blocks
        whole = between + LOGITS_COPIES * 4 * task.vocabulary * task.longest + training
        codes = sizes.block_numbers * task.num_blocks
        keep_codes = whole + codes <= left
        found = max(found, whole + (codes if keep_codes else 0))
    if task.backward_tokens:
        between = task.backward_tokens * per_state * task.num_blocks
        head = LOGITS_COPIES * 4 * task.vocabulary * task.longest
        found = max(found, between + head + training)
    return found, keep_codes


def _count_flops(task: _Task, batch_size: int, *, keep: bool) -> float:
    """Operations of the whole run."""
    sizes, config = task.sizes, task.config
    passes = task.streams * (1.0 if keep else 2.2)
    # Hessians cost half a product each, drifts a whole one.
    products = 1.5 if config.match_base else 0.5
    forward = 2.0 * task.tokens * (sizes.numbers * passes + sizes.hessian_macs * products)
    solve = sizes.solve_macs * (4 + 4 * config.polish)
    batch = batch_size * task.longest
    tune = 6.0 * config.tune_steps * batch * sizes.numbers
    # Forwards, forwards again and twice that backwards; the head for both models.
    per_token = 8.0 * sizes.numbers + 8.0 * task.vocabulary * sizes.hidden
    tune += config.end_to_end_steps * batch * per_token
    survey = 0.0
    if task.survey_tokens:
        survey = task.survey_tokens * (per_token + 2.0 * sizes.hessian_macs)
        survey += 4 * len(SUPPORTED_BITS) * sizes.solve_macs
    if config.weigh_tokens:
        # Forwards, forwards again and backwards, by activations alone.
        survey += 6.0 * task.tokens * (sizes.numbers + task.vocabulary * sizes.hidden)
    return forward + solve + tune + survey


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


def _outside_bytes(weights: ModelWeights) -> int:
    return sum(weights.files.infos[key].num_bytes for key in weights.outside_keys)


def _output_bytes(weights: ModelWeights, sizes: Sizes, bits: int) -> int:
    """Near enough to see whether the disk will do: codes, and a bit per weight for the rest."""
    rounded = sizes.block_numbers * len(weights.blocks.modules)
    return _outside_bytes(weights) + int((bits / 8 + 0.03) * rounded)

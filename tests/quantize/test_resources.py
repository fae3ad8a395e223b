"""Planning of a run's settings and needs."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.families import write_family

from halfbyte.model.weights import ModelWeights
from halfbyte.quant_config import PRESETS, CalibrationConfig, QuantConfig, ResourceConfig
from halfbyte.quantize import resources
from halfbyte.quantize.resources import (
    PROGRAM_BYTES,
    SMALLEST_HESSIAN_BYTES,
    RunPlan,
    RunSettings,
    resolve_dtype,
    resolve_resources,
)

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fixed_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "measure_gemm_rate", lambda dtype, device: 1e9)


@pytest.fixture
def weights(tmp_path: Path) -> ModelWeights:
    write_family(tmp_path, "llama")
    return ModelWeights(tmp_path, CPU)


def plan(weights: ModelWeights, *, lengths: list[int] | None = None, **asked: Any) -> RunPlan:
    calibration = CalibrationConfig(batch_size=asked.pop("batch_size", None))
    config = QuantConfig(**asked.pop("config", {}))
    lengths = lengths or [2048] * 128
    return resolve_resources(weights, ResourceConfig(**asked), calibration, config, lengths, 64)


@pytest.mark.parametrize(
    ("asked", "stored", "device", "fast", "dtype", "reason"),
    [
        ("float16", torch.float32, "cpu", True, torch.float16, "float16, as requested"),
        ("auto", torch.float32, "cpu", True, torch.float32, "float32, as the model is stored"),
        ("auto", torch.bfloat16, "cpu", True, torch.bfloat16, "bfloat16, which this processor"),
        ("auto", torch.float16, "cpu", True, torch.bfloat16, "bfloat16, which this processor"),
        ("auto", torch.float16, "cpu", False, torch.float32, "this processor has no fast 16-bit"),
        ("auto", torch.float16, "cuda", False, torch.float16, "float16, as the model is stored"),
    ],
)
def test_compute_dtype_is_chosen_with_a_reason(
    asked: str,
    stored: torch.dtype,
    device: str,
    fast: bool,
    dtype: torch.dtype,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resources, "has_fast_bf16", lambda: fast)
    found, why = resolve_dtype(asked, stored, torch.device(device))
    assert found == dtype
    assert reason in why


def test_much_memory_keeps_paused_passes(weights: ModelWeights) -> None:
    found = plan(weights, memory="64GB")
    assert found.settings.keep_paused
    assert found.settings.batch_size == 2, "4096 tokens"
    assert found.settings.reasons == (
        "the requested limit",
        "computes in float32, as the model is stored",
        "2 sequences per batch",
        "each block runs once",
    )
    assert found.memory_bytes < found.budget_bytes == 64 * 10**9


def test_less_memory_makes_each_block_run_once_per_stage(weights: ModelWeights) -> None:
    much = plan(weights, memory="64GB")
    waiting = much.memory_bytes - 1
    less = plan(weights, memory=f"{waiting / 1e6:.6f}MB")
    assert not less.settings.keep_paused
    assert less.settings.reasons[-1] == "each block runs once per stage, to save memory"
    assert less.memory_bytes < much.memory_bytes
    assert less.flops > much.flops


def test_little_memory_gives_small_but_nonempty_batches(weights: ModelWeights) -> None:
    fixed = plan(weights, memory="1MB", batch_size=1)
    room = fixed.memory_bytes
    sizes = [
        plan(weights, memory=f"{room / 1e6 + extra:.3f}MB").settings.batch_size
        for extra in (0, 20, 60, 1000)
    ]
    assert sizes == sorted(sizes)
    assert sizes[0] == 1
    assert sizes[-1] == 2


def test_requested_batch_size_is_used(weights: ModelWeights) -> None:
    assert plan(weights, memory="1MB", batch_size=9).settings.batch_size == 9


def test_plan_counts_disk_flops_and_memory(weights: ModelWeights) -> None:
    found = plan(weights, memory="64GB", lengths=[100] * 10)
    tokens, hidden = 1000, 64
    assert found.work_bytes == 2 * tokens * hidden * 4
    weighed = plan(weights, memory="64GB", lengths=[100] * 10, config={"weigh_tokens": True})
    assert weighed.work_bytes == found.work_bytes + 4 * tokens * 3 * 7, "a number for each linear"
    assert weighed.flops > found.flops
    outside = 2 * 128 * 64 * 4 + 64 * 4
    linears = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96
    assert found.output_bytes == outside + int(0.53 * 3 * (linears + 2 * 64))
    assert found.flops > 2 * tokens * 3 * linears
    assert found.seconds == pytest.approx(found.flops / (resources.ACHIEVED_RATE * 1e9))
    assert found.memory_bytes > PROGRAM_BYTES
    assert found.settings.hessian_bytes > SMALLEST_HESSIAN_BYTES
    assert plan(weights, memory="1MB").settings.hessian_bytes == SMALLEST_HESSIAN_BYTES


def test_memory_does_not_grow_with_the_number_of_blocks(tmp_path: Path) -> None:
    needs = []
    for blocks in (2, 8):
        write_family(tmp_path / str(blocks), "llama", num_hidden_layers=blocks)
        needs.append(plan(ModelWeights(tmp_path / str(blocks), CPU), memory="64GB"))
    assert needs[0].memory_bytes == needs[1].memory_bytes
    assert needs[1].flops == pytest.approx(4 * needs[0].flops)


def test_plan_counts_only_routed_experts(tmp_path: Path) -> None:
    flops = []
    for experts in (4, 8):
        folder = tmp_path / str(experts)
        write_family(folder, "mixtral", num_local_experts=experts)
        flops.append(plan(ModelWeights(folder, CPU), memory="64GB").flops)
    assert flops[1] < 1.3 * flops[0]


def test_plan_in_words(weights: ModelWeights) -> None:
    memory, disk, time = plan(weights, memory="64GB").lines()
    assert memory.startswith("memory  ")
    assert "of 64.0 GB; the requested limit; computes in float32" in memory
    assert "for the checkpoint, 134.2 MB while it runs" in disk
    assert time.startswith("time    at least ")
    assert f"on {torch.get_num_threads()} threads" in time
    tight, *_ = plan(weights, memory="1MB").lines()
    assert "of 1.0 MB; more than allowed, so the system may end the run; " in tight
    assert "more than allowed" not in memory


def test_default_budget_is_a_fraction_of_free_memory(
    weights: ModelWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "available_memory_bytes", lambda: 10 * 10**9)
    found = plan(weights)
    assert 0 < found.budget_bytes <= 6 * 10**9
    assert found.settings.reasons[0] == "60% of the free memory"


def test_settings_round_trip_through_the_journal(weights: ModelWeights) -> None:
    settings = plan(weights, memory="64GB").settings
    assert RunSettings.from_dict(settings.to_dict()) == settings
    assert settings.torch_dtype == torch.float32


def test_gemm_rate_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert resources.measure_gemm_rate(torch.float32, CPU) > 1e6


def test_each_preset_needs_more_than_the_one_before(weights: ModelWeights) -> None:
    plans = [
        plan(weights, memory="64GB", lengths=[512] * 128, config=settings)
        for settings in PRESETS.values()
    ]
    for smaller, larger in pairwise(plans):
        assert smaller.flops < larger.flops
        assert smaller.memory_bytes <= larger.memory_bytes
        assert smaller.work_bytes <= larger.work_bytes
    assert plans[1].work_bytes == 2 * plans[0].work_bytes, "two streams"


def test_checking_text_is_whole_batches(weights: ModelWeights) -> None:
    found = plan(weights, memory="64GB", lengths=[32] * 16, config=PRESETS["balanced"])
    assert found.settings.batch_size == 2, "of 16 sequences 8 batches, 2 of which confirm"


def test_gpu_keeps_states_if_they_fit(weights: ModelWeights) -> None:
    weights.device = torch.device("cuda")  # nothing is loaded
    much = plan(weights, memory="64GB")
    assert much.settings.hold_states
    assert much.settings.batch_size == 8, "16384 tokens"
    states = 128 * 2048 * 4 * weights.config.hidden_size
    fixed = plan(weights, memory="1MB", batch_size=1)
    assert not fixed.settings.hold_states
    # What a plan with next to no memory needs is fixed but for one batch.
    little = plan(weights, memory=f"{(fixed.memory_bytes + states) / 1e9}GB", batch_size=1)
    assert little.settings.hold_states
    assert not little.settings.keep_paused


def test_end_to_end_training_keeps_states_in_files(weights: ModelWeights) -> None:
    weights.device = torch.device("cuda")
    assert not plan(weights, memory="64GB", config=PRESETS["best"]).settings.hold_states
    assert plan(weights, memory="64GB", config=PRESETS["balanced"]).settings.hold_states


def test_cpu_never_keeps_states_in_memory(weights: ModelWeights) -> None:
    assert not plan(weights, memory="64GB").settings.hold_states


def test_limit_is_passed_to_the_allocator_if_the_plan_fits(weights):
    assert plan(weights).settings.limit_bytes is None
    fits = plan(weights, memory="64GB").settings
    assert fits.limit_bytes == 64 * 10**9 - PROGRAM_BYTES
    assert plan(weights, memory="1MB").settings.limit_bytes is None

"""A run that runs out of memory continues with reduced settings, or says what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.helpers.families import token_lists, write_family
from tests.quantize.test_resume import weight_digests

import halfbyte
from halfbyte.errors import ConfigError
from halfbyte.machine.memory import limit_device_memory
from halfbyte.model.forward_pass import ForwardPass
from halfbyte.quant_config import CalibrationConfig, QuantConfig, ResourceConfig
from halfbyte.quantize import run as running
from halfbyte.quantize import run_states, token_gradients
from halfbyte.quantize.attempt import WEIGHTS_FOLDER
from halfbyte.quantize.memory_fallback import CPU_ALLOCATOR, is_out_of_memory, reduce_memory
from halfbyte.quantize.resources import SMALLEST_HESSIAN_BYTES, RunSettings

CONFIG = QuantConfig(group_size=32)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_family(folder, "llama")
    return folder


@pytest.fixture
def device(monkeypatch) -> Callable[..., None]:
    """Makes forward passes of too many sequences run out of memory after some blocks."""
    run = ForwardPass.run

    def hold(
        most: int | None = None,
        *,
        behind: int = 0,
        of: Path = Path(),
        error: Exception | None = None,
    ) -> None:
        def run_if_it_fits(self: ForwardPass) -> None:
            done = len(list(of.glob("model-*.safetensors"))) if behind else 0
            if most is not None and done >= behind and len(self.input_ids) > most:
                raise error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
            run(self)

        monkeypatch.setattr(ForwardPass, "run", run_if_it_fits)

    return hold


def quantize(base: Path, output: Path, *, batch_size: int = 8, **given):
    settings = {"config": CONFIG, "quality": False} | given
    return halfbyte.quantize(
        base,
        output,
        calibration=CalibrationConfig(samples=8, length=40, batch_size=batch_size),
        text=token_lists(8, 40),
        **settings,
    )


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, match_base=True, polish=2)], ids=str)
def test_reduced_from_the_first_block_equals_a_run_with_less_memory(base, tmp_path, device, config):
    device(2)
    report = quantize(base, tmp_path / "out", config=config)
    assert [note for note in report.notes if "out of memory" in note] == [
        "out of memory in block 1 of 3: each block runs once per stage from there on",
        "out of memory in block 1 of 3: 4 sequences per batch instead of 8 from there on",
        "out of memory in block 1 of 3: 2 sequences per batch instead of 4 from there on",
    ]
    assert not (tmp_path / "out" / ".halfbyte").exists()
    device()
    quantize(
        base,
        tmp_path / "small",
        config=config,
        batch_size=2,
        resources=ResourceConfig(memory="1MB"),  # each block once per stage
    )
    assert weight_digests(tmp_path / "out") == weight_digests(tmp_path / "small")


def test_finished_blocks_are_kept(base, tmp_path, device):
    quantize(base, tmp_path / "whole")
    device(4, behind=2, of=tmp_path / "out")
    report = quantize(base, tmp_path / "out")
    assert [note for note in report.notes if "out of memory" in note] == [
        "out of memory in block 3 of 3: each block runs once per stage from there on",
        "out of memory in block 3 of 3: 4 sequences per batch instead of 8 from there on",
    ]
    one, other = (weight_digests(tmp_path / name) for name in ("whole", "out"))
    for number in (1, 2):
        name = f"model-0000{number}-of-00004.safetensors"
        assert one[name] == other[name]


def test_states_held_on_the_device_move_to_files(base, tmp_path, device, monkeypatch):
    resolve = running.resolve_resources

    def hold(*arguments):
        plan = resolve(*arguments)
        return replace(plan, settings=replace(plan.settings, hold_states=True))

    monkeypatch.setattr(running, "resolve_resources", hold)
    monkeypatch.setattr(run_states, "SAVE_EVERY_SECONDS", 1e6)  # none is saved but what must be
    device(4, behind=2, of=tmp_path / "out")
    report = quantize(base, tmp_path / "out")
    told = [note for note in report.notes if "out of memory" in note]
    assert "hidden states are kept in files" in told[1]
    assert "4 sequences per batch" in told[2]
    device()
    once_per_stage = ResourceConfig(memory="1MB")
    quantize(base, tmp_path / "small", batch_size=4, resources=once_per_stage)
    # Nothing had been saved: all three blocks were redone with reduced settings.
    assert weight_digests(tmp_path / "out") == weight_digests(tmp_path / "small")


def test_a_killed_run_resumes_with_the_reduced_settings(base, tmp_path, device, monkeypatch):
    device(2)
    quantize(base, tmp_path / "whole")

    class Killed(BaseException):
        pass

    def die(*_):
        raise Killed

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("halfbyte.quantize.attempt.Attempt._finish", die)
        with pytest.raises(Killed):
            quantize(base, out)
    lines = (out / ".halfbyte" / "journal.jsonl").read_text().splitlines()
    sizes = [
        found["settings"]["batch_size"]
        for line in lines
        if "settings" in (found := json.loads(line))
    ]
    assert sizes == [8, 8, 4, 2]
    device(2, error=AssertionError("more sequences than the journal says"))
    quantize(base, out, resume=True)
    assert weight_digests(out) == weight_digests(tmp_path / "whole")


def test_without_further_reduction_the_error_advises_and_nothing_is_lost(base, tmp_path, device):
    quantize(base, tmp_path / "whole", batch_size=1)
    device(0, behind=1, of=tmp_path / "out")
    with pytest.raises(
        ConfigError,
        match=r"cpu ran out of memory in block 2 of 3, with a batch size of 1 and sequences of up "
        r"to 40 tokens\. Free memory on it and continue with --resume, or .* \(--length\)",
    ):
        quantize(base, tmp_path / "out", batch_size=1)
    device()
    quantize(base, tmp_path / "out", batch_size=1, resume=True)
    assert weight_digests(tmp_path / "out") == weight_digests(tmp_path / "whole")


def test_bits_are_chosen_and_noted_once(base, tmp_path, device):
    device(4, behind=1, of=tmp_path / "out")
    report = quantize(base, tmp_path / "out", config=replace(CONFIG, target_bits=3.5))
    assert any("4 sequences per batch" in note for note in report.notes)
    assert len(report.notes) == len(set(report.notes))
    assert {module.bits for module in report.modules} > {3}


def test_token_weights_are_remeasured_for_another_batch_size(base, tmp_path, device, monkeypatch):
    # Eight sequences are one part of the text; in batches of four they are two.
    monkeypatch.setattr(token_gradients, "BACKWARD_TOKENS", 160)
    config = replace(CONFIG, weigh_tokens=True)
    device(4, behind=1, of=tmp_path / "out" / ".halfbyte" / WEIGHTS_FOLDER)
    report = quantize(base, tmp_path / "out", config=config)
    assert any("4 sequences per batch" in note for note in report.notes)
    device()
    once_per_stage = ResourceConfig(memory="1MB")
    quantize(base, tmp_path / "small", config=config, batch_size=4, resources=once_per_stage)
    assert weight_digests(tmp_path / "out") == weight_digests(tmp_path / "small")


def test_training_end_to_end_keeps_its_batches(base, tmp_path, monkeypatch):
    config = replace(CONFIG, match_base=True, end_to_end_steps=4)

    def run_out(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("halfbyte.quantize.end_to_end.EndToEndTuning._gradient", run_out)
        with pytest.raises(
            ConfigError, match=r"out of memory after the last block, with a batch size of 2"
        ):
            quantize(base, tmp_path / "out", config=config, batch_size=2)
    quantize(base, tmp_path / "out", config=config, batch_size=2, resume=True)
    quantize(base, tmp_path / "whole", config=config, batch_size=2)
    assert weight_digests(tmp_path / "out") == weight_digests(tmp_path / "whole")


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), ValueError("no")], ids=repr)
def test_other_errors_are_raised_unchanged(base, tmp_path, device, error):
    device(0, error=error)
    with pytest.raises(type(error), match=str(error)):
        quantize(base, tmp_path / "out")


def test_cpu_allocator_errors_count_as_out_of_memory():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(RuntimeError(f"[enforce fail at alloc_cpu.cpp:121] . {CPU_ALLOCATOR}"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_torch_raises_the_expected_message():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**62, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_settings_are_reduced_step_by_step():
    settings = RunSettings(
        dtype="bfloat16",
        device="cuda",
        threads=8,
        batch_size=3,
        keep_paused=True,
        hessian_bytes=20 * SMALLEST_HESSIAN_BYTES,
        hold_states=True,
        keep_codes=True,
    )
    told = []
    while (found := reduce_memory(settings)) is not None:
        assert found[0] != settings
        settings, why = found
        told.append(why)
    assert told == [
        "each block runs once per stage",
        "hidden states are kept in files",
        "1 sequence per batch instead of 3",
        "fewer Hessians at a time",
        "fewer Hessians at a time",
    ]
    assert settings.hessian_bytes == SMALLEST_HESSIAN_BYTES
    assert not settings.keep_codes


def test_torch_takes_no_more_of_a_gpu_than_the_limit(monkeypatch):
    told = []

    class Properties:
        total_memory = 80 * 10**9

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 4 * 10**9)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, _: told.append(share)
    )
    gpu = torch.device("cuda", 0)
    with pytest.raises(RuntimeError, match="on the way"), limit_device_memory(gpu, 12 * 10**9):
        raise RuntimeError("on the way")
    with limit_device_memory(gpu, 10**12):
        pass
    assert told == [0.2, 1.0, 1.0, 1.0]
    with limit_device_memory(gpu, None), limit_device_memory(torch.device("cpu"), 10**9):
        assert len(told) == 4

"""A run killed anywhere resumes and writes the same bytes."""

from __future__ import annotations

import hashlib
import json
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.families import token_lists, write_family
from tests.helpers.processes import CONTEXT

import halfbyte
from halfbyte.errors import CheckpointError, ConfigError, JournalError
from halfbyte.quant_config import CalibrationConfig, Override, QuantConfig, ResourceConfig
from halfbyte.quantize import finish, run_states
from halfbyte.quantize import run as running
from halfbyte.quantize.journal import Journal
from halfbyte.quantize.report import REPORT_FILE
from halfbyte.quantize.resources import RunPlan

CALIBRATION = CalibrationConfig(samples=8, length=40, batch_size=2)
CONFIG = QuantConfig(group_size=32)


def work(job: dict[str, Any]) -> None:
    """Quantize in a separate process."""
    if "save_every" in job:
        run_states.SAVE_EVERY_SECONDS = job["save_every"]
        resolve = running.resolve_resources

        def hold(*arguments: Any) -> RunPlan:
            plan = resolve(*arguments)
            return replace(plan, settings=replace(plan.settings, hold_states=True))

        running.resolve_resources = hold
    halfbyte.quantize(
        job["model"],
        job["output"],
        config=job["config"],
        calibration=CALIBRATION,
        text=token_lists(8, 40),
        resume=True,
    )


def weight_digests(folder: Path) -> dict[str, str]:
    """Hash everything but the report files, which contain times."""
    told = ("quantization_report.json", "README.md", "quantization_error.png")
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name not in told
    }


def run_worker(job: dict[str, Any], kill_after: float | None = None) -> float | None:
    """Run in a process of its own; kill it after so many seconds.

    Returns:
        The seconds that it took, or None where it was killed.
    """
    worker = CONTEXT.Process(target=work, args=(job,))
    worker.start()
    start = time.monotonic()
    worker.join(kill_after)
    if worker.exitcode is None:
        worker.kill()
        worker.join()
        return None
    assert worker.exitcode == 0
    return time.monotonic() - start


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", QuantConfig(group_size=32)),
        (
            "llama",
            QuantConfig(
                group_size=32,
                match_base=True,
                weigh_tokens=True,
                polish=1,
                tune_steps=3,
                end_to_end_steps=4,
            ),
        ),
        ("qwen3_moe", QuantConfig(group_size=32, symmetric=False, desc_act=True)),
        (
            "gpt2",
            QuantConfig(
                bits=3,
                group_size=16,
                lm_head=True,
                skip=(r"\.0\.attn",),
                overrides=(Override(pattern="mlp", bits=8),),
            ),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_killed_at_random_points_the_run_ends_with_the_same_bytes(
    family: str, config: QuantConfig, tmp_path: Path
) -> None:
    changes = {"n_layer": 6} if family == "gpt2" else {"num_hidden_layers": 6}
    write_family(tmp_path / "base", family, **changes)
    job = {
        "model": str(tmp_path / "base"),
        "config": config,
    }
    seconds = run_worker({**job, "output": str(tmp_path / "whole")})
    assert seconds is not None
    dice = random.Random(family)
    kills = 0
    while kills < 4:
        pause = dice.uniform(0.1, 0.7) * seconds
        if run_worker({**job, "output": str(tmp_path / "killed")}, pause) is not None:
            break
        kills += 1
    run_worker({**job, "output": str(tmp_path / "killed")})
    assert kills >= 1
    assert weight_digests(tmp_path / "killed") == weight_digests(tmp_path / "whole")


def test_killed_with_states_on_the_device_the_run_ends_with_the_same_bytes(
    tmp_path: Path,
) -> None:
    """As on a GPU: states in memory, saved now and then; the last block written by a thread."""
    config = QuantConfig(group_size=32, match_base=True)
    write_family(tmp_path / "base", "llama", num_hidden_layers=6)
    job = {
        "model": str(tmp_path / "base"),
        "config": config,
    }
    assert run_worker({**job, "output": str(tmp_path / "files")}) is not None
    held = {**job, "save_every": 0.3}
    seconds = run_worker({**held, "output": str(tmp_path / "whole")})
    assert seconds is not None
    assert weight_digests(tmp_path / "whole") == weight_digests(tmp_path / "files")
    dice = random.Random(3)
    for _ in range(3):
        pause = dice.uniform(0.2, 0.8) * seconds
        if run_worker({**held, "output": str(tmp_path / "killed")}, pause) is not None:
            break
    run_worker({**held, "output": str(tmp_path / "killed")})
    assert weight_digests(tmp_path / "killed") == weight_digests(tmp_path / "whole")


def quantize(base: Path, output: Path, **changes: object) -> halfbyte.QuantizationReport:
    keywords: dict[str, object] = {
        "config": CONFIG,
        "calibration": CALIBRATION,
        "text": token_lists(8, 40),
        **changes,
    }
    return halfbyte.quantize(base, output, **keywords)


class StopAfter:
    """A progress that ends the run when a block starts, as an error would."""

    def __init__(self, block: int) -> None:
        self.block = block

    def started(self, plan: tuple[str, ...]) -> None: ...

    def phase(self, name: str) -> None: ...

    def block_started(self, index: int, count: int) -> None:
        if index == self.block:
            raise InterruptedError(index)

    def module_done(self, module: object) -> None: ...

    def finished(self) -> None: ...


@pytest.fixture
def unfinished(tmp_path: Path) -> tuple[Path, Path]:
    base, output = tmp_path / "base", tmp_path / "out"
    write_family(base, "llama")
    with pytest.raises(InterruptedError):
        quantize(base, output, progress=StopAfter(2))
    return base, output


def test_unfinished_run_is_not_overwritten_without_resume(unfinished: tuple[Path, Path]) -> None:
    base, output = unfinished
    with pytest.raises(JournalError, match=r"holds an unfinished run\. Add --resume"):
        quantize(base, output)


def test_full_disk_at_the_end_keeps_the_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(*_: object) -> None:
        raise CheckpointError("Cannot write the last shard: No space left on device.")

    base, output = tmp_path / "base", tmp_path / "out"
    write_family(base, "llama", num_hidden_layers=2)
    with monkeypatch.context() as full:
        full.setattr(finish, "write_shard", fill)
        with pytest.raises(
            CheckpointError, match=r"device\. Finished blocks are kept for --resume"
        ):
            quantize(base, output)
    assert len(quantize(base, output, resume=True).modules) == 14


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": QuantConfig(group_size=32, bits=8)}, r"config.bits: 4 then, 8 now"),
        ({"config": QuantConfig(group_size=32, damping=0.1)}, r"config.damping: 0.01 then, 0.1"),
        ({"calibration": CalibrationConfig(samples=5, length=40, batch_size=2)}, "samples: 8 then"),
        ({"text": token_lists(6, 40, seed=9)}, "calibration.digest"),
        ({"resources": ResourceConfig(dtype="bfloat16")}, 'dtype: "auto" then, "bfloat16" now'),
    ],
)
def test_other_inputs_or_options_are_refused_by_name(
    unfinished: tuple[Path, Path], change: dict[str, object], message: str
) -> None:
    base, output = unfinished
    with pytest.raises(JournalError, match=message):
        quantize(base, output, resume=True, **change)
    assert quantize(base, output, resume=True).modules, "the refusal must lose nothing"


def test_other_weights_are_refused(unfinished: tuple[Path, Path]) -> None:
    base, output = unfinished
    write_family(base, "llama", seed=5)
    with pytest.raises(JournalError, match="model: "):
        quantize(base, output, resume=True)


def test_damaged_hidden_states_are_detected(unfinished: tuple[Path, Path]) -> None:
    base, output = unfinished
    for path in (output / ".halfbyte").glob("calibration-*.bin"):
        data = bytearray(path.read_bytes())
        data[100] ^= 1
        path.write_bytes(data)
    with pytest.raises(JournalError, match=r"are damaged \(calibration-0.bin\)"):
        quantize(base, output, resume=True)


def test_blocks_without_saved_states_are_redone(unfinished: tuple[Path, Path]) -> None:
    _, output = unfinished
    journal = output / ".halfbyte" / "journal.jsonl"
    lines = journal.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 3
    unsaved = json.dumps({**json.loads(lines[2]), "states": None})
    journal.write_text("\n".join([*lines[:2], unsaved, ""]), encoding="utf-8")
    with Journal(output) as found:
        found.load()
        assert len(found.blocks) == 1
    assert len(journal.read_text(encoding="utf-8").splitlines()) == 2


def test_incomplete_last_line_is_ignored(unfinished: tuple[Path, Path]) -> None:
    base, output = unfinished
    journal = output / ".halfbyte" / "journal.jsonl"
    whole = journal.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == 3
    # Half a line after the last block's, as left by a process killed while writing it.
    journal.write_bytes(b"".join(lines) + lines[-1][: len(lines[-1]) // 2])
    resumed = quantize(base, output, resume=True)
    assert [m.block for m in resumed.modules][-1] == 2


def test_journal_damaged_before_its_last_line_is_refused(unfinished: tuple[Path, Path]) -> None:
    base, output = unfinished
    journal = output / ".halfbyte" / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(lines[0] + b"garbage\n" + lines[2])
    with pytest.raises(JournalError, match="damaged in line 2"):
        quantize(base, output, resume=True)


def test_finished_run_returns_its_report_and_is_not_overwritten(tmp_path: Path) -> None:
    write_family(tmp_path / "base", "llama")
    report = quantize(tmp_path / "base", tmp_path / "out")
    digests = weight_digests(tmp_path / "out")
    assert not (tmp_path / "out" / ".halfbyte").exists()
    assert quantize(tmp_path / "base", tmp_path / "out", resume=True).modules == report.modules
    with pytest.raises(ConfigError, match="is not empty"):
        quantize(tmp_path / "base", tmp_path / "out")
    old = json.loads((tmp_path / "out" / REPORT_FILE).read_text()) | {"inputs": {}}
    (tmp_path / "out" / REPORT_FILE).write_text(json.dumps(old))
    with pytest.raises(JournalError, match=r"is complete\. .* not say .* Use the folder as it is"):
        quantize(tmp_path / "base", tmp_path / "out", resume=True)
    assert weight_digests(tmp_path / "out") == digests


def test_second_process_on_the_same_output_is_refused(tmp_path: Path) -> None:
    with (
        Journal(tmp_path / "out"),
        pytest.raises(JournalError, match="Another process"),
        Journal(tmp_path / "out"),
    ):
        raise AssertionError("both hold the lock")


def test_pausing_and_restarting_batches_write_the_same_bytes(tmp_path: Path) -> None:
    """Forward passes that pause between stages, compared with passes that restart."""
    for family in ("llama", "qwen3_moe", "gpt_neox"):
        write_family(tmp_path / family, family)
        for name, memory in (("fast", "64GB"), ("plain", "1MB")):
            quantize(
                tmp_path / family,
                tmp_path / f"{family}-{name}",
                resources=ResourceConfig(memory=memory),
            )
        fast, plain = (weight_digests(tmp_path / f"{family}-{n}") for n in ("fast", "plain"))
        assert fast == plain

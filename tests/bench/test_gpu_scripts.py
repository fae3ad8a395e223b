"""Tests of the GPU scripts, as far as they run without a GPU."""

from __future__ import annotations

import importlib
import json
import math
import multiprocessing
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from halfbyte.kernels.cuda_compiler import compile_source
from halfbyte.kernels.cuda_rows import SHARED_LIMIT, RowsConfig
from halfbyte.kernels.cuda_stream import StreamConfig
from halfbyte.kernels.gpu_table import load_table, parse_table
from halfbyte.nn.replace import quantized_linears

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def script(monkeypatch):
    """Imports a script of bench/ by name."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


def test_bandwidth_kernel_compiles(script, nvrtc):
    source = script("gpu_bandwidth").READ_SOURCE
    assert b"read_all" in compile_source(source, {}, "sm_90")


def test_checks_cover_every_kind_of_layer_with_every_configuration(script):
    checks = script("gpu_checks")
    jobs = checks.list_jobs("sm_90")
    kinds = {
        (spec.bits, spec.group_size, spec.symmetric, spec.act_order, spec.dtype)
        for job in jobs
        for spec in [job.spec]
    }
    assert len(kinds) == 4 * 5 * 2 * 2 * 2
    every = {
        *checks.list_triton_configs("sm_90"),
        *checks.list_cuda_configs("sm_90"),
        *checks.list_stream_configs("sm_90"),
    }
    assert len(every) > 30
    by_kind = {}
    for job in jobs:
        if job.configs:
            by_kind.setdefault(job.spec, set()).update(job.configs)
    assert len(by_kind) == len(kinds)
    assert all(configs == every for configs in by_kind.values())
    # A layer that a compiler once broke; what users run is checked first.
    wrong = replace(jobs[0].spec, group_size=32)
    assert wrong in [job.spec for job in jobs[:40] if not job.configs]


def test_is_good_rejects_every_kind_of_failure(script):
    is_good = script("gpu_checks").is_good
    fine = {"error_over_bound": 0.1, "repeats_bit_for_bit": True, "problem": None}
    assert is_good(fine)
    for wrong in (
        {"error_over_bound": 19.8},
        {"repeats_bit_for_bit": False},
        {"restores_bits": False},
        {"dequantizes_exactly": False},
        {"problem": "RuntimeError: out of memory"},
    ):
        assert not is_good(fine | wrong)
    assert not is_good({"problem": None})


def test_shipped_table_matches_the_saved_result(script):
    keep = script("keep_gpu")
    result = json.loads((BENCH / "results" / "gpu-kernels.json").read_text())
    table = load_table("sm_90")
    sweep = result["data"]["sweep"]
    for (shape, rows), config in table.triton.items():
        name = next(name for name, sizes in keep.SHAPES.items() if sizes == shape)
        fastest = sweep["triton"][f"{name}, rows {rows}"][0]
        assert fastest.startswith(" ".join(map(str, config.values())) + ":")
    for shape, rows in table.cuda_rows.items():
        name = next(name for name, sizes in keep.SHAPES.items() if sizes == shape)
        assert keep.find_cuda_rows(result["data"], name) == rows


def test_table_has_one_entry_per_line(script, tmp_path, monkeypatch):
    keep = script("keep_gpu")
    monkeypatch.setattr(keep, "TABLES", tmp_path)
    arm = '{"block_out": 64, "block_rows": 16, "splits": 2, "warps": 4, "stages": 4}'
    cases = {
        f"{name}, rows {rows}": {
            "cuda, early start": {"us": 5.0 if rows <= 4 else 9.0},
            "triton": {"us": 8.0},
        }
        for name in keep.SHAPES
        for rows in keep.ROWS
    }
    measured = {
        "device": "a GPU",
        "architecture": "sm_77",
        "best": {"triton": {"8B o, rows 16": arm}, "cuda": {}},
        "microseconds": cases,
    }
    before = {"stream": [], "made_of": {"stream": "another GPU, 2026-11-25"}}
    (tmp_path / "sm_77.json").write_text(json.dumps(before))
    keep.write_table(measured, "2026-11-26")
    text = (tmp_path / "sm_77.json").read_text()
    made_of = json.loads(text)["made_of"]
    assert made_of["triton"] == made_of["cuda"] == "a GPU, 2026-11-26"
    assert made_of["stream"] == "another GPU, 2026-11-25"
    assert max(map(len, text.splitlines())) < 160
    table = parse_table(json.loads(text))
    assert table.triton == {((4096, 4096), 16): json.loads(arm)}
    assert set(table.cuda_rows.values()) == {4}


def write_table(folder):
    """Write a table without the parts of single kernels."""
    table = {"made_of": {"triton": "a GPU, 2026-11-26"}, "triton": [], "cuda": [], "cuda_rows": []}
    (folder / "sm_77.json").write_text(json.dumps(table))


def test_shapes_share_one_thread_block_unless_another_is_much_faster(script, tmp_path, monkeypatch):
    keep = script("keep_gpu_rows")
    monkeypatch.setattr(keep, "TABLES", tmp_path)
    small, large = (
        asdict(RowsConfig(rows=rows, tiles=2, warpgroups=2, stages=4, splits=splits))
        for rows, splits in ((64, 0), (128, 3))
    )

    def case(first, second):
        timed = {json.dumps(small): {"us": first}, json.dumps(large): {"us": second}}
        return timed | {json.dumps(large | {"splits": 8}): {"us": 99.0}}

    sweep = dict.fromkeys((f"{name}, rows 128" for name in keep.SHAPES), case(10.0, 9.0))
    sweep |= {"8B o, rows 128": case(8.9, 9.0), "8B qkv, rows 128": case(8.0, 9.0)}
    paired = {"own, early start": {"us": 9.0}, "triton": {"us": 12.0}}
    times = dict.fromkeys(sweep, paired) | {
        "8B down, rows 128": paired | {"dequantize + cublas": {"us": 8.9}}
    }
    write_table(tmp_path)
    measured = {"kernel": "rows", "architecture": "sm_77", "device": "a GPU"}
    keep.write_table(measured | {"sweep": sweep, "microseconds": times}, "2026-11-27")
    found = parse_table(json.loads((tmp_path / "sm_77.json").read_text())).many_rows
    by_name = {
        name: found[sizes, 128] for name, sizes in keep.SHAPES.items() if (sizes, 128) in found
    }
    assert by_name["8B o"] == by_name["70B down"] == large
    assert by_name["8B qkv"] == small
    assert by_name["8B down"] is None


def test_kernel_for_few_rows_is_shipped_only_where_faster(script, tmp_path, monkeypatch):
    keep = script("keep_gpu_rows")
    monkeypatch.setattr(keep, "TABLES", tmp_path)
    config = StreamConfig(row_tiles=1, tiles=2, warps_out=1, warps_in=16, stages=6)
    timed = {json.dumps(asdict(config)): {"us": 5.0}}
    sweep = {f"{name}, rows {rows}": timed for name in keep.SHAPES for rows in (1, 8)}
    paired = {
        "cublas": {"us": 20.0},
        "as chosen": {"us": 6.0},
        "own": {"us": 6.0},
        "own, early start": {"us": 5.0},
        "humming": {"us": 7.0},
        "marlin": {"us": 8.0},
    }
    slower = paired | {"as chosen": {"us": 4.0}}
    times = dict.fromkeys(sweep, paired) | {"8B o, rows 8": slower}
    measured = {
        "kernel": "stream",
        "architecture": "sm_77",
        "device": "a GPU",
        "sweep": sweep,
        "best": {},
        "microseconds": times,
        "cases of earlier runs": [],
    }
    write_table(tmp_path)
    keep.write_table(measured, "2026-11-27")
    table = json.loads((tmp_path / "sm_77.json").read_text())
    assert table["made_of"] == {"triton": "a GPU, 2026-11-26", "stream": "a GPU, 2026-11-27"}
    found = parse_table(table).stream
    assert len(found) == 15
    assert ((4096, 4096), 8) not in found
    assert StreamConfig(**found[(4096, 4096), 1]) == config
    saved = {}
    monkeypatch.setattr(
        keep, "save_result", lambda claim, **given: saved.update(given, claim=claim)
    )
    keep.save_means(measured, None)
    assert saved["claim"] == "gpu-stream"
    assert [row[:4] for row in saved["rows"]] == [
        [1, 1.4, "1.40 (8B qkv)", "8 of 8"],
        [8, pytest.approx(1.44, abs=0.01), "1.40 (8B qkv)", "7 of 8"],
    ]
    assert "Humming" in saved["note"]


FAST, SLOW = (
    asdict(StreamConfig(row_tiles=1, tiles=tiles, warps_out=1, warps_in=16, stages=6))
    for tiles in (2, 4)
)


@pytest.fixture
def keep(script, tmp_path, monkeypatch):
    """Processes a run of the kernel for few rows; returns the table and the result's rows."""
    rows_script = script("keep_gpu_rows")
    monkeypatch.setattr(rows_script, "TABLES", tmp_path)
    write_table(tmp_path)
    saved = {}
    monkeypatch.setattr(rows_script, "save_result", lambda claim, **given: saved.update(given))
    paired = {"as chosen": 6.0, "own": 6.0, "own, early start": 5.0, "marlin": 8.0, "cublas": 20.0}

    def run(sweep, untimed=(), **changed):
        timed = {arm: {"us": us} for arm, us in (paired | changed).items()}
        cases = {
            f"{name}, rows {rows}": {json.dumps(c): {"us": us} for c, us in found}
            for name in rows_script.SHAPES
            for rows, found in sweep.items()
        }
        measured = {
            "kernel": "stream",
            "architecture": "sm_77",
            "device": "a GPU",
            "sweep": cases,
            "best": {},
            "microseconds": {case: timed for case in cases if case not in untimed},
            "cases of earlier runs": [],
        }
        rows_script.write_table(measured, "2026-11-27")
        rows_script.save_means(measured, None)
        table = parse_table(json.loads((tmp_path / "sm_77.json").read_text()))
        return table.stream, saved["rows"]

    return run


def test_complete_cases_of_an_interrupted_run_are_used(keep):
    sweep = {1: [(FAST, 5.0)], 16: [(FAST, 5.0)]}
    stream, rows = keep(sweep, untimed=["70B down, rows 16"])
    assert len(stream) == 15
    assert [row[0] for row in rows] == [1]


def test_rows_without_a_peer_are_left_out(keep):
    stream, rows = keep({1: [(FAST, 5.0)]}, marlin=math.inf)
    assert len(stream) == 8
    assert rows == []


def test_reported_time_is_that_of_the_shipped_configuration(keep):
    # For up to 8 rows, the fastest at 8 is shipped; at 4 rows it takes twice as long as another.
    stream, rows = keep(
        {4: [(FAST, 9.0), (SLOW, 4.5)], 8: [(FAST, 4.0), (SLOW, 8.0)]},
    )
    assert all(config == FAST for config in stream.values())
    assert [row[:2] for row in rows] == [[4, 0.8], [8, 1.6]]
    assert [row[4] for row in rows] == [1.6, 1.6]


def test_shared_configuration_must_itself_be_faster_than_before(keep):
    # 2% slower than the fastest, which is 1% faster than the kernel before it.
    sweep = {8: [(FAST, 1.0), (SLOW, 0.98)]}
    stream, _ = keep(sweep, **{"as chosen": 5.05})
    assert all(config == SLOW for config in stream.values())
    stream, _ = keep({8: [(SLOW, 1.0)]}, **{"as chosen": 4.95})
    assert stream == {}


def test_runs_of_different_gpus_are_not_joined(script):
    join = script("keep_gpu_rows").join_runs
    runs = [{"device": name, "microseconds": {name: 1}} for name in ("H100", "H200")]
    with pytest.raises(SystemExit, match=r"different GPUs cannot be joined: H100, H200\."):
        join(runs)
    joined = join([runs[0], runs[0] | {"microseconds": {"other": 1}}])
    assert joined["cases of earlier runs"] == ["H100"]


GOOD = {"error_over_bound": 0.1, "repeats_bit_for_bit": True, "problem": None, "ends": False}


@pytest.fixture
def collect(script, monkeypatch):
    """Collects from a process that sends these outcomes, then ends or hangs."""
    rows_script = script("measure_gpu_rows")
    monkeypatch.setattr(rows_script, "START_SECONDS", 0.2)
    monkeypatch.setattr(rows_script, "HANG_SECONDS", 0.05)

    def run(*sent, ends=True, count=9, before=()):
        ours, theirs = multiprocessing.Pipe()
        for outcome in sent:
            theirs.send(outcome)
        if ends:
            theirs.close()
        outcomes = list(before)
        begin = time.monotonic()
        rows_script.collect(ours, outcomes, count, begin + 60)
        return [o["problem"] for o in outcomes], time.monotonic() - begin

    return run


def test_hang_after_cuda_has_started_is_detected_soon(collect):
    problems, seconds = collect(None, GOOD, ends=False)
    assert problems == [None, "hangs"]
    assert seconds < 0.2
    problems, seconds = collect(ends=False)
    assert problems == ["hangs"]
    assert seconds >= 0.2


def test_only_a_process_that_cannot_continue_is_ended(collect):
    bad = GOOD | {"problem": "KernelUnavailable: The CUDA driver cannot describe boxes"}
    assert len(collect(None, bad, GOOD, GOOD, count=3)[0]) == 3
    assert len(collect(None, GOOD, bad | {"ends": True}, GOOD)[0]) == 2
    assert collect(None, GOOD)[0] == [None, "its process died"]


def test_checking_stops_early_if_the_first_checks_all_fail(collect, script):
    bad = GOOD | {"problem": "KernelUnavailable: The CUDA driver cannot describe boxes"}
    problems, _ = collect(None, *[bad] * 9)
    assert len(problems) == script("measure_gpu_rows").MIN_CHECKS
    stop = script("measure_gpu_rows").find_stop([bad] * 3)
    assert "the first 3 checks all failed" in stop
    assert "cannot describe boxes" in stop
    assert script("measure_gpu_rows").find_stop([bad, bad, GOOD]) is None
    assert script("measure_gpu_rows").find_stop([GOOD] + [bad] * 13) == "13 checks failed"


@pytest.mark.parametrize("name", ["rows", "stream"])
def test_candidates_fit_the_gpu_and_are_all_checked(script, name):
    kernel = script("gpu_candidates").KERNELS[name]
    candidates = kernel.list_candidates()
    assert len(candidates) == len(set(candidates)) > 20
    named = script("gpu_candidates").name_candidate
    checked = {named(config) for config, kind in kernel.list_checks(candidates) if not kind}
    assert checked == set(map(named, candidates))
    spec = script("gpu_checks").make_spec()
    for config in candidates:
        size = config.count_shared_bytes(spec, torch.float16)
        assert config.blocks * (size + 1024) <= SHARED_LIMIT + 1024
    for rows in kernel.rows:
        splits = [s for config in candidates for s in kernel.list_splits(config, spec, rows)]
        assert splits or rows in (1024, 4096), rows


def test_a_mixture_of_experts_is_made_without_its_dense_weights(script):
    experts = script("measure_gpu_experts")
    sizes = {"hidden_size": 128, "moe_intermediate_size": 128, "num_experts": 4, "vocab_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
    model = experts.make_model(
        2, "torch_reference", "cpu", **sizes, **heads, num_experts_per_tok=2
    ).float()
    tensors = (*model.named_parameters(), *model.named_buffers())
    assert not [name for name, tensor in tensors if tensor.is_meta]
    linears = [name for name, _ in quantized_linears(model)]
    assert len(linears) == 2 * (4 + 4 * 3)
    with torch.inference_mode():
        assert torch.isfinite(model(torch.arange(5)[None]).logits).all()
    with pytest.raises(RuntimeError, match="cannot run together"):
        experts.set_together(model, together=True)
    experts.set_together(model, together=False)

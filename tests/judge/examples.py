"""A complete comparison made without a model; its texts try to break the reports."""

from __future__ import annotations

from halfbyte.judge.answers import Answer
from halfbyte.judge.bootstrap import bootstrap_ratio
from halfbyte.judge.comparison import Comparison, Cost, Example, Generation, NoiseFloor
from halfbyte.judge.edge_cases import EdgeCase, judge_edge, summarize_kinds
from halfbyte.judge.fidelity import KindFidelity, TextFidelity, WorstToken
from halfbyte.judge.layers import LayerErrors, LinearError, mark_suspects
from halfbyte.judge.questions import Question
from halfbyte.judge.statistics import Flips
from halfbyte.judge.tasks import Item
from halfbyte.judge.verdict import Evidence, Margins, decide, measure_slice

NASTY = '<script>alert("x")</script> & \x00\x1b[31m ‮abc عربي 😀 \ud800'


def make_comparison(*, harmful=9) -> Comparison:
    margins = Margins()
    overall = measure_slice(
        "all items", Flips(num_items=300, harmful=harmful, beneficial=4), 200, margins
    )
    slices = tuple(
        measure_slice(f"task {name}", Flips(num_items=60, harmful=h, beneficial=1), 40, margins)
        for name, h in (
            ("arithmetic", harmful),
            ("facts <b>", 1),
            ("a very long name of a slice " * 3, 0),
        )
    )
    boot = bootstrap_ratio([3.0 + i % 5 for i in range(40)], [100] * 40)
    text = TextFidelity(
        num_tokens=4000,
        num_documents=40,
        kl_nats=0.12,
        kl_interval=boot.interval(0.9),
        kl_percentiles={"50": 0.01, "99.9": 2.5, "100": 7.5},
        kl_histogram=(0, 10, 400, 1500, 1200, 800, 88, 2),
        top1_agreement=0.82,
        top1_interval=None,
        base_perplexity=21.5,
        candidate_perplexity=23.1,
        nll_increase_nats=boot.mean,
        nll_increase_interval=boot.interval(0.9),
        bootstrap=boot,
        by_kind=(
            KindFidelity(
                kind="prose",
                num_tokens=4000,
                num_documents=40,
                kl_nats=0.12,
                top1_agreement=0.82,
                base_perplexity=21.5,
                candidate_perplexity=23.1,
            ),
        ),
        worst=(
            WorstToken(
                kl_nats=7.5,
                document="prose:0",
                before="the\n" + NASTY,
                actual="x",
                base="y",
                candidate="z",
            ),
        ),
        noise_kl_nats=1e-10,
        noise_kl_largest=2e-8,
        candidate_finite=True,
        base_finite=True,
    )
    linears = [
        LinearError(
            name=f"model.layers.{b}.{k}",
            block=b,
            kind=k,
            error=0.05 + 0.001 * b,
            gain=1.04 if (b, k) == (7, "mlp.down_proj") else 1 - 0.0001 * b,
        )
        for b in range(12)
        for k in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj")
    ]
    layers = LayerErrors(
        linears=mark_suspects(linears), block_errors=tuple(0.01 * b for b in range(12)), missing=0
    )
    case = EdgeCase(kind="code", question=Question(item=Item(name="e", prompt=NASTY), ids=(1,)))
    outcomes = (
        judge_edge(
            case, Answer(text="fine"), Answer(text="no " * 30), kl_nats=0.3, usual_kl_nats=0.12
        ),
    )
    evidence = Evidence(overall=overall, slices=slices, text=text, layers=layers)
    verdict, evidence = decide(evidence, margins)
    return Comparison(
        base="models/base <1>",
        candidate="models/a-rather-long-name-of-a-quantized-model-that-does-not-end-4bit-g128",
        verdict=verdict,
        margins=margins,
        overall=evidence.overall,
        slices=evidence.slices,
        text=text,
        generation=Generation(num_items=120, identical=90, median_first_difference=3.5),
        edge_kinds=summarize_kinds(outcomes),
        edge_outcomes=outcomes,
        edges=None,
        layers=layers,
        noise=NoiseFloor(
            num_items=40,
            identical_texts=40,
            flips=Flips(num_items=40, harmful=0, beneficial=0),
            batch_size=3,
            kl_nats=1e-10,
            kl_largest=2e-8,
        ),
        examples=(
            Example(
                name="json:1",
                kind="harmful",
                prompt=NASTY,
                expected='{"a": 1}',
                base_text='{"a": 1, "b": "same words here"}',
                candidate_text='{"a": 2, "b": "same words here"}',
                first_difference=4,
            ),
            Example(
                name="long:1",
                kind="same",
                prompt="w" * 3000,
                expected="x",
                base_text="y" * 2000,
                candidate_text="",
                first_difference=0,
            ),
        ),
        costs=(
            Cost(
                name="base",
                seconds=61.0,
                tokens=12000,
                reused=0,
                weight_bytes=270_000_000,
                peak_memory_bytes=1_200_000_000,
                planned_bytes=1_150_000_000,
            ),
            Cost(
                name="http://host/v1#m",
                seconds=0.0,
                tokens=0,
                reused=7,
                weight_bytes=None,
                peak_memory_bytes=None,
            ),
        ),
        notes=("A note with <angle brackets>.",),
        settings={"window": 512},
        versions={"torch": "2.13"},
        machine={"cores": "2"},
    )

"""Quantize a tiny random model of every family of causal models that Transformers has.

    python bench/measure_families.py [FAMILY ...] [--memory GB] [--seconds N] [--merge]

Each family is built, saved, quantized in 4 bits with groups of 32, loaded with ``from_pretrained``
and compared with the base model whose weights were replaced by the dequantized ones, in a process
of its own with limits of memory and time. Given families, only those are measured and shown;
``--merge`` puts their rows into the saved result.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import resource
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import halfbyte
from halfbyte.checkpoint.read import open_checkpoint
from halfbyte.errors import HalfbyteError
from halfbyte.model.blocks import find_blocks, set_linear_weight
from halfbyte.model.experts import unfuse_experts
from halfbyte.model.naming import module_key_map
from halfbyte.quant_config import CalibrationConfig, QuantConfig
from record import RESULTS, save_result
from tiny_families import TEXT_TOKENS, build_tiny

EQUAL, DIFFERS, REFUSED, FAILED = "equal", "differs", "refused", "failed"
NOT_TRANSFORMERS = "not with Transformers"
OUTCOMES = {
    EQUAL: "quantized, and computes with the dequantized weights",
    DIFFERS: "quantized, but computes something else",
    REFUSED: "refused with a reason",
    FAILED: "failed",
    NOT_TRANSFORMERS: "Transformers itself does not build, save, load or run it",
}
TOLERANCE = 1e-4
"""Allowed difference of the logits, relative to the largest."""
LOW_SHARE = 0.95
GENERATED = 4
PRELOADED = (
    "halfbyte.integrations.generation",
    "halfbyte.nn.model_loading",
    "halfbyte.quantize.pipeline",
    "halfbyte.quantize.run",
    "matplotlib.backends.backend_agg",
    "matplotlib.pyplot",
    "transformers.models.llama.modeling_llama",
)
"""What each family's process would import again."""


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help="default: all")
    parser.add_argument("--memory", type=float, default=3.0, help="GB a family may use")
    parser.add_argument("--seconds", type=float, default=180.0, help="time a family may take")
    parser.add_argument("--merge", action="store_true", help="update the saved rows of FAMILIES")
    options = parser.parse_args()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["measure_families", *PRELOADED])
    results = {}
    for family in options.families or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        results[family] = measure_apart(context, family, options.memory, options.seconds)
        print(json.dumps({"family": family, **results[family]}), flush=True)
    if options.families and not options.merge:
        return
    path = RESULTS / "families.json"
    merged = ""
    if options.merge and path.exists():
        saved = json.loads(path.read_text())
        merged = f"; all but {len(results)} rows by `{saved['command']}` at {saved['commit']}"
        results = {**saved["data"], **results}
    save({family: results[family] for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}, merged)


def measure_apart(context: Any, family: str, memory_gb: float, seconds: float) -> dict[str, Any]:
    """Measure one family in its own process; a crash or a timeout is its result."""
    ours, theirs = context.Pipe(duplex=False)
    start = time.monotonic()
    process = context.Process(target=run_child, args=(theirs, family, memory_gb))
    process.start()
    theirs.close()
    result: dict[str, Any] = {}
    try:
        if ours.poll(seconds):
            result = ours.recv()
        else:
            result = {"outcome": FAILED, "why": f"took more than {seconds:.0f} s"}
            process.kill()
    except EOFError:
        process.join()
        result = {"outcome": FAILED, "why": f"its process ended with code {process.exitcode}"}
    process.join()
    return {**result, "seconds": round(time.monotonic() - start, 1)}


def run_child(results: Connection, family: str, memory_gb: float) -> None:
    """Measure one family within a limit of memory, and send the result."""
    limit = int(memory_gb * 1e9)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        results.send(measure(family, Path(work)))


def measure(family: str, work: Path) -> dict[str, Any]:
    """Quantize a tiny model of one family and compare it with its base."""
    ids = random_tokens(2, 24, seed=2)
    built: dict[str, Any] = {}
    try:
        model = build_tiny(family)
        logits = compute_logits(model, ids)
        model.save_pretrained(work / "base", max_shard_size="200KB")
        reference = load(work / "base")
        built["round_trip"] = difference(compute_logits(reference, ids), logits)
    except Exception as error:  # noqa: BLE001 - the result
        return {"outcome": NOT_TRANSFORMERS, **describe(error)}
    if built["round_trip"] > TOLERANCE:
        why = f"saved and loaded, its logits differ by {built['round_trip']:.2g} of the largest"
        return {"outcome": NOT_TRANSFORMERS, **built, "why": why}
    try:
        report = halfbyte.quantize(
            work / "base",
            work / "out",
            config=QuantConfig(group_size=32),
            calibration=CalibrationConfig(samples=8, length=48, batch_size=4),
            text=random_tokens(8, 48, seed=1).tolist(),
        )
        compared = compare(work / "out", reference, ids)
    except HalfbyteError as error:
        return {"outcome": REFUSED, **built, **describe(error)}
    except Exception as error:  # noqa: BLE001 - the result
        return {"outcome": FAILED, **built, **describe(error)}
    skipped = Counter(f"{pattern(s.name)}: {s.reason}" for s in report.skipped)
    return {**compared, **built, "skipped": dict(skipped)}


def compare(folder: Path, reference: PreTrainedModel, ids: Tensor) -> dict[str, Any]:
    """Compare a checkpoint with its base, whose weights are replaced by the dequantized ones."""
    base_logits = compute_logits(reference, ids)
    blocks = f"{find_blocks(reference).prefix}."
    unfuse_experts(reference)
    checkpoint = open_checkpoint(folder)
    keys = module_key_map(reference, [f"{name}.qweight" for name in checkpoint.linears])
    names = {key.removesuffix(".qweight"): n.removesuffix(".qweight") for key, n in keys.items()}
    for key, name in names.items():
        set_linear_weight(reference.get_submodule(name), checkpoint.dequantize(key))
    expected, loaded = compute_logits(reference, ids), load(folder)
    found = compute_logits(loaded, ids)
    error = difference(found, expected)
    result: dict[str, Any] = {
        "outcome": EQUAL if error <= TOLERANCE else DIFFERS,
        "error": error,
        "change": difference(expected, base_logits),
        **count_weights(reference, blocks, {f"{name}.weight" for name in names.values()}),
    }
    reference_tokens = attempt(lambda: generate(reference, ids))
    tokens = attempt(lambda: generate(loaded, ids))
    result["generates"] = tokens if isinstance(tokens, str) else tokens == reference_tokens
    if isinstance(reference_tokens, str):
        result["generates"] = f"neither does the base: {reference_tokens}"
    elif result["generates"] is not True:
        result["outcome"] = DIFFERS
    return result


def count_weights(model: PreTrainedModel, blocks: str, quantized: set[str]) -> dict[str, Any]:
    """Count the weights, in and outside the blocks, that were quantized and left out."""
    left: Counter[str] = Counter()
    outside: Counter[str] = Counter()
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    embeddings = {id(getattr(module, "weight", None)) for module in ends}
    count = 0
    for name, parameter in model.named_parameters():
        if name in quantized:
            count += parameter.numel()
        elif parameter.dim() > 1 and id(parameter) not in embeddings:
            (left if name.startswith(blocks) else outside)[pattern(name)] += parameter.numel()
    return {
        "share": count / (count + left.total()),
        "share_of_model": count / (count + left.total() + outside.total()),
        "left_out": {name: n / (count + left.total()) for name, n in left.most_common()},
        "outside": dict(outside.most_common(12)),
    }


def random_tokens(samples: int, length: int, *, seed: int) -> Tensor:
    """Return random token ids of text, [samples, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(*TEXT_TOKENS, (samples, length), generator=generator)


def load(folder: Path) -> PreTrainedModel:
    """Load a model as a user does."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def compute_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return logits; raises if some are not finite, because nothing could be compared."""
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    if not torch.isfinite(logits).all():
        raise FloatingPointError("the random model's logits are not finite")
    return logits


def generate(model: PreTrainedModel, ids: Tensor) -> list[int]:
    """Generate a few tokens greedily."""
    length = {"max_new_tokens": GENERATED, "min_new_tokens": GENERATED}
    return model.generate(ids[:1], **length, do_sample=False)[0].tolist()


def attempt(function: Callable[[], list[int]]) -> list[int] | str:
    """Return a function's result, or its error as text."""
    try:
        return function()
    except Exception as error:  # noqa: BLE001 - the result
        return describe(error)["why"]


def difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


def describe(error: Exception) -> dict[str, str]:
    """Return an error's message and where it was raised."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    text = re.sub(r"\S*/base\b", "base", " ".join(str(error).split()))
    if not isinstance(error, HalfbyteError):
        text = f"{type(error).__name__}: {text.partition('. ')[0]}"
    return {"why": text[:400], "where": f"{Path(last.filename).name}:{last.lineno}"}


def pattern(name: str) -> str:
    """Return a name with ``*`` for every number in it."""
    return re.sub(r"\b\d+\b", "*", name)


def save(results: dict[str, dict[str, Any]], merged: str) -> None:
    """Save counts by outcome, the reasons of those that are not equal, and what was left out."""
    by_outcome = {o: [f for f, r in results.items() if r["outcome"] == o] for o in OUTCOMES}
    save_result(
        "families",
        columns=["outcome", "families", "which"],
        rows=[[OUTCOMES[o], len(f), ", ".join(f)] for o, f in by_outcome.items() if f],
        note=f"all {len(results)} model types of Transformers {transformers.__version__}; 4 bits, "
        f"groups of 32, random weights and tokens; logits equal within {TOLERANCE} of the largest"
        f"{merged}",
        data=results,
    )
    save_result(
        "families-others",
        columns=["family", "outcome", "why"],
        rows=[
            [f, o, results[f].get("why", "")]
            for o, names in by_outcome.items()
            for f in names
            if o != EQUAL
        ],
        note="Messages are cut after 400 characters",
        data={},
    )
    low = sorted((r["share"], f) for f, r in results.items() if r.get("share", 1) < LOW_SHARE)
    save_result(
        "families-left-out",
        columns=["family", "quantized share of the weights in blocks", "left out"],
        rows=[
            [
                f,
                share,
                ", ".join(f"`{n}` {s:.0%}" for n, s in results[f]["left_out"].items() if s >= 0.01),
            ]
            for share, f in low
        ],
        note="Matrices only; shares are of tiny models",
        data={},
    )


if __name__ == "__main__":
    main()

"""Run ``halfbyte compare`` on candidates with known faults, and on the base itself.

    python bench/measure_faults.py MODEL QUANTIZED [--items 40] [--work DIR]

MODEL is the base, QUANTIZED its GPTQ checkpoint. The faulty candidates: the checkpoint with the
scales of one linear 3% too large; the base rounded to nearest in 2 bits; the base with the
embeddings of digits set to zero, which breaks only numbers.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from halfbyte.evaluate.loading import load_tokenizer
from halfbyte.judge.compare import compare
from halfbyte.judge.comparison import Comparison
from halfbyte.judge.setup import CompareConfig
from record import save_result

FAULTY = "model.layers.12.mlp.down_proj"
RTN_BITS = 2
RTN_GROUP = 64


def main() -> None:
    """Make the candidates, compare each, save the verdicts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("quantized", type=Path)
    parser.add_argument("--items", type=int, default=40, help="items of each built-in task")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument(
        "--work", type=Path, help="folder that keeps models and answers; reused by later runs"
    )
    parser.add_argument("--only", default="", help="letters of the candidates to run, such as abc")
    args = parser.parse_args()
    config = CompareConfig(
        builtin_items=args.items, window=args.window, windows=args.windows, edge_cases=False
    )
    rows, data = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        for letter, name, make in (
            ("a", "the base itself", lambda _: args.base),
            ("b", "4 bits", lambda _: args.quantized),
            ("c", f"4 bits, scales of {FAULTY} 3% too large", stretch_scales),
            ("d", f"round to nearest, {RTN_BITS} bits", round_to_nearest),
            ("e", "the base, digits' embeddings zero", break_digits),
        ):
            if args.only and letter not in args.only:
                continue
            source = args.quantized if letter == "c" else args.base
            candidate = make(source) if letter in "ab" else make(source, work / f"model-{letter}")
            result = compare(
                args.base,
                candidate,
                config=config,
                cache=work / "cache",
                resume=True,
            )
            rows.append([f"({letter}) {name}", *make_cells(result)])
            gains = sorted(linear.gain for linear in result.layers.linears)
            data[letter] = {
                "sentence": result.verdict.sentence,
                "slices": {s.name: [s.base_accuracy, s.candidate_accuracy] for s in result.slices},
                "gains": [gains[0], gains[len(gains) // 2], gains[-1]],
            }
            print(rows[-1], flush=True)
    save_result(
        "faults",
        columns=[
            "candidate",
            "verdict",
            "flips − / +",
            "difference, points",
            "perplexity",
            "KL, nats",
            "slices harmed",
            "linears that stand out",
        ],
        rows=rows,
        note=f"built-in tasks, {args.items} items each; running text of five kinds, "
        f"{args.windows} windows of {args.window} tokens each; margins 2 points, "
        "10 points per slice, 10% perplexity; 90% intervals",
        data=data,
    )


def make_cells(result: Comparison) -> list[str | float]:
    """Return the cells of a comparison, without the candidate's name."""
    flips, interval = result.overall.flips, result.overall.interval
    harmed = [s.name for s in result.slices if s.harm_p is not None and s.harm_p < 0.05]
    suspects = [s.name for s in result.layers.suspects]
    return [
        result.verdict.outcome.value,
        f"{flips.harmful} / {flips.beneficial} of {flips.num_items}",
        f"{100 * flips.difference:+.1f} [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]",
        f"{100 * (result.text.perplexity_ratio - 1):+.1f}%",
        round(result.text.kl_nats, 4),
        ", ".join(harmed) or "none",
        ", ".join(suspects) or "none",
    ]


def stretch_scales(source: Path, target: Path) -> Path:
    """Copy a GPTQ checkpoint with one linear's scales 3% too large."""
    if not target.exists():
        shutil.copytree(source, target)
        for path in target.glob("*.safetensors"):
            tensors = load_file(path)
            key = f"{FAULTY}.scales"
            if key in tensors:
                tensors[key] = (tensors[key].float() * 1.03).to(tensors[key].dtype)
                save_file(tensors, path, metadata={"format": "pt"})
    return target


def round_to_nearest(source: Path, target: Path) -> Path:
    """Copy a model with all linears of its blocks rounded to the nearest of four values."""

    def change(name: str, weight: Tensor) -> Tensor:
        if not name.endswith("_proj.weight"):
            return weight
        rows, columns = weight.shape
        groups = weight.float().reshape(rows, columns // RTN_GROUP, RTN_GROUP)
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        step = ((high - low) / (2**RTN_BITS - 1)).clamp(min=1e-8)
        rounded = ((groups - low) / step).round() * step + low
        return rounded.reshape(rows, columns).to(weight.dtype)

    return copy_dense(source, target, change)


def break_digits(source: Path, target: Path) -> Path:
    """Copy a model with the embeddings of digits set to zero."""
    tokenizer = load_tokenizer(source)
    digits = [i for word, i in tokenizer.get_vocab().items() if word.strip("Ġ▁ ").isdigit()]

    def change(name: str, weight: Tensor) -> Tensor:
        if name.endswith("embed_tokens.weight"):
            weight = weight.clone()
            weight[digits] = 0
        return weight

    return copy_dense(source, target, change)


def copy_dense(source: Path, target: Path, change) -> Path:
    """Copy a model folder, applying a function of name and value to each tensor."""
    if not target.exists():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
        for path in source.glob("*.safetensors"):
            tensors = {name: change(name, t) for name, t in load_file(path).items()}
            save_file(tensors, target / path.name, metadata={"format": "pt"})
    return target


if __name__ == "__main__":
    main()

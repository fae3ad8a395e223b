"""The verb `compare`: may a quantized model replace its base?"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.cli.measuring import read_text
from halfbyte.cli.options import EXACTLY, add_computing_arguments
from halfbyte.cli.output import console, err_console, make_bars
from halfbyte.errors import ConfigError

if TYPE_CHECKING:
    from halfbyte.judge.compare import Progress
    from halfbyte.judge.comparison import Comparison
    from halfbyte.judge.setup import CompareConfig

HELP = (
    "say whether a model may replace its base: pass (exit code 0), fail (1) or inconclusive (2); "
    "3 where the comparison itself failed"
)

EXIT_ERROR = 3
"""1 and 2 are verdicts."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options and positionals."""
    parser.add_argument(
        "base", metavar="BASE", help="folder of the base, or an OpenAI-compatible http address"
    )
    parser.add_argument(
        "candidate",
        metavar="CANDIDATE",
        help="folder of the model to judge, or an address such as http://localhost:8000/v1#NAME",
    )
    what = parser.add_argument_group("what is asked")
    what.add_argument(
        "--tasks",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="JSONL of prompts and answers; may be given again (default: the built-in tasks)",
    )
    what.add_argument(
        "--slice",
        action="append",
        default=[],
        metavar="KEY",
        help="divide the tasks by this key of their lines; may be given again",
    )
    what.add_argument(
        "--checks", type=Path, metavar="FILE", help="Python file with check functions; it is run"
    )
    what.add_argument(
        "--lm-eval",
        action="append",
        default=[],
        metavar="TASK",
        help="a task of lm-eval (extra 'evaluate'), by name or YAML file; may be given again",
    )
    what.add_argument(
        "--builtin",
        type=int,
        metavar="N",
        help="N items of each of the five built-in tasks (default: 60, or none beside others)",
    )
    running = what.add_mutually_exclusive_group()
    running.add_argument(
        "--text",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="UTF-8 running text; may be given again (default: held-out text of five kinds)",
    )
    running.add_argument("--no-text", action="store_true", help="leave running text out")
    what.add_argument("--no-edge-cases", action="store_true", help="leave odd inputs out")
    margins = parser.add_argument_group("what may be lost")
    for name, default, text in (
        ("margin", 2.0, "points of accuracy over all items"),
        ("slice-margin", 10.0, "points of accuracy within one slice"),
        ("perplexity-margin", 10.0, "percent of perplexity"),
    ):
        margins.add_argument(
            f"--{name}",
            type=float,
            default=default,
            metavar="N",
            help=f"{text} (default: %(default)g)",
        )
    margins.add_argument(
        "--alpha",
        type=float,
        default=0.05,
        metavar="P",
        help="chance of a wrong verdict (default: %(default)g)",
    )
    how = parser.add_argument_group("how")
    how.add_argument(
        "--window",
        type=int,
        default=256,
        metavar="N",
        help="tokens per window of running text (default: %(default)s)",
    )
    how.add_argument(
        "--windows",
        type=int,
        default=20,
        metavar="N",
        help="windows of each text, spread over it; 0 for all (default: %(default)s)",
    )
    how.add_argument(
        "--longest",
        type=int,
        default=8192,
        metavar="N",
        help="tokens of the longest odd input, at most the model's (default: %(default)s)",
    )
    how.add_argument(
        "--batch-size",
        type=int,
        default=8,
        metavar="N",
        help="questions at a time (default: %(default)s)",
    )
    add_computing_arguments(how, auto=EXACTLY)
    how.add_argument(
        "--seed", type=int, default=0, help="of items and draws (default: %(default)s)"
    )
    how.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="where answers are kept (default: the user's cache)",
    )
    how.add_argument(
        "--resume", action="store_true", help="go on with the candidate's answers of an earlier run"
    )
    out = parser.add_argument_group("what comes out")
    out.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="DIR",
        help="write report.html, report.json, report.md and junit.xml there",
    )
    out.add_argument(
        "--format",
        default="text",
        choices=("text", "json", "md", "junit", "html"),
        help="what is printed (default: %(default)s)",
    )
    out.add_argument(
        "--json",
        action="store_const",
        const="json",
        dest="format",
        help="the same as --format json",
    )


def run(args: argparse.Namespace) -> int:
    """Compare, print, and give the verdict's exit code."""
    from halfbyte.judge.compare import compare
    from halfbyte.judge.report import make_folder, render, write_report

    items, functions = _items(args)
    documents, config = _documents(args), _config(args)
    if args.output is not None:
        # Now: hours of answers would wait for it.
        make_folder(args.output)
    with _progress() as progress:
        result = compare(
            args.base,
            args.candidate,
            items=items,
            documents=documents,
            functions=functions,
            config=config,
            cache=args.cache,
            resume=args.resume,
            progress=progress,
        )
    try:
        if args.output is not None:
            for path in write_report(result, args.output):
                err_console.print(f"wrote {path}", soft_wrap=True)
    finally:
        # Of hours of work a full disk takes no more than the files.
        if args.format == "text":
            _print_text(result)
        else:
            sys.stdout.write(render(result, args.format))
    return result.verdict.exit_code


def _items(args: argparse.Namespace) -> tuple[list[Any] | None, dict[str, Any]]:
    from halfbyte.judge.builtin_tasks import builtin_tasks
    from halfbyte.judge.checks import load_functions
    from halfbyte.judge.tasks import read_tasks

    if args.slice and not args.tasks:
        raise ConfigError(
            f"--slice {args.slice[0]} divides the lines of task files, and there are none: give "
            "--tasks, or leave it out."
        )
    functions = load_functions(args.checks)
    items: list[Any] = []
    if args.tasks:
        items += read_tasks(args.tasks, slice_by=args.slice, functions=functions)
    if args.lm_eval:
        from halfbyte.judge.lm_eval_tasks import read_lm_eval

        items += read_lm_eval(args.lm_eval, limit=None)
    if args.builtin and items:
        items += builtin_tasks(args.builtin, seed=args.seed)
    return (items or None), functions


def _documents(args: argparse.Namespace) -> dict[str, list[str]] | None:
    if args.no_text:
        return {}
    from halfbyte.judge.tasks import name_files

    named = zip(name_files(args.text), args.text, strict=True)
    return {name: [read_text(path)] for name, path in named} or None


def _config(args: argparse.Namespace) -> CompareConfig:
    from halfbyte.judge.builtin_tasks import ITEMS_PER_TASK
    from halfbyte.judge.setup import CompareConfig
    from halfbyte.judge.verdict import Margins

    return CompareConfig(
        margins=Margins(
            accuracy=args.margin / 100,
            slices=args.slice_margin / 100,
            perplexity=args.perplexity_margin / 100,
            alpha=args.alpha,
        ),
        builtin_items=ITEMS_PER_TASK if args.builtin is None else args.builtin,
        edge_cases=not args.no_edge_cases,
        longest_edge=args.longest,
        window=args.window,
        windows=args.windows or None,
        batch_size=args.batch_size,
        dtype=args.dtype,
        device=args.device,
        seed=args.seed,
    )


@contextmanager
def _progress() -> Iterator[Progress]:
    """Show what is being done on a terminal, one bar per stage."""
    bars = make_bars()
    stages: dict[str, Any] = {}

    def tell(what: str, done: int, total: int) -> None:
        if what not in stages:
            for earlier in stages.values():
                bars.stop_task(earlier)
            stages[what] = bars.add_task(what, total=total)
        bars.update(stages[what], completed=done, total=total)

    with bars:
        yield tell


def _print_text(result: Comparison) -> None:
    from rich.table import Table

    from halfbyte.judge.verdict import percent, points

    console.print(result.verdict.sentence, soft_wrap=True)
    table = Table(title=f"{result.candidate} in place of {result.base}")
    for heading in ("what must hold", "", "found"):
        table.add_column(heading, overflow="fold")
    for claim in result.verdict.claims:
        advice = f"\n{claim.advice}" if claim.advice else ""
        table.add_row(claim.name, claim.outcome.value, claim.found + advice)
    console.print(table)
    if result.overall is not None:
        table = Table(title="Tasks")
        for heading in ("slice", "items", "base", "candidate", "difference", "flips -/+"):
            table.add_column(heading, justify="left" if heading == "slice" else "right")
        for one in (result.overall, *result.slices):
            interval = f"[{100 * one.interval.low:+.1f}, {100 * one.interval.high:+.1f}]"
            table.add_row(
                one.name,
                str(one.flips.num_items),
                percent(one.base_accuracy),
                percent(one.candidate_accuracy),
                f"{points(one.flips.difference)} {interval}",
                f"{one.flips.harmful}/{one.flips.beneficial}",
            )
        console.print(table)
    if result.text is not None:
        text = result.text
        console.print(
            f"Running text: KL {text.kl_nats:.4f} nats, same first choice "
            f"{percent(text.top1_agreement)}, on {text.num_tokens} tokens of {text.num_documents} "
            "documents.",
            soft_wrap=True,
        )
    for note in result.notes:
        console.print(f"Note: {note}", soft_wrap=True)

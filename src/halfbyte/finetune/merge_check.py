"""How a merge is held against base plus adapter: what both make of text, and of the task.

::

    bare base, base + adapter -> Expected;  merged model against it -> MergeReport
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.data import evaluation_text
from halfbyte.evaluate.loading import Subject
from halfbyte.evaluate.windows import tokenize_text
from halfbyte.finetune.adapter import load_adapter
from halfbyte.finetune.data import Example, Examples, collate, read_examples, split_examples
from halfbyte.quantize.calibration_source import IGNORED

PROBE_TOKENS = 256
PROBE_ROWS = 16
"""Examples of the task that a merge is held against."""
LONGEST = 1024
"""Tokens of an example that are looked at."""
MOST_SCORED = 200
"""Examples that models are scored on; of more, every second, third, ... is taken."""
JUDGING_SHARE = 0.2
"""Of the task's examples: kept apart from calibration and training, to judge by."""
MOST_LOST = 0.02
"""Share of the task's examples, and of their tokens, that a merge may lose and still be good."""
MOST_WORSE = 0.2
"""Nats per token by which the loss on the task may rise: a fifth of the perplexity."""
LEAST_RIGHT = 0.1
"""Share of the examples that are right before a merge, below which what it lost hardly shows."""
BATCH = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScore:
    """How a model does on the task's examples, told the right words up to each token."""

    loss: float
    """Nats per counted token."""
    right: float
    """Share of the examples in which every counted token is the model's first choice."""
    right_tokens: float
    """Share of the counted tokens that are the model's first choice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeReport:
    """What a merge came to."""

    base: str
    adapter: str
    output: str
    kl_to_adapted: float
    """Of the 16-bit merge, to base plus adapter. Unit: nats per token."""
    kl_without: float
    """Of the bare base, to base plus adapter: what losing the adapter would cost."""
    quantized: bool
    scores: dict[str, TaskScore]
    """On the examples that were given: "adapted", "merged" and, where quantized, "quantized"."""

    @property
    def verdict(self) -> str:
        """Whether the model that was written keeps what the adapter learned, in one sentence."""
        if not self.scores:
            return "Not judged on the task: no data was given."
        before = self.scores["adapted"]
        after = self.scores["quantized" if self.quantized else "merged"]
        told = (
            f"{before.right:.1%} of the examples right before, {after.right:.1%} after; of their "
            f"tokens {before.right_tokens:.1%} and {after.right_tokens:.1%}, at a loss of "
            f"{before.loss:.4f} and {after.loss:.4f}"
        )
        # Long answers are hardly ever right throughout: what is lost of them shows in their tokens.
        lost = max(before.right - after.right, before.right_tokens - after.right_tokens)
        if not (lost <= MOST_LOST and after.loss - before.loss <= MOST_WORSE):
            return f"Loses part of the task: {told}. Serve the adapter beside the base instead."
        if before.right < LEAST_RIGHT:
            return (
                f"Cannot tell whether it keeps the task, of which too little is right: {told}. Ask "
                "both models with halfbyte compare."
            )
        return f"Keeps the task: {told}."

    def to_dict(self) -> dict[str, Any]:
        """Give plain values for JSON."""
        return {**asdict(self), "verdict": self.verdict}


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What base plus adapter computes, for a merge to be held against."""

    examples: Sequence[Example]
    """Of the task, that nothing was fitted to; empty where no data was given."""
    probe: Sequence[Tensor]
    log_probs: Sequence[Tensor]
    """Of the probe, from :func:`log_probs`."""
    kl_without: float
    """Of the bare base: what losing the adapter would cost. Unit: nats per token."""
    score: TaskScore | None
    """On the examples."""

    def kl_of(self, merged: Any) -> float:
        """Give the divergence of a merged model. Unit: nats per token."""
        return mean_kl(self.log_probs, log_probs(merged, self.probe))

    def report(
        self, merged: Any, kl: float, *, base: Path, adapter: str | Path, output: Path
    ) -> MergeReport:
        """Say what a merge came to.

        Args:
            merged: The merged model.
            kl: What :meth:`kl_of` said of it.
            base: The folder that was merged into.
            adapter: PEFT's folder.
            output: Where the merged model is or will be.

        Returns:
            The report, with the scores of both.
        """
        scores = {}
        if self.score is not None:
            scores = {"adapted": self.score, "merged": score_task(merged, self.examples)}
        return MergeReport(
            base=str(base),
            adapter=str(adapter),
            output=str(output),
            kl_to_adapted=kl,
            kl_without=self.kl_without,
            quantized=False,
            scores=scores,
        )


def adapt(subject: Subject, adapter: str | Path, data: str | Path | None) -> tuple[Any, Expected]:
    """Put a finished adapter on its base, and keep what that computes.

    Args:
        subject: The base; changed in place.
        adapter: PEFT's folder.
        data: Examples of the task; None: none.

    Returns:
        PEFT's model, and what is expected of a merge.
    """
    examples = judging_examples(data, subject)
    probe = make_probe(subject, examples)
    without = log_probs(subject.model, probe)
    adapted = load_adapter(subject, adapter)
    expected = log_probs(adapted, probe)
    return adapted, Expected(
        examples=examples,
        probe=probe,
        log_probs=expected,
        kl_without=mean_kl(expected, without),
        score=score_task(adapted, examples) if examples else None,
    )


@torch.no_grad()
def score_task(model: Any, examples: Sequence[Example]) -> TaskScore:
    """Run a model over the examples.

    Args:
        model: Any causal language model.
        examples: Of the task.

    Returns:
        Loss, and what is right of examples and tokens.
    """
    device = model.get_input_embeddings().weight.device
    total, tokens, right, right_tokens = 0.0, 0, 0, 0
    for start in range(0, len(examples), BATCH):
        batch = collate([[example] for example in examples[start : start + BATCH]], 0)
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        labels = batch.pop("labels")[:, 1:]
        with computing_in_float32(model):
            logits = model(**batch, use_cache=False).logits[:, :-1].float()
        counted = labels != IGNORED
        loss = nn.functional.cross_entropy(logits[counted], labels[counted], reduction="sum")
        total, tokens = total + float(loss), tokens + int(counted.sum())
        chosen = logits.argmax(-1) == labels
        right += int((chosen | ~counted).all(1).sum())
        right_tokens += int((chosen & counted).sum())
    return TaskScore(
        loss=total / tokens, right=right / len(examples), right_tokens=right_tokens / tokens
    )


def read_task(data: str | Path, tokenizer: Any, longest: int | None) -> Examples:
    """Read the task's examples.

    Args:
        data: JSON lines.
        tokenizer: The model's.
        longest: Sequence that the model takes.

    Returns:
        The examples, of 1024 tokens at most.
    """
    length = min(longest or LONGEST, LONGEST)
    return read_examples(Path(data), tokenizer, length=length, everything=False)


def judging_examples(data: str | Path | None, subject: Subject) -> Sequence[Example]:
    """Read the examples that models are judged by.

    Args:
        data: The task's; None: none.
        subject: Any of the models.

    Returns:
        Those that nothing is fitted to.
    """
    if data is None:
        return []
    return divide_examples(read_task(data, subject.tokenizer, subject.longest))[1]


def divide_examples(examples: Examples) -> tuple[Sequence[Example], Sequence[Example]]:
    """Divide a task's examples.

    Args:
        examples: All of them.

    Returns:
        Those to fit to, and those to judge by: at most ``MOST_SCORED``.
    """
    if len({e.digest for e in examples.examples}) < 2:
        return examples.examples, examples.examples
    fitted, apart = split_examples(examples, JUDGING_SHARE, seed=0)
    judging = examples.examples if apart is None else apart.examples
    return fitted.examples, judging[:: -(-len(judging) // MOST_SCORED)]


def make_probe(subject: Subject, examples: Sequence[Example]) -> list[Tensor]:
    """Choose token ids to hold models against each other on.

    Args:
        subject: Any of the models.
        examples: Of the task; where there are none, built-in text is taken.

    Returns:
        int64 [tokens] each.
    """
    if examples:
        return [torch.tensor(example.ids) for example in examples[:PROBE_ROWS]]
    count = min(PROBE_TOKENS, subject.longest or PROBE_TOKENS)
    if subject.tokenizer is None:
        return [torch.arange(count) % (subject.vocabulary or count)]
    return [tokenize_text(subject.tokenizer, evaluation_text()[: 20 * count])[:count]]


@torch.no_grad()
def log_probs(model: Any, probe: Sequence[Tensor]) -> list[Tensor]:
    """Run a model over a probe.

    Args:
        model: Any causal language model.
        probe: From :func:`make_probe`.

    Returns:
        Logarithms of its probabilities, float32 [tokens, vocabulary] each.
    """
    device = model.get_input_embeddings().weight.device
    with computing_in_float32(model):
        return [
            model(ids[None].to(device), use_cache=False).logits[0].float().log_softmax(-1).cpu()
            for ids in probe
        ]


@contextmanager
def computing_in_float32(model: Any) -> Iterator[None]:
    """Have a model of 16-bit weights compute in float32; linears are wide one at a time.

    Computing in 16 bits moves the predictions of a merge twenty times as far as rounding its
    weights does, and a weak adapter is lost in that.

    Args:
        model: Any model; packed linears compute in what they were loaded for.

    Yields:
        Nothing.
    """
    hooks, narrow = [], []
    # What is no linear first: it may share its weight with one, as a table does with the head.
    for module in sorted(model.modules(), key=lambda module: type(module) is nn.Linear):
        for parameter in module.parameters(recurse=False):
            if parameter.dtype not in (torch.float16, torch.bfloat16):
                continue
            widen, back = _Cast(parameter, torch.float32), _Cast(parameter, parameter.dtype)
            if type(module) is nn.Linear:
                hooks.append(module.register_forward_pre_hook(widen))
                hooks.append(module.register_forward_hook(back, always_call=True))
            else:
                # Not for its own run only: others may read it, as a head reads new tokens' rows.
                widen()
                narrow.append(back)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for cast in narrow:
            cast()


class _Cast:
    """A hook that gives a parameter another type; from 16 bits to 32 and back changes no value."""

    def __init__(self, parameter: nn.Parameter, dtype: torch.dtype) -> None:
        self.parameter, self.dtype = parameter, dtype

    def __call__(self, *_: object) -> None:
        self.parameter.data = self.parameter.data.to(self.dtype)


def mean_kl(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Give the mean over tokens of the divergence of ``found`` from ``expected``, in nats."""
    parts = [
        (one.exp() * (one - other)).sum(-1) for one, other in zip(expected, found, strict=True)
    ]
    return float(torch.cat(parts).mean())

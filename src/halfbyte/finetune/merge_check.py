"""Compare a merged model with base plus adapter, on text and on the task.

::

    base alone, base + adapter -> Expected;  merged model compared with it -> MergeReport
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
"""Examples of the task that a merge is compared on."""
MAX_TOKENS = 1024
"""Longer examples are truncated to this many tokens."""
MAX_SCORED = 200
"""Examples that models are scored on; if there are more, every n-th is taken."""
HELD_OUT_SHARE = 0.2
"""Share of the task's examples that is held out of calibration and training."""
MAX_LOST_SHARE = 0.02
"""Share of the task's examples, and of their tokens, that a good merge may lose."""
MAX_LOSS_INCREASE = 0.2
"""Allowed increase of the loss on the task, nats per token: a fifth of the perplexity."""
MIN_RIGHT_SHARE = 0.1
"""If fewer examples are right before a merge, a loss of the task would hardly show."""
BATCH_SIZE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScore:
    """Scores of a model on the task's examples, with teacher forcing."""

    loss: float
    """Nats per counted token."""
    right: float
    """Share of the examples in which every counted token is the top-1 prediction."""
    right_tokens: float
    """Share of the counted tokens that are the top-1 prediction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeReport:
    """Report of a merge."""

    base: str
    adapter: str
    output: str
    kl_to_adapted: float
    """KL divergence of the 16-bit merge from base plus adapter. Unit: nats per token."""
    kl_without: float
    """The same of the base alone: the divergence if the adapter were lost."""
    quantized: bool
    scores: dict[str, TaskScore]
    """Scores on the task by model: "adapted", "merged" and, if quantized, "quantized"."""

    @property
    def verdict(self) -> str:
        """Whether the written model keeps what the adapter learned, in one sentence."""
        if not self.scores:
            return "Not evaluated on the task: no data was given."
        before = self.scores["adapted"]
        after = self.scores["quantized" if self.quantized else "merged"]
        scores = (
            f"{before.right:.1%} of the examples right before, {after.right:.1%} after; of their "
            f"tokens {before.right_tokens:.1%} and {after.right_tokens:.1%}, at a loss of "
            f"{before.loss:.4f} and {after.loss:.4f}"
        )
        # Long answers are rarely right to the last token: what they lose shows in the token share.
        lost = max(before.right - after.right, before.right_tokens - after.right_tokens)
        if not (lost <= MAX_LOST_SHARE and after.loss - before.loss <= MAX_LOSS_INCREASE):
            return f"Loses part of the task: {scores}. Serve the adapter unmerged instead."
        if before.right < MIN_RIGHT_SHARE:
            return (
                f"Cannot tell whether it keeps the task, as too few examples are right: {scores}. "
                "Compare both models with halfbyte compare."
            )
        return f"Keeps the task: {scores}."

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {**asdict(self), "verdict": self.verdict}


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """The outputs of base plus adapter, which a merge is compared with."""

    examples: Sequence[Example]
    """Held-out examples of the task; empty if no data was given."""
    probe: Sequence[Tensor]
    """Token ids, from :func:`make_probe`."""
    log_probs: Sequence[Tensor]
    """Log probabilities on the probe, from :func:`log_probs`."""
    kl_without: float
    """Divergence of the base alone, as if the adapter were lost. Unit: nats per token."""
    score: TaskScore | None
    """Scores on the examples; None if there are none."""

    def kl_of(self, merged: Any) -> float:
        """Return the KL divergence of a merged model. Unit: nats per token."""
        return mean_kl(self.log_probs, log_probs(merged, self.probe))

    def report(
        self, merged: Any, kl: float, *, base: Path, adapter: str | Path, output: Path
    ) -> MergeReport:
        """Make the report of a merge.

        Args:
            merged: The merged model.
            kl: Its divergence, from :meth:`kl_of`.
            base: The folder that was merged into.
            adapter: Folder of the PEFT adapter.
            output: Folder of the merged model.

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
    """Attach a trained adapter to its base, and record the outputs.

    Args:
        subject: The base; changed in place.
        adapter: Folder of a PEFT adapter.
        data: Examples of the task; None: none.

    Returns:
        PEFT's model, and its outputs.
    """
    examples = held_out_examples(data, subject)
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
    """Score a model on the examples.

    Args:
        model: Any causal language model.
        examples: Of the task.

    Returns:
        Loss, and the share of right examples and tokens.
    """
    device = model.get_input_embeddings().weight.device
    total, tokens, right, right_tokens = 0.0, 0, 0, 0
    for start in range(0, len(examples), BATCH_SIZE):
        batch = collate([[example] for example in examples[start : start + BATCH_SIZE]], 0)
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


def read_task(data: str | Path, tokenizer: Any, context: int | None) -> Examples:
    """Read the task's examples.

    Args:
        data: JSON lines.
        tokenizer: The model's.
        context: Maximum tokens of the model; None: unknown.

    Returns:
        The examples, truncated to 1024 tokens.
    """
    length = min(context or MAX_TOKENS, MAX_TOKENS)
    return read_examples(Path(data), tokenizer, length=length, everything=False)


def held_out_examples(data: str | Path | None, subject: Subject) -> Sequence[Example]:
    """Read the held-out examples, which models are scored on.

    Args:
        data: JSON lines of the task; None: none.
        subject: Any of the models.

    Returns:
        The examples.
    """
    if data is None:
        return []
    return split_task_examples(read_task(data, subject.tokenizer, subject.longest))[1]


def split_task_examples(examples: Examples) -> tuple[Sequence[Example], Sequence[Example]]:
    """Split a task's examples into calibration and held-out ones.

    Args:
        examples: All examples.

    Returns:
        Examples for calibration and training, and held-out ones, at most ``MAX_SCORED``. Both are
        all examples if these are all equal.
    """
    if len({e.digest for e in examples.examples}) < 2:
        return examples.examples, examples.examples
    fitted, rest = split_examples(examples, HELD_OUT_SHARE, seed=0)
    held_out = examples.examples if rest is None else rest.examples
    return fitted.examples, held_out[:: -(-len(held_out) // MAX_SCORED)]


def make_probe(subject: Subject, examples: Sequence[Example]) -> list[Tensor]:
    """Choose token ids to compare models on.

    Args:
        subject: Any of the models.
        examples: Of the task; if there are none, built-in text is used.

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
        Log probabilities, float32 [tokens, vocabulary] each.
    """
    device = model.get_input_embeddings().weight.device
    with computing_in_float32(model):
        return [
            model(ids[None].to(device), use_cache=False).logits[0].float().log_softmax(-1).cpu()
            for ids in probe
        ]


@contextmanager
def computing_in_float32(model: Any) -> Iterator[None]:
    """Make a model with 16-bit weights compute in float32, converting one linear at a time.

    Computing in 16 bits changes the predictions of a merge twenty times as much as rounding its
    weights does, which would hide a weak adapter.

    Args:
        model: Any model; packed linears keep the dtype that they were loaded with.

    Yields:
        Nothing.
    """
    hooks, narrow = [], []
    # Linears last: another module may share a weight with one, as the embeddings with the head.
    for module in sorted(model.modules(), key=lambda module: type(module) is nn.Linear):
        for parameter in module.parameters(recurse=False):
            if parameter.dtype not in (torch.float16, torch.bfloat16):
                continue
            widen, back = _Cast(parameter, torch.float32), _Cast(parameter, parameter.dtype)
            if type(module) is nn.Linear:
                hooks.append(module.register_forward_pre_hook(widen))
                hooks.append(module.register_forward_hook(back, always_call=True))
            else:
                # For the whole context: another module may read the weight, as a head does.
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
    """A hook that casts a parameter; from 16 bits to 32 and back is lossless."""

    def __init__(self, parameter: nn.Parameter, dtype: torch.dtype) -> None:
        self.parameter, self.dtype = parameter, dtype

    def __call__(self, *_: object) -> None:
        self.parameter.data = self.parameter.data.to(self.dtype)


def mean_kl(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Return the mean KL divergence of ``found`` from ``expected``, in nats per token."""
    parts = [
        (one.exp() * (one - other)).sum(-1) for one, other in zip(expected, found, strict=True)
    ]
    return float(torch.cat(parts).mean())

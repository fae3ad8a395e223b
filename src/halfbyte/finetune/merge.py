"""Base and adapter -> one model in 16 bits.

::

    base (dequantized, or its 16-bit original) + adapter ──float32, layer by layer──> 16-bit folder

Every merge is held against base plus adapter before it is written: an adapter cannot be lost.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.checkpoint.companions import copy_companions
from halfbyte.data import evaluation_text
from halfbyte.errors import ConfigError, ModelError, VerificationError
from halfbyte.evaluate.loading import Subject, open_subject
from halfbyte.evaluate.windows import tokenize_text
from halfbyte.finetune.data import Example, Examples, collate, read_examples, split_examples
from halfbyte.finetune.train import require_peft
from halfbyte.model.weights import load_model_config
from halfbyte.nn.linear import QuantLinear
from halfbyte.quantize.calibration import IGNORED
from halfbyte.quantize.source import find_model

PROBE_TOKENS = 256
PROBE_ROWS = 16
"""Examples of the task that a merge is held against."""
LOST_SHARE = 0.1
"""A merge must be at least ten times nearer to base plus adapter than the bare base is."""
ROUNDING_KL = 0.002
"""Nats per token that rounding to 16 bits may cost where the adapter itself changes little."""
LONGEST = 1024
"""Tokens of an example that are looked at."""
MOST_SCORED = 200
"""Examples that models are scored on; of more, every second, third, ... is taken."""
JUDGING_SHARE = 0.2
"""Of the task's examples: kept apart from calibration and training, to judge by."""
MOST_LOST = 0.02
"""Share of the task's examples that a merge may lose and still be called good."""
BATCH = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScore:
    """How a model does on the task's examples, told the right words up to each token."""

    loss: float
    """Nats per counted token."""
    right: float
    """Share of the examples in which every counted token is the model's first choice."""


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
        lost = before.right - after.right
        told = f"{before.right:.1%} of the examples right before, {after.right:.1%} after"
        if lost <= MOST_LOST:
            return f"Keeps the task: {told}."
        return f"Loses part of the task: {told}. Serve the adapter beside the base instead."

    def to_dict(self) -> dict[str, Any]:
        """Give plain values for JSON."""
        return {**asdict(self), "verdict": self.verdict}


def merge(
    base: str | Path,
    adapter: str | Path,
    output: str | Path,
    *,
    original: str | Path | None = None,
    data: str | Path | None = None,
    device: str = "auto",
) -> MergeReport:
    """Merge an adapter into 16-bit weights and write the model.

    Args:
        base: The quantized model (or a 16-bit one) that the adapter was trained on.
        adapter: PEFT's folder.
        output: New folder for the model.
        original: The 16-bit model that ``base`` was made from, to merge into instead. The adapter
            has learned to live with the rounding of ``base``, so compare both.
        data: Examples of the task, to be judged by.
        device: Where to compute.

    Returns:
        What it came to.

    Raises:
        MissingExtraError: PEFT is not installed.
        ConfigError: The output is in use, or the adapter does not fit the model.
        ModelError: A folder cannot be loaded.
        VerificationError: The merged model does not compute what base plus adapter does.
    """
    require_peft("Merging an adapter")
    target = Path(output)
    check_new(target)
    folder = find_model(original if original is not None else base)
    dtype = stored_dtype(folder)
    subject = open_subject(folder, dtype=dtype, device=device)
    examples = judging_examples(data, subject)
    probe = make_probe(subject, examples)
    without = log_probs(subject.model, probe)
    adapted = attach_for_merge(subject, adapter)
    expected = log_probs(adapted, probe)
    scores = {} if not examples else {"adapted": score_task(adapted, examples)}
    merged = merge_layers(adapted, dtype)
    found = log_probs(merged, probe)
    kl, kl_without = mean_kl(expected, found), mean_kl(expected, without)
    if not kl <= max(ROUNDING_KL, LOST_SHARE * kl_without):
        raise VerificationError(
            f"Merging {adapter} into {folder} lost it: the merged model is {kl:.4f} nats per token "
            f"from base plus adapter, the bare base {kl_without:.4f}. Serve the adapter beside the "
            "base instead, and report this."
        )
    if examples:
        scores["merged"] = score_task(merged, examples)
    target.mkdir(parents=True, exist_ok=True)
    copy_companions(folder, target)
    merged.save_pretrained(target)
    return MergeReport(
        base=str(folder),
        adapter=str(adapter),
        output=str(target),
        kl_to_adapted=kl,
        kl_without=kl_without,
        quantized=False,
        scores=scores,
    )


@torch.no_grad()
def merge_layers(adapted: Any, dtype: torch.dtype) -> Any:
    """Merge every adapted layer in float32, and round once.

    Args:
        adapted: PEFT's model; it is used up.
        dtype: Of the merged weights.

    Returns:
        The plain model, without a trace of quantization.
    """
    from peft.tuners.lora import Linear as LoraLinear

    for module in list(adapted.modules()):
        if not isinstance(module, LoraLinear):
            continue
        base = module.get_base_layer()
        module.base_layer = _as_dense(base)
        module.to(torch.float32)
        module.merge(safe_merge=True)
        dense = module.base_layer
        dense.weight = nn.Parameter(dense.weight.data.to(dtype), requires_grad=False)
        if dense.bias is not None:
            dense.bias = nn.Parameter(dense.bias.data.to(dtype), requires_grad=False)
    inner = adapted.get_base_model()
    if getattr(inner, "hf_quantizer", None) is not None:
        # The layers without an adapter; and PEFT refuses what bears the mark of quantization.
        inner.dequantize()
    with warnings.catch_warnings():
        # What is left to PEFT is to take its layers away; it remarks that all are merged.
        warnings.filterwarnings("ignore", "All adapters are already merged")
        return adapted.merge_and_unload(safe_merge=True)


@torch.no_grad()
def score_task(model: Any, examples: Sequence[Example]) -> TaskScore:
    """Run a model over the examples.

    Args:
        model: Any causal language model.
        examples: Of the task.

    Returns:
        Loss and share of examples that are right throughout.
    """
    device = model.get_input_embeddings().weight.device
    total, tokens, right = 0.0, 0, 0
    for start in range(0, len(examples), BATCH):
        batch = collate([[example] for example in examples[start : start + BATCH]], 0)
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch, use_cache=False).logits[:, :-1].float()
        counted = labels != IGNORED
        loss = nn.functional.cross_entropy(logits[counted], labels[counted], reduction="sum")
        total, tokens = total + float(loss), tokens + int(counted.sum())
        right += int(((logits.argmax(-1) == labels) | ~counted).all(1).sum())
    return TaskScore(loss=total / tokens, right=right / len(examples))


def stored_dtype(folder: Path) -> torch.dtype:
    """Give the 16-bit type that a model folder names; bfloat16 where it names none."""
    dtype = getattr(load_model_config(folder), "dtype", None)
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.bfloat16


def _as_dense(base: nn.Module) -> nn.Linear:
    """Give a linear with its weight in float32."""
    if not isinstance(base, nn.Linear):
        raise ModelError(
            f"Cannot merge an adapter on a {type(base).__name__}: only linears are merged. Serve "
            "the adapter beside the base."
        )
    if isinstance(base, QuantLinear):
        weight = base.dequantize(torch.float32)
    else:
        weight = base.weight.data.float()
    dense = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
    dense.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if base.bias is not None:
        dense.bias = nn.Parameter(base.bias.data.float(), requires_grad=False)
    return dense


def check_new(target: Path) -> None:
    """Make sure that a folder may be written.

    Args:
        target: The folder.

    Raises:
        ConfigError: It is in use.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"The output {target} exists and is not empty. Choose a new folder.")


def attach_for_merge(subject: Subject, adapter: str | Path) -> Any:
    """Put a finished adapter on its base.

    Args:
        subject: The base.
        adapter: PEFT's folder.

    Returns:
        PEFT's model, in evaluation mode.

    Raises:
        ConfigError: It is none, or does not fit.
    """
    import peft

    try:
        return peft.PeftModel.from_pretrained(subject.model, str(adapter)).eval()
    except (ValueError, OSError, RuntimeError, KeyError) as error:
        raise ConfigError(
            f"Cannot put the adapter {adapter} on {subject.name}: {str(error).strip()[:300]} "
            "Give the folder of a PEFT adapter that was trained on this model."
        ) from error


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
    return [
        model(ids[None].to(device), use_cache=False).logits[0].float().log_softmax(-1).cpu()
        for ids in probe
    ]


def mean_kl(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Give the mean over tokens of the divergence of ``found`` from ``expected``, in nats."""
    parts = [
        (one.exp() * (one - other)).sum(-1) for one, other in zip(expected, found, strict=True)
    ]
    return float(torch.cat(parts).mean())

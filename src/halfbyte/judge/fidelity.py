"""Fidelity of the candidate on running text: divergence, top-1 agreement, perplexity.

::

    base: passages -> predictions on disk
    candidate: passages -> logits, compared with the base's
      -> PassageComparison (per token, cached on disk) -> summarize -> TextFidelity (by document)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch

from halfbyte.errors import ConfigError
from halfbyte.evaluate.divergence import percentiles
from halfbyte.evaluate.logits import compare_logits
from halfbyte.evaluate.perplexity import safe_exp
from halfbyte.judge.bootstrap import RatioBootstrap, bootstrap_ratio
from halfbyte.judge.local_model import LocalModel
from halfbyte.judge.model_cache import ModelCache
from halfbyte.judge.progress import StepProgress
from halfbyte.judge.questions import Passage, digest
from halfbyte.judge.statistics import Interval

WORST_PER_PASSAGE = 3
MAX_WORST = 12
CONTEXT_TOKENS = 24
"""Tokens shown before each of the worst tokens."""
NOISE_PASSAGES = 4
HISTOGRAM_EDGES = tuple(10.0**exponent for exponent in (-5, -4, -3, -2, -1, 0, 1))
"""Of the divergence per token, in nats."""

Load = Callable[[], LocalModel]


@dataclass(frozen=True, slots=True, kw_only=True)
class PassageComparison:
    """Both models' predictions of one passage, compared token by token."""

    kl_nats: tuple[float, ...]
    agrees: int
    """Tokens that both rank first."""
    base_nll_nats: float
    """Sum over the passage."""
    candidate_nll_nats: float
    worst: tuple[tuple[int, int, int], ...]
    """(position, base's top token, candidate's top token) where the divergence is largest."""
    finite: bool
    """Whether the candidate's logits are finite."""
    base_finite: bool

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Reverse ``asdict`` after a round trip through JSON."""
        worst = tuple((int(a), int(b), int(c)) for a, b, c in values["worst"])
        return cls(**{**values, "kl_nats": tuple(values["kl_nats"]), "worst": worst})


@dataclass(frozen=True, slots=True, kw_only=True)
class WorstToken:
    """A token with a large divergence, in its context."""

    kl_nats: float
    document: str
    before: str
    actual: str
    """The text's next token."""
    base: str
    """The base's top token."""
    candidate: str
    """The candidate's top token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KindFidelity:
    """Fidelity on one kind of text."""

    kind: str
    num_tokens: int
    num_documents: int
    kl_nats: float
    top1_agreement: float
    base_perplexity: float
    candidate_perplexity: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TextFidelity:
    """Fidelity of the candidate on running text."""

    num_tokens: int
    num_documents: int
    kl_nats: float
    """Mean of KL(base || candidate) per token. Unit: nats."""
    kl_interval: Interval | None
    kl_percentiles: dict[str, float]
    kl_histogram: tuple[int, ...]
    """Number of tokens below each of ``HISTOGRAM_EDGES``, and above the last."""
    top1_agreement: float
    top1_interval: Interval | None
    base_perplexity: float
    candidate_perplexity: float
    nll_increase_nats: float
    nll_increase_interval: Interval | None
    bootstrap: RatioBootstrap | None
    """Of ``nll_increase_nats`` over documents."""
    by_kind: tuple[KindFidelity, ...]
    worst: tuple[WorstToken, ...]
    noise_kl_nats: float | None
    """Mean divergence of the base from itself at another batch size; None if not measured."""
    noise_kl_largest: float | None
    candidate_finite: bool
    """Whether the candidate's logits are finite wherever the base's are."""
    base_finite: bool

    @property
    def perplexity_ratio(self) -> float:
        """Perplexity of the candidate divided by that of the base, paired."""
        return safe_exp(self.nll_increase_nats)

    @property
    def perplexity_ratio_interval(self) -> Interval | None:
        """Interval of the ratio, over documents."""
        interval = self.nll_increase_interval
        if interval is None:
            return None
        return Interval(low=safe_exp(interval.low), high=safe_exp(interval.high))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        values = {
            name: getattr(self, name) for name in self.__dataclass_fields__ if name != "bootstrap"
        }
        return values | {
            "perplexity_ratio": self.perplexity_ratio,
            "perplexity_ratio_interval": self.perplexity_ratio_interval,
            "kl_histogram_edges": HISTOGRAM_EDGES,
        }


def predict_base(
    load: Load, cache: ModelCache, passages: Sequence[Passage], progress: StepProgress
) -> None:
    """Save the base's predictions of every passage, and how much they depend on the batch size.

    Args:
        load: Returns the base; called only if a prediction is missing.
        cache: Cache of the base.
        passages: The passages to predict.
        progress: Called after each passage with (done, total).
    """
    for done, passage in enumerate(passages, start=1):
        if not cache.has_states(passage.key):
            model = load()
            cache.save_states(passage.key, model.predict([passage.ids])[0])
            cache.save_head(model)
        progress(done, len(passages))
    _measure_noise(load, cache, passages)


def _noise_key(passages: Sequence[Passage]) -> str:
    return digest(["noise", [p.key for p in passages]])


def _noise_passages(passages: Sequence[Passage]) -> list[Passage]:
    longest = max((len(p.ids) for p in passages), default=0)
    return [p for p in passages if len(p.ids) == longest][:NOISE_PASSAGES]


def _measure_noise(load: Load, cache: ModelCache, passages: Sequence[Passage]) -> None:
    """Run some passages again as one batch: batching changes the last digits of a prediction."""
    repeated = _noise_passages(passages)
    key = _noise_key(repeated)
    if key in cache.answers or not repeated:
        return
    # A single passage runs three times: a batch of one would repeat the same computation.
    batch = [p.ids for p in repeated]
    predictions = load().predict(batch if len(batch) > 1 else batch * 3)
    kl = []
    for passage, again in zip(repeated, predictions, strict=False):
        first = cache.load_logits(passage.key)
        other = again.logits.to(first.device)
        targets = torch.tensor(passage.ids[1:])
        kl.append(compare_logits(first[:-1], other[:-1], targets).kl_nats)
    all_kl = torch.cat(kl)
    cache.answers.add({key: {"mean": float(all_kl.mean()), "largest": float(all_kl.max())}})


def compare_candidate(
    load: Load,
    cache: ModelCache,
    base: ModelCache,
    passages: Sequence[Passage],
    progress: StepProgress,
) -> list[PassageComparison]:
    """Run the candidate over every passage and compare it with the base's predictions.

    Args:
        load: Returns the candidate; called only if a comparison is missing.
        cache: Cache of the candidate; a resumed run continues from it.
        base: Cache of the base, with its predictions of every passage.
        passages: The passages to predict.
        progress: Called after each passage with (done, total).

    Returns:
        One comparison per passage.

    Raises:
        ConfigError: The two models have different vocabularies.
    """
    results = []
    for done, passage in enumerate(passages, start=1):
        key = digest(["against", base.folder.name, passage.key])
        cached = cache.answers.get(key)
        if cached is None:
            compared = _compare_passage(load(), base, passage)
            cache.answers.add({key: asdict(compared)})
        else:
            compared = PassageComparison.from_dict(cached)
        results.append(compared)
        progress(done, len(passages))
    return results


def _compare_passage(model: LocalModel, base: ModelCache, passage: Passage) -> PassageComparison:
    prediction = model.predict([passage.ids])[0]
    base_logits = base.load_logits(passage.key)
    logits = prediction.logits
    if logits.shape != base_logits.shape:
        raise ConfigError(
            f"Cannot compare '{model.name}' with its base: its vocabulary has {logits.shape[-1]} "
            f"tokens, the base's {base_logits.shape[-1]}. Compare a model with its own quantized "
            "version."
        )
    targets = torch.tensor(passage.ids[1:])
    tokens = compare_logits(base_logits[:-1].to(logits.device), logits[:-1], targets)
    kl = torch.nan_to_num(tokens.kl_nats, nan=math.inf)
    worst = kl.topk(min(WORST_PER_PASSAGE, len(kl))).indices.tolist()
    return PassageComparison(
        kl_nats=tuple(float(f"{value:.6g}") for value in kl.tolist()),
        agrees=int(tokens.agrees.sum()),
        base_nll_nats=float(tokens.base_nll_nats.double().sum()),
        candidate_nll_nats=float(tokens.quantized_nll_nats.double().sum()),
        worst=tuple((p, int(base_logits[p].argmax()), int(logits[p].argmax())) for p in worst),
        finite=prediction.finite,
        base_finite=bool(torch.isfinite(base_logits).all()),
    )


def summarize(
    passages: Sequence[Passage],
    compared: Sequence[PassageComparison],
    *,
    confidence: float,
    base: ModelCache,
    tokenizer: Any,
) -> TextFidelity:
    """Aggregate the passages by document.

    Args:
        passages: The predicted passages.
        compared: Their comparisons, in the same order.
        confidence: Confidence level of the intervals.
        base: Cache of the base, which holds its noise floor.
        tokenizer: Decodes the worst tokens.

    Returns:
        Means with intervals over documents.
    """
    documents = list(dict.fromkeys(p.document for p in passages))
    row = {name: number for number, name in enumerate(documents)}
    counts = [0] * len(documents)
    sums = {name: [0.0] * len(documents) for name in ("kl", "agrees", "increase", "base")}
    for passage, one in zip(passages, compared, strict=True):
        at = row[passage.document]
        counts[at] += len(one.kl_nats)
        sums["kl"][at] += math.fsum(one.kl_nats)
        sums["agrees"][at] += one.agrees
        sums["increase"][at] += one.candidate_nll_nats - one.base_nll_nats
        sums["base"][at] += one.base_nll_nats
    tokens = sum(counts)
    mean = {name: math.fsum(values) / tokens for name, values in sums.items()}
    bootstraps = {
        name: bootstrap_ratio(sums[name], counts) if math.isfinite(mean[name]) else None
        for name in ("kl", "agrees", "increase")
    }
    intervals = {n: None if b is None else b.interval(confidence) for n, b in bootstraps.items()}
    all_kl = torch.tensor([value for one in compared for value in one.kl_nats])
    noise = base.answers.get(_noise_key(_noise_passages(passages))) or {}
    return TextFidelity(
        num_tokens=tokens,
        num_documents=len(documents),
        kl_nats=mean["kl"],
        kl_interval=intervals["kl"],
        kl_percentiles=percentiles(all_kl),
        kl_histogram=_histogram(all_kl),
        top1_agreement=mean["agrees"],
        top1_interval=intervals["agrees"],
        base_perplexity=safe_exp(mean["base"]),
        candidate_perplexity=safe_exp(mean["base"] + mean["increase"]),
        nll_increase_nats=mean["increase"],
        nll_increase_interval=intervals["increase"],
        bootstrap=bootstraps["increase"],
        by_kind=_by_kind(passages, compared),
        worst=_worst_tokens(passages, compared, tokenizer),
        noise_kl_nats=noise.get("mean"),
        noise_kl_largest=noise.get("largest"),
        candidate_finite=all(one.finite for one in compared if one.base_finite),
        base_finite=all(one.base_finite for one in compared),
    )


def _histogram(kl: torch.Tensor) -> tuple[int, ...]:
    buckets = torch.bucketize(kl.double(), torch.tensor(HISTOGRAM_EDGES, dtype=torch.float64))
    return tuple(torch.bincount(buckets, minlength=len(HISTOGRAM_EDGES) + 1).tolist())


def _by_kind(
    passages: Sequence[Passage], compared: Sequence[PassageComparison]
) -> tuple[KindFidelity, ...]:
    kinds = []
    for kind in dict.fromkeys(p.kind for p in passages):
        members = [(p, c) for p, c in zip(passages, compared, strict=True) if p.kind == kind]
        tokens = sum(len(c.kl_nats) for _, c in members)
        kinds.append(
            KindFidelity(
                kind=kind,
                num_tokens=tokens,
                num_documents=len({p.document for p, _ in members}),
                kl_nats=math.fsum(v for _, c in members for v in c.kl_nats) / tokens,
                top1_agreement=sum(c.agrees for _, c in members) / tokens,
                base_perplexity=safe_exp(math.fsum(c.base_nll_nats for _, c in members) / tokens),
                candidate_perplexity=safe_exp(
                    math.fsum(c.candidate_nll_nats for _, c in members) / tokens
                ),
            )
        )
    return tuple(kinds)


def _worst_tokens(
    passages: Sequence[Passage], compared: Sequence[PassageComparison], tokenizer: Any
) -> tuple[WorstToken, ...]:
    found = [
        (one.kl_nats[position], passage, position, base_top, candidate_top)
        for passage, one in zip(passages, compared, strict=True)
        for position, base_top, candidate_top in one.worst
    ]
    found.sort(key=lambda entry: -entry[0])

    def text(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    return tuple(
        WorstToken(
            kl_nats=kl,
            document=passage.document,
            before=text(passage.ids[max(0, position + 1 - CONTEXT_TOKENS) : position + 1]),
            actual=text([passage.ids[position + 1]]),
            base=text([base_top]),
            candidate=text([candidate_top]),
        )
        for kl, passage, position, base_top, candidate_top in found[:MAX_WORST]
    )

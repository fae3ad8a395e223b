"""How near is the candidate to the base on running text: divergence, agreement, perplexity.

::

    base: passages -> predictions on disk      candidate: passages -> logits beside them
      -> PassageComparison (per token, kept on disk) -> summarize -> TextFidelity (by document)
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
from halfbyte.evaluate.perplexity import exponential
from halfbyte.judge.bootstrap import RatioBootstrap, bootstrap_ratio
from halfbyte.judge.local_model import LocalModel
from halfbyte.judge.model_cache import ModelCache
from halfbyte.judge.questions import Passage, digest
from halfbyte.judge.statistics import Interval

WORST_PER_PASSAGE = 3
WORST_SHOWN = 12
CONTEXT_TOKENS = 24
"""Shown before a token on which both models differ most."""
NOISE_PASSAGES = 4
HISTOGRAM_EDGES = tuple(10.0**exponent for exponent in (-5, -4, -3, -2, -1, 0, 1))
"""Of the divergence per token, in nats."""

Progress = Callable[[int, int], None]
Load = Callable[[], LocalModel]


@dataclass(frozen=True, slots=True, kw_only=True)
class PassageComparison:
    """Both models on one passage, token by token."""

    kl_nats: tuple[float, ...]
    agrees: int
    base_nll_nats: float
    """Sum over the passage."""
    candidate_nll_nats: float
    worst: tuple[tuple[int, int, int], ...]
    """(position, what the base ranks first, what the candidate does) where both differ most."""
    finite: bool
    """Whether the candidate's logits are numbers."""
    base_finite: bool

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Undo ``asdict`` after a way through JSON."""
        worst = tuple((int(a), int(b), int(c)) for a, b, c in values["worst"])
        return cls(**{**values, "kl_nats": tuple(values["kl_nats"]), "worst": worst})


@dataclass(frozen=True, slots=True, kw_only=True)
class WorstToken:
    """A place where both models differ much, in its context."""

    kl_nats: float
    document: str
    before: str
    actual: str
    """What the text goes on with."""
    base: str
    """What the base ranks first."""
    candidate: str


@dataclass(frozen=True, slots=True, kw_only=True)
class KindFidelity:
    """One kind of text."""

    kind: str
    num_tokens: int
    num_documents: int
    kl_nats: float
    top1_agreement: float
    base_perplexity: float
    candidate_perplexity: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TextFidelity:
    """How near the candidate is to the base on running text."""

    num_tokens: int
    num_documents: int
    kl_nats: float
    """Mean of KL(base || candidate) per token. Unit: nats."""
    kl_interval: Interval | None
    kl_percentiles: dict[str, float]
    kl_histogram: tuple[int, ...]
    """Tokens below each of ``HISTOGRAM_EDGES``, and above the last."""
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
    """Mean divergence of the base from itself at another batch size."""
    noise_kl_largest: float | None
    candidate_finite: bool
    """Wherever the base's logits are."""
    base_finite: bool

    @property
    def perplexity_ratio(self) -> float:
        """Perplexity of the candidate over that of the base, paired."""
        return exponential(self.nll_increase_nats)

    @property
    def perplexity_ratio_interval(self) -> Interval | None:
        """Interval of the ratio, over documents."""
        between = self.nll_increase_interval
        if between is None:
            return None
        return Interval(low=exponential(between.low), high=exponential(between.high))

    def to_dict(self) -> dict[str, Any]:
        """Give plain values for JSON."""
        values = {
            name: getattr(self, name) for name in self.__dataclass_fields__ if name != "bootstrap"
        }
        return values | {
            "perplexity_ratio": self.perplexity_ratio,
            "perplexity_ratio_interval": self.perplexity_ratio_interval,
            "kl_histogram_edges": HISTOGRAM_EDGES,
        }


def predict_base(
    load: Load, cache: ModelCache, passages: Sequence[Passage], progress: Progress
) -> None:
    """Keep the base's predictions of every passage, and how much they depend on the batch.

    Args:
        load: Gives the base; called only where something is missing.
        cache: Its place.
        passages: What to predict.
        progress: Called after each with (done, in all).
    """
    for done, passage in enumerate(passages, start=1):
        if not cache.has_states(passage.key):
            model = load()
            cache.keep_states(passage.key, model.predict([passage.ids])[0])
            cache.keep_head(model)
        progress(done, len(passages))
    _measure_noise(load, cache, passages)


def _noise_key(passages: Sequence[Passage]) -> str:
    return digest(["noise", [p.key for p in passages]])


def _noise_passages(passages: Sequence[Passage]) -> list[Passage]:
    longest = max((len(p.ids) for p in passages), default=0)
    return [p for p in passages if len(p.ids) == longest][:NOISE_PASSAGES]


def _measure_noise(load: Load, cache: ModelCache, passages: Sequence[Passage]) -> None:
    """Run some passages again as one batch: a model may differ from itself in its last digits."""
    same = _noise_passages(passages)
    key = _noise_key(same)
    if key in cache.answers or not same:
        return
    # Three at the least: a batch of one would be the same computation again.
    batch = [p.ids for p in same]
    predictions = load().predict(batch if len(batch) > 1 else batch * 3)
    kl = []
    for passage, again in zip(same, predictions, strict=False):
        first = cache.load_logits(passage.key)
        other = again.logits.to(first.device)
        targets = torch.tensor(passage.ids[1:])
        kl.append(compare_logits(first[:-1], other[:-1], targets).kl_nats)
    together = torch.cat(kl)
    cache.answers.keep({key: {"mean": float(together.mean()), "largest": float(together.max())}})


def compare_candidate(
    load: Load,
    cache: ModelCache,
    base: ModelCache,
    passages: Sequence[Passage],
    progress: Progress,
) -> list[PassageComparison]:
    """Run the candidate over every passage and hold it against the base's predictions.

    Args:
        load: Gives the candidate; called only where something is missing.
        cache: Its place; a resumed run goes on from what is there.
        base: The base's place, with predictions of every passage.
        passages: What to predict.
        progress: Called after each with (done, in all).

    Returns:
        One comparison per passage.

    Raises:
        ConfigError: The two models have different vocabularies.
    """
    results = []
    for done, passage in enumerate(passages, start=1):
        key = digest(["against", base.folder.name, passage.key])
        kept = cache.answers.get(key)
        if kept is None:
            compared = _compare_passage(load(), base, passage)
            cache.answers.keep({key: asdict(compared)})
        else:
            compared = PassageComparison.from_dict(kept)
        results.append(compared)
        progress(done, len(passages))
    return results


def _compare_passage(model: LocalModel, base: ModelCache, passage: Passage) -> PassageComparison:
    prediction = model.predict([passage.ids])[0]
    theirs = base.load_logits(passage.key)
    ours = prediction.logits
    if ours.shape != theirs.shape:
        raise ConfigError(
            f"Cannot compare '{model.name}' with its base: it predicts {ours.shape[-1]} token ids, "
            f"the base {theirs.shape[-1]}. Compare a model with its own quantized version."
        )
    tokens = compare_logits(theirs[:-1].to(ours.device), ours[:-1], torch.tensor(passage.ids[1:]))
    kl = torch.nan_to_num(tokens.kl_nats, nan=math.inf)
    places = kl.topk(min(WORST_PER_PASSAGE, len(kl))).indices.tolist()
    return PassageComparison(
        kl_nats=tuple(float(f"{value:.6g}") for value in kl.tolist()),
        agrees=int(tokens.agrees.sum()),
        base_nll_nats=float(tokens.base_nll_nats.double().sum()),
        candidate_nll_nats=float(tokens.quantized_nll_nats.double().sum()),
        worst=tuple((p, int(theirs[p].argmax()), int(ours[p].argmax())) for p in places),
        finite=prediction.finite,
        base_finite=bool(torch.isfinite(theirs).all()),
    )


def summarize(
    passages: Sequence[Passage],
    compared: Sequence[PassageComparison],
    *,
    confidence: float,
    base: ModelCache,
    tokenizer: Any,
) -> TextFidelity:
    """Put the passages together, document by document.

    Args:
        passages: What was predicted.
        compared: Their comparisons.
        confidence: Of the intervals.
        base: For the noise of the base.
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
    spread = {
        name: bootstrap_ratio(sums[name], counts) if math.isfinite(mean[name]) else None
        for name in ("kl", "agrees", "increase")
    }
    between = {n: None if b is None else b.interval(confidence) for n, b in spread.items()}
    every = torch.tensor([value for one in compared for value in one.kl_nats])
    noise = base.answers.get(_noise_key(_noise_passages(passages))) or {}
    return TextFidelity(
        num_tokens=tokens,
        num_documents=len(documents),
        kl_nats=mean["kl"],
        kl_interval=between["kl"],
        kl_percentiles=percentiles(every),
        kl_histogram=_histogram(every),
        top1_agreement=mean["agrees"],
        top1_interval=between["agrees"],
        base_perplexity=exponential(mean["base"]),
        candidate_perplexity=exponential(mean["base"] + mean["increase"]),
        nll_increase_nats=mean["increase"],
        nll_increase_interval=between["increase"],
        bootstrap=spread["increase"],
        by_kind=_by_kind(passages, compared),
        worst=_worst_tokens(passages, compared, tokenizer),
        noise_kl_nats=noise.get("mean"),
        noise_kl_largest=noise.get("largest"),
        candidate_finite=all(one.finite for one in compared if one.base_finite),
        base_finite=all(one.base_finite for one in compared),
    )


def _histogram(kl: torch.Tensor) -> tuple[int, ...]:
    places = torch.bucketize(kl.double(), torch.tensor(HISTOGRAM_EDGES, dtype=torch.float64))
    return tuple(torch.bincount(places, minlength=len(HISTOGRAM_EDGES) + 1).tolist())


def _by_kind(
    passages: Sequence[Passage], compared: Sequence[PassageComparison]
) -> tuple[KindFidelity, ...]:
    kinds = []
    for kind in dict.fromkeys(p.kind for p in passages):
        own = [(p, c) for p, c in zip(passages, compared, strict=True) if p.kind == kind]
        tokens = sum(len(c.kl_nats) for _, c in own)
        kinds.append(
            KindFidelity(
                kind=kind,
                num_tokens=tokens,
                num_documents=len({p.document for p, _ in own}),
                kl_nats=math.fsum(v for _, c in own for v in c.kl_nats) / tokens,
                top1_agreement=sum(c.agrees for _, c in own) / tokens,
                base_perplexity=exponential(math.fsum(c.base_nll_nats for _, c in own) / tokens),
                candidate_perplexity=exponential(
                    math.fsum(c.candidate_nll_nats for _, c in own) / tokens
                ),
            )
        )
    return tuple(kinds)


def _worst_tokens(
    passages: Sequence[Passage], compared: Sequence[PassageComparison], tokenizer: Any
) -> tuple[WorstToken, ...]:
    found = [
        (one.kl_nats[place], passage, place, theirs, ours)
        for passage, one in zip(passages, compared, strict=True)
        for place, theirs, ours in one.worst
    ]
    found.sort(key=lambda entry: -entry[0])

    def text(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    return tuple(
        WorstToken(
            kl_nats=kl,
            document=passage.document,
            before=text(passage.ids[max(0, place + 1 - CONTEXT_TOKENS) : place + 1]),
            actual=text([passage.ids[place + 1]]),
            base=text([theirs]),
            candidate=text([ours]),
        )
        for kl, passage, place, theirs, ours in found[:WORST_SHOWN]
    )

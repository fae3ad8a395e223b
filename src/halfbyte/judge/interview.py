"""Ask one model everything, in batches, keeping each answer; and tell right answers from wrong."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from halfbyte.errors import ConfigError
from halfbyte.evaluate.logits import compare_logits
from halfbyte.judge.answers import Answer, AnswerFile, Respondent
from halfbyte.judge.checks import PythonCheck
from halfbyte.judge.edge_cases import EdgeCase
from halfbyte.judge.local_model import LocalModel
from halfbyte.judge.model_cache import ModelCache
from halfbyte.judge.questions import Question, digest

EDGE_LAST_TOKENS = 128
"""Predictions of an odd input are compared at its last tokens; a long one's need not all stay."""

LONG_TOKENS = 512
"""Odd inputs above this run alone: padding the others to their length would cost more."""

Done = Callable[[int, int], None]


class Interview:
    """One model and the answers that it has given."""

    def __init__(self, load: Callable[[], Respondent], answers: AnswerFile) -> None:
        """Start with what is kept already.

        Args:
            load: Gives the model; called only where an answer is missing.
            answers: Where its answers are kept.
        """
        self._load = load
        self._kept = answers
        self.tokens = 0
        """Prompt tokens that were run."""
        self.reused = 0

    def ask(self, questions: Sequence[Question], batch_size: int, done: Done) -> dict[str, Answer]:
        """Ask questions, those without a kept answer in batches of like length.

        Args:
            questions: In any order.
            batch_size: Questions per batch.
            done: Called with (answered, in all).

        Returns:
            Answers by the question's key.
        """
        return self._ask(questions, batch_size, done, prefix="")

    def repeat(self, questions: Sequence[Question], count: int, batch_size: int) -> None:
        """Ask some questions once more, in other batches; keeps the answers beside the first ones.

        Args:
            questions: Of which every so-manieth is taken.
            count: How many at the most.
            batch_size: Another one than before.
        """
        step = max(1, len(questions) // max(1, count))
        self._ask(questions[::step][:count], batch_size, lambda *_: None, prefix="again ")

    def _ask(
        self, questions: Sequence[Question], batch_size: int, done: Done, prefix: str
    ) -> dict[str, Answer]:
        missing = {q.key: q for q in questions if prefix + q.key not in self._kept}
        self.reused += 0 if prefix else len(questions) - len(missing)
        answered = len(questions) - len(missing)
        for batch in self._batches(list(missing.values()), batch_size):
            model, choosing = self._load(), bool(batch[0].item.choices)
            answers = model.answer_choices(batch) if choosing else model.write(batch)
            self._kept.keep(
                {prefix + q.key: a.to_dict() for q, a in zip(batch, answers, strict=True)}
            )
            self.tokens += sum(len(q.ids) for q in batch)
            answered += len(batch)
            done(answered, len(questions))
        return {q.key: Answer.from_dict(self._kept.get(prefix + q.key)) for q in questions}

    def _batches(self, questions: list[Question], size: int) -> Iterator[list[Question]]:
        """Give batches of one way of answering and of like lengths, in a fixed order."""

        def rank(q: Question) -> tuple[bool, bool, int, int, str]:
            single = all(len(choice) == 1 for choice in q.choices)
            return bool(q.choices), single, q.item.max_new_tokens, len(q.ids), q.key

        def together(q: Question) -> tuple[bool, bool, int]:
            # Models that cannot be told positions take no padding: one length per batch.
            return (*rank(q)[:2], 0 if padding else len(q.ids))

        if not questions:
            return
        padding = self._load().takes_padding

        for _, group in itertools.groupby(sorted(questions, key=rank), key=together):
            same = list(group)
            for start in range(0, len(same), size):
                yield same[start : start + size]

    def ask_edges(
        self, cases: Sequence[EdgeCase], batch_size: int, seed: int, done: Done
    ) -> list[Answer]:
        """Ask odd inputs; long ones, and those that are drawn at a temperature, one by one.

        Args:
            cases: The odd inputs.
            batch_size: Of the others.
            seed: Of the draw.
            done: Called with (answered, in all).

        Returns:
            Answers in the order of the cases.
        """
        apart = [c for c in cases if c.temperature or len(c.question.ids) > LONG_TOKENS]
        together = [c.question for c in cases if c not in apart]
        self._ask(together, batch_size, lambda d, _: done(d, len(cases)), prefix="")
        for number, case in enumerate(apart, start=len(together) + 1):
            key = self._edge_key(case, seed)
            if key in self._kept:
                self.reused += 1
                continue
            answer = self._load().write([case.question], temperature=case.temperature, seed=seed)[0]
            self._kept.keep({key: answer.to_dict()})
            self.tokens += len(case.question.ids)
            done(number, len(cases))
        return [Answer.from_dict(self._kept.get(self._edge_key(case, seed))) for case in cases]

    @staticmethod
    def _edge_key(case: EdgeCase, seed: int) -> str:
        key = case.question.key
        return digest(["drawn", key, case.temperature, seed]) if case.temperature else key

    def predict_edges(
        self, cases: Sequence[EdgeCase], cache: ModelCache, against: ModelCache | None
    ) -> list[tuple[bool, float | None]]:
        """Predict the last tokens of each odd input.

        Args:
            cases: The odd inputs.
            cache: This model's place.
            against: The base's place; None: this is the base, whose predictions are kept.

        Returns:
            Per case whether all logits are numbers, and the mean divergence from the base.
        """
        results: list[tuple[bool, float | None]] = []
        for case in cases:
            key = digest(["odd", case.question.ids])
            note = digest(["odd", against.folder.name if against else "", key])
            if note not in self._kept or (against is None and not cache.has_states(key)):
                self._kept.keep({note: self._predict_edge(case, key, cache, against)})
            finite, kl = self._kept.get(note)
            results.append((bool(finite), kl))
        return results

    def _predict_edge(
        self,
        case: EdgeCase,
        key: str,
        cache: ModelCache,
        against: ModelCache | None,
    ) -> tuple[bool, float | None]:
        model, ids = self._load(), case.question.ids
        assert isinstance(model, LocalModel)
        last = min(EDGE_LAST_TOKENS, len(ids))
        prediction = model.predict([ids], last=last)[0]
        self.tokens += len(ids)
        if against is None:
            cache.keep_states(key, prediction)
            cache.keep_head(model)
            return prediction.finite, None
        if not against.has_states(key):
            return prediction.finite, None
        theirs, ours = against.load_logits(key), prediction.logits
        # The token after the last one is not known; any id will do, as only the divergence is read.
        targets = torch.tensor([*ids[len(ids) - last + 1 :], 0])
        kl = compare_logits(theirs.to(ours.device), ours, targets).kl_nats
        mean = float(kl.mean())
        return prediction.finite, mean if math.isfinite(mean) else None


def is_right(question: Question, answer: Answer, functions: Mapping[str, PythonCheck]) -> bool:
    """Tell whether an answer is right.

    Args:
        question: With what is right.
        answer: A model's.
        functions: Python functions that checks name.

    Returns:
        For choices: whether the right one is the likeliest; an answer of logits that are not
        numbers is wrong.

    Raises:
        ConfigError: The item's check cannot take the answer; names both.
    """
    item = question.item
    if not answer.finite:
        return False
    if item.choices:
        nats = answer.choice_nats
        return max(range(len(nats)), key=lambda i: nats[i]) == item.right_choice
    assert item.check is not None
    try:
        return item.check.passes(answer.text, item.line, functions)
    except (Exception, SystemExit) as error:
        shown = item.check.value if item.check.kind == "python" else item.check.kind
        raise ConfigError(
            f"Cannot judge the answer {answer.text[:80]!r} to item '{item.name}': the check "
            f"'{shown}' raised {error!r}. A check must take every text, the empty one included."
        ) from error

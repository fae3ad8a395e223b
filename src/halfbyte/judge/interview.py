"""Puts all questions to one model, in batches, and caches every answer; grades answers."""

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
from halfbyte.judge.progress import StepProgress
from halfbyte.judge.questions import Question, digest

EDGE_LAST_TOKENS = 128
"""Predictions of an edge case are compared at its last tokens only, to save disk space."""

LONG_TOKENS = 512
"""Edge cases with longer prompts run one at a time: padding a batch to their length costs more."""


class Interview:
    """One model and the answers it has given."""

    def __init__(self, load: Callable[[], Respondent], answers: AnswerFile) -> None:
        """Start from the cached answers.

        Args:
            load: Returns the model; called only if an answer is missing.
            answers: Cache of the model's answers.
        """
        self._load = load
        self._cached = answers
        self.tokens = 0
        """Tokens of the prompts that were answered."""
        self.reused = 0
        """Answers taken from the cache."""

    def ask(
        self, questions: Sequence[Question], batch_size: int, progress: StepProgress
    ) -> dict[str, Answer]:
        """Answer questions; those without a cached answer run in batches of similar length.

        Args:
            questions: In any order.
            batch_size: Questions per batch.
            progress: Called with (answered, total).

        Returns:
            Answers by the question's key.
        """
        return self._ask(questions, batch_size, progress, prefix="")

    def repeat(
        self,
        questions: Sequence[Question],
        max_count: int,
        batch_size: int,
        progress: StepProgress,
    ) -> None:
        """Answer some questions again in other batches; both answers are kept.

        Args:
            questions: An evenly spaced subset is repeated.
            max_count: Size of the subset.
            batch_size: Different from the first run's.
            progress: Called with (answered, total).
        """
        step = max(1, len(questions) // max(1, max_count))
        chosen = questions[::step][:max_count]
        self._ask(chosen, batch_size, progress, prefix=repeat_prefix(batch_size))

    def _ask(
        self,
        questions: Sequence[Question],
        batch_size: int,
        progress: StepProgress,
        prefix: str,
    ) -> dict[str, Answer]:
        missing = {q.key: q for q in questions if prefix + q.key not in self._cached}
        self.reused += 0 if prefix else len(questions) - len(missing)
        answered = len(questions) - len(missing)
        if missing:
            self._load()
        if questions:
            progress(answered, len(questions))
        for batch in self._batches(list(missing.values()), batch_size):
            model, has_choices = self._load(), bool(batch[0].item.choices)
            answers = model.answer_choices(batch) if has_choices else model.write(batch)
            self._cached.add(
                {prefix + q.key: a.to_dict() for q, a in zip(batch, answers, strict=True)}
            )
            self.tokens += sum(len(q.ids) for q in batch)
            answered += len(batch)
            progress(answered, len(questions))
        return {q.key: Answer.from_dict(self._cached.get(prefix + q.key)) for q in questions}

    def _batches(self, questions: list[Question], size: int) -> Iterator[list[Question]]:
        """Yield batches of one answer type and similar prompt length, in a fixed order."""

        def sort_key(q: Question) -> tuple[bool, bool, int, int, str]:
            single = all(len(choice) == 1 for choice in q.choices)
            return bool(q.choices), single, q.item.max_new_tokens, len(q.ids), q.key

        def group_key(q: Question) -> tuple[bool, bool, int]:
            # A model without position_ids cannot be padded: one prompt length per batch.
            return (*sort_key(q)[:2], 0 if can_pad else len(q.ids))

        if not questions:
            return
        can_pad = self._load().takes_padding

        for _, group in itertools.groupby(sorted(questions, key=sort_key), key=group_key):
            members = list(group)
            for start in range(0, len(members), size):
                yield members[start : start + size]

    def ask_edges(
        self, cases: Sequence[EdgeCase], batch_size: int, seed: int, progress: StepProgress
    ) -> list[Answer]:
        """Answer edge cases; long ones and sampled ones run one at a time.

        Args:
            cases: The edge cases.
            batch_size: Of the others.
            seed: For sampling.
            progress: Called with (answered, total).

        Returns:
            Answers in the order of the cases.
        """
        single = [c for c in cases if c.temperature or len(c.question.ids) > LONG_TOKENS]
        batched = [c.question for c in cases if c not in single]
        self._ask(batched, batch_size, lambda done, _: progress(done, len(cases)), prefix="")
        for number, case in enumerate(single, start=len(batched) + 1):
            key = self._edge_key(case, seed)
            if key in self._cached:
                self.reused += 1
                continue
            answer = self._load().write([case.question], temperature=case.temperature, seed=seed)[0]
            self._cached.add({key: answer.to_dict()})
            self.tokens += len(case.question.ids)
            progress(number, len(cases))
        return [Answer.from_dict(self._cached.get(self._edge_key(case, seed))) for case in cases]

    @staticmethod
    def _edge_key(case: EdgeCase, seed: int) -> str:
        key = case.question.key
        return digest(["drawn", key, case.temperature, seed]) if case.temperature else key

    def predict_edges(
        self,
        cases: Sequence[EdgeCase],
        cache: ModelCache,
        base_cache: ModelCache | None,
        progress: StepProgress,
    ) -> list[tuple[bool, float | None]]:
        """Predict the last tokens of each edge case's prompt.

        Args:
            cases: The edge cases.
            cache: Cache of this model.
            base_cache: Cache of the base; None if this model is the base, whose predictions are
                saved.
            progress: Called with (done, total).

        Returns:
            Per case whether all logits are finite, and the mean KL divergence from the base.
        """
        results: list[tuple[bool, float | None]] = []
        for done, case in enumerate(cases, start=1):
            key = digest(["odd", case.question.ids])
            result_key = digest(["odd", base_cache.folder.name if base_cache else "", key])
            if result_key not in self._cached or (base_cache is None and not cache.has_states(key)):
                self._cached.add({result_key: self._predict_edge(case, key, cache, base_cache)})
            finite, kl = self._cached.get(result_key)
            results.append((bool(finite), kl))
            progress(done, len(cases))
        return results

    def _predict_edge(
        self,
        case: EdgeCase,
        key: str,
        cache: ModelCache,
        base_cache: ModelCache | None,
    ) -> tuple[bool, float | None]:
        model, ids = self._load(), case.question.ids
        assert isinstance(model, LocalModel)
        last = min(EDGE_LAST_TOKENS, len(ids))
        prediction = model.predict([ids], last=last)[0]
        if base_cache is None:
            cache.save_states(key, prediction)
            cache.save_head(model)
            return prediction.finite, None
        if not base_cache.has_states(key):
            return prediction.finite, None
        base_logits, logits = base_cache.load_logits(key), prediction.logits
        # No token follows the last one. Any id will do: only the divergence is used.
        targets = torch.tensor([*ids[len(ids) - last + 1 :], 0])
        kl = compare_logits(base_logits.to(logits.device), logits, targets).kl_nats
        mean = float(kl.mean())
        return prediction.finite, mean if math.isfinite(mean) else None


def repeat_prefix(batch_size: int) -> str:
    """Return how the cache's keys of answers begin that were repeated in batches of this size."""
    return f"in batches of {batch_size} "


def is_correct(question: Question, answer: Answer, functions: Mapping[str, PythonCheck]) -> bool:
    """Check whether an answer is correct.

    Args:
        question: The question, with the expected answer.
        answer: A model's answer.
        functions: Python functions that checks refer to by name.

    Returns:
        For choices, whether the right one has the highest log-likelihood; otherwise whether the
        item's check passes. An answer with non-finite logits is wrong.

    Raises:
        ConfigError: The item's check raised an exception on the answer; names both.
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
            f"Cannot grade the answer {answer.text[:80]!r} to item '{item.name}': the check "
            f"'{shown}' raised {error!r}. A check must accept any text, including an empty one."
        ) from error

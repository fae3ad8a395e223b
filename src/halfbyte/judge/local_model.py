"""A model in this process: scores choices, generates greedily, predicts a text token by token.

Predictions are stored as the hidden states before the output layer, plus that layer once. They are
about a hundred times smaller than logits over the vocabulary, and one matrix product gives the
same logits. So the base's predictions of a whole text can be cached on disk for the candidate.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.environment import KERNEL, read_variable
from halfbyte.evaluate.loading import Subject
from halfbyte.judge.answers import Answer
from halfbyte.judge.questions import Question
from halfbyte.machine.limits import available_memory_bytes
from halfbyte.nn.linear import QuantLinear
from halfbyte.nn.replace import dequantize_linears

MAX_DENSE_SHARE = 0.5
"""Share of the free memory that dequantized weights may take."""

HEAD_CHECK_TOLERANCE = 1e-4
"""Relative. Models that change their logits after the output layer, such as by soft-capping, differ
by far more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """A model's predictions after each token of a passage."""

    states: Tensor
    """[tokens, hidden]: hidden states before the output layer, or the logits themselves."""
    logits: Tensor
    """[tokens, vocabulary]."""
    finite: bool

    @property
    def are_logits(self) -> bool:
        """Whether ``states`` holds the logits, because the output layer does not reproduce them."""
        return self.states is self.logits


class LocalModel:
    """A loaded model that answers questions."""

    def __init__(self, subject: Subject) -> None:
        """Find the model's output layer.

        Args:
            subject: The model and its tokenizer.
        """
        self.subject = subject
        self.name = subject.name
        self.model = subject.model
        self.head: nn.Module | None = self.model.get_output_embeddings()
        self._head_gives_logits: bool | None = None

    @property
    def device(self) -> torch.device:
        """Device of the token ids."""
        return self.subject.input_device

    @torch.inference_mode()
    def predict(self, batch: Sequence[Sequence[int]], *, last: int = 0) -> list[Prediction]:
        """Predict the next token at each position.

        Args:
            batch: Passages of one length.
            last: Only at this many last positions; 0: at all.

        Returns:
            One prediction per passage, on the model's device.
        """
        ids = torch.tensor([list(p) for p in batch], device=self.device)
        captured: list[Tensor] = []
        hooks = []
        if isinstance(self.head, nn.Module):
            hooks.append(self.head.register_forward_pre_hook(lambda _, x: captured.append(x[0])))
        try:
            logits: Tensor = self.model(
                input_ids=ids, use_cache=False, **self._keep_last(last)
            ).logits
        finally:
            for hook in hooks:
                hook.remove()
        if last:
            logits = logits[:, -last:]
        states = captured[0][:, -logits.shape[1] :] if captured and captured[0].dim() == 3 else None
        if self._head_gives_logits is None:
            self._head_gives_logits = states is not None and self._check_head(states, logits)
        finite = torch.isfinite(logits).flatten(1).all(dim=1).tolist()
        if not self._head_gives_logits or states is None:
            # The very same tensors: Prediction.are_logits tests for identity.
            return [
                Prediction(states=x, logits=x, finite=f)
                for x, f in zip(logits, finite, strict=True)
            ]
        return [
            Prediction(states=state, logits=row, finite=is_finite)
            for state, row, is_finite in zip(states, logits, finite, strict=True)
        ]

    def _check_head(self, states: Tensor, logits: Tensor) -> bool:
        """Return whether the output layer alone maps these states to these logits."""
        assert self.head is not None
        expected = self.head(states[0, -4:]).float()
        found = logits[0, -4:].float()
        if expected.shape != found.shape or not bool(torch.isfinite(found).all()):
            return False
        return bool((expected - found).norm() <= HEAD_CHECK_TOLERANCE * found.norm())

    @torch.inference_mode()
    def answer_choices(self, questions: list[Question]) -> list[Answer]:
        """Compute the log-likelihood of each choice; the prompts run once, as a batch.

        Args:
            questions: Questions with choices; prompts of similar length need the least padding.

        Returns:
            One answer per question, with the log-likelihoods of its choices.
        """
        ids, mask = self._pad_left([q.ids for q in questions])
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        padded = not bool(mask.all())
        inputs: dict[str, Any] = {}
        if padded:
            inputs = {"attention_mask": mask, "position_ids": positions}
        all_single = all(len(choice) == 1 for q in questions for choice in q.choices)
        output = self.model(input_ids=ids, use_cache=not all_single, **self._keep_last(1), **inputs)
        first = output.logits[:, -1].float()
        finite = torch.isfinite(first).all(dim=1)
        first = first.log_softmax(dim=1)
        nats = [[float(first[row, c[0]]) for c in q.choices] for row, q in enumerate(questions)]
        for index in range(0 if all_single else max(len(q.choices) for q in questions)):
            chosen = [q.choices[index] if index < len(q.choices) else (0,) for q in questions]
            width = max(len(choice) for choice in chosen) - 1
            if width == 0:
                continue
            rest = torch.zeros(len(chosen), width, dtype=torch.int64)
            for row, choice in enumerate(chosen):
                rest[row, : len(choice) - 1] = torch.tensor(choice[:-1])
            rest = rest.to(self.device)
            inputs = {}
            if padded:
                # Choices are padded on the right, where causal attention never looks.
                steps = torch.arange(1, width + 1, device=self.device)
                inputs = {
                    "attention_mask": torch.cat([mask, torch.ones_like(rest)], dim=1),
                    "position_ids": positions[:, -1:] + steps,
                }
            # A forward pass extends the cache in place; a copy works for every kind of cache.
            inputs[self._cache_name] = copy.deepcopy(output[self._cache_name])
            logits = self.model(input_ids=rest, use_cache=True, **inputs).logits.float()
            for row, choice in enumerate(chosen):
                if len(choice) == 1:
                    continue
                scores = logits[row, : len(choice) - 1]
                finite[row] &= torch.isfinite(scores).all()
                logprobs = scores.log_softmax(dim=1)
                targets = torch.tensor(choice[1:], device=scores.device)
                nats[row][index] += float(logprobs.gather(1, targets[:, None]).sum())
        return [
            Answer(choice_nats=tuple(values), finite=bool(finite[row]))
            for row, values in enumerate(nats)
        ]

    @property
    def takes_padding(self) -> bool:
        """Whether prompts of different lengths may run as one batch."""
        return "position_ids" in self._parameters

    @property
    def _parameters(self) -> Mapping[str, Any]:
        return inspect.signature(self.model.forward).parameters

    @property
    def _cache_name(self) -> str:
        """Name of the KV cache argument; Transformers 5.24 renamed it."""
        return "cache" if "cache" in self._parameters else "past_key_values"

    def _keep_last(self, count: int) -> dict[str, int]:
        """Return the argument that limits the logits to the last ``count``, if the model has it."""
        supported = count and "logits_to_keep" in self._parameters
        return {"logits_to_keep": count} if supported else {}

    def _pad_left(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Return ids and attention mask, padded on the left: generation must follow the prompt."""
        longest = max(map(len, prompts))
        ids = torch.full((len(prompts), longest), self._pad_id())
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        return ids.to(self.device), mask.to(self.device)

    @torch.inference_mode()
    def write(
        self, questions: list[Question], *, temperature: float = 0.0, seed: int = 0
    ) -> list[Answer]:
        """Generate a continuation of each prompt, greedily or by sampling.

        Args:
            questions: One batch; prompts of similar length need the least padding.
            temperature: 0: greedy.
            seed: For sampling.

        Returns:
            The text up to each question's stop sequence, in order.
        """
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

        ids, mask = self._pad_left([q.ids for q in questions])
        longest = ids.shape[1]
        ends = self._end_ids()
        config = GenerationConfig(
            do_sample=temperature > 0,
            max_new_tokens=max(q.item.max_new_tokens for q in questions),
            pad_token_id=self._pad_id(),
            eos_token_id=sorted(ends) or None,
            **({"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}),
        )
        recorder = _ConfidenceRecorder(len(questions))
        stop = _StopSequences(questions, longest, self._decode)
        saved = self.model.generation_config
        # generate() takes unset settings, such as penalties and beams, from the model's config.
        self.model.generation_config = config
        try:
            with torch.random.fork_rng(devices=_cuda_devices(self.device)):
                torch.manual_seed(seed)
                output = self.model.generate(
                    ids,
                    attention_mask=mask,
                    generation_config=config,
                    logits_processor=LogitsProcessorList([recorder]),
                    stopping_criteria=StoppingCriteriaList([stop]),
                )
        finally:
            self.model.generation_config = saved
        recorder.add_tokens(output[:, -1])
        generated = [
            row[:length]
            for row, length in zip(output[:, longest:].tolist(), stop.lengths, strict=True)
        ]
        return [
            self._finish(question, new, ends, row, recorder)
            for row, (question, new) in enumerate(zip(questions, generated, strict=True))
        ]

    def _finish(
        self,
        question: Question,
        new: list[int],
        ends: set[int],
        row: int,
        recorder: _ConfidenceRecorder,
    ) -> Answer:
        length = next((i for i, token in enumerate(new) if token in ends), len(new))
        new = new[: length + 1]
        text = cut_at(self._decode(new), question.item.stop)
        logprobs, entropies = recorder.confidence(row, length)
        return Answer(
            text=text,
            ids=tuple(new),
            finite=recorder.finite[row],
            logprobs=logprobs,
            entropies=entropies,
        )

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self.subject.tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def _end_ids(self) -> set[int]:
        ends: set[int] = set()
        for source in (getattr(self.model, "generation_config", None), self.subject.tokenizer):
            value = getattr(source, "eos_token_id", None)
            ends |= {value} if isinstance(value, int) else set(value or ())
        return ends

    def _pad_id(self) -> int:
        tokenizer = self.subject.tokenizer
        for value in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id):
            if isinstance(value, int):
                return value
        return 0


def unpack_reference_linears(model: nn.Module) -> str | None:
    """Replace linears that only the reference kernel can run by dense ones of the same weights.

    That kernel dequantizes the weights at every forward pass. Dequantized once, they give the same
    products in a fraction of the time, and take as much memory as the base.

    Args:
        model: Changed in place, unless the dense weights take too much memory.

    Returns:
        A note for the report; None if nothing was changed.
    """
    linears = [m for m in model.modules() if isinstance(m, QuantLinear)]
    slow = [m for m in linears if m.selection and m.selection.kernel.name == "torch_reference"]
    if not slow or len(slow) < len(linears) or read_variable(KERNEL) is not None:
        return None
    dtype = slow[0].spec.dtype
    size = sum(m.in_features * m.out_features for m in slow) * dtype.itemsize
    device = slow[0].scales.device
    if device.type != "cpu" or size > available_memory_bytes() * MAX_DENSE_SHARE:
        return None
    dequantize_linears(model, dtype)
    return (
        f"The weights of {len(slow)} linears were dequantized once, because the only kernel here "
        "that runs them, torch_reference, dequantizes them at every forward pass. The results are "
        "the same, but memory and speed of this run are not those of the packed model."
    )


def cut_at(text: str, stop: Sequence[str]) -> str:
    """Return the text before the first of the stop sequences."""
    ends = [index for sequence in stop if (index := text.find(sequence)) >= 0]
    return text[: min(ends)] if ends else text


class _ConfidenceRecorder:
    """Records log-probability and entropy of each token, and rows with non-finite logits.

    Non-finite logits are replaced by 0, so that generation of the other rows can finish.
    """

    def __init__(self, rows: int) -> None:
        self.finite = [True] * rows
        self._entropies: list[Tensor] = []
        self._logprobs: list[Tensor] = []
        self._last: Tensor | None = None
        """[rows, vocabulary]: log-probabilities of a step whose tokens are not known yet."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.add_tokens(input_ids[:, -1])
        bad = ~torch.isfinite(scores).all(dim=1)
        if bool(bad.any()):
            for row in bad.nonzero().flatten().tolist():
                self.finite[row] = False
            scores = torch.nan_to_num(scores, nan=0.0, posinf=0.0, neginf=0.0)
        self._last = scores.float().log_softmax(dim=1)
        self._entropies.append(torch.special.entr(self._last.exp()).sum(dim=1))
        return scores

    def add_tokens(self, tokens: Tensor) -> None:
        """Record the tokens [rows] chosen in the last step."""
        if self._last is not None:
            self._logprobs.append(self._last.gather(1, tokens[:, None])[:, 0])

    def confidence(self, row: int, count: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return log-probabilities and entropies of a row's first tokens."""
        found = [
            tuple(round(float(step[row]), 4) for step in steps[:count])
            for steps in (self._logprobs, self._entropies)
        ]
        return found[0], found[1]


class _StopSequences:
    """Stops a row at its stop sequence or its own token limit."""

    def __init__(
        self, questions: list[Question], start: int, decode: Callable[[Sequence[int]], str]
    ) -> None:
        self._questions = questions
        self._start = start
        self._decode = decode
        self.lengths = [q.item.max_new_tokens for q in questions]
        """Number of tokens at which each row stopped; tokens after that are ignored."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        length = input_ids.shape[1] - self._start
        for row, question in enumerate(self._questions):
            if length > self.lengths[row] or not question.item.stop:
                continue
            # Earlier tokens were checked in earlier steps; a stop sequence may span a few tokens.
            tail = self._decode(input_ids[row, self._start :][-16:].tolist())
            if any(sequence in tail for sequence in question.item.stop):
                self.lengths[row] = length
        done = [limit <= length for limit in self.lengths]
        return torch.tensor(done, device=input_ids.device)


def _cuda_devices(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []

"""A model in this process: rates choices, writes greedily, predicts a text token by token.

Predictions leave it as what enters the output layer (hidden states) together with that layer: some
hundred times smaller than logits over the vocabulary, and the very same after one product. So the
base's predictions of a whole text can wait on disk for the candidate.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from halfbyte.environment import KERNEL, read_variable
from halfbyte.evaluate.loading import Subject
from halfbyte.judge.answers import Answer
from halfbyte.judge.questions import Question
from halfbyte.nn.linear import QuantLinear
from halfbyte.nn.replace import dequantize_linears

SHARE_FOR_UNPACKED = 0.5
"""Of the free memory that unpacked weights may take."""

HEAD_CHECK_TOLERANCE = 1e-4
"""Relative; a model that does more than one product after its hidden states differs by far more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a model predicts after each token of a passage."""

    states: Tensor
    """[tokens, width]: hidden states before the output layer, or the logits themselves."""
    logits: Tensor
    """[tokens, vocabulary]."""
    finite: bool

    @property
    def are_logits(self) -> bool:
        """Whether the model computes its logits in a way that only they themselves tell."""
        return self.states is self.logits


class LocalModel:
    """A loaded model that answers questions."""

    def __init__(self, subject: Subject) -> None:
        """Look at the model's output layer.

        Args:
            subject: The model and its tokenizer.
        """
        self.subject = subject
        self.name = subject.name
        self.model = subject.model
        self.head: nn.Module | None = self.model.get_output_embeddings()
        self._head_is_all: bool | None = None

    @property
    def device(self) -> torch.device:
        """Where token ids must be."""
        return self.subject.input_device

    @torch.inference_mode()
    def predict(self, batch: Sequence[Sequence[int]], *, last: int = 0) -> list[Prediction]:
        """Predict what follows each token.

        Args:
            batch: Passages of one length.
            last: Only after this many last tokens; 0: after all.

        Returns:
            One prediction per passage, on the model's device.
        """
        ids = torch.tensor([list(p) for p in batch], device=self.device)
        caught: list[Tensor] = []
        hooks = []
        if isinstance(self.head, nn.Module):
            hooks.append(self.head.register_forward_pre_hook(lambda _, x: caught.append(x[0])))
        try:
            logits: Tensor = self.model(input_ids=ids, use_cache=False, **self._last(last)).logits
        finally:
            for hook in hooks:
                hook.remove()
        if last:
            logits = logits[:, -last:]
        states = caught[0][:, -logits.shape[1] :] if caught and caught[0].dim() == 3 else None
        if self._head_is_all is None:
            self._head_is_all = states is not None and self._explains(states, logits)
        finite = torch.isfinite(logits).flatten(1).all(dim=1).tolist()
        kept = states if self._head_is_all and states is not None else None
        predictions = []
        for row, (own, is_finite) in enumerate(zip(logits, finite, strict=True)):
            own_states = own if kept is None else kept[row]
            predictions.append(Prediction(states=own_states, logits=own, finite=is_finite))
        return predictions

    def _explains(self, states: Tensor, logits: Tensor) -> bool:
        """Whether the output layer alone turns these states into these logits."""
        assert self.head is not None
        expected = self.head(states[0, -4:]).float()
        found = logits[0, -4:].float()
        if expected.shape != found.shape or not bool(torch.isfinite(found).all()):
            return False
        return bool((expected - found).norm() <= HEAD_CHECK_TOLERANCE * found.norm())

    @torch.inference_mode()
    def answer_choices(self, questions: list[Question]) -> list[Answer]:
        """Rate choices: the prompts run once, as a batch, and the choices behind them.

        Args:
            questions: With choices; prompts of like length waste least.

        Returns:
            The log-likelihood of each choice, by question.
        """
        ids, mask = self._pad_left([q.ids for q in questions])
        places = (mask.cumsum(dim=1) - 1).clamp(min=0)
        padded = not bool(mask.all())
        given: dict[str, Any] = {}
        if padded:
            given = {"attention_mask": mask, "position_ids": places}
        alone = all(len(choice) == 1 for q in questions for choice in q.choices)
        output = self.model(input_ids=ids, use_cache=not alone, **self._last(1), **given)
        first = output.logits[:, -1].float()
        finite = torch.isfinite(first).all(dim=1)
        first = first.log_softmax(dim=1)
        nats = [[float(first[row, c[0]]) for c in q.choices] for row, q in enumerate(questions)]
        for index in range(0 if alone else max(len(q.choices) for q in questions)):
            chosen = [q.choices[index] if index < len(q.choices) else (0,) for q in questions]
            width = max(len(choice) for choice in chosen) - 1
            if width == 0:
                continue
            rest = torch.zeros(len(chosen), width, dtype=torch.int64)
            for row, choice in enumerate(chosen):
                rest[row, : len(choice) - 1] = torch.tensor(choice[:-1])
            rest = rest.to(self.device)
            given = {}
            if padded:
                # What pads a choice stands behind it, where nothing that counts looks.
                steps = torch.arange(1, width + 1, device=self.device)
                given = {
                    "attention_mask": torch.cat([mask, torch.ones_like(rest)], dim=1),
                    "position_ids": places[:, -1:] + steps,
                }
            # A cache grows as it is used; a copy per choice is exact for every kind of cache.
            given[self._cache_name] = copy.deepcopy(output[self._cache_name])
            logits = self.model(input_ids=rest, use_cache=True, **given).logits.float()
            for row, choice in enumerate(chosen):
                if len(choice) == 1:
                    continue
                own = logits[row, : len(choice) - 1]
                finite[row] &= torch.isfinite(own).all()
                targets = torch.tensor(choice[1:], device=own.device)
                nats[row][index] += float(own.log_softmax(dim=1).gather(1, targets[:, None]).sum())
        return [
            Answer(choice_nats=tuple(values), finite=bool(finite[row]))
            for row, values in enumerate(nats)
        ]

    @property
    def takes_padding(self) -> bool:
        """Whether prompts of unlike length may run as one batch."""
        return "position_ids" in self._parameters

    @property
    def _parameters(self) -> Mapping[str, Any]:
        return inspect.signature(self.model.forward).parameters

    @property
    def _cache_name(self) -> str:
        """Transformers 5.24 calls it otherwise than those before."""
        return "cache" if "cache" in self._parameters else "past_key_values"

    def _last(self, count: int) -> dict[str, int]:
        """Ask for the last logits only, where the model can give only these."""
        able = count and "logits_to_keep" in self._parameters
        return {"logits_to_keep": count} if able else {}

    def _pad_left(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Give ids and mask; padding goes before, as what is written must follow the last token."""
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
        """Write on after each prompt: the likeliest tokens, or drawn ones at a temperature.

        Args:
            questions: One batch; prompts of like length waste least.
            temperature: 0: always the likeliest token.
            seed: Of the draw.

        Returns:
            What was written up to each question's stop text, in order.
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
        watch = _StepWatch(len(questions))
        stop = _StopTexts(questions, longest, self._decode)
        own = self.model.generation_config
        # What the settings above leave open is filled from the model's: its penalties and beams.
        self.model.generation_config = config
        try:
            with torch.random.fork_rng(devices=_cuda_devices(self.device)):
                torch.manual_seed(seed)
                output = self.model.generate(
                    ids,
                    attention_mask=mask,
                    generation_config=config,
                    logits_processor=LogitsProcessorList([watch]),
                    stopping_criteria=StoppingCriteriaList([stop]),
                )
        finally:
            self.model.generation_config = own
        watch.note(output[:, -1])
        written = [
            row[:length]
            for row, length in zip(output[:, longest:].tolist(), stop.lengths, strict=True)
        ]
        return [
            self._finish(question, new, ends, row, watch)
            for row, (question, new) in enumerate(zip(questions, written, strict=True))
        ]

    def _finish(
        self, question: Question, new: list[int], ends: set[int], row: int, watch: _StepWatch
    ) -> Answer:
        written = next((i for i, token in enumerate(new) if token in ends), len(new))
        new = new[: written + 1]
        text = cut_at(self._decode(new), question.item.stop)
        logprobs, entropies = watch.confidence(row, written)
        return Answer(
            text=text,
            ids=tuple(new),
            finite=watch.finite[row],
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
    """Turn linears that only the reference kernel can run into ordinary ones with its weights.

    That kernel unpacks the weights anew for every token; unpacked once they give the same products
    in a fraction of the time, in the memory that the base needs too.

    Args:
        model: Loaded; changed where this is possible.

    Returns:
        What was done, for the report; None where nothing was.
    """
    linears = [m for m in model.modules() if isinstance(m, QuantLinear)]
    slow = [m for m in linears if m.selection and m.selection.kernel.name == "torch_reference"]
    if not slow or len(slow) < len(linears) or read_variable(KERNEL) is not None:
        return None
    dtype = slow[0].spec.dtype
    size = sum(m.in_features * m.out_features for m in slow) * dtype.itemsize
    device = slow[0].scales.device
    if device.type != "cpu" or size > psutil.virtual_memory().available * SHARE_FOR_UNPACKED:
        return None
    dequantize_linears(model, dtype)
    return (
        f"The weights of {len(slow)} linears were unpacked once, because of the kernels here only "
        "torch_reference runs them, which unpacks them for every token: the same numbers, faster, "
        "in the base's memory. Memory and speed of this run are not those of the packed model."
    )


def cut_at(text: str, stop: Sequence[str]) -> str:
    """Give the text before the first of the stop texts."""
    ends = [place for word in stop if (place := text.find(word)) >= 0]
    return text[: min(ends)] if ends else text


class _StepWatch:
    """Notes how sure the model is of each token, and rows whose logits are not numbers.

    Those are passed on as finite, so that the rest ends.
    """

    def __init__(self, rows: int) -> None:
        self.finite = [True] * rows
        self._entropies: list[Tensor] = []
        self._logprobs: list[Tensor] = []
        self._last: Tensor | None = None
        """[rows, vocabulary]: log-probabilities of the token that is not known yet."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.note(input_ids[:, -1])
        bad = ~torch.isfinite(scores).all(dim=1)
        if bool(bad.any()):
            for row in bad.nonzero().flatten().tolist():
                self.finite[row] = False
            scores = torch.nan_to_num(scores, nan=0.0, posinf=0.0, neginf=0.0)
        self._last = scores.float().log_softmax(dim=1)
        self._entropies.append(torch.special.entr(self._last.exp()).sum(dim=1))
        return scores

    def note(self, tokens: Tensor) -> None:
        """Take in which tokens [rows] were drawn in the last step."""
        if self._last is not None:
            self._logprobs.append(self._last.gather(1, tokens[:, None])[:, 0])

    def confidence(self, row: int, count: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Give logprobs and entropies of a row's first tokens."""
        found = [
            tuple(round(float(step[row]), 4) for step in steps[:count])
            for steps in (self._logprobs, self._entropies)
        ]
        return found[0], found[1]


class _StopTexts:
    """Ends a row at its stop text or its own limit of tokens."""

    def __init__(
        self, questions: list[Question], start: int, decode: Callable[[Sequence[int]], str]
    ) -> None:
        self._questions = questions
        self._start = start
        self._decode = decode
        self.lengths = [q.item.max_new_tokens for q in questions]
        """Tokens up to where each row stopped; what follows there is padding."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        written = input_ids.shape[1] - self._start
        for row, question in enumerate(self._questions):
            if written > self.lengths[row] or not question.item.stop:
                continue
            # What was written before was looked at before; a stop text may straddle few tokens.
            tail = self._decode(input_ids[row, self._start :][-16:].tolist())
            if any(word in tail for word in question.item.stop):
                self.lengths[row] = written
        done = [length <= written for length in self.lengths]
        return torch.tensor(done, device=input_ids.device)


def _cuda_devices(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []

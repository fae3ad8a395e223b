"""Run one block of a model with exactly the arguments that the model gives it.

The model's own forward runs each time: blocks before the current one are stubs, the current one
gets the cached hidden state instead of theirs, and the forward ends right behind it. Rotary
tables, masks and sliding windows are therefore the model's, whatever its family.

Each calibration batch makes its way through a block as a *passage*: a forward that pauses where a
stage of linears begins, so that their Hessian can be collected from all batches and their weights
replaced before any batch goes on. Paused passages cost memory, not time; where they would cost
too much they are thrown away and run again from the start of the block, with the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn
from transformers import PreTrainedModel

from halfbyte.errors import ModelError
from halfbyte.model.blocks import Blocks, Stage
from halfbyte.model.experts import UnfusedExperts

InputGetter = Callable[[], Tensor]


@dataclass(slots=True)
class _BlockDone(Exception):  # ends a forward, reports no error
    output: Any


class _Passage(greenlet):
    """One batch's way through the model's forward."""

    def __init__(self, model: nn.Module, input_ids: Tensor, hidden: Tensor | None) -> None:
        super().__init__()
        self.model = model
        self.input_ids = input_ids
        self.hidden = hidden
        self.stubs_run: list[int] = []
        self.target: int | None = None
        self.stage: int = -1
        self.inputs: Sequence[InputGetter] = ()
        self.output: Any = None

    def run(self) -> None:
        try:
            self.output = self.model(input_ids=self.input_ids, use_cache=False)
        except _BlockDone as done:
            self.output = done.output
        except GreenletExit:
            return

    def pause(self, stage: int, inputs: Sequence[InputGetter]) -> None:
        """Wait at a stage, if anybody waits for this one or an earlier one."""
        if self.target is None or stage < self.target or stage <= self.stage:
            return
        self.stage, self.inputs = stage, inputs
        self.parent.switch()
        self.inputs = ()

    def go_on(self, target: int | None) -> None:
        """Run until a stage at or behind the target, or to the end."""
        self.target = target
        self.switch()


class BlockStream:
    """A model whose blocks run one at a time, on cached hidden states."""

    def __init__(self, model: PreTrainedModel, blocks: Blocks, dtype: torch.dtype) -> None:
        """Wrap a model; its weights outside the blocks must be loaded.

        Args:
            model: The model.
            blocks: Its decoder blocks.
            dtype: The type in which hidden states are computed and kept.
        """
        self.model = model
        self.blocks = blocks
        self.dtype = dtype
        self.output_sizes: dict[int, int] = {}
        """Per block: 0 where it returns a tensor, else the length of the tuple it returns."""

    @contextmanager
    def at(self, index: int, stages: Sequence[Stage] = ()) -> Iterator[None]:
        """Make one block the current one.

        Args:
            index: The block; ``len(blocks)`` means the model's tail behind the last block.
            stages: Where passages can pause.
        """
        with ExitStack() as stack:
            for j, block in enumerate(self.blocks.modules):
                forward = block.forward
                stack.callback(block.__dict__.pop, "forward", None)
                block.forward = self._forward_of(j, index, forward)
            self._cast_outside(stack)
            if index < len(self.blocks.modules):
                self._watch_stages(stack, self.blocks.modules[index], stages)
            else:
                self._watch_stages(stack, self.model, stages)
            yield

    def run(self, input_ids: Tensor, hidden: Tensor | None) -> Any:
        """Run the current block (or the tail) on one batch, without pauses.

        Args:
            input_ids: [sequences, tokens].
            hidden: [sequences, tokens, hidden], or None in front of the first block.

        Returns:
            The block's hidden states, or the model's own output behind the last block.
        """
        passage = _Passage(self.model, input_ids, hidden)
        passage.go_on(None)
        return passage.output

    def _forward_of(self, j: int, current: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        tail = current == len(self.blocks.modules)

        def stub(*args: Any, **kwargs: Any) -> Any:
            passage = _current_passage()
            passage.stubs_run.append(j)
            hidden = _hidden_of(args, kwargs)
            if tail and j == current - 1:
                hidden = passage.hidden
            size = self.output_sizes.get(j, 0)
            return (hidden, *[None] * (size - 1)) if size else hidden

        def run_block(*args: Any, **kwargs: Any) -> Any:
            passage = _current_passage()
            if passage.stubs_run != list(range(current)):
                raise ModelError(
                    f"Cannot stream {self.blocks.name(current)}: the model ran blocks "
                    f"{passage.stubs_run[:8]} before it instead of 0..{current - 1} in order."
                )
            if passage.hidden is not None:
                args, kwargs = _with_hidden(args, kwargs, passage.hidden)
            output = self._hidden_output(j, forward(*args, **kwargs))
            width = self.model.config.get_text_config().hidden_size
            if output.shape != (*passage.input_ids.shape, width):
                raise ModelError(
                    f"Cannot stream {self.blocks.name(j)}: it gives states of shape "
                    f"{list(output.shape)} for tokens {list(passage.input_ids.shape)}, where one "
                    f"vector of {width} numbers per token is needed. This kind of model cannot be "
                    "quantized."
                )
            raise _BlockDone(output)

        return run_block if j == current else stub

    def _hidden_output(self, index: int, output: Any) -> Tensor:
        self.output_sizes[index] = len(output) if isinstance(output, tuple) else 0
        hidden = output[0] if isinstance(output, tuple) else output
        if not isinstance(hidden, Tensor):
            raise ModelError(
                f"Cannot stream {self.blocks.name(index)}: it returns {type(hidden).__name__}, "
                "not hidden states."
            )
        return hidden

    def _cast_outside(self, stack: ExitStack) -> None:
        """Outside the blocks parameters keep their stored type; what goes in is brought into it.

        They are mapped, not read: the head may even be the embedding. A norm with a bias does not
        compute in two types at once.
        """
        inside = f"{self.blocks.prefix}."
        head = self.model.get_output_embeddings()
        for name, module in self.model.named_modules():
            own = next(module.parameters(recurse=False), None)
            if own is None or name.startswith(inside):
                continue
            before = module.register_forward_pre_hook(
                lambda _m, x, dtype=own.dtype: tuple(_cast(value, dtype) for value in x)
            )
            stack.callback(before.remove)
            if module is not head:
                # First of all: who watches the module sees the very tensor that others get.
                after = module.register_forward_hook(
                    lambda _m, _x, out: _cast(out, self.dtype), prepend=True
                )
                stack.callback(after.remove)

    def _watch_stages(self, stack: ExitStack, root: nn.Module, stages: Sequence[Stage]) -> None:
        for number, stage in enumerate(stages):
            if stage.experts is not None:
                experts = root.get_submodule(stage.experts)
                assert isinstance(experts, UnfusedExperts)
                stack.callback(setattr, experts, "observer", None)
                numbers = {
                    s.experts_stage: n for n, s in enumerate(stages) if s.experts == stage.experts
                }
                experts.observer = lambda name, inputs, n=numbers: _current_passage().pause(
                    n[name], inputs
                )
            else:
                linear = root.get_submodule(stage.groups[0].linears[0])
                hook = linear.register_forward_pre_hook(
                    lambda _m, x, n=number: _current_passage().pause(n, [lambda: x[0]])
                )
                stack.callback(hook.remove)


class Passages:
    """All batches on their way through the current block."""

    def __init__(
        self,
        stream: BlockStream,
        num_batches: int,
        load: Callable[[int], tuple[Tensor, Tensor | None]],
        *,
        keep_paused: bool,
    ) -> None:
        """Prepare; nothing runs yet.

        Args:
            stream: The stream, standing at the block.
            num_batches: How many batches there are.
            load: Gives one batch's input ids and hidden states.
            keep_paused: True: passages wait at a stage. False: they are run again from the start
                of the block for each stage, which holds one batch in memory at a time.
        """
        self._stream = stream
        self._load = load
        self._keep = keep_paused
        self._live: dict[int, _Passage] = {}
        self.num_batches = num_batches

    def reach(self, batch: int, stage: int) -> Sequence[InputGetter] | None:
        """Bring a batch to a stage.

        Args:
            batch: Which batch.
            stage: Which stage; never one before a stage already reached.

        Returns:
            The inputs of the stage's groups, valid until the next call; None where the batch does
            not run this stage.
        """
        passage = self._passage(batch)
        if passage.stage < stage and not passage.dead:
            passage.go_on(stage)
        return passage.inputs if passage.stage == stage and not passage.dead else None

    def release(self, batch: int) -> None:
        """Say that the inputs of :meth:`reach` are used; forget the passage unless it is kept."""
        if not self._keep:
            self._kill(batch)

    def finish(self, batch: int) -> Any:
        """Run a batch to the end of the block and give the hidden states behind it."""
        passage = self._passage(batch)
        if not passage.dead:
            passage.go_on(None)
        output = passage.output
        self._live.pop(batch, None)
        return output

    def close(self) -> None:
        """End every passage."""
        for batch in list(self._live):
            self._kill(batch)

    def _passage(self, batch: int) -> _Passage:
        if batch not in self._live:
            input_ids, hidden = self._load(batch)
            self._live[batch] = _Passage(self._stream.model, input_ids, hidden)
        return self._live[batch]

    def _kill(self, batch: int) -> None:
        passage = self._live.pop(batch, None)
        if passage is not None and passage:
            passage.throw(GreenletExit)


def _current_passage() -> _Passage:
    passage = getcurrent()
    assert isinstance(passage, _Passage)
    return passage


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else kwargs["hidden_states"]


def _with_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (hidden, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": hidden}

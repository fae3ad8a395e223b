"""Runs single blocks of a model with exactly the arguments that the model passes to them.

The model's own forward runs each time: blocks before the current one are replaced by stubs, the
current one gets the cached hidden states as input, and the forward ends right after it. Rotary
tables, masks and sliding windows therefore come from the model itself, whatever its family.

Each calibration batch goes through a block as a pausable forward pass: it pauses before each stage
of linears, so that their Hessians can be collected from all batches and their weights replaced
before any batch continues. Paused passes cost memory but no time; if they would need too much
memory, they are discarded and run again from the start of the block, with identical results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from greenlet import GreenletExit
from torch import Tensor, nn
from transformers import PreTrainedModel

from halfbyte.errors import HalfbyteError, ModelError, first_line
from halfbyte.model.blocks import Blocks, Stage
from halfbyte.model.experts import UnfusedExperts
from halfbyte.model.forward_pass import BlockDone, ForwardPass, InputGetter, current_pass

SHAPE_TOKENS = 7
"""Tokens that are run to find the shape of a token's states; unlike any other size."""


class BlockStream:
    """Runs a model's blocks one at a time on cached hidden states."""

    def __init__(self, model: PreTrainedModel, blocks: Blocks, dtype: torch.dtype) -> None:
        """Wrap a model, whose weights outside the blocks must be loaded before anything runs.

        Args:
            model: The model.
            blocks: Its decoder blocks.
            dtype: Dtype in which hidden states are computed and kept.
        """
        self.model = model
        self.blocks = blocks
        self.dtype = dtype
        self._token_shape: tuple[int, ...] | None = None
        self.output_sizes: dict[int, int] = {}
        """By block: the length of the tuple that it returns, or 0 if it returns a tensor."""

    @property
    def token_shape(self) -> tuple[int, ...]:
        """Shape of one token's states between blocks: the hidden size, or several such vectors.

        Raises:
            ModelError: The states in front of the first block are not one set per token.
        """
        if self._token_shape is None:
            self._token_shape = self._measure_token_shape()
        return self._token_shape

    def _measure_token_shape(self) -> tuple[int, ...]:
        """Run the model up to its first block, whose weights need not be loaded."""
        name, first = self.blocks.name(0), self.blocks.modules[0]
        embeddings: Any = self.model.get_input_embeddings()
        ids = torch.ones((1, SHAPE_TOKENS), dtype=torch.int64, device=embeddings.weight.device)

        def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise BlockDone(_hidden_of(args, kwargs))

        parameters = [p for block in self.blocks.modules for p in block.parameters()]
        versions = [parameter._version for parameter in parameters]
        with ExitStack() as stack:
            before = first.register_forward_pre_hook(stop, prepend=True, with_kwargs=True)
            stack.callback(before.remove)
            self._cast_outside(stack)
            hidden = self.run(ids, None)
        if not isinstance(hidden, Tensor):
            raise ModelError(
                f"Cannot stream {name}: the model does not run it for text, so these may be blocks "
                "of another part of it. This kind of model cannot be quantized."
            )
        if [parameter._version for parameter in parameters] != versions:
            raise ModelError(
                f"Cannot stream {self.blocks.prefix}: the model changes the weights of its blocks "
                "while it runs, but packed weights cannot be changed. If a setting in config.json "
                "turns this off, change it first."
            )
        if hidden.shape[:2] != ids.shape:
            raise ModelError(
                f"Cannot stream {name}: it gets states of shape {list(hidden.shape)} for tokens "
                f"{list(ids.shape)}, but the same number of states is needed for every token. This "
                "kind of model cannot be quantized."
            )
        return tuple(hidden.shape[2:])

    @contextmanager
    def at(self, index: int, stages: Sequence[Stage] = ()) -> Iterator[None]:
        """Make one block the current one.

        Args:
            index: The block; ``len(blocks)`` is the model's tail, everything after the last block.
            stages: Where forward passes can pause.
        """
        _ = self.token_shape  # measured before anything is replaced
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
            hidden: Input of the block, [sequences, tokens, hidden]; None for the first block.

        Returns:
            The block's output hidden states, or the model's own output after the tail.
        """
        forward_pass = ForwardPass(self.model, input_ids, hidden)
        forward_pass.resume(None)
        return forward_pass.output

    def check_block_order(self, input_ids: Tensor) -> None:
        """Check that the model runs its blocks once each, in order, and nothing between them.

        Call it after the first block. It runs the tail up to the head, which is cheap.

        Args:
            input_ids: [1, tokens].

        Raises:
            ModelError: The model runs its blocks in another order, repeatedly or not at all, or
                changes the states between them.
        """
        inputs: list[Tensor] = []

        def stop(*_: Any) -> None:
            raise BlockDone(None)

        def compare(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any
        ) -> None:
            # Stubs return their input, so that all blocks get that of the first.
            inputs.append(_hidden_of(args, kwargs))
            if not torch.allclose(inputs[-1], inputs[0], rtol=0, atol=0, equal_nan=True):
                last = len(inputs) - 1
                raise ModelError(
                    f"Cannot stream {self.blocks.prefix}: the model changes the states between "
                    f"blocks {last - 1} and {last}, but only blocks may change them. This kind of "
                    "model cannot be quantized."
                )

        shape = (*input_ids.shape, *self.token_shape)
        hidden = torch.zeros(shape, dtype=self.dtype, device=input_ids.device)
        with self.at(len(self.blocks.modules)), ExitStack() as stack:
            head = self.model.get_output_embeddings()
            if head is not None:
                stack.callback(head.register_forward_pre_hook(stop, prepend=True).remove)
            for block in self.blocks.modules:
                after = block.register_forward_hook(compare, with_kwargs=True)
                stack.callback(after.remove)
            try:
                self.run(input_ids, hidden)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise ModelError(
                    f"Cannot stream {self.blocks.prefix}: the model does not run with hidden "
                    f"states in place of its blocks' outputs ({type(error).__name__}: "
                    f"{first_line(error)}). This kind of model cannot be quantized."
                ) from error
        if len(inputs) != len(self.blocks.modules):
            raise ModelError(
                f"Cannot stream {self.blocks.prefix}: for text, the model runs only {len(inputs)} "
                f"of its {len(self.blocks.modules)} blocks. A model that leaves out blocks, such "
                "as those for images, cannot be quantized."
            )

    def _forward_of(self, j: int, current: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        tail = current == len(self.blocks.modules)

        def stub(*args: Any, **kwargs: Any) -> Any:
            forward_pass = current_pass()
            if tail and forward_pass.stubs_run != list(range(j)):
                raise ModelError(
                    f"Cannot stream {self.blocks.prefix}: the model runs block {j} after blocks "
                    f"{forward_pass.stubs_run[:8]}, but every block must run once, in order. A "
                    "model that loops over its blocks, or leaves some out, cannot be quantized."
                )
            forward_pass.stubs_run.append(j)
            hidden = _hidden_of(args, kwargs)
            if tail and j == current - 1:
                hidden = forward_pass.hidden
            size = self.output_sizes.get(j, self.output_sizes.get(0, 0))
            return (hidden, *[None] * (size - 1)) if size else hidden

        def run_block(*args: Any, **kwargs: Any) -> Any:
            forward_pass = current_pass()
            if forward_pass.stubs_run != list(range(current)):
                raise ModelError(
                    f"Cannot stream {self.blocks.name(current)}: the model ran blocks "
                    f"{forward_pass.stubs_run[:8]} before it instead of 0..{current - 1} in order."
                )
            if forward_pass.hidden is not None:
                args, kwargs = _with_hidden(args, kwargs, forward_pass.hidden)
            try:
                returned = forward(*args, **kwargs)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                if not current or isinstance(error, HalfbyteError):
                    raise
                raise ModelError(
                    f"Cannot stream {self.blocks.name(current)}: it does not run without the "
                    f"blocks before it ({type(error).__name__}: {first_line(error)}). It may need "
                    "more of them than hidden states, such as keys and values that it shares with "
                    "them; such a model cannot be quantized."
                ) from error
            output = self._hidden_output(j, returned)
            tokens = forward_pass.input_ids.shape
            if output.shape != (*tokens, *self.token_shape):
                raise ModelError(
                    f"Cannot stream {self.blocks.name(j)}: it returns states of shape "
                    f"{list(output.shape)} for tokens {list(tokens)}, but the first block gets "
                    f"{[*tokens, *self.token_shape]}. This kind of model cannot be quantized."
                )
            raise BlockDone(output)

        return run_block if j == current else stub

    def _hidden_output(self, index: int, output: Any) -> Tensor:
        several = isinstance(output, tuple | list)
        self.output_sizes[index] = len(output) if several else 0
        hidden = output[0] if several else output
        if not isinstance(hidden, Tensor):
            raise ModelError(
                f"Cannot stream {self.blocks.name(index)}: it returns {type(hidden).__name__}, "
                "not hidden states."
            )
        return hidden

    def _cast_outside(self, stack: ExitStack) -> None:
        """Cast inputs of modules outside the blocks to their parameters' dtype, and outputs back.

        Their parameters keep the stored dtype, because they are memory-mapped and may be tied, and
        some modules, such as a norm with a bias, do not accept mixed dtypes.
        """
        inside = f"{self.blocks.prefix}."
        head = self.model.get_output_embeddings()
        for name, module in self.model.named_modules():
            parameter = next(module.parameters(recurse=False), None)
            if parameter is None or name.startswith(inside):
                continue
            before = module.register_forward_pre_hook(
                lambda _m, x, dtype=parameter.dtype: tuple(_cast(value, dtype) for value in x)
            )
            stack.callback(before.remove)
            if module is not head:
                # Prepended, so that other hooks see the tensor that the next module gets.
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
                experts.observer = lambda name, inputs, n=numbers: current_pass().pause(
                    n[name], inputs
                )
            else:
                linear = root.get_submodule(stage.groups[0].linears[0])
                hook = linear.register_forward_pre_hook(
                    lambda _m, x, n=number: current_pass().pause(n, [lambda: x[0]])
                )
                stack.callback(hook.remove)


class ForwardPasses:
    """The pausable forward passes of all batches through the current block."""

    def __init__(
        self,
        stream: BlockStream,
        num_batches: int,
        load: Callable[[int], tuple[Tensor, Tensor | None]],
        *,
        keep_paused: bool,
    ) -> None:
        """Create the passes; nothing runs yet.

        Args:
            stream: The stream, positioned at the block.
            num_batches: Number of batches.
            load: Returns the input ids and hidden states of a batch.
            keep_paused: True: keep paused passes in memory. False: rerun them from the start of the
                block for each stage, which holds only one batch in memory at a time.
        """
        self._stream = stream
        self._load = load
        self._keep = keep_paused
        self._active: dict[int, ForwardPass] = {}
        self.num_batches = num_batches

    def reach(self, batch: int, stage: int) -> Sequence[InputGetter] | None:
        """Run a batch until it pauses at a stage.

        Args:
            batch: Index of the batch.
            stage: Index of the stage; not smaller than that of a stage already reached.

        Returns:
            The inputs of the stage's groups, valid until the next call; None if the batch does not
            run this stage.
        """
        forward_pass = self._get_pass(batch)
        if forward_pass.stage < stage and not forward_pass.dead:
            forward_pass.resume(stage)
        return (
            forward_pass.inputs if forward_pass.stage == stage and not forward_pass.dead else None
        )

    def release(self, batch: int) -> None:
        """Declare the inputs of :meth:`reach` unused; drop the pass unless paused ones are kept."""
        if not self._keep:
            self._abort(batch)

    def finish(self, batch: int) -> Any:
        """Run a batch to the end of the block and return the block's output."""
        forward_pass = self._get_pass(batch)
        if not forward_pass.dead:
            forward_pass.resume(None)
        output = forward_pass.output
        self._active.pop(batch, None)
        return output

    def close(self) -> None:
        """Abort every pass."""
        for batch in list(self._active):
            self._abort(batch)

    def _get_pass(self, batch: int) -> ForwardPass:
        if batch not in self._active:
            input_ids, hidden = self._load(batch)
            self._active[batch] = ForwardPass(self._stream.model, input_ids, hidden)
        return self._active[batch]

    def _abort(self, batch: int) -> None:
        forward_pass = self._active.pop(batch, None)
        if forward_pass is not None and forward_pass:
            forward_pass.throw(GreenletExit)


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

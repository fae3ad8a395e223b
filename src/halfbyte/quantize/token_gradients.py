"""How much does each calibration token count at each linear? Asked of the base model.

::

    batches -> base model, forwards -> a token drawn from each prediction -> backwards by blocks
        -> by linear and token: |gradient by its outputs|² -> files -> weights in Hessians

A Hessian that sums x xᵀ over all tokens alike holds an error at a comma to be as bad as one at a
name. How bad it is for the predictions, the gradient g of a drawn token's log-probability tells: to
second order an error d of a linear's outputs raises the KL by half the mean of (g·d)². One draw is
a noisy sample of that, whose largest values are hundreds of times the mean and would decide alone,
so |g| is the weight and not |g|².

Source:
    Hessians weighted with the gradients of the end loss: Kim et al. 2025, "GuidedQuant",
    https://arxiv.org/abs/2505.07004, there squared, and apart for groups of outputs. The curvature
    of the KL by drawn tokens: Martens 2014, https://arxiv.org/abs/1412.1193, section 9.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.checkpoint.shards import TensorFiles
from halfbyte.checkpoint.write import shard_name, write_shard
from halfbyte.machine.memory import release_memory
from halfbyte.model.blockwise_backward import BlockChain
from halfbyte.model.stream import BlockStream
from halfbyte.quantize.block_work import BlockWork
from halfbyte.quantize.probe import run_tail
from halfbyte.quantize.resources import BACKWARD_TOKENS
from halfbyte.quantize.token_weights import TokenWeights, key_of


def measure_token_weights(
    work: BlockWork,
    batches: Sequence[Tensor],
    weights_of_tokens: Sequence[Tensor] | None,
    *,
    seed: int,
    folder: Path,
    on_portion: Callable[[str], None],
) -> TokenWeights:
    """Take the calibration text through the base model and back, a portion at a time.

    What an earlier process of the run left is not computed again.

    Args:
        work: Loads blocks; what is outside them is loaded.
        batches: Calibration ids, [sequences, tokens] each.
        weights_of_tokens: How much the prediction behind each of them counts; None: all alike.
        seed: Draws tokens from the model's predictions.
        folder: For the files.
        on_portion: Told which portion is taken up, in words.

    Returns:
        The weights.
    """
    sizes = [ids.numel() for ids in batches]
    portions = _cut(sizes)
    folder.mkdir(exist_ok=True)
    for number, chosen in enumerate(portions):
        path = folder / shard_name(number + 1, len(portions))
        if not path.exists():
            on_portion(f"what calibration tokens count: part {number + 1} of {len(portions)}")
            backward = _Backward(work, seed + number)
            counted = None if weights_of_tokens is None else [weights_of_tokens[k] for k in chosen]
            found = backward.run([batches[k] for k in chosen], counted)
            write_shard(path, {key_of(name, number): square for name, square in found.items()}, {})
    return TokenWeights(TensorFiles.open(folder), len(portions), sizes)


def draw_gradient(
    stream: BlockStream,
    ids: Tensor,
    hidden: Tensor,
    dice: torch.Generator,
    counted: Tensor | None = None,
) -> Tensor:
    """Give the gradient, by hidden states, of the log-probability of tokens drawn from the model.

    Args:
        stream: The base model's, standing behind its last block.
        ids: [sequences, tokens].
        hidden: [sequences, tokens, hidden], behind the last block.
        dice: Draws.
        counted: How much each prediction counts, [sequences, tokens]; None: all alike.

    Returns:
        [sequences, tokens, hidden].
    """
    gradient = torch.empty_like(hidden)
    for row in range(len(ids)):
        part = slice(row, row + 1)
        own = hidden[part].detach().requires_grad_()
        with torch.enable_grad():
            logits = run_tail(stream, ids[part], own)[0]
        probabilities = logits.detach().float().softmax(-1)
        drawn = draw_tokens(probabilities, dice)
        # A log-probability's gradient by the logits: 1 at the token, less all probabilities.
        by_logits = probabilities.neg_().scatter_add_(1, drawn, torch.ones_like(drawn).float())
        if counted is not None:
            # The curvature of a weighted KL has the weight, its square root the gradient.
            by_logits.mul_(counted[row].to(by_logits.device).sqrt()[:, None])
        logits.backward(by_logits.to(logits.dtype))  # type: ignore[no-untyped-call]
        assert own.grad is not None
        gradient[part] = own.grad
    return gradient


def draw_tokens(probabilities: Tensor, dice: torch.Generator) -> Tensor:
    """Draw a token for each position, by one random number: torch's own takes one for every token.

    Args:
        probabilities: fp32 [positions, vocabulary].
        dice: Draws; on the same device.

    Returns:
        int64 [positions, 1].
    """
    heaped = probabilities.cumsum(-1)
    reached = torch.rand(len(heaped), 1, generator=dice, device=heaped.device) * heaped[:, -1:]
    return torch.searchsorted(heaped, reached, right=True).clamp_(max=heaped.shape[1] - 1)


class _Backward:
    """One pass of a portion of the text, forwards and backwards."""

    def __init__(self, work: BlockWork, seed: int) -> None:
        self.work = work
        self.weights, self.stream = work.weights, work.stream
        self.dice = torch.Generator(self.weights.device).manual_seed(seed)
        self.squares: dict[str, list[Tensor]] = {}
        self.going_back = False

    def run(self, batches: Sequence[Tensor], counted: Sequence[Tensor] | None) -> dict[str, Tensor]:
        """Give the squared gradients of linears that see every token, [tokens], by name on disk."""
        batches = [ids.to(self.weights.device) for ids in batches]
        chain = BlockChain(self.stream, self._enter)
        states = chain.forward(batches)
        with self.stream.at(chain.num_blocks):
            gradients = [
                draw_gradient(self.stream, i, h, self.dice, None if counted is None else counted[k])
                for k, (i, h) in enumerate(zip(batches, states[-1], strict=True))
            ]
        self.going_back = True
        for _ in chain.backward(batches, states, gradients):
            pass
        tokens = [ids.numel() for ids in batches]
        return {
            name: torch.cat(squares)
            for name, squares in self.squares.items()
            if [len(square) for square in squares] == tokens
        }

    @contextmanager
    def _enter(self, index: int) -> Iterator[None]:
        block, exact = self.work.load(index)
        try:
            with ExitStack() as stack:
                for module in exact if self.going_back else ():
                    name = self.weights.disk_name(f"{self.weights.blocks.name(index)}.{module}")
                    hook = watch_gradients(partial(self._note, name))
                    stack.callback(block.get_submodule(module).register_forward_hook(hook).remove)
                yield
        finally:
            self.weights.drop_block(index)
            release_memory()

    def _note(self, name: str, gradient: Tensor) -> None:
        squares = gradient.float().square().sum(-1).flatten()
        self.squares.setdefault(name, []).append(squares.cpu())


def watch_gradients(on_gradient: Callable[[Tensor], None]) -> Callable[..., None]:
    """Make a forward hook that shows the gradients of a linear's outputs as they come.

    Args:
        on_gradient: Gets each, of the output's shape.

    Returns:
        The hook.
    """

    def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        if not output.requires_grad:
            output.requires_grad_()  # the first block's inputs need no gradient
        output.register_hook(  # type: ignore[no-untyped-call]
            lambda gradient: on_gradient(gradient.detach())
        )

    return hook


def _cut(sizes: Sequence[int]) -> list[list[int]]:
    """Cut batches into portions whose states between all blocks fit in memory."""
    portions: list[list[int]] = []
    used = 0
    for batch, size in enumerate(sizes):
        if not portions or used + size > BACKWARD_TOKENS:
            portions.append([])
            used = 0
        portions[-1].append(batch)
        used += size
    return portions

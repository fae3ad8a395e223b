"""Weights of calibration tokens at each linear, from gradients of the base model.

::

    batches -> base model forward -> a token sampled from each prediction -> backward by blocks
        -> by linear and token: |gradient of its outputs|² -> files -> weights in Hessians

A Hessian that sums x xᵀ over all tokens equally treats an error at a comma like one at a name. How
much an error matters for the predictions is given by the gradient g of a sampled token's
log-probability: to second order, an error d of a linear's outputs raises the KL by half the mean of
(g·d)². A single sample is a noisy estimate of that, and its largest values, hundreds of times the
mean, would dominate; therefore the weight is |g| instead of |g|².

Source:
    Hessians weighted with the gradients of the end loss: Kim et al. 2025, "GuidedQuant",
    https://arxiv.org/abs/2505.07004, there squared, and separate for groups of outputs. The
    curvature of the KL by sampled tokens: Martens 2014, https://arxiv.org/abs/1412.1193, section 9.
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
from halfbyte.quantize.token_weights import TokenWeights, gradient_key


def measure_token_weights(
    work: BlockWork,
    batches: Sequence[Tensor],
    weights_of_tokens: Sequence[Tensor] | None,
    *,
    seed: int,
    folder: Path,
    on_portion: Callable[[str], None],
) -> TokenWeights:
    """Run forward and backward passes over the calibration text, one portion at a time.

    Portions that an earlier process of the run has finished are not computed again.

    Args:
        work: Loads blocks; the weights outside the blocks must be loaded.
        batches: Calibration ids, [sequences, tokens] each.
        weights_of_tokens: Weight of the prediction after each token; None: equal weights.
        seed: Seed for sampling tokens from the model's predictions.
        folder: Where the gradients are stored.
        on_portion: Called with a description of each portion before it starts.

    Returns:
        The weights.
    """
    sizes = [ids.numel() for ids in batches]
    portions = _split_portions(sizes)
    folder.mkdir(exist_ok=True)
    for number, chosen in enumerate(portions):
        path = folder / shard_name(number + 1, len(portions))
        if not path.exists():
            on_portion(f"measuring token weights: part {number + 1} of {len(portions)}")
            backward = _Backward(work, seed + number)
            token_weights = (
                None if weights_of_tokens is None else [weights_of_tokens[k] for k in chosen]
            )
            found = backward.run([batches[k] for k in chosen], token_weights)
            write_shard(
                path, {gradient_key(name, number): square for name, square in found.items()}, {}
            )
    return TokenWeights(TensorFiles.open(folder), len(portions), sizes)


def sample_gradient(
    stream: BlockStream,
    ids: Tensor,
    hidden: Tensor,
    generator: torch.Generator,
    token_weights: Tensor | None = None,
) -> Tensor:
    """Return the gradient of the log-probability of sampled tokens with respect to hidden states.

    Args:
        stream: The base model's stream, positioned at the tail.
        ids: [sequences, tokens].
        hidden: Output of the last block, [sequences, tokens, hidden].
        generator: For sampling.
        token_weights: Weight of each prediction, [sequences, tokens]; None: equal weights.

    Returns:
        [sequences, tokens, hidden].
    """
    gradient = torch.empty_like(hidden)
    for row in range(len(ids)):
        part = slice(row, row + 1)
        leaf = hidden[part].detach().requires_grad_()
        with torch.enable_grad():
            logits = run_tail(stream, ids[part], leaf)[0]
        probabilities = logits.detach().float().softmax(-1)
        drawn = sample_tokens(probabilities, generator)
        # d log p(token) / d logits = one_hot(token) - probabilities.
        logits_gradient = probabilities.neg_().scatter_add_(
            1, drawn, torch.ones_like(drawn).float()
        )
        if token_weights is not None:
            # A weight in the KL scales its curvature, and so the gradient by its square root.
            logits_gradient.mul_(token_weights[row].to(logits_gradient.device).sqrt()[:, None])
        logits.backward(logits_gradient.to(logits.dtype))  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        gradient[part] = leaf.grad
    return gradient


def sample_tokens(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """Sample a token for each position by inverting the cumulative distribution.

    Needs one random number per position; torch.multinomial draws one per vocabulary entry.

    Args:
        probabilities: fp32 [positions, vocabulary].
        generator: On the same device.

    Returns:
        int64 [positions, 1].
    """
    cdf = probabilities.cumsum(-1)
    drawn = torch.rand(len(cdf), 1, generator=generator, device=cdf.device) * cdf[:, -1:]
    return torch.searchsorted(cdf, drawn, right=True).clamp_(max=cdf.shape[1] - 1)


class _Backward:
    """A forward and backward pass over one portion of the text."""

    def __init__(self, work: BlockWork, seed: int) -> None:
        self.work = work
        self.weights, self.stream = work.weights, work.stream
        self.generator = torch.Generator(self.weights.device).manual_seed(seed)
        self.squares: dict[str, list[Tensor]] = {}
        self.in_backward = False

    def run(
        self, batches: Sequence[Tensor], token_weights: Sequence[Tensor] | None
    ) -> dict[str, Tensor]:
        """Return squared gradients [tokens] of linears that see every token, by name on disk."""
        batches = [ids.to(self.weights.device) for ids in batches]
        chain = BlockChain(self.stream, self._enter)
        states = chain.forward(batches)
        with self.stream.at(chain.num_blocks):
            gradients = [
                sample_gradient(
                    self.stream,
                    i,
                    h,
                    self.generator,
                    None if token_weights is None else token_weights[k],
                )
                for k, (i, h) in enumerate(zip(batches, states[-1], strict=True))
            ]
        self.in_backward = True
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
                for module in exact if self.in_backward else ():
                    name = self.weights.disk_name(f"{self.weights.blocks.name(index)}.{module}")
                    hook = make_gradient_hook(partial(self._record, name))
                    stack.callback(block.get_submodule(module).register_forward_hook(hook).remove)
                yield
        finally:
            self.weights.drop_block(index)
            release_memory()

    def _record(self, name: str, gradient: Tensor) -> None:
        squares = gradient.float().square().sum(-1).flatten()
        self.squares.setdefault(name, []).append(squares.cpu())


def make_gradient_hook(on_gradient: Callable[[Tensor], None]) -> Callable[..., None]:
    """Make a forward hook that passes the gradients of a module's output to a callback.

    Args:
        on_gradient: Called with each gradient, of the output's shape.

    Returns:
        The hook.
    """

    def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        if not output.requires_grad:
            output.requires_grad_()  # the first block's inputs do not require one
        output.register_hook(  # type: ignore[no-untyped-call]
            lambda gradient: on_gradient(gradient.detach())
        )

    return hook


def _split_portions(sizes: Sequence[int]) -> list[list[int]]:
    """Split batches into portions of about ``BACKWARD_TOKENS``, to limit the states in memory."""
    portions: list[list[int]] = []
    used = 0
    for batch, size in enumerate(sizes):
        if not portions or used + size > BACKWARD_TOKENS:
            portions.append([])
            used = 0
        portions[-1].append(batch)
        used += size
    return portions

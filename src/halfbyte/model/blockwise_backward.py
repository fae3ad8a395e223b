"""Forward and backward passes through the whole model with one block in memory at a time.

This is gradient checkpointing per block: the forward pass keeps the hidden states between blocks;
the backward pass recomputes each block from its kept input and hands the input's gradient to the
block before. The memory needed is that of one block plus the states between blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from halfbyte.model.stream import BlockStream

EnterBlock = Callable[[int], AbstractContextManager[None]]
"""Context manager that loads a block's weights on entry and frees them on exit."""


class BlockChain:
    """All blocks of a model, run one after the other."""

    def __init__(self, stream: BlockStream, enter: EnterBlock) -> None:
        """Wrap a stream.

        Args:
            stream: Runs single blocks; the weights outside the blocks must be loaded.
            enter: Loads a block's weights and frees them again.
        """
        self.stream = stream
        self.enter = enter
        self.num_blocks = len(stream.blocks.modules)

    @torch.no_grad()
    def forward(self, batches: Sequence[Tensor]) -> list[list[Tensor]]:
        """Run all blocks, each on all batches before the next.

        Args:
            batches: Token ids, [sequences, tokens] each.

        Returns:
            Output of every block, by block and batch: [sequences, tokens, hidden].
        """
        states: list[list[Tensor]] = []
        for index in range(self.num_blocks):
            before = states[-1] if states else [None] * len(batches)
            with self.enter(index), self.stream.at(index):
                states.append([self.stream.run(i, h) for i, h in zip(batches, before, strict=True)])
        return states

    def backward(
        self, batches: Sequence[Tensor], states: list[list[Tensor]], gradients: Sequence[Tensor]
    ) -> Iterator[int]:
        """Backpropagate through all blocks, accumulating the gradients of what requires one.

        Args:
            batches: As given to :meth:`forward`.
            states: The result of :meth:`forward`; freed block by block and empty afterwards.
            gradients: Gradients of the loss with respect to the last block's output, by batch.

        Yields:
            Each block's index, from the last to the first, while the block is still loaded.
        """
        current = list(gradients)
        for index in reversed(range(self.num_blocks)):
            states.pop()
            with torch.enable_grad(), self.enter(index), self.stream.at(index):
                for k, ids in enumerate(batches):
                    before = states[-1][k].detach().requires_grad_() if states else None
                    output = self.stream.run(ids, before)
                    if output.requires_grad:
                        output.backward(current[k])
                    if before is not None and before.grad is not None:
                        current[k] = before.grad
                yield index

"""The whole model, forwards and backwards, with one block at work at a time.

Going forwards, the hidden states between blocks are kept. Going backwards, each block runs again
from its kept input, with gradients, and hands the gradient of that input to the block before. So a
backward pass through a model of any size needs one block and the states between blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from halfbyte.model.stream import BlockStream

EnterBlock = Callable[[int], AbstractContextManager[None]]
"""Makes a block's weights usable for a while."""


class BlockChain:
    """All blocks of a model, one after the other."""

    def __init__(self, stream: BlockStream, enter: EnterBlock) -> None:
        """Take what runs blocks.

        Args:
            stream: Runs one block; what is outside the blocks is loaded.
            enter: Puts a block's weights in place, and takes them away again.
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
            Hidden states behind every block, by block and batch: [sequences, tokens, hidden].
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
        """Let gradients flow through all blocks; what requires one in them gets it.

        Args:
            batches: As given to :meth:`forward`.
            states: What it returned; given back block by block, so empty afterwards.
            gradients: Of the loss by the states behind the last block, by batch.

        Yields:
            Each block's number, from the last to the first, while the block is still in place.
        """
        flowing = list(gradients)
        for index in reversed(range(self.num_blocks)):
            states.pop()
            with torch.enable_grad(), self.enter(index), self.stream.at(index):
                for k, ids in enumerate(batches):
                    before = states[-1][k].detach().requires_grad_() if states else None
                    output = self.stream.run(ids, before)
                    if output.requires_grad:
                        output.backward(flowing[k])
                    if before is not None and before.grad is not None:
                        flowing[k] = before.grad
                yield index

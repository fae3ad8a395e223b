"""The whole model, forwards and backwards, with one block at work at a time.

Going forwards, the hidden states between blocks are kept. Going backwards, each block runs again
from its kept input, with gradients, and hands the gradient of that input to the block before. So a
backward pass through a model of any size needs one block and the states between blocks.
"""

from __future__ import annotations

from collections.abc import Callable
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
    def forward(self, input_ids: Tensor) -> list[Tensor]:
        """Run all blocks.

        Args:
            input_ids: [sequences, tokens].

        Returns:
            Hidden states behind every block, [sequences, tokens, hidden] each.
        """
        states: list[Tensor] = []
        for index in range(self.num_blocks):
            with self.enter(index), self.stream.at(index):
                states.append(self.stream.run(input_ids, states[-1] if states else None))
        return states

    def backward(self, input_ids: Tensor, states: list[Tensor], gradient: Tensor) -> None:
        """Let a gradient flow through all blocks; what requires one in them gets it.

        Args:
            input_ids: As given to :meth:`forward`.
            states: What it returned; given back block by block, so empty afterwards.
            gradient: Of the loss by the states behind the last block.
        """
        for index in reversed(range(self.num_blocks)):
            states.pop()
            before = states[-1].detach().requires_grad_() if states else None
            with torch.enable_grad(), self.enter(index), self.stream.at(index):
                output = self.stream.run(input_ids, before)
                if output.requires_grad:
                    output.backward(gradient)
            if before is None or before.grad is None:
                return
            gradient = before.grad

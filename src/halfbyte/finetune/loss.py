"""Cross-entropy loss that computes logits for a few counted tokens at a time.

::

    ids ──decoder──> states ──those before a counted label──> head, a chunk at a time ──> loss

With a 4-bit base, the logits of a whole batch in float32, their softmax and their gradient take
most of the training memory: 4 GB for 2,048 tokens of Llama 3. Here logits exist for one chunk at a
time and are recomputed in the backward pass. Tokens that are not counted, such as those of a
prompt, have none.

Source:
    The idea of computing the head and its loss in pieces is Liger Kernel's fused linear
    cross-entropy, https://github.com/linkedin/Liger-Kernel; recomputation is torch's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from halfbyte.quantize.calibration_source import IGNORED

CHUNK_VALUES = 2**22
"""Logits per chunk: 16 MB in float32, of which a few copies exist."""

PROBE_TOKENS = 8
MAX_DEVIATION = 1e-3
"""Relative deviation of the logits due to another order of summation; a model that scales or caps
its logits deviates far more."""


class ChunkedLoss:
    """Mean negative log-likelihood of the counted labels, from a model's decoder and head."""

    def __init__(self, model: Any) -> None:
        """Check whether a model's logits are the plain output of its head.

        Args:
            model: A causal language model, or PEFT's around one.
        """
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.obstacle = self._find_obstacle()
        """Why the model's own loss must be used instead; None if chunks can be used."""

    def __call__(self, inputs: Mapping[str, Tensor], count: Tensor | int | None = None) -> Tensor:
        """Compute the loss of a batch.

        Args:
            inputs: What the model takes, with ``labels`` [rows, tokens].
            count: Divisor of the sum: the counted labels of all batches of a step; None: those of
                this batch.

        Returns:
            The loss. Unit: nats per counted token.
        """
        labels = inputs["labels"][:, 1:]
        others = {name: value for name, value in inputs.items() if name != "labels"}
        states = self._decoder(**others, use_cache=False).last_hidden_state[:, :-1]
        counted = labels != IGNORED
        states, targets = states[counted], labels[counted]
        head = self._head
        # Without counted labels there is one empty chunk, so that the loss still has a gradient.
        chunks = zip(torch.split(states, self._rows), torch.split(targets, self._rows), strict=True)
        total = torch.stack([checkpoint(_sum_loss, head, *c, use_reentrant=False) for c in chunks])
        return total.sum() / (len(targets) if count is None else count)

    @property
    def _head(self) -> nn.Module:
        head: nn.Module = self.model.get_output_embeddings()
        return head

    @property
    def _decoder(self) -> nn.Module:
        decoder: nn.Module = self.model.get_decoder()
        return decoder

    @property
    def _rows(self) -> int:
        vocabulary: int = self.model.config.get_text_config().vocab_size
        return max(CHUNK_VALUES // vocabulary, 1)

    @torch.no_grad()
    def _find_obstacle(self) -> str | None:
        config = self.model.config.get_text_config()
        if getattr(config, "output_router_logits", False):
            return "the model adds a loss of its own for its experts"
        if self.model.get_output_embeddings() is None or self._decoder is self.model:
            return "the model has no head apart from its decoder"
        device = self.model.get_input_embeddings().weight.device
        ids = torch.arange(PROBE_TOKENS, device=device)[None] % config.vocab_size
        training = self.model.training
        self.model.eval()
        try:
            states = self._decoder(input_ids=ids, use_cache=False).last_hidden_state
            expected = self._head(states).float()
            found = self.model(input_ids=ids, use_cache=False).logits.float()
        finally:
            self.model.train(training)
        if expected.shape != found.shape:
            return "the model's logits have another shape than its head's"
        if not (expected - found).norm() <= MAX_DEVIATION * found.norm():
            return "the model changes its head's logits"
        return None


def _sum_loss(head: nn.Module, states: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(head(states).float(), targets, reduction="sum")

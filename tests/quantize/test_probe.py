"""Quality on the probe: the same as over all windows at once, without all logits in memory."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from halfbyte.evaluate.divergence import DivergenceAccumulator
from halfbyte.quantize.probe import Probe, measure_quality
from halfbyte.quantize.report import QualityReport

WINDOWS, TOKENS, VOCABULARY = 5, 12, 50


def test_logits_of_one_window_are_in_memory_at_a_time() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (WINDOWS, TOKENS), generator=generator)
    base, quantized = torch.randn(2, WINDOWS, TOKENS, VOCABULARY, generator=generator)
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0

    def compute(logits: Tensor, window: int) -> Tensor:
        nonlocal most
        made = logits[window].clone()
        alive.add(made)
        most = max(most, len(alive))
        return made

    found = measure_quality(
        Probe(ids=ids, is_held_out=True),
        lambda window: compute(base, window),
        lambda window: compute(quantized, window),
        torch.device("cpu"),
    )
    accumulator = DivergenceAccumulator()
    accumulator.update(base[:, :-1], quantized[:, :-1], ids[:, 1:])
    expected = QualityReport.from_divergence(accumulator.result(), text="", text_digest="")
    assert found == expected
    assert most == 2

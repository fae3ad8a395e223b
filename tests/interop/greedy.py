"""Tell a tie within rounding from a wrong answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

NEAR_TOP = 10
"""How many of the best tokens can swap places by rounding."""


@torch.no_grad()
def answer(model: Any, prompt: Sequence[int], new_tokens: int) -> list[int]:
    """Continue a prompt, always by the most likely token."""
    ids = torch.tensor([list(prompt)])
    whole = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
    )
    return whole[0, len(prompt) :].tolist()


@torch.no_grad()
def _logits_before(model: Any, prompt: Sequence[int], reply: Sequence[int]) -> Tensor:
    """Give the logits from which each token of a reply was chosen, float32 [tokens, vocabulary]."""
    ids = torch.tensor([[*prompt, *reply]])
    return model(ids).logits[0, len(prompt) - 1 : -1].float()


def check_is_greedy(exact: Any, rounded: Any, prompt: Sequence[int], reply: Sequence[int]) -> int:
    """Check each token of a reply against the best one after the same tokens before it.

    Args:
        exact: Our model in float32.
        rounded: Our model in the type that the other tool computed in.
        prompt: Token ids.
        reply: What the other tool made of it.

    Returns:
        How many of the tokens were not ``exact``'s first choice. Each lost to it by no more than
        twice what rounding alone does to our own best logits.
    """
    before = _logits_before(exact, prompt, reply)
    best, near = before.topk(NEAR_TOP)
    rounding = (_logits_before(rounded, prompt, reply).gather(-1, near) - best).abs().max().item()
    chosen = before.gather(-1, torch.tensor(reply)[:, None])[:, 0]
    lost = best[:, 0] - chosen
    worst = int(lost.argmax())
    assert lost[worst] <= 2 * rounding, (
        f"token {worst} of {list(reply)} is {reply[worst]}, whose logit is {lost[worst]:.3f} below "
        f"the best; rounding moves the best ones by {rounding:.3f} at most"
    )
    return int((lost > 0).sum())

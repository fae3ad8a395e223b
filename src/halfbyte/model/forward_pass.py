"""A forward pass that can pause inside the model and end before the model does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

InputGetter = Callable[[], Tensor]


@dataclass(slots=True)
class BlockDone(Exception):  # not an error
    """Raised inside a model to end its forward pass with a block's output."""

    output: Any


class ForwardPass(greenlet):
    """A forward pass of one batch that can pause inside the model."""

    def __init__(self, model: nn.Module, input_ids: Tensor, hidden: Tensor | None) -> None:
        """Prepare a pass; nothing runs yet.

        Args:
            model: The model, whose blocks may be replaced.
            input_ids: [sequences, tokens].
            hidden: Input of the current block; None: what the model passes to it.
        """
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
        """Run the model; called by greenlet on the first :meth:`resume`."""
        try:
            self.output = self.model(input_ids=self.input_ids, use_cache=False)
        except BlockDone as done:
            self.output = done.output
        except GreenletExit:
            return

    def pause(self, stage: int, inputs: Sequence[InputGetter]) -> None:
        """Pause at a stage, if the caller of :meth:`resume` waits for this or an earlier one."""
        if self.target is None or stage < self.target or stage <= self.stage:
            return
        self.stage, self.inputs = stage, inputs
        self.parent.switch()
        self.inputs = ()

    def resume(self, target: int | None) -> None:
        """Run to the first stage at or after the target; to the end if the target is None."""
        self.target = target
        self.switch()


def current_pass() -> ForwardPass:
    """Return the pass that this code runs in."""
    forward_pass = getcurrent()
    assert isinstance(forward_pass, ForwardPass)
    return forward_pass

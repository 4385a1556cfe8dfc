"""When an optimizer's step begins and ends, where its class calls the step of its base class."""

from __future__ import annotations

import weakref

import torch


class Steps:
    """Tells an optimizer's steps from the steps inside them.

    Where a class overrides `step` and calls that of its base class, PyTorch may run the hooks of
    both. What counts is the first that begins and the first that ends: then the weights are new.
    After an exception in a step the next one counts as inside where it begins, not where it ends.
    """

    def __init__(self) -> None:
        self._begun: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()

    def begins(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the pre-hook that calls this is that of a step, not of one inside."""
        begins = optimizer not in self._begun
        self._begun.add(optimizer)
        return begins

    def ends(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the post-hook that calls this is that of a step, not of one inside."""
        ends = optimizer in self._begun
        self._begun.discard(optimizer)
        return ends

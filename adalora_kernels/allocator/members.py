"""Which adapters take part in the allocation, and which of their triplets are there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..adapters import taking_part


class Members:
    """Knows who competes for the budget: the host by adapter, the device by triplet.

    An adapter takes part if its lora_E requires a gradient and, once any adapter has had one, has
    had a gradient since the run began. A triplet is there unless its row of lora_A, its lora_E and
    its column of lora_B are all 0, which nothing can change.

    Captured graphs hold the addresses of the tensors: they are only written in place, and only
    where something changes, from numbers that the host has.

    Args:
        ranks: the number of triplets of each adapter; n is their sum.
        device: that of the adapters.

    Attributes:
        taking: which adapters take part.
        had_gradient: which have had a gradient since the run began.
        counts: how many triplets of each adapter are there.
        restarted: whether what is not there may learn, because a restart has left it out; it is
            kept at 0 then.
        there: which triplets are there, (n,) bool.
        in_play: which are there, and of an adapter that takes part, (n,) bool.
        kept_at_0: those of adapters that take part which a restart has left out, (n,) bool.
        untouched: those of adapters that had no gradient in the run before, (n,) bool.
        others_had: whether adapters of other processes, which share the budget, have had one.
    """

    _TENSORS = ("there", "in_play", "kept_at_0", "untouched", "_takes_part")

    def __init__(self, ranks: Sequence[int], device: torch.device) -> None:
        self._ranks = list(ranks)
        self.taking = [True] * len(ranks)
        self.had_gradient = [False] * len(ranks)
        self.counts = list(ranks)
        self.others_had = False
        self.restarted = False
        self.there = torch.ones(sum(ranks), dtype=torch.bool, device=device)
        self.in_play, self._takes_part = self.there.clone(), self.there.clone()
        self.kept_at_0, self.untouched = ~self.there, ~self.there

    def move(self, device: torch.device) -> None:
        """Follow the adapters to another device."""
        for name in self._TENSORS:
            setattr(self, name, getattr(self, name).to(device))

    def take_step(self, lora_E: Sequence[Tensor]) -> None:
        """See who has a gradient in this step, and so takes part. Reads nothing from the device."""
        had = self.had_gradient
        if not all(had):
            for i, E in enumerate(lora_E):
                had[i] = had[i] or E.grad is not None
        self.look(lora_E)

    def look(self, lora_E: Sequence[Tensor]) -> None:
        """See which adapters take part now. Reads nothing from the device."""
        taking, had = [E.requires_grad for E in lora_E], self.had_gradient
        if not all(had):
            taking = taking_part(taking, had, self._ranks, any(had) or self.others_had)
        if taking != self.taking:
            self.taking = taking
            self._tell()

    def count(self, there: Tensor, *, restarted: bool) -> None:
        """Take over which triplets are there, (n,) bool. Reads the device."""
        self.there.copy_(there)
        self.restarted = restarted
        self.counts = [int(part.sum()) for part in self._split(self.there.cpu())]
        self._tell()

    def begin(self) -> None:
        """Forget who has had a gradient, but not who has had none: a new run begins."""
        for part, had in zip(self._split(self.untouched), self.had_gradient, strict=True):
            part.fill_(not had)
        self.had_gradient = [False] * len(self._ranks)
        self.others_had = False

    @property
    def total(self) -> int:
        """The number of triplets that are in play."""
        return sum(count for count, takes in zip(self.counts, self.taking, strict=True) if takes)

    def _split(self, flat: Tensor) -> tuple[Tensor, ...]:
        return flat.split_with_sizes(self._ranks)

    def _tell(self) -> None:
        """Write into the tensors who takes part."""
        for part, takes in zip(self._split(self._takes_part), self.taking, strict=True):
            part.fill_(takes)
        self.in_play.copy_(self._takes_part & self.there)
        self.kept_at_0.copy_(self._takes_part & ~self.there)

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, copied."""
        return {
            "had_gradient": list(self.had_gradient),
            "there": self.there.clone(),
            "restarted": self.restarted,
        }

    def load(self, saved: dict[str, Any]) -> None:
        """Take over a state; in one of an earlier version everything counts."""
        self.had_gradient = list(saved.get("had_gradient", [True] * len(self._ranks)))
        there = saved.get("there", torch.ones_like(self.there))
        self.count(there, restarted=saved.get("restarted", False))

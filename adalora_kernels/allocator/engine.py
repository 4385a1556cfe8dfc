"""What an allocator does around the steps of a DeepSpeed engine, whose parameters are in parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..distributed.deepspeed import WholeCopies, ZeroStep, gradient_scale, zero_optimizer_of
from ..orthogonality import orth_reg_grad_
from .processes import AmongProcesses


class FollowsEngines(AmongProcesses):
    """The part of a `RankAllocator` that lets DeepSpeed's ZeRO optimizers step it.

    While it follows one, it works on whole copies of the adapters' parameters (`_copies`), the same
    on all processes: so all take the same decisions, and need not tell one another.
    """

    orth_reg_weight: float

    def look_through(self, optimizer: Any) -> Any | None:
        """Work on copies from now on if `optimizer` is DeepSpeed's, until `detach`.

        All processes have to call this together.

        Returns:
            The ZeRO optimizer; None if it is no such one.

        Raises:
            ValueError: DeepSpeed is set up so that the adapters can't be allocated, or does not
                train them.
        """
        zero = zero_optimizer_of(optimizer)
        if zero is not None and self._copies is None:
            if self._state.stages is not None:
                raise ValueError(
                    "process_group, one budget over several stages, is not possible under DeepSpeed"
                )
            if self.shrunk:
                raise ValueError(
                    "optimizer is DeepSpeed's, and the adapters have been cut by shrink(): make a "
                    "new RankAllocator before deepspeed.initialize"
                )
            self._copies = WholeCopies(self.adapters, zero)
        return zero

    def _hook_engine(self, zero: Any, allocator: Callable[[], Any]) -> ZeroStep:
        """Have the steps of `zero` call the methods below, while there is an allocator."""

        def before(optimizer: Any) -> None:
            if (alive := allocator()) is not None:
                alive._before_engine_step(optimizer)

        def within(flat: Tensor) -> None:
            if (alive := allocator()) is not None:
                alive._copies.add_to(flat)

        def after(optimizer: Any, loss_scale: float) -> None:
            if (alive := allocator()) is not None:
                alive._after_engine_step(optimizer, loss_scale)

        return ZeroStep(zero, before, within, after)

    @torch.no_grad()
    def _before_engine_step(self, zero: Any) -> None:
        """Read the gradients, which DeepSpeed's step frees, and make the regulariser's."""
        copies, learns = self._copies, self._learns_next()
        copies.follow()
        copies.drop_gradients()  # of a step that has failed
        if learns:
            copies.read_gradients(self._state.members.had_gradient)
        if self.orth_reg_weight > 0.0 and (copies.have_gradients or not learns):
            copies.read_values((0, 2))
            self.orth_reg = orth_reg_grad_(self._pairs(), self.orth_reg_weight)
            copies.take_additions(zero)

    @torch.no_grad()
    def _after_engine_step(self, zero: Any, loss_scale: float) -> None:
        """Take the step that DeepSpeed has taken, from its gradients and the new values."""
        copies, learns = self._copies, self._learns_next()
        # A step that DeepSpeed skips does not count, like one that a GradScaler skips.
        if not zero.overflow and (copies.have_gradients or not learns):
            if learns:
                copies.set_gradients(gradient_scale(zero, loss_scale, copies.device))
                if self._state.importance == "paper":
                    copies.read_values()
            self._step(self.global_step + 1, None)
        copies.drop_gradients()

    def _learns_next(self) -> bool:
        """Whether the next step needs gradients."""
        return not self.frozen and self.global_step + 1 < self.schedule.final_step

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        """lora_A and lora_B of the adapters that the model has."""
        parameters = self._parameters()
        triples = zip(self.adapters, parameters[::3], parameters[2::3], strict=True)
        return [(A, B) for adapter, A, B in triples if not adapter.is_deleted]

    def _step(self, global_step: int, grad_scale: Tensor | None) -> int:
        """What `RankAllocator.step` does when its arguments have been checked."""
        raise NotImplementedError

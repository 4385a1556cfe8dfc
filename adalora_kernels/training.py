"""What the callbacks for transformers' Trainer and for Lightning do alike."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from . import peft
from .adapters import Adapter
from .allocator import LOG_PREFIX, RankAllocator
from .checks import as_int
from .starts import check_start, start_adapters_, start_of

# The total_step that a callback has put into an allocator's schedule, and what its user had there.
_replaced: weakref.WeakKeyDictionary[RankAllocator, tuple[int, int | None]] = (
    weakref.WeakKeyDictionary()
)


class AllocatingCallback:
    """Holds the allocator of the model that is being trained, for as long as it is.

    Args:
        allocator: for models that are not PEFT's; by default the model's own, from its config.
        total_step: the steps of the schedule; by default as `fit_schedule` finds it.
        start: "lora" to give new adapters of PEFT's the start of LoRA, "paper" to leave them.

    Raises:
        TypeError: allocator is not a RankAllocator, or total_step no number.
        ValueError: total_step is not a whole number of at least 1; or start is another one, or
            "lora" beside an allocator.
    """

    def __init__(self, allocator: RankAllocator | None, total_step: int | None, start: str) -> None:
        if isinstance(allocator, peft.ApplyReport):
            raise TypeError("allocator is an ApplyReport: give AdaLoraCallback(report.allocator)")
        if allocator is not None and not isinstance(allocator, RankAllocator):
            raise TypeError(f"allocator must be a RankAllocator, got {type(allocator).__name__}")
        self.allocator = allocator
        self.total_step = None if total_step is None else as_int("total_step", total_step, 1)
        self.start = check_start(start)
        if allocator is not None and start != "paper":
            raise ValueError(
                f"start={start!r} is for a PEFT model that the callback takes over: where there is "
                "an allocator, give start to SVDLinear or to peft.apply"
            )
        self._training: RankAllocator | None = None

    def __getattr__(self, name: str) -> Any:
        # Both callbacks have one name, so that the wrong one is soon imported.
        raise AttributeError(
            f"the AdaLoraCallback of {type(self).__module__} has no attribute {name!r}: "
            "transformers' Trainer takes that of adalora_kernels.trainer, Lightning's that of "
            "adalora_kernels.lightning"
        )

    def _take_over(self, model: nn.Module) -> None:
        """Make a PEFT model ours on which nobody has called `peft.apply`."""
        if self.allocator is None and peft.is_adalora(model):
            allocator = peft.apply(model).allocator
            if allocator is None or self.start == "paper":
                return
            adapters = _pefts_adapters(allocator)
            if start_of(adapters) is not None:  # Otherwise it may be resumed: `_begin` knows.
                start_adapters_(adapters, self.start)

    def _allocator_for(self, model: nn.Module) -> RankAllocator:
        """The allocator for `model`, which is taken over if nobody has done so."""
        allocator = self.allocator or peft.allocator_of(model)
        if allocator is None:
            try:
                allocator = peft.apply(model).allocator
            except TypeError as error:
                raise ValueError(
                    f"model has no AdaLoRA adapter of PEFT ({error}); for other layers give "
                    "AdaLoraCallback(allocator) a RankAllocator"
                ) from error
        if allocator is None:
            raise ValueError("model has no trainable AdaLoRA adapter, only one for inference")
        return allocator

    def _begin(
        self,
        allocator: RankAllocator,
        optimizers: Iterable[torch.optim.Optimizer],
        steps: int | None,
        *,
        state: dict[str, Any] | None = None,
        continues: bool = False,
    ) -> None:
        """Bring the allocator to where the training is, and attach it to the optimizers.

        Args:
            allocator: the allocator.
            optimizers: those that have its adapters' parameters.
            steps: of the whole training; None if they are not known.
            state: the allocator's state to go on from.
            continues: whether the allocator is already where the training goes on.
        """
        optimizers = list(optimizers)
        allocator.detach()  # from an optimizer of another training, or one that a user has chosen
        engines = [allocator.look_through(optimizer) for optimizer in optimizers]
        # DeepSpeed has taken over the values that the model had when the engine was made.
        if state is None and not continues and not any(engines):
            self._give_start(allocator)
        if state is None and not continues and allocator.shrunk:
            warnings.warn(
                f"AdaLoRA's ranks are final ({sum(allocator.ranks().values())} triplets), because "
                "the model has been shrunk: this training goes on with them, and prunes nothing",
                stacklevel=2,
            )
        else:
            fit_schedule(allocator, self.total_step, steps)
            if state is not None:
                allocator.load_state_dict(state)
            elif not continues and allocator.begun:
                allocator.restart()
        try:
            for optimizer in optimizers:
                allocator.attach(optimizer)
        except BaseException:
            allocator.detach()
            raise
        self._training = allocator
        if isinstance(allocator, peft.PeftRankAllocator):
            allocator.saves_all = True

    def _give_start(self, allocator: RankAllocator) -> None:
        """Give a run that begins its start, unless it goes on with what the run before has left.

        Raises:
            ValueError: the adapters have been trained or loaded, and not in a run before this.
        """
        if self.start == "paper":
            return
        adapters = _pefts_adapters(allocator)
        if not (allocator.begun and start_of(adapters) is None):
            start_adapters_(adapters, self.start)

    def _catch_up(self, step: int) -> None:
        """Count a step that did not reach the optimizer, because gradients overflowed."""
        if self._training is not None and self._training.global_step < step:
            self._training.skip(step)

    def _end(self) -> None:
        """Leave the optimizers. Without effect if there is no training."""
        allocator, self._training = self._training, None
        if allocator is not None:
            allocator.detach()
            if isinstance(allocator, peft.PeftRankAllocator):
                allocator.saves_all = False


def _pefts_adapters(allocator: RankAllocator) -> list[Adapter]:
    """Those of PEFT's adapter. Layers of the user's own beside them have a start of their own."""
    return [adapter for adapter in allocator.adapters_left if adapter.key is not None]


def logs_of(allocator: RankAllocator) -> dict[str, int | float]:
    """Budget, ranks, skipped steps and the regulariser, for logs. Reads the device."""
    summary = allocator.summary()
    logs = {LOG_PREFIX + key: summary[key] for key in ("budget", "total_rank", "skipped_steps")}
    if allocator.orth_reg is not None:
        logs[LOG_PREFIX + "orth_reg"] = allocator.orth_reg.item()
    return logs


def written_total_step(allocator: RankAllocator) -> int | None:
    """The total_step that the user has written, where a callback has used another one since."""
    current = allocator.schedule.total_step
    used, written = _replaced.get(allocator, (None, None))
    return written if used is not None and used == current else current


def fit_schedule(allocator: RankAllocator, total_step: int | None, steps: int | None) -> None:
    """Give the allocator's schedule the total_step with which it comes to its end.

    That is what the user has said for this training (`total_step`); or else what stands in the
    schedule, but the training's `steps` where that is None, or more, because the target budget
    would not be reached. If it is less than `steps`, or more, a warning says so.

    Raises:
        ValueError: there is no step between tinit and tfinal, or no number at all.
    """
    written = written_total_step(allocator)
    if total_step is not None:
        _set_total_step(allocator, total_step, written, f"AdaLoraCallback(total_step={total_step})")
    elif steps is not None and (written is None or written > steps):
        _set_total_step(allocator, steps, written, f"this training of {steps} steps")
        if written is not None:
            warnings.warn(
                f"AdaLoRA's total_step is {written}, but this training has {steps} steps, which "
                f"is used; AdaLoraCallback(total_step={written}) would not come to the target "
                "budget",
                stacklevel=2,
            )
    elif written is None:
        raise ValueError(
            "AdaLoRA's total_step is None, and how many optimizer steps this training has is not "
            "known: give AdaLoraCallback(total_step=...)"
        )
    else:
        _set_total_step(allocator, written, written, f"total_step={written}")
        if steps is not None and written < steps:
            warnings.warn(
                f"AdaLoRA's total_step is {written}, but this training has {steps} steps: the "
                f"ranks are final from step {allocator.schedule.final_step} on (tfinal is "
                f"{allocator.schedule.tfinal}). If that is meant, say so by "
                f"AdaLoraCallback(total_step={written})",
                stacklevel=2,
            )


def _set_total_step(
    allocator: RankAllocator, total_step: int, written: int | None, source: str
) -> None:
    schedule = allocator.schedule
    try:
        allocator.set_total_step(total_step)
    except ValueError as error:
        raise ValueError(
            f"{source} leaves no step for AdaLoRA's pruning, which is to begin after tinit="
            f"{schedule.tinit} steps and to end tfinal={schedule.tfinal} steps before the last; "
            f"the schedule's own total_step is {written}"
        ) from error
    _replaced[allocator] = total_step, written

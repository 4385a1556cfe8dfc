"""Warns where an optimizer trains adapters and nobody steps their allocator."""

from __future__ import annotations

import functools
import sys
import warnings
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from ..distributed.engines import refuse_deepspeed
from .steps import Steps

if TYPE_CHECKING:
    from .allocator import RankAllocator

# Everyone whose adapters an optimizer may train.
_allocators: weakref.WeakSet[RankAllocator] = weakref.WeakSet()
_steps = Steps()


class Reminder:
    """Counts the optimizer steps since an allocator's last one.

    An allocator has to take its turn in every step: in a hand-written loop it comes after the
    optimizer's. So there is a lapse when one optimizer has stepped twice. Each is counted for
    itself, because one may be a step of the other (SAM). Whoever is gone is counted with all.
    """

    def __init__(self) -> None:
        self._counts: weakref.WeakKeyDictionary[torch.optim.Optimizer, int]
        self._counts = weakref.WeakKeyDictionary()
        self._total = 0
        self._has_warned = False
        # What each optimizer has of the adapters, and what it was looked up for.
        self._held: weakref.WeakKeyDictionary[torch.optim.Optimizer, tuple[Any, list[Tensor]]]
        self._held = weakref.WeakKeyDictionary()

    def allocator_stepped(self) -> None:
        """Begin to count anew."""
        if self._total:
            self._counts.clear()
            self._total, self._has_warned = 0, False

    def optimizer_stepped(self, optimizer: torch.optim.Optimizer, allocator: RankAllocator) -> bool:
        """Count a step, if the optimizer has trained a lora_E; returns whether to warn of it."""
        if not any(p.grad is not None for p in self._held_by(optimizer, allocator)):
            return False
        self._total += 1
        self._counts[optimizer] = self._counts.get(optimizer, 0) + 1
        if self._has_warned or not self.has_lapsed(optimizer):
            return False
        self._has_warned = True
        return True

    def has_lapsed(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether this optimizer, or others that are gone, have stepped twice."""
        own = self._counts.get(optimizer, 0)
        gone = self._total - sum(self._counts.values())
        return own + gone > 1

    def _held_by(self, optimizer: torch.optim.Optimizer, allocator: RankAllocator) -> list[Tensor]:
        """Each lora_E in the optimizer, without a search in every step."""
        first, groups = _first_lora_E(allocator), optimizer.param_groups
        if first is None:
            return []
        looked_up_for = sum(len(group["params"]) for group in groups), first
        known = self._held.get(optimizer)
        if known is None or known[0][0] != looked_up_for[0] or known[0][1] is not looked_up_for[1]:
            own = {id(adapter.lora_E) for adapter in allocator.adapters}
            held = [p for group in groups for p in group["params"] if id(p) in own]
            known = self._held[optimizer] = looked_up_for, held
        return known[1]


def expect_steps(allocator: RankAllocator) -> None:
    """Warn from now on when an optimizer steps twice over its adapters and the allocator doesn't.

    Every lapse is warned of once, when it begins.
    """
    _allocators.add(allocator)
    _watch_optimizers()


@functools.cache
def _watch_optimizers() -> None:
    # For every optimizer, because nobody says which one it is going to be; and once for all:
    # PyTorch can't remove such a hook while it runs the hooks.
    register_optimizer_step_pre_hook(_before_optimizer_step)
    register_optimizer_step_post_hook(_after_optimizer_step)


def _before_optimizer_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if "deepspeed" in sys.modules:
        _refuse_deepspeed(optimizer)
    _steps.begins(optimizer)


def _refuse_deepspeed(optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError if DeepSpeed has put an optimizer in the place of an attached one.

    That is where its config has an optimizer: the user's, and its hooks, are never called.
    """
    for allocator in tuple(_allocators):
        waits = allocator.was_attached and not allocator.follows(optimizer)
        if waits and not allocator.is_of_engine:
            adapter = allocator.adapters[0]
            refuse_deepspeed([(adapter, adapter.parameters)])


def _after_optimizer_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if not _steps.ends(optimizer):
        return
    for allocator in tuple(_allocators):
        if allocator.shrunk or allocator.follows(optimizer):
            continue
        if allocator.reminder.optimizer_stepped(optimizer, allocator) and not any(
            _has_taken_its_place(other, allocator, optimizer) for other in _allocators
        ):
            warnings.warn(
                "AdaLoRA is training as plain LoRA: " + _what_is_missing(allocator), stacklevel=2
            )


def _has_taken_its_place(
    other: RankAllocator, allocator: RankAllocator, optimizer: torch.optim.Optimizer
) -> bool:
    """Whether another allocator takes care of the same adapters."""
    return (
        other is not allocator
        and _first_lora_E(other) is _first_lora_E(allocator)
        and (other.follows(optimizer) or not other.reminder.has_lapsed(optimizer))
    )


def _first_lora_E(allocator: RankAllocator) -> Tensor | None:
    """Return what tells these adapters from others; None once they have been deleted."""
    try:
        return allocator.adapters[0].lora_E
    except ValueError:
        return None


def _what_is_missing(allocator: RankAllocator) -> str:
    if allocator.attached:
        return (
            "an optimizer has stepped twice that the rank allocator is not attached to, only to "
            "another one. Call allocator.attach(optimizer) for each optimizer that trains the "
            "adapters"
        )
    if allocator.was_attached:
        return (
            "the optimizer that the rank allocator was attached to is gone, and another one has "
            "stepped twice. Call allocator.attach(optimizer) for each new optimizer"
        )
    return (
        "the optimizer has stepped twice, but nobody has stepped the rank allocator. In a Trainer "
        "add callbacks=[AdaLoraCallback()], transformers' from adalora_kernels.trainer, "
        "Lightning's from adalora_kernels.lightning; elsewhere call allocator.attach(optimizer), "
        "or update_and_allocate(step) in every step"
    )

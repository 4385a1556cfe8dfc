"""Warns where an optimizer trains adapters and nobody steps their allocator."""

from __future__ import annotations

import functools
import warnings
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

if TYPE_CHECKING:
    from .allocator import PeftRankAllocator

# The allocators that nobody has stepped yet, each with the optimizer steps that it has missed.
_missed_steps: weakref.WeakKeyDictionary[PeftRankAllocator, int] = weakref.WeakKeyDictionary()


def expect_steps(allocator: PeftRankAllocator) -> None:
    """Warn if an optimizer steps twice over the allocator's adapters before the allocator does."""
    _missed_steps[allocator] = 0
    _watch_optimizers()


@functools.cache
def _watch_optimizers() -> None:
    # For every optimizer, because nobody says which one it is going to be; and once for all:
    # PyTorch can't remove such a hook while it runs the hooks.
    register_optimizer_step_post_hook(_after_optimizer_step)


def _after_optimizer_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for allocator, missed in list(_missed_steps.items()):
        if allocator.global_step > 0 or allocator.attached:
            del _missed_steps[allocator]
            continue
        lora_E = allocator.adapters[0].lora_E
        if not any(p is lora_E for group in optimizer.param_groups for p in group["params"]):
            continue
        # In a hand-written loop the allocator's turn comes after the first.
        _missed_steps[allocator] = missed + 1
        if missed == 1:
            del _missed_steps[allocator]
            warnings.warn(
                "AdaLoRA is training as plain LoRA: the optimizer has stepped twice, but nobody "
                "has stepped the rank allocator. In a transformers Trainer add "
                "callbacks=[adalora_kernels.trainer.AdaLoraCallback()]; elsewhere call "
                "allocator.attach(optimizer), or update_and_allocate(step) in every step",
                stacklevel=2,
            )

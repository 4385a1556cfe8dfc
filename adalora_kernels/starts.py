"""What an adapter's parameters are before the first step, and how fast it moves from there.

Both starts have ΔW = scaling · lora_B · diag(lora_E) · lora_A = 0 exactly.

| start | lora_A (r, in) | lora_E (r, 1) | lora_B (out, r) |
|---|---|---|---|
| "paper" (loralib, PEFT's AdaLoRA) | normal, deviation σ = 0.02 | 0 | normal, deviation σ |
| "lora" (LoRA, with lora_E beside it) | uniform in ±1/√in (Kaiming, a = √5) | 1 | 0 |

Adam's first steps change every entry that has a gradient by the learning rate η, whatever the
gradient's size. What changes at first is lora_E for "paper" and lora_B for "lora"; a step changes
the norm of ΔW by

    "paper":  scaling · η · √r · σ² · √(in · out)
    "lora":   scaling · η · √r · √(out / 3)

which is 1 / (σ² · √(3 · in)) times as much: 74 times for in = 384, 23 times for in = 4096. So
with "paper" the loss stands still at first. Then it falls faster and faster: once the entries have
moved by u in all, those of lora_A and lora_B are about √(σ² + u²) in size, and lora_E is u. So both
starts have moved ΔW equally far when σ² + u² = 1 / √(3 · in), that is, after

    u / η = √(1 / √(3 · in) - σ²) / η

steps (`slow_path`). This leaves out how often gradients change their sign, and so is short.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .adapters import Adapter

STARTS = ("paper", "lora")
_DEVIATION = 0.02


def check_start(start: object) -> str:
    """Return `start`; ValueError if it is neither "paper" nor "lora"."""
    if not isinstance(start, str) or start not in STARTS:
        raise ValueError(f"start must be 'paper' or 'lora', got {start!r}")
    return start


@torch.no_grad()
def start_(lora_A: Tensor, lora_E: Tensor, lora_B: Tensor, start: str) -> None:
    """Write a start into one adapter, with torch's global random numbers.

    Args:
        lora_A, lora_E, lora_B: (r, in), (r, 1) and (out, r), of any floating dtype and device.
        start: "paper" or "lora".
    """
    if start == "paper":
        nn.init.zeros_(lora_E)
        nn.init.normal_(lora_A, mean=0.0, std=_DEVIATION)
        nn.init.normal_(lora_B, mean=0.0, std=_DEVIATION)
        return
    if lora_A.numel() > 0:  # Of a tensor without entries torch would warn.
        nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
    nn.init.ones_(lora_E)
    nn.init.zeros_(lora_B)


def start_of(adapters: Sequence[Adapter]) -> str | None:
    """Which start the adapters of a model stand at. Reads the device.

    Returns:
        "lora" if every lora_E is 1 and every lora_B 0; "paper" if every lora_E is 0, or some
        adapters stand at the one and some at the other start; None if any is at neither, because
        it has been trained or loaded, or has no values yet (on the meta device), or there is none.
    """
    if not adapters or any(p.is_meta for adapter in adapters for p in adapter.parameters):
        return None
    # One of rank 0 stands at both.
    starts = {_start_of(*a.parameters) for a in adapters if len(a.lora_E) > 0}
    if None in starts:
        return None
    return "lora" if starts == {"lora"} else "paper"


def start_adapters_(adapters: Sequence[Adapter], start: str) -> None:
    """Give the adapters of a model a start. Reads the device.

    "paper" leaves them as they are: whoever has made them has given them that start. "lora"
    leaves those alone that stand at it already, so that doing it twice changes nothing.

    Raises:
        ValueError: start is "lora", and an adapter has been trained or loaded, or is on the meta
            device. Nothing has been changed then.
    """
    if start == "paper":
        return
    # All are looked at before any is written to: parameters may be tied.
    fresh = []
    for adapter in adapters:
        if any(p.is_meta for p in adapter.parameters):
            raise ValueError(
                f"start={start!r} needs adapters with values, and {adapter.name} is on the meta "
                "device: give it the start when it has been moved to another one"
            )
        stands_at = _start_of(*adapter.parameters)
        if stands_at is None:
            raise ValueError(
                f"start={start!r} is for adapters that are new, and {adapter.name} has been "
                "trained or loaded: leave start out to go on with its values"
            )
        if stands_at != start:
            fresh.append(adapter)
    for adapter in fresh:
        start_(*adapter.parameters, start)


def _start_of(lora_A: Tensor, lora_E: Tensor, lora_B: Tensor) -> str | None:
    if not lora_E.any():
        return "paper"
    return "lora" if bool((lora_E == 1).all()) and not lora_B.any() else None


def slow_path(in_features: int) -> float:
    """By how much Adam has to move each entry until "paper" has moved ΔW as far as "lora" has.

    Divided by the learning rate it is a number of steps; see the arithmetic above.

    Args:
        in_features: the columns of lora_A.
    """
    return math.sqrt(1 / math.sqrt(3 * in_features) - _DEVIATION**2)

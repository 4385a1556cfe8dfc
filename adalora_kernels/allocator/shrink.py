"""Cutting pruned triplets out of parameters, gradients and optimizer state."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import Adapter


@torch.no_grad()
def shrink_(
    adapters: list[Adapter], masks: Iterable[Tensor], optimizer: torch.optim.Optimizer | None
) -> None:
    """Keep of each adapter the triplets that are true in its mask (r,) bool. Reads the device.

    Raises:
        ValueError: the optimizer holds state that can't be cut to a subset of the triplets.
            Nothing is changed.
    """
    states: Any = {} if optimizer is None else optimizer.state
    for adapter in adapters:
        for parameter in adapter.parameters:
            _check_state(adapter, parameter, states.get(parameter, {}))
    for adapter, mask in zip(adapters, masks, strict=True):
        alive = mask.nonzero().squeeze(1)
        for parameter, dim in zip(adapter.parameters, (0, 0, 1), strict=True):
            _cut_(parameter, states.get(parameter, {}), dim, alive)
        adapter.set_rank(alive.numel())
        adapter.set_mask(None)


def _check_state(adapter: Adapter, parameter: nn.Parameter, state: dict[str, Any]) -> None:
    for key, value in state.items():
        if isinstance(value, Tensor) and value.numel() > 1 and value.shape != parameter.shape:
            raise ValueError(
                f"optimizer state {key!r} of {adapter.name} has shape {tuple(value.shape)}, "
                f"its parameter {tuple(parameter.shape)}: it can't be cut to the live triplets"
            )


def _cut_(parameter: nn.Parameter, state: dict[str, Any], dim: int, alive: Tensor) -> None:
    """Keep the `alive` indices along `dim` of a parameter, its gradient and its optimizer state."""
    shape, grad = parameter.shape, parameter.grad
    parameter.grad = None
    parameter.data = parameter.data.index_select(dim, alive)
    if grad is not None:
        parameter.grad = grad.index_select(dim, alive)
    for key, value in state.items():
        # Step counters and other scalars have a shape of their own.
        if isinstance(value, Tensor) and value.shape == shape and value.dim() > 0:
            state[key] = value.index_select(dim, alive)

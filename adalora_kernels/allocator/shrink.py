"""Cutting pruned triplets out of parameters, gradients and optimizer state."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import Adapter

# Optimizers whose update of an entry depends on more than that entry's own gradients and state.
_COUPLING = tuple(
    getattr(torch.optim, name)
    for name in ("Adafactor", "LBFGS", "Muon")
    if hasattr(torch.optim, name)
)


@torch.no_grad()
def shrink_(
    adapters: Sequence[Adapter],
    masks: Iterable[Tensor],
    optimizers: Iterable[torch.optim.Optimizer],
) -> None:
    """Keep of each adapter the triplets that are true in its mask (r,) bool. Reads the device.

    Raises:
        ValueError: an optimizer holds state that can't be cut to a subset of the triplets.
            Nothing is changed.
    """
    states: list[Any] = []
    for optimizer in optimizers:
        if optimizer.state and isinstance(optimizer, _COUPLING):
            raise ValueError(
                f"optimizer is a {type(optimizer).__name__}, whose state can't be cut to the live "
                "triplets: go on with a new one after shrink(), or take another kind"
            )
        if not any(optimizer.state is state for state in states):  # that of what it wraps
            states.append(optimizer.state)
    for adapter in adapters:
        for parameter in adapter.parameters:
            for state in states:
                _check_state(adapter, parameter, state.get(parameter, {}))
    for adapter, mask in zip(adapters, masks, strict=True):
        alive = mask.nonzero().squeeze(1)
        for parameter, dim in zip(adapter.parameters, (0, 0, 1), strict=True):
            _cut_(parameter, [state.get(parameter, {}) for state in states], dim, alive)
        adapter.set_rank(alive.numel())


def _check_state(adapter: Adapter, parameter: nn.Parameter, state: dict[str, Any]) -> None:
    for key, value in state.items():
        if isinstance(value, Tensor) and value.numel() > 1 and value.shape != parameter.shape:
            raise ValueError(
                f"optimizer state {key!r} of {adapter.name} has shape {tuple(value.shape)}, "
                f"its parameter {tuple(parameter.shape)}: it can't be cut to the live triplets"
            )


def _cut_(
    parameter: nn.Parameter, states: Iterable[dict[str, Any]], dim: int, alive: Tensor
) -> None:
    """Keep the `alive` indices along `dim` of a parameter, its gradient and its optimizer state."""
    shape, grad, alive = parameter.shape, parameter.grad, alive.to(parameter.device)
    parameter.grad = None
    parameter.data = parameter.data.index_select(dim, alive)
    if grad is not None:
        parameter.grad = grad.index_select(dim, alive)
    for state in states:
        for key, value in state.items():
            # Step counters and other scalars have a shape of their own.
            if isinstance(value, Tensor) and value.shape == shape and value.dim() > 0:
                state[key] = value.index_select(dim, alive)

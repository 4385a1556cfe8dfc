"""Checks of arguments that several modules share."""

from __future__ import annotations

import torch
from torch import Tensor


def shape_of(t: Tensor) -> tuple[int, ...]:
    """Return the shape as messages print it, without the name of torch's class."""
    return tuple(t.shape)


def check_floating(**tensors: Tensor | None) -> None:
    """Raise TypeError if one of them is no floating point tensor; only `bias` may be None."""
    for name, t in tensors.items():
        if t is None and name == "bias":
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
        if not t.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {t.dtype}")


def check_weight(name: str, weight: float) -> None:
    """Raise TypeError or ValueError if `weight` is not a number ≥ 0."""
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise TypeError(f"{name} must be a number, got {type(weight).__name__}")
    if not weight >= 0.0:
        raise ValueError(f"{name} must be at least 0, got {weight}")


def check_int(name: str, value: object, minimum: int) -> None:
    """Raise TypeError or ValueError if `value` is not an int of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")


def check_beta(name: str, beta: object) -> None:
    """Raise TypeError or ValueError if `beta`, the decay of an average, is not in (0, 1)."""
    if isinstance(beta, bool) or not isinstance(beta, int | float):
        raise TypeError(f"{name} must be a number, got {type(beta).__name__}")
    if not 0.0 < beta < 1.0:
        raise ValueError(f"{name} must be in (0, 1), got {beta}")


def as_grad_scale(grad_scale: float | Tensor | None, device: torch.device) -> Tensor | None:
    """Return the factor from gradients to ∂L/∂w as the ops take it: one float32 on `device`.

    Raises:
        TypeError: neither a number nor a tensor.
        ValueError: a tensor of another shape, dtype or device.
    """
    if grad_scale is None:
        return None
    if isinstance(grad_scale, Tensor):
        if grad_scale.numel() != 1 or grad_scale.dtype != torch.float32:
            raise ValueError(
                "grad_scale must be one float32, "
                f"got {grad_scale.dtype} of shape {tuple(grad_scale.shape)}"
            )
        if grad_scale.device != device:
            raise ValueError(f"grad_scale must be on {device}, is on {grad_scale.device}")
        return grad_scale
    if isinstance(grad_scale, bool) or not isinstance(grad_scale, int | float):
        raise TypeError(f"grad_scale must be a number or a tensor, got {type(grad_scale).__name__}")
    return torch.full((1,), grad_scale, dtype=torch.float32, device=device)

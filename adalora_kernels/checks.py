"""Checks of arguments that several modules share."""

from __future__ import annotations

from typing import Any

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


def as_int(name: str, value: object, least: int) -> int:
    """Return `value` as a plain int of at least `least`.

    Args:
        name: the argument's name, for messages.
        value: an int; a NumPy or 0-d tensor integer; or a float that is a whole number, such as
            24 / 2. A tensor on a device is read.
        least: the smallest that is allowed.

    Raises:
        TypeError: it is no number (bool is none).
        ValueError: it is not a whole number, or less than `least`.
    """
    number = _as_number(name, value, "an int")
    if isinstance(number, float):
        if not number.is_integer():
            raise ValueError(f"{name} must be a whole number, got {number}")
        number = int(number)
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number


def as_float(name: str, value: object) -> float:
    """Return `value` as a plain float.

    Args:
        name: the argument's name, for messages.
        value: a float or an int; or a real number of NumPy's or in a 0-d tensor. A tensor on a
            device is read.

    Raises:
        TypeError: it is no real number (bool is none).
    """
    return float(_as_number(name, value, "a number"))


def as_weight(name: str, value: object) -> float:
    """Return `value` as a plain float ≥ 0; raises as `as_float`, and ValueError below 0 or NaN."""
    weight = as_float(name, value)
    if not weight >= 0.0:
        raise ValueError(f"{name} must be at least 0, got {weight}")
    return weight


def as_beta(name: str, value: object) -> float:
    """Return `value`, the decay of an average, as a plain float; ValueError if not in (0, 1)."""
    beta = as_float(name, value)
    if not 0.0 < beta < 1.0:
        raise ValueError(f"{name} must be in (0, 1), got {beta}")
    return beta


def _as_number(name: str, value: Any, what: str) -> int | float:
    """Return the plain int or float that `value` is or holds."""
    number = value
    # NumPy's scalars and 0-d arrays, and 0-d tensors, without an import of NumPy.
    if not isinstance(value, int) and getattr(value, "shape", None) == ():
        number = value.item()
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise TypeError(f"{name} must be {what}, got {_kind(value)}")
    return number


def _kind(value: Any) -> str:
    """Return the class of `value`, and what is in it where that says more."""
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    kind = type(value).__name__
    return kind if shape is None else f"{kind} of shape {tuple(shape)} and {dtype}"


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
    number = as_float("grad_scale", grad_scale)
    return torch.full((1,), number, dtype=torch.float32, device=device)

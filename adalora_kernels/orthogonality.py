"""The orthogonality regulariser of a whole model (paper, eq. 4)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import torch
from torch import Tensor, nn

from . import ops  # noqa: F401  (defines the operators that are called here)
from .adapters import Adapter, find_adapters
from .checks import as_grad_scale, check_floating, check_weight, shape_of

Pairs: TypeAlias = nn.Module | Iterable[tuple[Tensor, Tensor] | Adapter]


def orth_reg(pairs_or_model: Pairs, weight: float = 0.1, squared: bool = False) -> Tensor:
    """The orthogonality regulariser (paper, eq. 4), differentiable.

    weight · mean over all lora_A, lora_B of ‖G - I‖_F (loralib, PEFT), or the paper's
    weight · Σ ‖G - I‖²_F if `squared`; G = A·Aᵀ or Bᵀ·B.

    Args:
        pairs_or_model: (lora_A (r, in), lora_B (out, r)) pairs of floating point tensors on one
            device; adapters, such as those of a `RankAllocator`; or a model in which
            `find_adapters` finds them, which takes time. Rank 0 counts as norm 0.
        weight: the coefficient, ≥ 0.

    Returns:
        A scalar on the adapters' device, float32 (float64 for float64 adapters).

    Raises:
        TypeError: not a model or pairs of floating point tensors, or weight is not a number.
        ValueError: no pair at all, shapes or devices that do not fit, or a negative weight.
    """
    lora_A, lora_B = _pairs(pairs_or_model)
    check_weight("weight", weight)
    norms, _ = torch.ops.adalora.orth_reg(lora_A, lora_B)
    return _penalty(norms, weight, squared)


@torch.no_grad()
def orth_reg_grad_(
    pairs_or_model: Pairs,
    weight: float,
    squared: bool = False,
    *,
    grad_scale: float | Tensor | None = None,
) -> Tensor:
    """Add the gradient of `orth_reg` straight into the `.grad` of the adapters.

    To be called once per optimizer step, after the last backward and before clipping: the
    regulariser then counts once under gradient accumulation, DDP and activation checkpointing,
    and no autograd graph is built. With a GradScaler, call `scaler.unscale_(optimizer)` first, or
    give grad_scale.

    Args, raises: those of `orth_reg`. Parameters that need no gradient are left out.
        grad_scale: what ∂L/∂w is of the gradients; 1 / 1024 if the loss was multiplied by 1024. A
            number, or one float32 on the adapters' device. None: 1.

    Returns:
        The value of the regulariser, a scalar on the adapters' device; nothing is read back.
    """
    lora_A, lora_B = _pairs(pairs_or_model)
    check_weight("weight", weight)
    scale = as_grad_scale(grad_scale, lora_A[0].device)
    norms, residuals = torch.ops.adalora.orth_reg(lora_A, lora_B)
    grad_norms = 2.0 * weight * norms if squared else torch.full_like(norms, weight / len(norms))
    if scale is not None:
        grad_norms = grad_norms / scale
    targets, aside = _gradients_of(lora_A + lora_B)
    grad_A, grad_B = targets[: len(lora_A)], targets[len(lora_A) :]
    torch.ops.adalora.orth_reg_grad_(grad_norms, norms, residuals, lora_A, lora_B, grad_A, grad_B)
    for grad, part in aside:
        grad.add_(part)
    return _penalty(norms, weight, squared)


def _gradients_of(
    parameters: list[Tensor],
) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """The `.grad` of each (made where it is missing), for an op that adds to all of them at once.

    A tensor of its own stands in for that of a parameter that needs none, or is in the list
    already. In the second case (the `.grad`, what stands in for it) is in the second result.
    """
    targets, aside = [], []
    shared = len({id(parameter) for parameter in parameters}) < len(parameters)
    seen = set()
    for parameter in parameters:
        if not parameter.requires_grad:
            targets.append(torch.zeros_like(parameter))
            continue
        grad = parameter.grad
        if grad is None:
            parameter.grad = grad = torch.zeros_like(parameter)
        if shared:
            if id(parameter) in seen:
                aside.append((grad, torch.zeros_like(grad)))
                grad = aside[-1][1]
            seen.add(id(parameter))
        targets.append(grad)
    return targets, aside


def _penalty(norms: Tensor, weight: float, squared: bool) -> Tensor:
    return weight * (norms.square().sum() if squared else norms.mean())


def _pairs(pairs_or_model: Pairs) -> tuple[list[Tensor], list[Tensor]]:
    if isinstance(pairs_or_model, nn.Module):
        adapters = find_adapters(pairs_or_model)
        if not adapters:
            raise ValueError(f"no AdaLoRA adapter in this {type(pairs_or_model).__name__}")
        pairs_or_model = adapters
    elif isinstance(pairs_or_model, Tensor) or not isinstance(pairs_or_model, Iterable):
        raise TypeError(
            "pairs_or_model must be a torch.nn.Module or (lora_A, lora_B) pairs, "
            f"got {type(pairs_or_model).__name__}"
        )
    lora_A: list[Tensor] = []
    lora_B: list[Tensor] = []
    device = None
    for i, pair in enumerate(pairs_or_model):
        a: Tensor
        b: Tensor
        if isinstance(pair, Adapter):
            a, _, b = pair.parameters
        elif isinstance(pair, tuple | list) and len(pair) == 2:
            a, b = pair
            _check_pair(i, a, b)
            device = a.device if device is None else device
            if a.device != device or b.device != device:
                raise ValueError(
                    f"pairs_or_model[{i}] must be on {device} like the first pair, "
                    f"got {a.device} and {b.device}"
                )
        else:
            raise TypeError(f"pairs_or_model[{i}] must be (lora_A, lora_B), got {pair!r:.80}")
        lora_A.append(a)
        lora_B.append(b)
    if not lora_A:
        raise ValueError("pairs_or_model is empty")
    return lora_A, lora_B


def _check_pair(i: int, lora_A: Tensor, lora_B: Tensor) -> None:
    check_floating(**{f"pairs_or_model[{i}][0]": lora_A, f"pairs_or_model[{i}][1]": lora_B})
    if lora_A.dim() != 2 or lora_B.dim() != 2 or lora_A.shape[0] != lora_B.shape[1]:
        raise ValueError(
            f"pairs_or_model[{i}] must be lora_A (r, in) and lora_B (out, r), "
            f"got shapes {shape_of(lora_A)} and {shape_of(lora_B)}"
        )

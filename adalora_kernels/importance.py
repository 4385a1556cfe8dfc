"""The importance of the triplets of a whole model in few calls of torch, on any device.

Its update runs where the compiled library has no code. The definitions, which take one matrix
after the other, are `reference.importance_update_` and `reference.triplet_norms`. Here what has one
shape lies in one stack: the number of calls depends on the shapes and, beyond the size of a stack,
on the entries of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor

from .reference import flat_views

# The most that is stacked at a time: on a CPU so little that all that is made of it stays in the
# cache from one call to the next, elsewhere what keeps the memory bounded while launches are few.
_STACK_BYTES = {"cpu": 2**18}
_LARGEST_STACK_BYTES = 2**26


def importance_update_(
    params: list[Tensor],
    grads: list[Tensor | None],
    exp_avg_ipt: list[Tensor],
    exp_avg_unc: list[Tensor],
    scores: Tensor,
    skipped: Tensor,
    beta1: float,
    beta2: float,
    grad_scale: Tensor | None = None,
) -> None:
    """One step of the importance averages and the triplet scores, as `reference` defines it."""
    exp_avg_ipt, exp_avg_unc = (flat_views(avg, params) for avg in (exp_avg_ipt, exp_avg_unc))
    groups = list(_groups(params, grads))
    learning = [group for group in groups if grads[group[0]] is not None]
    if not learning:
        return
    # The extremes are finite exactly when everything is; the decision stays on the device.
    extremes = [e for group in learning for e in torch.aminmax(_stack(_of(grads, group)))]
    if grad_scale is not None:
        extremes.append(grad_scale.reshape(()))
    finite = torch.stack(extremes).isfinite().all()
    skipped.add_(~finite)
    step = finite.to(scores.dtype)
    weight_ipt, weight_unc = step * (1.0 - beta1), step * (1.0 - beta2)
    scores_of = scores.zero_().split_with_sizes([E.shape[0] for E in params[1::3]])
    for group in groups:
        w, avg_ipt, avg_unc = (_of(each, group) for each in (params, exp_avg_ipt, exp_avg_unc))
        if grads[group[0]] is not None:
            ipt = _products(w, _of(grads, group)).abs_()
            if grad_scale is not None:
                ipt.mul_(grad_scale)
            # A weight of 0 leaves an average as it was, but only against a finite end.
            ends = list(ipt.nan_to_num_().unbind())
            torch._foreach_sub_(ends, _lerp_(avg_ipt, ends, weight_ipt))
            ipt.abs_()
            _lerp_(avg_unc, ends, weight_unc)
        # Eq. (7); lora_E is, like lora_A, a matrix of r rows, but of one entry each.
        means = _products(avg_ipt, avg_unc).mean(1 if group[0] % 3 == 2 else 2)
        torch._foreach_add_([scores_of[i // 3] for i in group], means.unbind())


def triplet_norms(params: list[Tensor]) -> Tensor:
    """As `reference.triplet_norms`."""
    squares = triplet_squares(params)
    A, E, B = (torch.cat(squares[i::3]) for i in range(3))
    return A.sqrt_() * E.sqrt_() * B.sqrt_()


def triplet_squares(params: list[Tensor]) -> list[Tensor]:
    """The sum of squares of each triplet's part of each parameter.

    Args:
        params: lora_A (r, in), lora_E (r, 1) and lora_B (out, r) of each adapter in turn.

    Returns:
        A tensor (r,) for each, float64 if it is, else float32.
    """
    # What has no entry is in no group.
    result = [
        p.new_zeros(p.shape[i % 3 == 2], dtype=at_least_float32(p.dtype))
        for i, p in enumerate(params)
    ]
    for group in _groups(params, [None] * len(params)):
        own = _of(params, group)
        squares = _products(own, own).sum(1 if group[0] % 3 == 2 else 2)
        for i, part in zip(group, squares.unbind(), strict=True):
            result[i] = part
    return result


def not_finite(grads: Sequence[Tensor | None], scale: Tensor) -> Tensor:
    """Whether a gradient, or the scale of all, one float32, is inf or NaN: int32 (1,), 1 or 0.

    The gradients are on the device of the scale. Reads nothing from it.
    """
    held = [grad for grad in grads if grad is not None and grad.numel() > 0]
    norms = torch._foreach_norm(held, torch.inf) if held else []
    # What is concatenated takes the widest dtype.
    finite = torch.cat([scale, *(norm.view(1) for norm in norms)]).isfinite().all()
    return (~finite).to(torch.int32).view(1)


def scale_unless(bad: Tensor, scale: Tensor) -> Tensor:
    """The scale of the gradients, or inf, with which the update skips itself, where bad is not 0.

    Args:
        bad: what `not_finite` has found, here or anywhere.
        scale: one float32, as `grad_scale_or_1` has it.
    """
    return torch.full_like(scale, torch.inf).where(bad > 0, scale)


def grad_scale_or_1(grad_scale: Tensor | None, device: torch.device) -> Tensor:
    """The scale of the gradients, (1,) float32."""
    return torch.ones(1, device=device) if grad_scale is None else grad_scale.view(1)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, and else float32: what averages of and sums over entries are in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _groups(params: list[Tensor], grads: list[Tensor | None]) -> Iterator[list[int]]:
    """Indices of what may lie in one stack: all of one factor, one shape and the same dtypes."""
    alike: dict[tuple[int, torch.Size, torch.dtype, torch.dtype | None], list[int]] = {}
    for i, (w, g) in enumerate(zip(params, grads, strict=True)):
        if w.numel() > 0:
            key = i % 3, w.shape, w.dtype, None if g is None else g.dtype
            alike.setdefault(key, []).append(i)
    limit = _STACK_BYTES.get(params[0].device.type, _LARGEST_STACK_BYTES)
    for (_, shape, *_), members in alike.items():
        most = max(1, limit // (shape.numel() * torch.float32.itemsize))
        for start in range(0, len(members), most):
            yield members[start : start + most]


def _of(tensors: Sequence[Tensor | None], group: list[int]) -> list[Tensor]:
    return [cast(Tensor, tensors[i]) for i in group]


def _stack(tensors: list[Tensor]) -> Tensor:
    """The tensors as one (n, rows, columns), which is a view where there is but one."""
    return torch.stack(tensors) if len(tensors) > 1 else tensors[0].unsqueeze(0)


def _products(left: list[Tensor], right: list[Tensor]) -> Tensor:
    """The products of one another's entries, (n, rows, columns) in float32 or float64."""
    is_double = torch.float64 in (left[0].dtype, right[0].dtype)
    wide = torch.float64 if is_double else torch.float32
    if len(left) == 1:
        return (left[0].to(wide) * right[0]).unsqueeze(0)
    products = torch.stack(left).to(wide)
    torch._foreach_mul_(products.unbind(), right)
    return products


def _lerp_(averages: list[Tensor], ends: list[Tensor], weight: Tensor) -> list[Tensor]:
    """Move averages towards ends; returns them as they are before they are rounded to bfloat16."""
    dtype = ends[0].dtype
    is_wide = averages[0].dtype == dtype
    wide = averages if is_wide else list(_stack(averages).to(dtype).unbind())
    torch._foreach_lerp_(wide, ends, [weight.to(dtype)] * len(ends))
    if not is_wide:
        torch._foreach_copy_(averages, wide)
    return wide

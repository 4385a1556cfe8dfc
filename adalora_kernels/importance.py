"""The importance update of a whole model in a few `torch._foreach` calls, on any device.

It runs where the compiled library has no code. `reference.importance_update_` is the definition,
which takes one matrix after the other; the number of calls made here depends on how many different
shapes there are, not on how many matrices.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_B = 2  # The lists hold A_0, E_0, B_0, A_1, …: every third tensor is a lora_B.


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
    """One step of the importance averages and the triplet scores, as `reference` defines it.

    It needs memory for one more copy of the parameters in float32, and for a second one where the
    averages are bfloat16.
    """
    if all(g is None or g.numel() == 0 for g in grads):
        return
    groups = _by_shape(params, grads)
    order = [i for group in groups for i in group]
    weights, ipt, unc = ([those[i] for i in order] for those in (params, exp_avg_ipt, exp_avg_unc))
    found = [grads[i] for i in order]
    # What has no gradient only takes part in the scores.
    learning = [g is not None for g in found]
    # `entries` are the parts of the stacks that belong to the parameters: at first they hold |g|,
    # then |w·g|, then |w·g - Ī|, and in the end Ī·Ū.
    stacks, entries = _stack(
        [torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)],
        groups,
        [_wide(params[group[0]], grads[group[0]]) for group in groups],
    )
    torch._foreach_abs_(stacks)
    # The largest one is finite exactly when all are; the decision stays on the device.
    finite = (torch.stack(torch._foreach_max(stacks)) < math.inf).all()
    if grad_scale is not None:
        finite = finite & grad_scale.isfinite().all()
    skipped.add_(~finite)
    step = finite.to(scores.dtype)

    torch._foreach_mul_(entries, weights)
    torch._foreach_abs_(stacks)
    if grad_scale is not None:
        torch._foreach_mul_(stacks, grad_scale.reshape(()))
    for stack in stacks:
        # A weight of 0 leaves an average as it was, but only against a finite end.
        stack.nan_to_num_()
    ends = _where(learning, entries)
    new_ipt = _lerp_(_where(learning, ipt), ends, step * (1.0 - beta1))
    torch._foreach_sub_(ends, new_ipt)
    torch._foreach_abs_(ends)
    _lerp_(_where(learning, unc), ends, step * (1.0 - beta2))

    torch._foreach_copy_(entries, ipt)
    torch._foreach_mul_(entries, unc)
    _sum_of_means_(scores, [E.shape[0] for E in params[1::3]], stacks, groups)


def _by_shape(params: list[Tensor], grads: list[Tensor | None]) -> list[list[int]]:
    """The indices of the parameters that have entries, those together that fit into one stack."""
    groups: dict[tuple[bool, torch.Size, torch.dtype], list[int]] = {}
    for i, (w, g) in enumerate(zip(params, grads, strict=True)):
        if w.numel() > 0:
            groups.setdefault((i % 3 == _B, w.shape, _wide(w, g)), []).append(i)
    return list(groups.values())


def _wide(w: Tensor, g: Tensor | None) -> torch.dtype:
    """The dtype in which the products of a parameter and its gradient are formed."""
    is_double = w.dtype == torch.float64 or (g is not None and g.dtype == torch.float64)
    return torch.float64 if is_double else torch.float32


def _stack(
    tensors: list[Tensor], groups: list[list[int]], dtypes: list[torch.dtype]
) -> tuple[list[Tensor], list[Tensor]]:
    """(n, rows, columns) for each group, of tensors that lie in the order of the groups; views."""
    sizes = [len(group) for group in groups]
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    stacks = [
        torch.stack(tensors[start : start + size]).to(dtype)
        for start, size, dtype in zip(starts, sizes, dtypes, strict=True)
    ]
    return stacks, [view for stack in stacks for view in stack.unbind()]


def _where(learning: list[bool], tensors: list[Tensor]) -> list[Tensor]:
    return [t for t, learns in zip(tensors, learning, strict=True) if learns]


def _lerp_(averages: list[Tensor], ends: list[Tensor], weight: Tensor) -> list[Tensor]:
    """Move the averages towards the ends; returns them before they are rounded to bfloat16."""
    weights = {end.dtype: weight.to(end.dtype) for end in ends}
    wide = [a.to(end.dtype) for a, end in zip(averages, ends, strict=True)]
    torch._foreach_lerp_(wide, ends, [weights[end.dtype] for end in ends])
    if any(a is not w for a, w in zip(averages, wide, strict=True)):
        torch._foreach_copy_(averages, wide)
    return wide


def _sum_of_means_(
    scores: Tensor, ranks: list[int], stacks: list[Tensor], groups: list[list[int]]
) -> None:
    """Eq. (7), S_i = s(E_i) + mean_j s(A_ij) + mean_j s(B_ji), from the stacks of s."""
    means: dict[int, Tensor] = {}
    for stack, group in zip(stacks, groups, strict=True):
        # lora_E is like lora_A a matrix of r rows, of one entry each.
        means.update(zip(group, stack.mean(1 if group[0] % 3 == _B else 2).unbind(), strict=True))
    of_adapter = scores.zero_().split_with_sizes(ranks)
    for factor in range(3):
        mine = [i for i in means if i % 3 == factor]
        torch._foreach_add_([of_adapter[i // 3] for i in mine], [means[i] for i in mine])

"""The importance update of a whole model in `torch._foreach` calls, on any device.

It runs where the compiled library has no code. `reference.importance_update_` is the definition,
which takes one matrix after the other. The number of calls made here depends on how many different
shapes there are, and on how often the model fills a cache, but not on how many matrices it has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TypeAlias

import torch
from torch import Tensor

# Indices of parameters of one shape that may lie in one stack. The lists hold A_0, E_0, B_0, A_1, …
_Group: TypeAlias = list[int]
_B = 2

# How much of a model is worked on at a time: on a CPU what stays in the cache from one call to the
# next, elsewhere what keeps the memory bounded while there are few launches.
_BATCH_BYTES = {"cpu": 2**23}
_LARGEST_BATCH_BYTES = 2**26


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
    if all(g is None or g.numel() == 0 for g in grads):
        return
    batches = list(_batches(params, grads))
    largest = [] if grad_scale is None else [grad_scale.abs().reshape(())]
    for groups in batches:
        stacks, entries = _stack(params, grads, groups)
        torch._foreach_abs_(stacks)
        largest += torch._foreach_max(stacks)
    # The largest one is finite exactly when all are; the decision stays on the device.
    finite = (torch.stack(largest) < math.inf).all()
    skipped.add_(~finite)
    step = finite.to(scores.dtype)
    weight_ipt, weight_unc = step * (1.0 - beta1), step * (1.0 - beta2)
    parts = scores.zero_().split_with_sizes([E.shape[0] for E in params[1::3]])
    # The last batch, as a rule the only one, is in the stacks already.
    for groups in reversed(batches):
        if groups is not batches[-1]:
            stacks, entries = _stack(params, grads, groups)
        order = list(entries)
        learning = [i for i in order if grads[i] is not None]
        # At first an entry is |g| or g, then |w·g|, then |w·g - Ī|, and in the end Ī·Ū.
        torch._foreach_mul_(list(entries.values()), [params[i] for i in order])
        torch._foreach_abs_(stacks)
        if grad_scale is not None:
            torch._foreach_mul_(stacks, grad_scale.reshape(()))
        for stack in stacks:
            # A weight of 0 leaves an average as it was, but only against a finite end.
            stack.nan_to_num_()
        if learning:
            ends = [entries[i] for i in learning]
            new_ipt = _lerp_([exp_avg_ipt[i] for i in learning], ends, weight_ipt)
            torch._foreach_sub_(ends, new_ipt)
            torch._foreach_abs_(ends)
            _lerp_([exp_avg_unc[i] for i in learning], ends, weight_unc)
        torch._foreach_copy_(list(entries.values()), [exp_avg_ipt[i] for i in order])
        torch._foreach_mul_(list(entries.values()), [exp_avg_unc[i] for i in order])
        _add_means_(parts, stacks, groups)


def _wide(w: Tensor, g: Tensor | None) -> torch.dtype:
    """The dtype in which the products of a parameter and its gradient are formed."""
    is_double = w.dtype == torch.float64 or (g is not None and g.dtype == torch.float64)
    return torch.float64 if is_double else torch.float32


def _batches(params: list[Tensor], grads: list[Tensor | None]) -> Iterator[list[_Group]]:
    """All parameters that have entries, by shape, in batches that are worked on at a time."""
    by_shape: dict[tuple[bool, torch.Size, torch.dtype], _Group] = {}
    for i, (w, g) in enumerate(zip(params, grads, strict=True)):
        if w.numel() > 0:
            by_shape.setdefault((i % 3 == _B, w.shape, _wide(w, g)), []).append(i)
    limit = _BATCH_BYTES.get(params[0].device.type, _LARGEST_BATCH_BYTES)
    batch: list[_Group] = []
    room = limit
    for (_, shape, dtype), members in by_shape.items():
        size = shape.numel() * dtype.itemsize
        while members:
            fitting = max(room // size, 0 if batch else 1)
            if fitting > 0:
                batch.append(members[:fitting])
                room -= len(batch[-1]) * size
                members = members[fitting:]
            if members:
                yield batch
                batch, room = [], limit
    if batch:
        yield batch


def _stack(
    params: list[Tensor], grads: list[Tensor | None], groups: list[_Group]
) -> tuple[list[Tensor], dict[int, Tensor]]:
    """The gradients of each group as one tensor (n, rows, columns), and its views, by index.

    A parameter without a gradient has 0 there: it only takes part in the scores.
    """
    stacks: list[Tensor] = []
    entries: dict[int, Tensor] = {}
    for group in groups:
        members = [torch.zeros_like(params[i]) if (g := grads[i]) is None else g for i in group]
        stacks.append(torch.stack(members).to(_wide(params[group[0]], grads[group[0]])))
        entries.update(zip(group, stacks[-1].unbind(), strict=True))
    return stacks, entries


def _lerp_(averages: list[Tensor], ends: list[Tensor], weight: Tensor) -> list[Tensor]:
    """Move averages towards ends; returns them as they are before they are rounded to bfloat16."""
    weights = {end.dtype: weight.to(end.dtype) for end in ends}
    wide = [average.to(end.dtype) for average, end in zip(averages, ends, strict=True)]
    torch._foreach_lerp_(wide, ends, [weights[end.dtype] for end in ends])
    if any(average is not moved for average, moved in zip(averages, wide, strict=True)):
        torch._foreach_copy_(averages, wide)
    return wide


def _add_means_(parts: tuple[Tensor, ...], stacks: list[Tensor], groups: list[_Group]) -> None:
    """Eq. (7), S_i = s(E_i) + mean_j s(A_ij) + mean_j s(B_ji), the stacks holding s.

    `parts` are the scores of each adapter. They are added to factor by factor, for the same one
    must not stand twice in a list that is added to at once.
    """
    means: dict[int, Tensor] = {}
    for stack, group in zip(stacks, groups, strict=True):
        # lora_E is, like lora_A, a matrix of r rows, but of one entry each.
        means.update(zip(group, stack.mean(1 if group[0] % 3 == _B else 2).unbind(), strict=True))
    for factor in range(3):
        mine = [i for i in means if i % 3 == factor]
        if mine:
            torch._foreach_add_([parts[i // 3] for i in mine], [means[i] for i in mine])

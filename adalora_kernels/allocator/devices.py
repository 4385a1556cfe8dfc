"""What an allocator learns from adapters on several devices of one process (`device_map`)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..adapters import Adapter, triplets_there
from ..distributed.shards import any_dtensor
from ..importance import (
    at_least_float32,
    grad_scale_or_1,
    not_finite,
    scale_unless,
    triplet_norms,
)
from ..orthogonality import orth_reg_grad_
from ..reference import triplet_scores
from .shards import Shards

T = TypeVar("T")


def device_of(parameter: Tensor) -> torch.device:
    """Where a parameter is. What is on different devices is worked on apart."""
    return parameter.device


def are_apart(parameters: Sequence[Tensor]) -> bool:
    """Whether adapters are on several devices, in little time: a model is divided into few parts.

    Where the first and the last one are on the same device, all are looked at only when something
    has been moved.
    """
    return device_of(parameters[0]) != device_of(parameters[-1])


class Devices:
    """Adapters on several devices, each of which learns for itself.

    What decides about all of them is on the first adapter's device: a flag (one number per device
    and step) comes there before averages change, and the scores do in steps that prune. Nothing is
    read by the host.

    It has the methods of `Shards`. Averages are one tensor for each parameter, where that is.

    Args:
        parameters: lora_A, lora_E and lora_B of each adapter in turn.

    Raises:
        ValueError: an adapter whose parameters are on different devices.
    """

    # The scores are kept here, by device.
    count = 0

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._where = [device_of(p) for p in parameters]
        self.home = parameters[0].device
        groups: dict[torch.device, list[int]] = {}
        for i, places in enumerate(zip(*(self._where[k::3] for k in range(3)), strict=True)):
            if len(set(places)) > 1:
                raise ValueError(
                    "model must have lora_A, lora_E and lora_B of an adapter on one device, got "
                    f"{', '.join(map(str, places))}"
                )
            groups.setdefault(places[0], []).append(i)
        ranks = [lora_E.shape[0] for lora_E in parameters[1::3]]
        *starts, self._n = itertools.accumulate(ranks, initial=0)
        self._groups = list(groups.values())
        dtype = at_least_float32(parameters[0].dtype)
        self._scores: list[Tensor] = []
        self._places: list[Tensor] = []
        for adapters in self._groups:
            numbers = [starts[i] + k for i in adapters for k in range(ranks[i])]
            own = parameters[3 * adapters[0]].device
            self._scores.append(torch.zeros(len(numbers), dtype=dtype, device=own))
            self._places.append(torch.tensor(numbers, dtype=torch.int64, device=self.home))

    def holds(self, parameters: Sequence[Tensor]) -> bool:
        """Whether these parameters are where those are that this is of."""
        return self._where == [device_of(p) for p in parameters]

    def recall(self, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
        """The parameters as they are."""
        return parameters

    def parts(self, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        """What there is an average of: the parameters."""
        return parameters

    def new_averages(self, parameters: Sequence[Tensor], narrow_dtype: torch.dtype) -> list[Tensor]:
        """Zeros for each parameter, on its device."""
        dtypes = (torch.float64 if p.dtype == torch.float64 else narrow_dtype for p in parameters)
        return [
            torch.zeros(p.shape, dtype=dtype, device=p.device)
            for p, dtype in zip(parameters, dtypes, strict=True)
        ]

    def importance_update_(
        self,
        parameters: Sequence[Tensor],
        exp_avg_ipt: Sequence[Tensor],
        exp_avg_unc: Sequence[Tensor],
        scores: Tensor,
        skipped: Tensor,
        beta1: float,
        beta2: float,
        grad_scale: Tensor | None,
    ) -> None:
        """The op of that name on each device, unless there is inf or NaN on any of them.

        Args: those of the op; `scores` are not used.
        """
        grads = [p.grad if p.requires_grad else None for p in parameters]
        scale = grad_scale_or_1(grad_scale, self.home)
        bad = [
            not_finite(_of(grads, adapters), scale.to(own.device)).to(self.home)
            for adapters, own in zip(self._groups, self._scores, strict=True)
        ]
        scale = scale_unless(torch.cat(bad).amax(0, keepdim=True), scale)
        skipped.add_(~scale.isfinite())
        for adapters, own in zip(self._groups, self._scores, strict=True):
            if not any(grad is not None for grad in _of(grads, adapters)):
                continue
            torch.ops.adalora.importance_update_(
                _of(parameters, adapters),
                _of(grads, adapters),
                _of(exp_avg_ipt, adapters),
                _of(exp_avg_unc, adapters),
                own,
                torch.zeros_like(skipped, device=own.device),  # It has been counted.
                beta1,
                beta2,
                scale.to(own.device),
            )

    def scores_of(self, exp_avg_ipt: Sequence[Tensor], exp_avg_unc: Sequence[Tensor]) -> Tensor:
        """Take over the scores that follow from the averages; returns nothing, (0,)."""
        for adapters, own in zip(self._groups, self._scores, strict=True):
            own.copy_(triplet_scores(_of(exp_avg_ipt, adapters), _of(exp_avg_unc, adapters)))
        return torch.zeros(0, device=self.home)

    def together(self, scores: Tensor) -> Tensor:
        """The scores (n,) of all triplets, on the first device; `scores` are not used."""
        whole = torch.zeros(self._n, dtype=self._scores[0].dtype, device=self.home)
        for places, own in zip(self._places, self._scores, strict=True):
            whole[places] = own.to(self.home)
        return whole

    def norms(self, parameters: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """`reference.triplet_norms` (n,) of all triplets, on the first device."""
        whole = torch.zeros(self._n, dtype=dtype, device=self.home)
        for adapters, places in zip(self._groups, self._places, strict=True):
            whole[places] = triplet_norms(_of(parameters, adapters)).to(self.home, dtype)
        return whole

    def placed(self, parts: Sequence[Tensor], narrow_dtype: torch.dtype) -> list[Tensor]:
        """The averages as they are."""
        return list(parts)

    def fill_(self, parts: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Copy a value of each parameter to where it belongs."""
        for part, value in zip(parts, values, strict=True):
            part.copy_(value)

    def write_zeros_(self, lora_E: Sequence[Tensor], dead: Tensor) -> None:
        """Write 0 into the lora_E of what is dead, (n,) bool, on each device."""
        for adapters, places in zip(self._groups, self._places, strict=True):
            held = [lora_E[i] for i in adapters]
            own = dead[places].to(held[0].device)
            flat = torch.cat(held).masked_fill_(own.unsqueeze(1), 0.0)
            torch._foreach_copy_(held, flat.split_with_sizes([len(E) for E in held]))

    def there(self, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Which triplets have any value that is not 0, and which a lora_E; both (n,) bool."""
        there, nonzero = (
            torch.zeros(self._n, dtype=torch.bool, device=self.home) for _ in range(2)
        )
        for adapters, places in zip(self._groups, self._places, strict=True):
            triples = [parameters[3 * i : 3 * i + 3] for i in adapters]
            there[places] = torch.cat([triplets_there(*t) for t in triples]).to(self.home)
            lora_E = torch.cat([lora_E for _, lora_E, _ in triples])
            nonzero[places] = (lora_E != 0).squeeze(1).to(self.home)
        return there, nonzero


def _of(each: Sequence[T], adapters: Sequence[int]) -> list[T]:
    """Of something for each parameter, that of some adapters."""
    return [each[3 * i + k] for i in adapters for k in range(3)]


def layout_of(parameters: Sequence[Tensor]) -> Shards | Devices | None:
    """What knows where parts of the adapters are that are not in one place."""
    if any_dtensor(parameters):
        return Shards(parameters)
    return Devices(parameters) if len(set(map(device_of, parameters))) > 1 else None


def check_devices(parameters: Sequence[Tensor]) -> None:
    """Raise ValueError if adapters are on devices that can't be allocated together."""
    devices = {p.device for p in parameters}
    has_meta = any(device.type == "meta" for device in devices)
    if len(devices) > 1 and (has_meta or any_dtensor(parameters)):
        kind = "some of them meta" if has_meta else "sharded"
        raise ValueError(
            "model must have all its adapters on one device, or on several of one process, got "
            f"{', '.join(sorted(map(str, devices)))}, {kind}"
        )


def regularise_(adapters: Sequence[Adapter], weight: float, grad_scale: Tensor | None) -> Tensor:
    """`orth_reg_grad_` of adapters that may be on several devices; its value is on the first."""
    groups: dict[torch.device, list[Adapter]] = {}
    for adapter in adapters:
        groups.setdefault(device_of(adapter.lora_E), []).append(adapter)
    if len(groups) < 2:
        return orth_reg_grad_(adapters, weight, grad_scale=grad_scale)
    values = []
    for group in groups.values():
        device = group[0].lora_E.device
        scale = None if grad_scale is None else grad_scale.to(device)
        share = weight * len(group) / len(adapters)
        values.append(orth_reg_grad_(group, share, grad_scale=scale).to(adapters[0].lora_E.device))
    return torch.stack(values).sum()

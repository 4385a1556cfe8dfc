"""Decides which triplets of an adapter go to a file, and what its config says about them.

PEFT's `save_pretrained`, the Trainer's checkpoints and `adalora_kernels.export` all ask here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import AdaLoraConfig
from torch import Tensor

from ..adapters import Adapter
from ..allocator import RankAllocator

# The three parameters of an adapter, and the dimension in which each counts its triplets.
FACTORS = (("lora_A", 0), ("lora_E", 0), ("lora_B", 1))


@dataclass(frozen=True)
class AdaptedLayer:
    """One layer of an adapter, and the r triplets that its run has begun with.

    Attributes:
        adapter: where its parameters are.
        alive: (r,) bool on the CPU: whether each is not pruned.
        stored: (n,) int64 on the CPU, ascending: those that the parameters still hold. They are
            all r until `shrink` drops the pruned ones.
    """

    adapter: Adapter
    alive: Tensor
    stored: Tensor

    @property
    def name(self) -> str:
        """The name of the layer in the base model."""
        return module_name(self.adapter.name, self.adapter.key)

    @property
    def module(self) -> Any:
        """The layer itself: of PEFT, or ours."""
        return self.adapter.module

    def chosen(self, *, checkpoint: bool) -> Tensor:
        """(r,) bool on the CPU: the triplets that a file gets. Reads the device.

        A checkpoint, from which the training goes on, gets all. An adapter for use gets those that
        are alive, and those that were pruned but add something all the same: between two prunings
        the optimizer moves some of them away from 0 again.
        """
        if checkpoint or bool(self.alive.all()):
            return torch.ones_like(self.alive)
        chosen = self.alive.clone()
        chosen[self.stored] |= lora_E_in_use(self.adapter).squeeze(1) != 0
        return chosen

    def select(self, part: Tensor, dim: int, chosen: Tensor) -> Tensor:
        """Cut one of the adapter's three parameters to the chosen triplets.

        Args:
            part: the parameter, or a copy of it: n entries along `dim`, on any device.
            dim: the dimension that counts the triplets.
            chosen: (r,) bool on the CPU. What is chosen but no longer stored is filled with zeros.
        """
        numbers = chosen.nonzero().squeeze(1)
        if torch.equal(numbers, self.stored):
            return part
        if len(self.stored) < len(self.alive):
            shape = list(part.shape)
            shape[dim] = len(self.alive)
            whole = part.new_zeros(shape)
            part = whole.index_copy_(dim, self.stored.to(part.device), part.detach())
        return part.index_select(dim, numbers.to(part.device))


def adapted_layers(adapters: list[Adapter], allocator: RankAllocator | None) -> list[AdaptedLayer]:
    """The layer of each adapter. Reads the device.

    Without an allocator, triplets with lora_E = 0 count as pruned; but if that is all of them, the
    adapter is new and nothing is.

    Args:
        adapters: adapters of one model.
        allocator: the allocator of some or all of them. All triplets of the others count as
            pruned, so that a file gets those that add something.

    Raises:
        ValueError: the allocator is for none of the adapters, or for other ranks.
    """
    if allocator is None:
        nonzero = [lora_E_in_use(adapter).squeeze(1) != 0 for adapter in adapters]
        is_new = not any(bool(part.any()) for part in nonzero)
        return [
            AdaptedLayer(adapter, part | is_new, torch.arange(len(part)))
            for adapter, part in zip(adapters, nonzero, strict=True)
        ]
    patterns = {
        (id(adapter.module), adapter.key): torch.tensor(pattern, dtype=torch.bool)
        for adapter, pattern in zip(
            allocator.adapters, allocator.rank_pattern.values(), strict=True
        )
    }
    keys = [(id(adapter.module), adapter.key) for adapter in adapters]
    if patterns.keys().isdisjoint(keys):
        raise ValueError("allocator is for another model or adapter")
    result = []
    for adapter, key in zip(adapters, keys, strict=True):
        rows = adapter.lora_E.shape[0]
        alive = patterns.get(key, torch.zeros(rows, dtype=torch.bool))
        # After shrink() the parameters hold only what is alive.
        stored = torch.arange(rows) if len(alive) == rows else alive.nonzero().squeeze(1)
        layer = AdaptedLayer(adapter, alive, stored)
        if len(stored) != rows:
            raise ValueError(
                f"allocator is for {len(stored)} triplets of {layer.name}, it has {rows}"
            )
        result.append(layer)
    return result


def lora_E_in_use(adapter: Adapter) -> Tensor:
    """lora_E (n, 1) on the CPU as the layer uses it: 0 where a frozen pattern masks it."""
    suffix = "" if adapter.key is None else f"_{adapter.key}"
    mask: Tensor | None = getattr(adapter.module, f"_mask{suffix}", None)
    lora_E = adapter.lora_E.detach().cpu()
    return lora_E if mask is None else lora_E.masked_fill(~mask.cpu().unsqueeze(1), 0.0)


def module_name(name: str, adapter_name: str | None) -> str:
    """The name of the layer whose lora_E is called `name`, with the adapter's name or without."""
    name = name.removesuffix(f".{adapter_name}")
    return "" if name == "lora_E" else name.removesuffix(".lora_E")


def by_module(
    rank_pattern: dict[str, Any] | None, adapter_name: str | None
) -> dict[str, list[bool]]:
    """PEFT's rank_pattern by the names of the layers, not by those of their lora_E."""
    return {module_name(name, adapter_name): p for name, p in (rank_pattern or {}).items()}


def over_first_triplets(pattern: list[bool], before: list[bool]) -> list[bool]:
    """Put the pattern of a run that has begun with a pruned adapter into that adapter's pattern.

    Args:
        pattern: over the triplets that this run has begun with.
        before: the pattern that it has begun with, whose True entries are those triplets; or an
            earlier pattern of the same run, to be replaced: then the lengths are equal.
    """
    if len(before) == len(pattern):
        return pattern
    inner = iter(pattern)
    return [alive and next(inner) for alive in before]


def rank_pattern_for_file(
    chosen: dict[str, Tensor], before: dict[str, list[bool]]
) -> dict[str, list[bool]] | None:
    """The rank_pattern of an adapter_config.json; None where nothing has ever been left out.

    Args:
        chosen: for each layer, by its name, what `AdaptedLayer.chosen` says.
        before: for each layer the pattern that the run has begun with; empty if it had none.
    """
    pattern = {
        f"{name}.lora_E": over_first_triplets(part.tolist(), before.get(name, part.tolist()))
        for name, part in chosen.items()
    }
    return pattern if before or not all(map(all, pattern.values())) else None


def positive_alpha(lora_alpha: float, rank: float) -> float:
    """The scaling that PEFT and loralib mean: the initial rank, where lora_alpha is not positive.

    In a file it has to be written out: PEFT would take the rank that is left.
    """
    return lora_alpha if lora_alpha > 0 else rank


def known_total_step(total_step: int | None, tinit: int, tfinal: int) -> int:
    """The least number of steps that PEFT accepts, where it is not known: it reads no None."""
    return tinit + tfinal + 1 if total_step is None else total_step


def make_loadable_(config: AdaLoraConfig, total_step: int | None = None) -> None:
    """Replace in `config` what PEFT could not read back, or would read as another adapter.

    Args:
        config: it is changed.
        total_step: the steps of the schedule, if the config does not know them.
    """
    config.lora_alpha = positive_alpha(config.lora_alpha, config.init_r)
    known = total_step if config.total_step is None else config.total_step
    config.total_step = known_total_step(known, config.tinit, config.tfinal)

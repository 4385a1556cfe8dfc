"""The AdaLoraConfig of a model with an allocator of ours."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from peft import AdaLoraConfig

from .saving import (
    adapted_layers,
    by_module,
    config_for_file,
    module_name,
    over_first_triplets,
    rank_pattern_for_file,
)

if TYPE_CHECKING:
    from .allocator import PeftRankAllocator


class AllocatedConfig(AdaLoraConfig):
    """An AdaLoraConfig whose rank_pattern is read from the allocator when somebody asks for it.

    To assign it in every step, as PEFT does, would be to wait for the device in every step. A
    config becomes one of these in place: scripts keep the object that they have made, and set
    total_step on it.
    """

    # Weak, because a config may live on, or be used again, after its model is gone.
    _allocator: weakref.ref[PeftRankAllocator] | None = None

    @property
    def allocator(self) -> PeftRankAllocator | None:
        """The allocator that this follows, while that exists."""
        return None if self._allocator is None else self._allocator()

    @property
    def first_rank_pattern(self) -> dict[str, Any] | None:
        """The rank_pattern that the run has begun with: what has been assigned, not read."""
        pattern: dict[str, Any] | None = self.__dict__.get("rank_pattern")
        return pattern

    @property
    def rank_pattern(self) -> dict[str, Any] | None:
        """PEFT's rank_pattern over the triplets that an adapter starts with, by their lora_E.

        Where nothing has been pruned, it is what has been assigned; PEFT assigns a shortened
        pattern when it saves, which is not needed. Reads the device.
        """
        allocator = self.allocator
        if allocator is None or not allocator.begun:
            return self.first_rank_pattern
        pattern, adapter_name = allocator.rank_pattern, allocator.adapter_name
        if all(map(all, pattern.values())):
            return self.first_rank_pattern
        before = by_module(self.first_rank_pattern, adapter_name)
        return {
            name: over_first_triplets(alive, before.get(module_name(name, adapter_name), alive))
            for name, alive in pattern.items()
        }

    @rank_pattern.setter
    def rank_pattern(self, pattern: dict[str, Any] | None) -> None:
        if self.allocator is None or not self.allocator.begun:
            self.__dict__["rank_pattern"] = pattern

    def to_dict(self) -> dict[str, Any]:
        """PEFT's, as it goes to files (`save_pretrained`, diffusers' metadata): what loads again.

        What PEFT's own functions save of the model has all init_r rows, so there is no
        rank_pattern; but for a checkpoint of a run that has begun with a pruned adapter, which has
        the triplets of that.
        """
        allocator, written = self.allocator, config_for_file(self)
        written.rank_pattern = None
        if allocator is not None and allocator.saves_all:
            layers = adapted_layers(
                allocator.adapters, allocator, written.init_r, self.first_rank_pattern
            )
            written.rank_pattern = rank_pattern_for_file(
                {layer.name: layer.first for layer in layers}
            )
        return written.to_dict()

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "rank_pattern": self.rank_pattern}
        state.pop("_allocator", None)
        return state


def follow(config: AdaLoraConfig, allocator: PeftRankAllocator) -> None:
    """Make `config` an `AllocatedConfig` that reads from `allocator`."""
    config.__class__ = AllocatedConfig
    config._allocator = weakref.ref(allocator)


def allocator_in(config: Any) -> PeftRankAllocator | None:
    """The allocator that `config` follows, if it follows one."""
    return config.allocator if isinstance(config, AllocatedConfig) else None

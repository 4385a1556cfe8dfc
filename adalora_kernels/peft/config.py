"""The AdaLoraConfig of a model with an allocator of ours."""

from __future__ import annotations

import copy
import weakref
from typing import TYPE_CHECKING, Any

from peft import AdaLoraConfig

from .saving import (
    adapted_layers,
    by_module,
    make_loadable_,
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

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """PEFT's, with the rank_pattern that says which triplets are in the file.

        Its names are those in PEFT's files: without the adapter's. A checkpoint that holds all
        triplets has the pattern that the run has begun with.
        """
        allocator, written = self.allocator, copy.copy(self)
        if allocator is not None:
            chosen = {
                layer.name: layer.chosen(checkpoint=allocator.saves_all)
                for layer in adapted_layers(allocator.adapters, allocator)
            }
            before = by_module(self.first_rank_pattern, allocator.adapter_name)
            written.rank_pattern = rank_pattern_for_file(chosen, before)
        make_loadable_(written)
        super(AllocatedConfig, written).save_pretrained(save_directory, **kwargs)

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

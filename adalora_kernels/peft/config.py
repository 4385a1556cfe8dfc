"""The AdaLoraConfig of a model with an allocator of ours."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from peft import AdaLoraConfig
from torch import Tensor

from ..checks import as_int
from .saving import (
    AdaptedLayer,
    adapted_layers,
    by_module,
    config_for_file,
    rank_pattern_for_file,
)

if TYPE_CHECKING:
    from .allocator import PeftRankAllocator


def _number(name: str) -> Any:
    """A field of which a model may have a number of its own (`AllocatedConfig.set_own`)."""

    def read(config: AllocatedConfig) -> Any:
        field = config.__dict__[name]
        before, number = config._own_numbers.get(name, (field, field))
        return number if before == field else field

    def write(config: AllocatedConfig, number: Any) -> None:
        config._own_numbers.pop(name, None)
        config.__dict__[name] = number

    return property(read, write)


class AllocatedConfig(AdaLoraConfig):
    """The config of one model with an allocator of ours, beside the one that its user has made.

    Both have the same fields: scripts keep the object that they have made, set total_step on it,
    and may give it to other models. What is only this model's stands beside the fields: its
    allocator, from which rank_pattern is read when somebody asks for it (to assign it in every
    step, as PEFT does, would be to wait for the device in every step), and the numbers that the
    allocator has been given.
    """

    # The reference is weak, because a config may live on when its model is gone. For each number
    # that only this model has: what the field was when it got it, and the number. The rank_pattern
    # of another model, and the allocator's step when it was assigned.
    __slots__ = ("_allocator", "_other_pattern", "_own_numbers")

    _allocator: weakref.ref[PeftRankAllocator] | None
    _own_numbers: dict[str, tuple[Any, Any]]
    _other_pattern: tuple[dict[str, Any] | None, int] | None

    def __new__(cls, *args: Any, **kwargs: Any) -> AllocatedConfig:
        """An object without fields, as copies and pickles make it, that follows no allocator."""
        config: AllocatedConfig = super().__new__(cls)
        config._allocator, config._own_numbers, config._other_pattern = None, {}, None
        return config

    @classmethod
    def beside(cls, config: AdaLoraConfig) -> AllocatedConfig:
        """Make one with the fields of `config`: what is set on either is read from both."""
        result = cls.__new__(cls)
        result.__dict__ = config.__dict__  # type: ignore[misc]
        return result

    def follow(self, allocator: PeftRankAllocator) -> None:
        """Read from `allocator` from now on."""
        self._allocator = weakref.ref(allocator)

    @property
    def allocator(self) -> PeftRankAllocator | None:
        """The allocator that this follows, while that exists."""
        return None if self._allocator is None else self._allocator()

    def __eq__(self, other: object) -> bool:
        """Whether the fields are equal; those of the object that its user has made are."""
        if not isinstance(other, AdaLoraConfig):
            return NotImplemented
        return vars(self) == vars(other)

    def set_own(self, name: str, number: Any) -> None:
        """Set a number for this model only, until somebody sets the field to another one."""
        self._own_numbers[name] = self.__dict__[name], number

    total_step = _number("total_step")
    tinit = _number("tinit")
    tfinal = _number("tfinal")
    deltaT = _number("deltaT")
    orth_reg_weight = _number("orth_reg_weight")

    @property
    def first_rank_pattern(self) -> dict[str, Any] | None:
        """The rank_pattern that the run has begun with: what has been assigned, not read."""
        pattern: dict[str, Any] | None = self.__dict__.get("rank_pattern")
        return pattern

    @property
    def rank_pattern(self) -> dict[str, Any] | None:
        """PEFT's rank_pattern over the triplets that an adapter starts with, by their lora_E.

        Where nothing has been pruned, it is what has been assigned. What is assigned later comes
        from a model of PEFT's that has been given this object, and is read until the allocator
        steps again. Reads the device.
        """
        allocator = self.allocator
        if allocator is None or not allocator.begun:
            return self.first_rank_pattern
        if self._other_pattern is not None and self._other_pattern[1] == allocator.global_step:
            return self._other_pattern[0]
        layers = self._layers(allocator)
        if all(torch.equal(layer.alive, layer.first) for layer in layers):
            return self.first_rank_pattern
        return {layer.adapter.name: layer.alive.tolist() for layer in layers}

    @rank_pattern.setter
    def rank_pattern(self, pattern: dict[str, Any] | None) -> None:
        refuse_lora_ranks(pattern)
        allocator = self.allocator
        if allocator is None or not allocator.begun:
            self.__dict__["rank_pattern"] = pattern
            return
        self._other_pattern = None
        # PEFT assigns the model's own with shorter names when it saves, which is not needed.
        name = allocator.adapter_name
        if by_module(pattern, name) != by_module(self.rank_pattern, name):
            self._other_pattern = pattern, allocator.global_step

    def to_dict(self) -> dict[str, Any]:
        """PEFT's, as it goes to files (`save_pretrained`, diffusers' metadata): what loads again.

        What PEFT's own functions save of the model has all init_r rows, so there is no
        rank_pattern; but for a checkpoint of a run that has begun with a pruned adapter, which has
        the triplets of that.
        """
        allocator, written = self.allocator, config_for_file(self)
        written.rank_pattern = None
        if allocator is not None and allocator.saves_all:
            first = {layer.name: layer.first for layer in self._layers(allocator)}
            written.rank_pattern = rank_pattern_for_file(first)
        return written.to_dict()

    def _layers(self, allocator: PeftRankAllocator) -> list[AdaptedLayer]:
        init_r = as_int("init_r", self.init_r, 1)
        adapters = allocator.adapters_left
        return adapted_layers(adapters, allocator, init_r, self.first_rank_pattern)

    def __getstate__(self) -> dict[str, Any]:
        # A copy has the rank_pattern that this run has begun with: it may be for another model,
        # into which PEFT then loads what was saved of this one, with all its rows.
        return {n: v if n == "rank_pattern" else getattr(self, n) for n, v in vars(self).items()}


def allocator_in(config: Any) -> PeftRankAllocator | None:
    """The allocator that `config` follows, if it follows one."""
    return config.allocator if isinstance(config, AllocatedConfig) else None


def refuse_lora_ranks(rank_pattern: Any) -> None:
    """Raise ValueError if a rank_pattern has ranks in it, as a LoraConfig's has."""
    if not isinstance(rank_pattern, dict | None):
        raise ValueError(f"rank_pattern must be a dict or None, got {rank_pattern!r}")
    for name, alive in (rank_pattern or {}).items():
        flags = alive.flatten().tolist() if isinstance(alive, Tensor) else alive
        if not isinstance(flags, list) or not all(flag in (0, 1) for flag in flags):
            raise ValueError(
                f"rank_pattern has {alive!r} for {name!r}. In an AdaLoraConfig it says of each "
                "triplet of a matrix whether it is left, as a list of bools, and comes from a "
                "saved adapter. Ranks, as a LoraConfig has them there, are init_r and target_r "
                "here: one number for all matrices, among which the allocator divides the budget"
            )

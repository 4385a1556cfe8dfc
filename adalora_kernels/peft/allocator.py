"""The allocator of a PEFT model: ours, with the numbers that stand in its AdaLoraConfig."""

from __future__ import annotations

import dataclasses
from typing import Any

from peft import AdaLoraConfig
from torch import nn

from ..allocator import BudgetSchedule, RankAllocator
from .config import AllocatedConfig, allocator_in

# What an AdaLoraConfig and a BudgetSchedule have in common.
_SCHEDULE = ("total_step", "tinit", "tfinal", "deltaT")


class PeftRankAllocator(RankAllocator):
    """Ours, with the schedule and the weight of the regulariser that stand in an AdaLoraConfig.

    Scripts set total_step and the like on the config when they know them. What is set here
    instead is for this model only, because other models may have the same config.

    Attributes:
        adapter_name: PEFT's name of the adapter that is allocated.
        config: the config of this model, whose fields are those of the user's.
        saves_all: whether PEFT's save writes all triplets: a checkpoint to go on from.
    """

    _is_kept_by_model = True

    def __init__(self, root: nn.Module, config: AdaLoraConfig, adapter_name: str) -> None:
        is_own = allocator_in(config) is self
        self.config = config if is_own else AllocatedConfig.beside(config)
        self.adapter_name = adapter_name
        self._schedule: BudgetSchedule
        # The config's numbers from which `_schedule` was made.
        self._schedule_source: tuple[int | None, ...]
        self.saves_all = False
        super().__init__(
            root,
            target_r=config.target_r,
            total_step=config.total_step,
            tinit=config.tinit,
            tfinal=config.tfinal,
            deltaT=config.deltaT,
            beta1=config.beta1,
            beta2=config.beta2,
            adapter_name=adapter_name,
            orth_reg_weight=config.orth_reg_weight,
        )
        self.config.follow(self)

    @property
    def schedule(self) -> BudgetSchedule:
        """The `BudgetSchedule` of the config."""
        current = self._numbers_in_config()
        if current != self._schedule_source:
            options: dict[str, Any] = dict(zip(_SCHEDULE, current[1:], strict=True))
            if current[0] != self._schedule_source[0]:
                options["target_budget"] = self.config.target_r * self.matrices
            self._schedule = dataclasses.replace(self._schedule, **options)
            self._schedule_source = current
        return self._schedule

    @schedule.setter
    def schedule(self, schedule: BudgetSchedule) -> None:
        for name in _SCHEDULE:
            self.config.set_own(name, getattr(schedule, name))
        self._schedule, self._schedule_source = schedule, self._numbers_in_config()

    def _numbers_in_config(self) -> tuple[int | None, ...]:
        return tuple(getattr(self.config, name) for name in ("target_r", *_SCHEDULE))

    @property
    def orth_reg_weight(self) -> float:
        """The config's."""
        return self.config.orth_reg_weight

    @orth_reg_weight.setter
    def orth_reg_weight(self, weight: float) -> None:
        self.config.set_own("orth_reg_weight", weight)

    def begin_anew(self, root: nn.Module) -> None:
        """Begin with the ranks that the layers have now, after they have got new parameters."""
        self.detach()
        importance, stages = self.importance, self._state.stages
        check_replicas = self.check_replicas
        PeftRankAllocator.__init__(self, root, self.config, self.adapter_name)
        self.importance, self.check_replicas = importance, check_replicas
        if stages is not None:
            self.share_budget(stages.group)

    def update_and_allocate(self, global_step: int) -> None:
        """PEFT's name of `step`. Does nothing while an optimizer does it (`attach`).

        Before the first one it finds out which triplets are there: weights may have been loaded
        since the allocator was made, and those that are not there still aren't after a step.
        """
        if not self.attached:
            self.count_triplets()
            self.step(global_step)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.config.follow(self)

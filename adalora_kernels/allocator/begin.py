"""How the run of an allocator begins, and begins again."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..adapters import refuse_flattened
from .report import Reports


class BeginsRuns(Reports):
    """The part of a `RankAllocator` that finds out with which triplets a run begins."""

    orth_reg: Tensor | None
    # The budget of the pattern that is frozen, while it is.
    _final_budget: int | None

    def _whole_parameters(self) -> list[nn.Parameter]:
        """Return the adapters' parameters; ValueError if FSDP1 has made something else of them."""
        parameters = self._parameters()
        if not all(_is_parameter(E) and E.dim() == 2 for E in parameters[1::3]):
            refuse_flattened(self.adapters)
        return parameters

    @torch.no_grad()
    def count_triplets(self) -> None:
        """Find out which triplets are there, and let the schedule begin with their number.

        A triplet whose row of lora_A, lora_E and column of lora_B are all 0 can't learn: it does
        not exist. An adapter that was saved pruned is loaded with such triplets. This is done
        when the allocator is made, in `attach` and in `restart`; otherwise call it after weights
        have been loaded. Without effect when something has been stepped. Reads the device.
        """
        if self.begun:
            return
        restarted = self._state.members.restarted
        if restarted and self._has_gradients():
            return  # An optimizer may just have moved what `restart` has left out.
        self._count_triplets(restarted=restarted)

    def _count_triplets(self, *, restarted: bool) -> None:
        if self._copies is not None:
            self._copies.read_values()
        parameters = self._parameters()
        self._state.follow(parameters)
        self._state.count_triplets(parameters, restarted=restarted)
        self._begin_with(self._count_everywhere())

    def _count_everywhere(self) -> int:
        """How many triplets are there, in all stages. Then all processes have to call this."""
        members, stages = self._state.members, self._state.stages
        if stages is None:
            return sum(members.counts)
        trained = [adapter.lora_E.requires_grad for adapter in self.adapters]
        self._everywhere = stages.gather_members(trained, members.had_gradient, members.counts)
        members.others_had = self._everywhere.any_had_gradient
        members.look(self._parameters()[1::3])
        return self._everywhere.there

    def _begin_with(self, init_budget: int) -> None:
        if self.schedule.init_budget != init_budget:
            self.schedule = replace(self.schedule, init_budget=init_budget)

    @torch.no_grad()
    def restart(self) -> None:
        """Begin a new run with the triplets that are there: those whose lora_E is not 0.

        Or with all, if all are 0, because the adapters have been initialised again. An adapter
        that the last run has not touched, because it had no gradient, has all of its triplets.
        The budget begins with the number of those that are there; what is left out stays at 0.
        Averages, scores, step and pattern are new. Weights that the run is to begin with have to
        be loaded before. Reads the device.

        Raises:
            RuntimeError: `shrink` has dropped triplets: make a new `RankAllocator` then.
            ValueError: the adapters are flattened (FSDP1).
        """
        if self.shrunk:
            raise RuntimeError(
                "restart() needs adapters that shrink() has not cut: make a new RankAllocator"
            )
        parameters = self._whole_parameters()
        self.global_step, self.frozen, self._final_budget, self.orth_reg = 0, False, None, None
        self._state.follow(parameters)
        self._state.begin(parameters)
        self._count_triplets(restarted=True)

    def _goes_back(self, global_step: int) -> bool:
        return self.frozen and global_step < min(self.global_step, self.schedule.final_step)


def _is_parameter(tensor: Tensor) -> bool:
    # The first takes less time, and is True but for DTensors.
    return type(tensor) is nn.Parameter or isinstance(tensor, nn.Parameter)

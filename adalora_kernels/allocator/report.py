"""What an allocator has, and what it tells of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import Adapter, parameters_of
from ..distributed.shards import any_dtensor
from ..distributed.stages import Totals
from .schedule import BudgetSchedule
from .state import AllocatorState


class Reports:
    """The part of a `RankAllocator` that all others need, and that says where the run stands."""

    adapters: list[Adapter]
    schedule: BudgetSchedule
    global_step: int
    frozen: bool
    shrunk: bool
    _state: AllocatorState
    # Where the adapters' parameters stand (`Adapter.places`).
    _places: list[tuple[Any, str]]
    # Not empty once a layer is gone.
    _gone: list[Any]
    # Who took part in all stages that share a budget, in the last step that pruned.
    _everywhere: Totals | None = None
    # What stands for the parameters while they are in parts; see `FollowsEngines`.
    _copies: Any = None

    def _look_up_places(self) -> None:
        """To be called when the adapters are others."""
        self._places = [place for adapter in self.adapters for place in adapter.places]
        self._gone = [adapter for adapter in self.adapters if adapter.is_deleted]
        # A layer that goes puts itself down there, so that a step need not ask each of them.
        self._layers = [adapter.watch(self._gone.append) for adapter in self.adapters]

    def _parameters(self) -> list[nn.Parameter]:
        if self._copies is not None:
            copies: list[nn.Parameter] = self._copies.parameters
            return copies
        found, shards = parameters_of(self.adapters, self._places), self._state.shards
        return found if shards is None else shards.recall(found)

    @property
    def adapters_left(self) -> list[Adapter]:
        """The adapters, but for those whose layers the model has no more, while it has any."""
        if not self._gone:
            return self.adapters
        return [adapter for adapter in self.adapters if not adapter.is_deleted] or self.adapters

    def _freeze_what_is_gone(self) -> None:
        """Let adapters whose layers the model has no more take no part, like frozen ones."""
        gone = [adapter for adapter in self.adapters if adapter.is_deleted] if self._gone else []
        if len(gone) < len(self.adapters):
            for adapter in gone:
                adapter.lora_E.requires_grad_(False)

    @property
    def _device(self) -> torch.device:
        return self.adapters[0].lora_E.device if self._copies is None else self._copies.device

    def _has_gradients(self) -> bool:
        if self._copies is not None or self._state.shards is not None:
            return any(p.grad is not None and p.requires_grad for p in self._parameters())
        # Without a list of all: as a rule the first one answers it.
        return any(
            p.grad is not None and p.requires_grad
            for adapter in self.adapters
            for p in adapter.parameters
        )

    @property
    def is_sharded(self) -> bool:
        """Whether the adapters are spread over processes, as DTensors.

        Then all these processes have to call what steps, saves, loads or exports.
        """
        return any_dtensor(self._parameters())

    @property
    def begun(self) -> bool:
        """Whether there has been a step, so that there may be something that is pruned."""
        return self.global_step > 0 or self.frozen

    def _schedule_of_members(self, schedule: BudgetSchedule) -> BudgetSchedule:
        """Return a schedule with the budget that is for the adapters that take part."""
        members = self._state.members
        taking, matrices, in_play = sum(members.taking), len(members.taking), members.total
        if self._state.stages is not None and self._everywhere is not None:
            taking, matrices = self._everywhere.taking, self.matrices
            in_play = self._everywhere.in_play
        if taking == matrices:
            return schedule
        target = schedule.target_budget * taking // matrices
        return replace(schedule, init_budget=in_play, target_budget=target)

    def _budget_of_pattern(self) -> int:
        """How many triplets a frozen pattern has."""
        if self._state.stages is None:
            return self._state.total_rank()
        return self._schedule_of_members(self.schedule).budget(self.global_step)

    @property
    def matrices(self) -> int:
        """The number of adapters that share the budget."""
        stages = self._state.stages
        return len(self.adapters) if stages is None else stages.matrices

    def ranks(self) -> dict[str, int]:
        """Triplets alive in each matrix, by the name of its lora_E. Reads the device."""
        return {name: sum(pattern) for name, pattern in self.rank_pattern.items()}

    @property
    def rank_pattern(self) -> dict[str, list[bool]]:
        """PEFT's rank_pattern: which initial triplets of each matrix live. Reads the device."""
        masks = self._state.split(self._state.mask.cpu())
        return {a.name: mask.tolist() for a, mask in zip(self.adapters, masks, strict=True)}

    def scores(self) -> dict[str, Tensor]:
        """The importance (r,) of each matrix's triplets (eq. 7), by the name of its lora_E."""
        parts = self._state.split(self._state.scores.clone())
        return {adapter.name: part for adapter, part in zip(self.adapters, parts, strict=True)}

    def highest_pruned_score(self) -> Tensor:
        """loralib's mask threshold: a scalar on the device, -inf where nothing is pruned."""
        return self._state.highest_pruned_score()

    def summary(self) -> dict[str, Any]:
        """Where the run stands, for logs. Reads the device.

        Keys: step, phase, budget, total_rank (triplets alive), init_budget, target_budget,
        matrices, skipped_steps (steps with inf or NaN gradients, before the pattern is frozen),
        frozen, shrunk, and untrained: the names of the adapters that do not take part, because
        they need no gradient or have had none since the run began, although others have. All
        numbers are those of the adapters that take part: the others keep their values, and have
        no share in the budget. With a `process_group`, total_rank, matrices and untrained are of
        this process's adapters, and init_budget, target_budget and budget of all.
        """
        self._freeze_what_is_gone()
        state, step = self._state, self.global_step
        state.members.look(self._parameters()[1::3])
        schedule, total_rank = self._schedule_of_members(self.schedule), state.total_rank()
        taking = state.members.taking
        return {
            "step": step,
            "phase": "final" if self.frozen else schedule.phase(step),
            "budget": self._budget_of_pattern() if self.frozen else schedule.budget(step),
            "total_rank": total_rank,
            "init_budget": schedule.init_budget,
            "target_budget": schedule.target_budget,
            "matrices": sum(taking),
            "untrained": [a.name for a, t in zip(self.adapters, taking, strict=True) if not t],
            "skipped_steps": int(state.skipped),
            "frozen": self.frozen,
            "shrunk": self.shrunk,
        }

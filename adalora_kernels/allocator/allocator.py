"""The allocator, which spends the budget on the most important triplets.

What stands here is its steps, its state and `shrink`. Its other methods are in its base classes:
what it reports (report.py), where its runs begin (begin.py), what it does among several processes
(processes.py), and which optimizers step it (attach.py).
"""

from __future__ import annotations

import warnings
import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import describe, find_adapters, parameters_of, refuse_flattened
from ..checks import as_beta, as_grad_scale, as_int, as_weight
from ..distributed.groups import Group
from ..distributed.shards import any_dtensor
from .attach import FollowsOptimizers, chain, check_is_optimizer
from .reminder import Reminder, expect_steps
from .schedule import BudgetSchedule
from .shrink import shrink_
from .state import FORMAT, AllocatorState, check_importance


class RankAllocator(FollowsOptimizers):
    """Scores every triplet of every adapter, and keeps the best ones within the budget.

    Either `attach` it to the optimizer, or call `step` once per optimizer step, after
    `optimizer.step()` and before `zero_grad()`. Pruning writes 0 into lora_E; a pruned triplet
    still gets a gradient there and can come back, until the pattern is frozen at step
    total_step - tfinal. Works on our layers, loralib's and PEFT's.

    Memory: two averages in float32 (float64 for float64 parameters) per adapter entry, freed when
    the pattern is frozen; none with importance="norm".

    In a CUDA graph: `step` is `advance` (what only the host knows: the step's number and budget,
    written to the device) and then `update` (what runs on the device). Capture `update` with the
    rest of the training step, and before each replay call `advance`. One graph serves all steps
    before `schedule.final_step`; at that step call `step`, which freezes the pattern, and capture
    anew for the steps after it: there `update` only writes the zeros of the pattern again, for an
    optimizer with momentum moves them.

    An adapter takes part if its lora_E requires a gradient and, once any adapter has had one, has
    had a gradient since the run began. Others (frozen ones, experts and towers that are not used)
    are not scored, written to or counted: the schedule's budget is shared out to those that take
    part, from the sum of their ranks to their share of the target. That may change in a run, and
    `summary()` names who is left out. Nor does a triplet count that is 0 altogether, which is what
    a pruned one is in a file: see `count_triplets`.

    Args:
        model: where to look for adapters (`find_adapters`); all on one device.
        target_r: average number of triplets per matrix at the end.
        total_step, tinit, tfinal, deltaT: see `BudgetSchedule`. total_step may follow by
            `set_total_step`.
        importance: what triplets are compared by. "paper": sensitivity times uncertainty, averaged
            over the steps (eq. 7 to 11). "norm": ‖lora_A_i‖ · |lora_E_i| · ‖lora_B_i‖ at the step
            that prunes, the norm of what triplet i adds to the weight, but for scaling; it needs
            no averages and no gradients (docs/recipe.md).
        beta1, beta2: decay of the averages of sensitivity and uncertainty (eq. 9, 10), in (0, 1).
        target_total_rank: triplets at the end over all matrices, in place of target_r per matrix.
        adapter_name: which of PEFT's named adapters; by default the trainable ones.
        state_dtype: of the averages: torch.float32, or torch.bfloat16 for half of the memory. A
            bfloat16 average is rounded to 8 bits at every step, a relative error of up to
            2⁻⁸ / (1 - beta): 2.6 % at 0.85. float64 parameters always have float64 averages.
        orth_reg_weight: weight of the orthogonality regulariser whose gradient an optimizer that
            this is attached to gets; see `orth_reg_grad_`. Without `attach` it has no effect.
        check_replicas: whether processes that train the same adapters (DDP, FSDP2,
            `sync_gradients`) compare the mask and lora_E of each matrix at the first step, at
            every hundredth, and when the pattern is final. Where they differ, every process raises
            a RuntimeError in that step. True for all processes of torch.distributed, or a process
            group. It costs 16 bytes per matrix and process, and reads the device, only then.
        process_group: processes with different adapters that share one budget: the stages of a
            pipeline, each of which has adapters. target_r then counts for the matrices of all.
            They have to make the allocator together, and also to attach, to step, to load a state
            and to restart it together. See `share_budget`.

    Attributes:
        schedule: the `BudgetSchedule` of all adapters together, which begins with the triplets
            that are there; may be replaced by one with the same init_budget.
        adapters: the adapters, in module order. Ties between triplets go to the earlier one.
        orth_reg: the regulariser at the last step of an optimizer that this is attached to, a
            scalar on the device; None before that, or at weight 0.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: no adapter in the model, adapters on different devices or flattened (FSDP1),
            DTensors that are neither sharded nor replicated, or a number out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        target_r: int,
        total_step: int | None = None,
        tinit: int = 0,
        tfinal: int = 0,
        deltaT: int = 1,
        importance: str = "paper",
        beta1: float = 0.85,
        beta2: float = 0.85,
        target_total_rank: int | None = None,
        adapter_name: str | None = None,
        state_dtype: torch.dtype = torch.float32,
        orth_reg_weight: float = 0.0,
        check_replicas: bool | Group = False,
        process_group: Group | None = None,
    ) -> None:
        target_r = as_int("target_r", target_r, 0)
        if target_total_rank is not None:
            target_total_rank = as_int("target_total_rank", target_total_rank, 0)
        importance = check_importance(importance)
        self.beta1 = as_beta("beta1", beta1)
        self.beta2 = as_beta("beta2", beta2)
        orth_reg_weight = as_weight("orth_reg_weight", orth_reg_weight)
        self.adapters = find_adapters(model, adapter_name)
        if not self.adapters:
            raise ValueError(f"no AdaLoRA adapter in this {describe(model)}")
        refuse_flattened(self.adapters)
        self.check_replicas = check_replicas
        self._model = weakref.ref(model)
        self._look_up_places()
        self._start_following()
        # The ranks in it are the initial ones, also when `shrink` makes the parameters smaller.
        parameters = parameters_of(self.adapters, self._places)
        self._state = AllocatorState(parameters, state_dtype, importance)
        self.schedule = BudgetSchedule(
            init_budget=sum(self._state.ranks),
            target_budget=(
                target_r * len(self.adapters) if target_total_rank is None else target_total_rank
            ),
            tinit=tinit,
            tfinal=tfinal,
            deltaT=deltaT,
            total_step=total_step,
        )
        self._target_r = target_r if target_total_rank is None else None
        self.global_step = 0
        self.frozen = False
        self.shrunk = False
        self.orth_reg_weight = orth_reg_weight
        self.orth_reg: Tensor | None = None
        self._final_budget = None
        self.reminder = Reminder()
        if process_group is not None:
            self.share_budget(process_group)
        self.count_triplets()
        expect_steps(self)

    def __getstate__(self) -> dict[str, Any]:
        left_out = (*self._NOT_COPIED, "reminder")
        return {key: value for key, value in self.__dict__.items() if key not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._look_up_places()
        self._start_following()
        self.reminder = Reminder()
        expect_steps(self)

    def set_total_step(self, total_step: int) -> None:
        """Set the number of training steps in the schedule.

        Raises:
            TypeError, ValueError: as `BudgetSchedule`.
        """
        total_step = as_int("total_step", total_step, 1)
        self.schedule = replace(self.schedule, total_step=total_step)

    @property
    def importance(self) -> str:
        """What triplets are compared by: "paper" or "norm". It can be set while no run has begun.

        Raises:
            ValueError: it is set to something else.
            RuntimeError: it is set in a run.
        """
        return self._state.importance

    @importance.setter
    def importance(self, importance: str) -> None:
        if check_importance(importance) == self.importance:
            return
        if self.begun:
            raise RuntimeError(
                f"importance={importance!r} comes too late: at step {self.global_step} triplets "
                f"are compared by {self.importance!r}"
            )
        self._state.importance = importance
        self._state.make_averages(self._parameters())

    def step(self, global_step: int, *, grad_scale: float | Tensor | None = None) -> int:
        """Update the importance averages and, where the schedule says so, prune.

        Nothing is read from the device. A step whose gradients hold inf or NaN changes no
        average and is counted in `summary()`.

        Args:
            global_step: the number of this optimizer step, counted from 1.
            grad_scale: see `update`.

        Returns:
            The budget at this step, over the adapters that take part.

        Raises:
            TypeError, ValueError: as `advance` and `update`.
            RuntimeError: no adapter has a gradient, before the pattern is frozen; or an optimizer
                does this already (`attach`); or as `advance`.
        """
        global_step = as_int("global_step", global_step, 0)
        if self.attached:
            raise RuntimeError("attached to an optimizer, whose step() has done this: see attach()")
        return self._step(global_step, as_grad_scale(grad_scale, self._device))

    @torch.no_grad()
    def _step(self, global_step: int, grad_scale: Tensor | None) -> int:
        parameters = self._whole_parameters()
        learns, was_frozen = self._learns(global_step), self.frozen
        budget = self._advance(global_step, parameters)
        if learns:
            self._state.learn(parameters, self.beta1, self.beta2, grad_scale)
        self._prune_and_freeze(parameters)
        self._compare_replicas(was_frozen)
        return budget

    @torch.no_grad()
    def skip(self, global_step: int) -> int:
        """A `step` that the optimizer skipped, because a GradScaler found inf or NaN.

        The averages stay, and while there are any `summary()` counts it; budget and pattern
        follow the schedule.

        Args, returns, raises: as `advance`.
        """
        budget = self.advance(global_step)
        if not self.frozen and self.global_step < self.schedule.final_step:
            self._state.skipped += 1
        self._prune_and_freeze(self._parameters())
        return budget

    def _prune_and_freeze(self, parameters: list[nn.Parameter]) -> None:
        """What the schedule wants at this step; the host knows it, so nothing else is launched."""
        schedule = self.schedule
        prunes = self.frozen or schedule.masks_at(self.global_step)
        if prunes and not self.frozen:
            self._score(parameters)
        if self._brings_together(self.global_step):
            self._state.prune_with_others(parameters[1::3])
        elif prunes or self._state.members.restarted:
            self._prune(parameters)
        if not self.frozen and self.global_step >= schedule.final_step:
            self._freeze()

    @torch.no_grad()
    def advance(self, global_step: int) -> int:
        """The part of `step` that is not captured: hand the step's budget to the device.

        Also which adapters take part. If the pattern is final and global_step goes back to before
        it was, a new run begins, with a warning; see `restart`.

        Returns:
            The budget at this step, over the adapters that take part.

        Raises:
            TypeError, ValueError: global_step is no whole number ≥ 0; or as the constructor.
            RuntimeError: total_step is not known, or global_step goes back after `shrink`.
        """
        global_step = as_int("global_step", global_step, 0)
        return self._advance(global_step, self._whole_parameters())

    def _advance(self, global_step: int, parameters: list[nn.Parameter]) -> int:
        if self._goes_back(global_step):
            self.restart()
            warnings.warn(
                f"the pattern of AdaLoRA's ranks was final, and step {global_step} comes again: a "
                f"new run begins, with the {self.schedule.init_budget} triplets that are there. "
                "Call restart() before a training that is to begin with those of the last one",
                stacklevel=4,
            )
        self._freeze_what_is_gone()
        if self._state.follow(parameters) and not self.begun:
            self.count_triplets()  # Before they were sharded, processes may have had others.
        self._state.members.take_step(parameters[1::3])
        schedule = self.schedule
        if self._asks_who_takes_part(global_step):
            self._count_everywhere()
        budget = self._schedule_of_members(schedule).budget(global_step)
        if self._final_budget is not None:
            # The schedule may have been changed since.
            budget = min(budget, self._final_budget)
        self.global_step = global_step
        self.reminder.allocator_stepped()
        self._state.budget.fill_(budget)
        self._state.prunes.fill_(schedule.masks_at(global_step))
        return budget

    @torch.no_grad()
    def update(self, *, grad_scale: float | Tensor | None = None) -> None:
        """The part of `step` that runs on the device, for the step that `advance` was told.

        Args:
            grad_scale: what ∂L/∂w is of the gradients; 1 / 1024 if the loss was multiplied by
                1024, for instance. A number, or one float32 on the adapters' device.

        Raises:
            TypeError: grad_scale is neither.
            ValueError: it is a tensor of another shape, dtype or device; or as the constructor.
            RuntimeError: no adapter has a gradient, before the pattern is frozen; or there is a
                process_group.
        """
        scale = as_grad_scale(grad_scale, self._device)
        if self._state.stages is not None:
            raise RuntimeError("update() does not bring the stages of process_group together")
        parameters = self._whole_parameters()
        # What is captured runs a few times before, with nothing to advance.
        self.reminder.allocator_stepped()
        if self._learns(self.global_step):
            self._state.learn(parameters, self.beta1, self.beta2, scale)
            self._score(parameters)
        self._prune(parameters)

    def _learns(self, global_step: int) -> bool:
        """Whether the step updates the averages, for which there must be a gradient."""
        if self.frozen and not self._goes_back(global_step):
            return False
        if global_step >= self.schedule.final_step:
            return False
        if self._has_gradients() or self._state.stages is not None:
            return True
        if any(p.requires_grad for p in self._parameters()):
            raise RuntimeError(
                "no adapter has a gradient: call step() after backward() and before zero_grad()"
            )
        return False

    def _score(self, parameters: list[nn.Parameter]) -> None:
        """Make the scores of a pruning that follows, where they are not those of the averages."""
        if self.importance == "paper":
            return
        if self._copies is not None:
            self._copies.read_values()
        self._state.score(parameters)

    def _prune(self, parameters: list[nn.Parameter]) -> None:
        if self.shrunk:
            return
        if self._copies is not None:
            self._copies.read_values((1,))
        self._state.prune(parameters[1::3], again=self.frozen)
        if self._copies is not None:
            self._copies.write_lora_E()

    def _freeze(self) -> None:
        """Fix the pattern, whose zeros are written in every step; the averages are of no use."""
        self.frozen = True
        self._final_budget = self._schedule_of_members(self.schedule).budget(self.global_step)
        self._state.drop_averages()

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, as tensors (copied), ints, bools and strings."""
        return {
            "format": FORMAT,
            "names": [adapter.name for adapter in self.adapters],
            "ranks": list(self._state.ranks),
            "global_step": self.global_step,
            "frozen": self.frozen,
            "shrunk": self.shrunk,
            **self._state.tensors(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`; the run is then bitwise the uninterrupted one.

        The schedule and the betas are not part of it. Where the state is of a shrunk model, the
        adapters of this one are shrunk alike, so that its weights can be loaded afterwards.

        Raises:
            TypeError: `state` is not a dict.
            ValueError: it is not from an allocator, or one of another model; nothing is changed.
                Under ZeRO stage 3, before `attach(engine)`.
        """
        if not isinstance(state, dict):
            raise TypeError(f"state must be a dict, got {type(state).__name__}")
        parameters = self._whole_parameters()
        self._state.check(state, self.state_dict(), parameters)
        self._state.load(state, parameters)
        self._begin_with(self._count_everywhere())
        self.global_step = state["global_step"]
        self.frozen, self._final_budget = state["frozen"], None
        if self.frozen:
            self._final_budget = self._budget_of_pattern()
            self._state.drop_averages()
        if state["shrunk"] and not self.shrunk:
            self._shrink(self._state.mask, None)

    @torch.no_grad()
    def shrink(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Drop the pruned triplets for real, once the pattern is frozen.

        The same Parameter objects get smaller storage (and `.grad`), and every state tensor of the
        optimizer that has the shape of its parameter is cut alike, so training goes on as before,
        but for what looks at all stored triplets: the regulariser, and clipping by norm. The
        function stays as it is: a triplet whose lora_E is not 0, because other weights have been
        loaded, is kept, and belongs to the pattern from now on. A matrix without a triplet left
        becomes its base layer. A wrapper that has recorded parameter sizes (DDP) has to be built
        after this call. Reads the device.

        Args:
            optimizer: the optimizer over these parameters, or what wraps it; None if there is none
                yet, or `attach` has been told. Its state and that of those followed is cut.

        Raises:
            TypeError: `optimizer` is not a torch optimizer.
            RuntimeError: the pattern is not frozen yet; or attached to a DeepSpeed engine.
            ValueError: the optimizer holds state that can't be cut to a subset of the triplets.
                Of torch's these are, once they have stepped, Adafactor (averages over rows and
                columns), LBFGS (all parameters in one vector) and Muon (each update depends on
                the whole matrix). Or the adapters are sharded: load the states of model and
                allocator into a model that is not, shrink that, and shard it afterwards. Nothing
                is changed.
        """
        if self._copies is not None:
            raise RuntimeError(
                "shrink() can't cut parameters that are in DeepSpeed's flat buffers: save the "
                "adapter, or detach() and shrink a model without an engine"
            )
        if optimizer is not None:
            check_is_optimizer(optimizer)
        if not self.frozen:
            raise RuntimeError(
                "shrink() needs a frozen pattern: call it at or after step "
                f"total_step - tfinal = {self.schedule.final_step}, not at {self.global_step}"
            )
        if not self.shrunk:
            if any_dtensor(self._parameters()):
                raise ValueError(
                    "shrink() needs whole adapters, and these are sharded (DTensor): save the "
                    "model and the allocator, load both into a model that is not sharded, call "
                    "shrink() there, and shard it then"
                )
            mask = self._state.mask
            lora_E = [E.to(mask.device) for E in self._whole_parameters()[1::3]]
            self._shrink(mask | (torch.cat(lora_E) != 0).squeeze(1), optimizer)

    def _shrink(self, kept: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
        optimizers = [] if optimizer is None else chain(optimizer)
        shrink_(self.adapters, self._state.split(kept), [*optimizers, *self.followed])
        self._state.keep(kept)
        self.shrunk = True

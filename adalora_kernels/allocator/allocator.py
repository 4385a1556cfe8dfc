"""The allocator, which spends the budget on the most important triplets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..adapters import find_adapters
from ..checks import as_beta, as_grad_scale, as_int, as_weight
from ..orthogonality import orth_reg_grad_
from . import attach
from .schedule import BudgetSchedule
from .shrink import shrink_
from .state import FORMAT, AllocatorState


class RankAllocator:
    """Scores every triplet of every adapter, and keeps the best ones within the budget.

    Either `attach` it to the optimizer, or call `step` once per optimizer step, after
    `optimizer.step()` and before `zero_grad()`. Pruning writes 0 into lora_E; a pruned triplet
    still gets a gradient there and can come back, until the pattern is frozen at step
    total_step - tfinal. Works on our layers, loralib's and PEFT's.

    Memory: two averages in float32 (float64 for float64 parameters) per adapter entry, freed when
    the pattern is frozen.

    In a CUDA graph: `step` is `advance` (what only the host knows: the step's number and budget,
    written to the device) and then `update` (what runs on the device). Capture `update` with the
    rest of the training step, and before each replay call `advance`. One graph serves all steps
    before `schedule.final_step`; at that step call `step`, which freezes the pattern and gives the
    layers their masks, and capture anew for the steps after it.

    Args:
        model: where to look for adapters (`find_adapters`); all on one device.
        target_r: average number of triplets per matrix at the end.
        total_step, tinit, tfinal, deltaT: see `BudgetSchedule`. total_step may follow by
            `set_total_step`.
        beta1, beta2: decay of the averages of sensitivity and uncertainty (eq. 9, 10), in (0, 1).
        target_total_rank: triplets at the end over all matrices, in place of target_r per matrix.
        adapter_name: which of PEFT's named adapters; by default the trainable ones.
        state_dtype: of the averages: torch.float32, or torch.bfloat16 for half of the memory. A
            bfloat16 average is rounded to 8 bits at every step, a relative error of up to
            2⁻⁸ / (1 - beta): 2.6 % at 0.85. float64 parameters always have float64 averages.
        orth_reg_weight: weight of the orthogonality regulariser whose gradient an optimizer that
            this is attached to gets; see `orth_reg_grad_`. Without `attach` it has no effect.

    Attributes:
        schedule: the `BudgetSchedule`; may be replaced by one with the same init_budget.
        adapters: the adapters, in module order. Ties between triplets go to the earlier one.
        orth_reg: the regulariser at the last step of an optimizer that this is attached to, a
            scalar on the device; None before that, or at weight 0.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: no adapter in the model, adapters on different devices, or a number out of
            its range.
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
        beta1: float = 0.85,
        beta2: float = 0.85,
        target_total_rank: int | None = None,
        adapter_name: str | None = None,
        state_dtype: torch.dtype = torch.float32,
        orth_reg_weight: float = 0.0,
    ) -> None:
        target_r = as_int("target_r", target_r, 0)
        if target_total_rank is not None:
            target_total_rank = as_int("target_total_rank", target_total_rank, 0)
        self.beta1 = as_beta("beta1", beta1)
        self.beta2 = as_beta("beta2", beta2)
        orth_reg_weight = as_weight("orth_reg_weight", orth_reg_weight)
        self.adapters = find_adapters(model, adapter_name)
        if not self.adapters:
            raise ValueError(f"no AdaLoRA adapter in this {type(model).__name__}")
        # The ranks in it are the initial ones, also when `shrink` makes the parameters smaller.
        self._state = AllocatorState(self._parameters(), state_dtype)
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
        self.global_step = 0
        self.frozen = False
        self.shrunk = False
        self.orth_reg_weight = orth_reg_weight
        self.orth_reg: Tensor | None = None
        self._hooks: tuple[RemovableHandle, ...] = ()

    @property
    def _device(self) -> torch.device:
        return self.adapters[0].lora_E.device

    def _parameters(self) -> list[nn.Parameter]:
        return [p for adapter in self.adapters for p in adapter.parameters]

    def set_total_step(self, total_step: int) -> None:
        """Set the number of training steps in the schedule.

        Raises:
            TypeError, ValueError: as `BudgetSchedule`.
        """
        total_step = as_int("total_step", total_step, 1)
        self.schedule = replace(self.schedule, total_step=total_step)

    @property
    def attached(self) -> bool:
        """Whether an optimizer steps this; see `attach`."""
        return bool(self._hooks)

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Take part in every `optimizer.step()` from now on, so that no call can be forgotten.

        Before the optimizer's own work the gradient of the orthogonality regulariser, weighted by
        `orth_reg_weight`, is added to the adapters' gradients; after it comes our `step`, with
        the number of the last one plus 1. So the regulariser counts once per optimizer step,
        whatever the model returns, however many micro-batches there are, and not in any loss. It
        comes after gradient clipping, which no longer sees it. Steps that a GradScaler skips do
        not count, unless the optimizer is a fused one: those can't know, and count, but leave the
        averages as they are. An optimizer step for which no adapter has a gradient is ignored.

        Uses the optimizer's public step hooks, which are not saved or copied with it: attach
        again after loading or copying. A step captured in a CUDA graph needs `advance` and
        `update` instead.

        Args:
            optimizer: over all trainable adapter parameters; or a wrapper that has it as its
                `optimizer`, such as Accelerate's.

        Raises:
            TypeError: not a torch optimizer.
            ValueError: the optimizer lacks a trainable parameter of an adapter, or the adapters
                are sharded.
            RuntimeError: already attached.
        """
        if self.attached:
            raise RuntimeError("attached to an optimizer already: call detach() first")
        optimizer = attach.checked_optimizer(optimizer, self.adapters)
        self._hooks = (
            optimizer.register_step_pre_hook(self._before_optimizer_step),
            optimizer.register_step_post_hook(self._after_optimizer_step),
        )

    def detach(self) -> None:
        """End what `attach` began. Without effect if there is nothing to end."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = ()

    def __getstate__(self) -> dict[str, Any]:
        # A copy has no optimizer that would step it.
        return {**self.__dict__, "_hooks": ()}

    def _has_gradients(self) -> bool:
        # Without a list of all: as a rule the first one answers it.
        return any(p.grad is not None for adapter in self.adapters for p in adapter.parameters)

    def _before_optimizer_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        attach.refuse_capture(self._device)
        if self.orth_reg_weight == 0.0 or not self._has_gradients():
            return
        attach.refuse_closure(args, kwargs)
        self.orth_reg = orth_reg_grad_(
            self.adapters, self.orth_reg_weight, grad_scale=attach.grad_scale_of(optimizer)
        )

    def _after_optimizer_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self._has_gradients():
            self._step(self.global_step + 1, attach.overflow_as_scale(optimizer, self._device))

    def step(self, global_step: int, *, grad_scale: float | Tensor | None = None) -> int:
        """Update the importance averages and, where the schedule says so, prune.

        Nothing is read from the device. A step whose gradients hold inf or NaN changes no
        average and is counted in `summary()`.

        Args:
            global_step: the number of this optimizer step, counted from 1.
            grad_scale: see `update`.

        Returns:
            The budget at this step.

        Raises:
            TypeError, ValueError: global_step is not an int ≥ 0, or what `update` raises.
            RuntimeError: no adapter has a gradient, before the pattern is frozen; or an optimizer
                does this already (`attach`).
        """
        global_step = as_int("global_step", global_step, 0)
        if self.attached:
            raise RuntimeError("attached to an optimizer, whose step() has done this: see attach()")
        return self._step(global_step, as_grad_scale(grad_scale, self._device))

    @torch.no_grad()
    def _step(self, global_step: int, grad_scale: Tensor | None) -> int:
        parameters = self._parameters()
        learns = self._learns(global_step)
        budget = self._advance(global_step, parameters)
        if learns:
            self._state.learn(parameters, self.beta1, self.beta2, grad_scale)
        self._prune_and_freeze(parameters)
        return budget

    @torch.no_grad()
    def skip(self, global_step: int) -> int:
        """A `step` that the optimizer skipped, because a GradScaler found inf or NaN.

        The averages stay, and while there are any `summary()` counts it; budget and pattern
        follow the schedule.

        Args, returns, raises: as `advance`.
        """
        final = self.frozen or global_step >= self.schedule.final_step
        budget = self.advance(global_step)
        if not final:
            self._state.skipped += 1
        self._prune_and_freeze(self._parameters())
        return budget

    def _prune_and_freeze(self, parameters: list[nn.Parameter]) -> None:
        """What the schedule wants at this step; the host knows it, so nothing else is launched."""
        if self.frozen or self.schedule.masks_at(self.global_step):
            self._prune(parameters)
        if not self.frozen and self.global_step >= self.schedule.final_step:
            self._freeze()

    @torch.no_grad()
    def advance(self, global_step: int) -> int:
        """The part of `step` that is not captured: hand the step's budget to the device.

        Returns:
            The budget at this step.

        Raises:
            TypeError, ValueError: global_step is not an int ≥ 0.
        """
        global_step = as_int("global_step", global_step, 0)
        return self._advance(global_step, self._parameters())

    def _advance(self, global_step: int, parameters: list[nn.Parameter]) -> int:
        self._state.follow(parameters)
        self.global_step = global_step
        budget = self.schedule.budget(global_step)
        self._state.budget.fill_(budget)
        self._state.prunes.fill_(self.schedule.masks_at(global_step))
        return budget

    @torch.no_grad()
    def update(self, *, grad_scale: float | Tensor | None = None) -> None:
        """The part of `step` that runs on the device, for the step that `advance` was told.

        Args:
            grad_scale: what ∂L/∂w is of the gradients; 1 / 1024 if the loss was multiplied by
                1024, for instance. A number, or one float32 on the adapters' device.

        Raises:
            TypeError: grad_scale is neither.
            ValueError: it is a tensor of another shape, dtype or device.
            RuntimeError: no adapter has a gradient, before the pattern is frozen.
        """
        scale = as_grad_scale(grad_scale, self._device)
        parameters = self._parameters()
        if self._learns(self.global_step):
            self._state.learn(parameters, self.beta1, self.beta2, scale)
        self._prune(parameters)

    def _learns(self, global_step: int) -> bool:
        """Whether the step updates the averages, for which there must be a gradient."""
        if self.frozen or global_step >= self.schedule.final_step:
            return False
        if not self._has_gradients():
            raise RuntimeError(
                "no adapter has a gradient: call step() after backward() and before zero_grad()"
            )
        return True

    def _prune(self, parameters: list[nn.Parameter]) -> None:
        if not self.shrunk:
            self._state.prune(parameters[1::3], again=self.frozen)

    def _freeze(self) -> None:
        """Fix the pattern: the layers skip what is masked, and the averages are of no more use."""
        self.frozen = True
        self._state.drop_averages()
        if not self.shrunk:
            for adapter, mask in zip(
                self.adapters, self._state.split(self._state.mask), strict=True
            ):
                adapter.set_mask(mask)

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
        return self._state.scores.masked_fill(self._state.mask, -torch.inf).amax()

    def summary(self) -> dict[str, Any]:
        """Where the run stands, for logs. Reads the device.

        Keys: step, phase, budget, total_rank (triplets alive), init_budget, target_budget,
        matrices, skipped_steps (steps with inf or NaN gradients, before the pattern is frozen),
        frozen, shrunk.
        """
        step, schedule = self.global_step, self.schedule
        return {
            "step": step,
            "phase": schedule.phase(step),
            "budget": schedule.budget(step),
            "total_rank": int(self._state.mask.sum()),
            "init_budget": schedule.init_budget,
            "target_budget": schedule.target_budget,
            "matrices": len(self.adapters),
            "skipped_steps": int(self._state.skipped),
            "frozen": self.frozen,
            "shrunk": self.shrunk,
        }

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
        """
        if not isinstance(state, dict):
            raise TypeError(f"state must be a dict, got {type(state).__name__}")
        self._state.check(state, self.state_dict(), self._parameters())
        self._state.load(state, self._parameters())
        self.global_step = state["global_step"]
        self.frozen = False
        for adapter in self.adapters:
            adapter.set_mask(None)
        if state["frozen"]:
            self._freeze()
        if state["shrunk"] and not self.shrunk:
            self.shrink()

    @torch.no_grad()
    def shrink(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Drop the masked triplets for real, once the pattern is frozen.

        The same Parameter objects get smaller storage (and `.grad`), and every state tensor of the
        optimizer that has the shape of its parameter is cut alike, so training goes on exactly
        as with the mask. A matrix without a triplet left becomes its base layer. A wrapper that
        has recorded parameter sizes (DDP, FSDP) has to be built after this call.

        Args:
            optimizer: the optimizer over these parameters; None if there is none yet.

        Raises:
            TypeError: `optimizer` is not a torch optimizer.
            RuntimeError: the pattern is not frozen yet.
            ValueError: the optimizer holds state that can't be cut to a subset of the triplets
                (Adafactor's row and column averages, for instance). Nothing is changed.
        """
        if optimizer is not None:
            attach.check_is_optimizer(optimizer)
        if not self.frozen:
            raise RuntimeError(
                "shrink() needs a frozen pattern: call it at or after step "
                f"total_step - tfinal = {self.schedule.final_step}, not at {self.global_step}"
            )
        if not self.shrunk:
            shrink_(self.adapters, self._state.split(self._state.mask), optimizer)
            self.shrunk = True

"""The budget schedule, and the allocator that spends the budget on the most important triplets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .adapters import Adapter, find_adapters
from .checks import as_grad_scale, check_weight
from .orthogonality import orth_reg_grad_

# Logs of a training have the values of `RankAllocator.summary` under these names.
LOG_PREFIX = "adalora/"
_STATE_FORMAT = 1


def _check_int(name: str, value: object, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")


@dataclass(frozen=True)
class BudgetSchedule:
    """How many triplets may live at each step (paper, section 3.3 and appendix A).

    Three phases: `init_budget` up to step tinit; a cubic decay to `target_budget`; and from step
    total_step - tfinal on, a fixed pattern of `target_budget` triplets.

    Args:
        init_budget: triplets at the start, over all matrices.
        target_budget: triplets at the end. Not below it, but above init_budget it prunes nothing.
        tinit: steps before the first pruning.
        tfinal: steps after the last.
        deltaT: steps between two prunings.
        total_step: steps of the whole training. Steps count from 1, so the last is total_step.
            None: not known yet; nothing after step tinit can be asked until it is.

    Raises:
        TypeError: an argument is not an int.
        ValueError: an argument is negative (deltaT, total_step: not positive), or there is no
            step left for the budgeting phase (tinit ≥ total_step - tfinal).
    """

    init_budget: int
    target_budget: int
    tinit: int
    tfinal: int
    deltaT: int
    total_step: int | None

    def __post_init__(self) -> None:
        for name in ("init_budget", "target_budget", "tinit", "tfinal"):
            _check_int(name, getattr(self, name), 0)
        _check_int("deltaT", self.deltaT, 1)
        if self.total_step is None:
            return
        _check_int("total_step", self.total_step, 1)
        if self.tinit >= self.final_step:
            raise ValueError(
                "tinit must be less than total_step - tfinal, got "
                f"tinit={self.tinit}, total_step={self.total_step}, tfinal={self.tfinal}"
            )

    @property
    def final_step(self) -> int:
        """The last step of the budgeting phase, at which the pattern is frozen.

        Raises:
            RuntimeError: total_step is not known yet.
        """
        if self.total_step is None:
            raise RuntimeError("total_step is not known yet: set it, for the budget depends on it")
        return self.total_step - self.tfinal

    def phase(self, step: int) -> str:
        """ "initial", "budgeting" or "final"."""
        if step <= self.tinit:
            return "initial"
        return "budgeting" if step <= self.final_step else "final"

    def budget(self, step: int) -> int:
        """b(t): the number of triplets that may live at `step`."""
        target = min(self.target_budget, self.init_budget)
        if step <= self.tinit:
            return self.init_budget
        if step >= self.final_step:
            return target
        remaining = 1 - (step - self.tinit) / (self.final_step - self.tinit)
        return int((self.init_budget - target) * remaining**3 + target)

    def masks_at(self, step: int) -> bool:
        """Whether triplets are pruned at `step`: every deltaT-th, the last one, and all final ones.

        PEFT's convention; loralib prunes at the last budgeting step only if deltaT divides it.
        """
        if step <= self.tinit:
            return False
        return step >= self.final_step or step % self.deltaT == 0


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
        _check_int("target_r", target_r, 0)
        if target_total_rank is not None:
            _check_int("target_total_rank", target_total_rank, 0)
        for name, beta in (("beta1", beta1), ("beta2", beta2)):
            if isinstance(beta, bool) or not isinstance(beta, int | float):
                raise TypeError(f"{name} must be a number, got {type(beta).__name__}")
            if not 0.0 < beta < 1.0:
                raise ValueError(f"{name} must be in (0, 1), got {beta}")
        if state_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"state_dtype must be float32 or bfloat16, got {state_dtype}")
        check_weight("orth_reg_weight", orth_reg_weight)
        self.adapters = find_adapters(model, adapter_name)
        if not self.adapters:
            raise ValueError(f"no AdaLoRA adapter in this {type(model).__name__}")
        devices = {p.device for adapter in self.adapters for p in adapter.parameters}
        if len(devices) > 1:
            raise ValueError(
                "model must have all its adapters on one device, "
                f"got {', '.join(sorted(map(str, devices)))}"
            )
        self.beta1 = float(beta1)
        self.beta2 = float(beta2)
        # The initial ranks: they stay what they are when `shrink` makes the parameters smaller.
        self._ranks = [adapter.lora_A.shape[0] for adapter in self.adapters]
        self.schedule = BudgetSchedule(
            init_budget=sum(self._ranks),
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
        self._narrow_dtype = state_dtype
        self._hooks: tuple[RemovableHandle, ...] = ()
        self._make_state()

    def _make_state(self) -> None:
        """The state before the first step, where the model is.

        Captured graphs hold the addresses of all of it: while the model stays where it is and the
        pattern is not frozen, it is only written in place.
        """
        device, dtype, ranks = self._device, self._scores_dtype, sum(self._ranks)
        self._exp_avg_ipt = [self._average_of(p) for p in self._parameters()]
        self._exp_avg_unc = [self._average_of(p) for p in self._parameters()]
        self._scores = torch.zeros(ranks, dtype=dtype, device=device)
        self._mask = torch.ones(ranks, dtype=torch.bool, device=device)
        self._skipped = torch.zeros(1, dtype=torch.int64, device=device)
        # Of the current step; negative where nothing is pruned.
        self._budget = torch.full((1,), -1, dtype=torch.int64, device=device)

    @property
    def _device(self) -> torch.device:
        return self.adapters[0].lora_E.device

    def _parameters(self) -> list[nn.Parameter]:
        return [p for adapter in self.adapters for p in adapter.parameters]

    def _masks(self) -> list[Tensor]:
        return list(self._mask.split_with_sizes(self._ranks))

    @property
    def _scores_dtype(self) -> torch.dtype:
        return _at_least_float32(self.adapters[0].lora_A.dtype)

    def _average_dtype(self, parameter: Tensor) -> torch.dtype:
        dtype = _at_least_float32(parameter.dtype)
        return dtype if dtype == torch.float64 else self._narrow_dtype

    def _average_of(self, parameter: Tensor) -> Tensor:
        return torch.zeros(
            parameter.shape, dtype=self._average_dtype(parameter), device=parameter.device
        )

    def set_total_step(self, total_step: int) -> None:
        """Set the number of training steps in the schedule.

        Raises:
            TypeError, ValueError: as `BudgetSchedule`.
        """
        _check_int("total_step", total_step, 1)
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
        while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
            optimizer = optimizer.optimizer  # type: ignore[attr-defined]
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
            )
        if self.attached:
            raise RuntimeError("attached to an optimizer already: call detach() first")
        if any("DTensor" in type(p).__name__ for p in self._parameters()):
            raise ValueError("the adapters are sharded (FSDP2, DTensor), which is not supported")
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for adapter in self.adapters:
            if any(p.requires_grad and id(p) not in held for p in adapter.parameters):
                raise ValueError(
                    f"optimizer must have all trainable adapter parameters, lacks one of those "
                    f"beside {adapter.name}"
                )
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
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "an attached allocator can't be captured in a CUDA graph, for its budget changes: "
                "detach() it, and capture update() (see RankAllocator)"
            )
        weight = self.orth_reg_weight
        if weight == 0.0 or not self._has_gradients():
            return
        if (len(args) > 1 and args[1] is not None) or kwargs.get("closure") is not None:
            raise RuntimeError(
                "an attached allocator can't add its regulariser to gradients that are made by a "
                "closure: use orth_reg in the loss, and orth_reg_weight=0 here"
            )
        # A fused optimizer divides by the GradScaler's scale itself.
        scale = getattr(optimizer, "grad_scale", None)
        self.orth_reg = orth_reg_grad_(
            self.adapters, weight, grad_scale=None if scale is None else 1.0 / scale
        )

    def _after_optimizer_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if not self._has_gradients():
            return
        # What a fused optimizer under a GradScaler has instead of not being called. It is not to
        # be read here; a scale of inf makes the update skip itself on the device.
        overflow = getattr(optimizer, "found_inf", None)
        scale = None
        if overflow is not None:
            scale = torch.full((1,), torch.inf, device=self._device)
            scale = scale.where(overflow.to(self._device) > 0, 1.0)
        self._step(self.global_step + 1, scale)

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
        _check_int("global_step", global_step, 0)
        if self.attached:
            raise RuntimeError("attached to an optimizer, whose step() has done this: see attach()")
        return self._step(global_step, as_grad_scale(grad_scale, self._device))

    def _step(self, global_step: int, grad_scale: Tensor | None) -> int:
        parameters = self._learning(global_step)
        budget = self.advance(global_step)
        self._update(parameters, grad_scale)
        self._freeze_if_final()
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
            self._skipped += 1
        self._update([], None)
        self._freeze_if_final()
        return budget

    def _freeze_if_final(self) -> None:
        if self.global_step >= self.schedule.final_step and not self.frozen:
            self._freeze()

    @torch.no_grad()
    def advance(self, global_step: int) -> int:
        """The part of `step` that is not captured: hand the step's budget to the device.

        Returns:
            The budget at this step.

        Raises:
            TypeError, ValueError: global_step is not an int ≥ 0.
        """
        _check_int("global_step", global_step, 0)
        self._follow_model()
        self.global_step = global_step
        budget = self.schedule.budget(global_step)
        self._budget.fill_(budget if self.schedule.masks_at(global_step) else -1)
        return budget

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
        self._update(self._learning(self.global_step), scale)

    def _learning(self, global_step: int) -> list[nn.Parameter]:
        """The parameters whose averages the step updates: all, or none any more."""
        if self.frozen or global_step >= self.schedule.final_step:
            return []
        parameters = self._parameters()
        if all(p.grad is None for p in parameters):
            raise RuntimeError(
                "no adapter has a gradient: call step() after backward() and before zero_grad()"
            )
        return parameters

    @torch.no_grad()
    def _update(self, parameters: list[nn.Parameter], grad_scale: Tensor | None) -> None:
        if parameters:
            torch.ops.adalora.importance_update_(
                parameters,
                [p.grad for p in parameters],
                self._exp_avg_ipt,
                self._exp_avg_unc,
                self._scores,
                self._skipped,
                self.beta1,
                self.beta2,
                grad_scale,
            )
        if not self.shrunk:
            lora_E = parameters[1::3] or [adapter.lora_E for adapter in self.adapters]
            budget = None if self.frozen else self._budget
            torch.ops.adalora.allocate_(self._scores, budget, self._mask, lora_E)

    def _follow_model(self) -> None:
        """Bring the state to the device and dtype of the model, which may have been moved since."""
        device, dtype = self._device, self._scores_dtype
        if self._scores.device == device and self._scores.dtype == dtype:
            return
        if self._scores.is_meta:
            self._make_state()
            return
        if not self.frozen:
            dtypes = [self._average_dtype(p) for p in self._parameters()]
            for averages in (self._exp_avg_ipt, self._exp_avg_unc):
                averages[:] = [t.to(device, d) for t, d in zip(averages, dtypes, strict=True)]
        self._scores = self._scores.to(device, dtype)
        self._mask = self._mask.to(device)
        self._skipped = self._skipped.to(device)
        self._budget = self._budget.to(device)

    def _freeze(self) -> None:
        """Fix the pattern: the layers skip what is masked, and the averages are of no more use."""
        self.frozen = True
        self._exp_avg_ipt = []
        self._exp_avg_unc = []
        if self.shrunk:
            return
        for adapter, mask in zip(self.adapters, self._masks(), strict=True):
            adapter.set_mask(mask)

    def ranks(self) -> dict[str, int]:
        """Triplets alive in each matrix, by the name of its lora_E. Reads the device."""
        return {name: sum(pattern) for name, pattern in self.rank_pattern.items()}

    @property
    def rank_pattern(self) -> dict[str, list[bool]]:
        """PEFT's rank_pattern: which initial triplets of each matrix live. Reads the device."""
        patterns = [part.tolist() for part in self._mask.cpu().split_with_sizes(self._ranks)]
        return {a.name: pattern for a, pattern in zip(self.adapters, patterns, strict=True)}

    def scores(self) -> dict[str, Tensor]:
        """The importance (r,) of each matrix's triplets (eq. 7), by the name of its lora_E."""
        parts = self._scores.clone().split_with_sizes(self._ranks)
        return {adapter.name: part for adapter, part in zip(self.adapters, parts, strict=True)}

    def highest_pruned_score(self) -> Tensor:
        """loralib's mask threshold: a scalar on the device, -inf where nothing is pruned."""
        return self._scores.masked_fill(self._mask, -torch.inf).amax()

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
            "total_rank": int(self._mask.sum()),
            "init_budget": schedule.init_budget,
            "target_budget": schedule.target_budget,
            "matrices": len(self.adapters),
            "skipped_steps": int(self._skipped),
            "frozen": self.frozen,
            "shrunk": self.shrunk,
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, as tensors (copied), ints, bools and strings."""
        return {
            "format": _STATE_FORMAT,
            "names": [adapter.name for adapter in self.adapters],
            "ranks": list(self._ranks),
            "global_step": self.global_step,
            "frozen": self.frozen,
            "shrunk": self.shrunk,
            "exp_avg_ipt": [t.clone() for t in self._exp_avg_ipt],
            "exp_avg_unc": [t.clone() for t in self._exp_avg_unc],
            "scores": self._scores.clone(),
            "mask": self._mask.clone(),
            "skipped": self._skipped.clone(),
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
        missing = self.state_dict().keys() - state.keys()
        if missing:
            raise ValueError(f"state is not from a RankAllocator: it lacks {sorted(missing)}")
        if state["format"] != _STATE_FORMAT:
            raise ValueError(f"state has format {state['format']}, this version reads 1")
        names = [adapter.name for adapter in self.adapters]
        if state["names"] != names:
            raise ValueError(
                f"state is for other adapters: {_first_difference(state['names'], names)}"
            )
        if state["ranks"] != self._ranks:
            raise ValueError(f"state is for ranks {state['ranks']}, the model has {self._ranks}")
        if self.shrunk and not (state["shrunk"] and state["mask"].tolist() == self._mask.tolist()):
            raise ValueError("state is for other triplets than those that shrink() left here")
        shapes = [] if state["frozen"] else [p.shape for p in self._parameters()]
        expected = {
            "exp_avg_ipt": shapes,
            "exp_avg_unc": shapes,
            "scores": self._scores.shape,
            "mask": self._mask.shape,
            "skipped": self._skipped.shape,
        }
        for key, shape in expected.items():
            value = state[key]
            actual = [t.shape for t in value] if isinstance(value, list) else value.shape
            if actual != shape:
                raise ValueError(f"state has {key} of shape {actual}, expected {shape}")
        self._follow_model()
        if not state["frozen"]:
            if self.frozen:
                self._exp_avg_ipt = [self._average_of(p) for p in self._parameters()]
                self._exp_avg_unc = [self._average_of(p) for p in self._parameters()]
            torch._foreach_copy_(self._exp_avg_ipt, state["exp_avg_ipt"])
            torch._foreach_copy_(self._exp_avg_unc, state["exp_avg_unc"])
        for name in ("scores", "mask", "skipped"):
            getattr(self, f"_{name}").copy_(state[name])
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
        if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
            )
        if not self.frozen:
            raise RuntimeError(
                "shrink() needs a frozen pattern: call it at or after step "
                f"total_step - tfinal = {self.schedule.final_step}, not at {self.global_step}"
            )
        if self.shrunk:
            return
        states = {} if optimizer is None else optimizer.state
        for adapter in self.adapters:
            for parameter in adapter.parameters:
                _check_state(adapter, parameter, states.get(parameter, {}))
        for adapter, mask in zip(self.adapters, self._masks(), strict=True):
            alive = mask.nonzero().squeeze(1)
            for parameter, dim in zip(adapter.parameters, (0, 0, 1), strict=True):
                _cut_(parameter, states.get(parameter, {}), dim, alive)
            adapter.set_rank(alive.numel())
            adapter.set_mask(None)
        self.shrunk = True


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _first_difference(theirs: list[str], mine: list[str]) -> str:
    for a, b in zip(theirs, mine, strict=False):
        if a != b:
            return f"{a!r} where the model has {b!r}"
    return f"{len(theirs)} of them where the model has {len(mine)}"


def _check_state(adapter: Adapter, parameter: nn.Parameter, state: dict[str, Any]) -> None:
    for key, value in state.items():
        if isinstance(value, Tensor) and value.numel() > 1 and value.shape != parameter.shape:
            raise ValueError(
                f"optimizer state {key!r} of {adapter.name} has shape {tuple(value.shape)}, "
                f"its parameter {tuple(parameter.shape)}: it can't be cut to the live triplets"
            )


def _cut_(parameter: nn.Parameter, state: dict[str, Any], dim: int, alive: Tensor) -> None:
    """Keep the `alive` indices along `dim` of a parameter, its gradient and its optimizer state."""
    shape, grad = parameter.shape, parameter.grad
    parameter.grad = None
    parameter.data = parameter.data.index_select(dim, alive)
    if grad is not None:
        parameter.grad = grad.index_select(dim, alive)
    for key, value in state.items():
        # Step counters and other scalars have a shape of their own.
        if isinstance(value, Tensor) and value.shape == shape and value.dim() > 0:
            state[key] = value.index_select(dim, alive)

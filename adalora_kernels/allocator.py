"""The budget schedule, and the allocator that spends the budget on the most important triplets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import reference
from .adapters import Adapter, find_adapters

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
    total_step: int

    def __post_init__(self) -> None:
        for name in ("init_budget", "target_budget", "tinit", "tfinal"):
            _check_int(name, getattr(self, name), 0)
        for name in ("deltaT", "total_step"):
            _check_int(name, getattr(self, name), 1)
        if self.tinit >= self.final_step:
            raise ValueError(
                "tinit must be less than total_step - tfinal, got "
                f"tinit={self.tinit}, total_step={self.total_step}, tfinal={self.tfinal}"
            )

    @property
    def final_step(self) -> int:
        """The last step of the budgeting phase, at which the pattern is frozen."""
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

    Call `step` once per optimizer step, after `optimizer.step()` and before `zero_grad()`. Pruning
    writes 0 into lora_E; a pruned triplet still gets a gradient there and can come back, until
    the pattern is frozen at step total_step - tfinal. Works on our layers, loralib's and PEFT's.

    Memory: two averages in float32 (float64 for float64 parameters) per adapter entry, freed when
    the pattern is frozen.

    Args:
        model: where to look for adapters (`find_adapters`); all on one device.
        target_r: average number of triplets per matrix at the end.
        total_step, tinit, tfinal, deltaT: see `BudgetSchedule`.
        beta1, beta2: decay of the averages of sensitivity and uncertainty (eq. 9, 10), in (0, 1).
        target_total_rank: triplets at the end over all matrices, in place of target_r per matrix.
        adapter_name: which of PEFT's named adapters; by default the trainable ones.

    Attributes:
        schedule: the `BudgetSchedule`; may be replaced by one with the same init_budget.
        adapters: the adapters, in module order. Ties between triplets go to the earlier one.

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
        total_step: int,
        tinit: int = 0,
        tfinal: int = 0,
        deltaT: int = 1,
        beta1: float = 0.85,
        beta2: float = 0.85,
        target_total_rank: int | None = None,
        adapter_name: str | None = None,
    ) -> None:
        _check_int("target_r", target_r, 0)
        if target_total_rank is not None:
            _check_int("target_total_rank", target_total_rank, 0)
        for name, beta in (("beta1", beta1), ("beta2", beta2)):
            if isinstance(beta, bool) or not isinstance(beta, int | float):
                raise TypeError(f"{name} must be a number, got {type(beta).__name__}")
            if not 0.0 < beta < 1.0:
                raise ValueError(f"{name} must be in (0, 1), got {beta}")
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
        device = self._device
        dtype = _state_dtype(self.adapters[0].lora_A)
        self._exp_avg_ipt = [_state_like(p) for p in self._parameters()]
        self._exp_avg_unc = [_state_like(p) for p in self._parameters()]
        self._scores = torch.zeros(sum(self._ranks), dtype=dtype, device=device)
        self._mask = torch.ones(sum(self._ranks), dtype=torch.bool, device=device)
        self._skipped = torch.zeros(1, dtype=torch.int64, device=device)

    @property
    def _device(self) -> torch.device:
        return self.adapters[0].lora_E.device

    def _parameters(self) -> list[nn.Parameter]:
        return [p for adapter in self.adapters for p in adapter.parameters]

    def _masks(self) -> list[Tensor]:
        return list(self._mask.split_with_sizes(self._ranks))

    @torch.no_grad()
    def step(self, global_step: int) -> int:
        """Update the importance averages and, where the schedule says so, prune.

        Nothing is read from the device. A step whose gradients hold inf or NaN changes no
        average and is counted in `summary()`.

        Args:
            global_step: the number of this optimizer step, counted from 1.

        Returns:
            The budget at this step.

        Raises:
            TypeError, ValueError: global_step is not an int ≥ 0.
            RuntimeError: no adapter has a gradient, before the pattern is frozen.
        """
        _check_int("global_step", global_step, 0)
        schedule = self.schedule
        updates = not self.frozen and global_step < schedule.final_step
        parameters = self._parameters()
        if updates and all(p.grad is None for p in parameters):
            raise RuntimeError(
                "no adapter has a gradient: call step() after backward() and before zero_grad()"
            )
        self._follow_model()
        self.global_step = global_step
        if updates:
            torch.ops.adalora.importance_update_(
                parameters,
                [p.grad for p in parameters],
                self._exp_avg_ipt,
                self._exp_avg_unc,
                self._scores,
                self._skipped,
                self.beta1,
                self.beta2,
            )
        budget = schedule.budget(global_step)
        if schedule.masks_at(global_step) and not self.shrunk:
            if not self.frozen:
                self._mask = reference.top_b_mask(self._scores, budget)
            self._write_mask()
            if global_step >= schedule.final_step and not self.frozen:
                self._freeze()
        return budget

    def _follow_model(self) -> None:
        """Bring the state to the device and dtype of the model, which may have been moved since."""
        device, dtype = self._device, _state_dtype(self.adapters[0].lora_A)
        if self._scores.device == device and self._scores.dtype == dtype:
            return
        if not self.frozen:
            dtypes = [_state_dtype(p) for p in self._parameters()]
            for averages in (self._exp_avg_ipt, self._exp_avg_unc):
                averages[:] = [t.to(device, d) for t, d in zip(averages, dtypes, strict=True)]
        self._scores = self._scores.to(device, dtype)
        self._mask = self._mask.to(device)
        self._skipped = self._skipped.to(device)

    def _write_mask(self) -> None:
        """Write 0 into lora_E where the mask is false: one fill and one copy for all matrices."""
        lora_E: list[Tensor] = [adapter.lora_E for adapter in self.adapters]
        flat = torch.cat(lora_E).masked_fill_(~self._mask.unsqueeze(1), 0.0)
        torch._foreach_copy_(lora_E, flat.split_with_sizes(self._ranks))

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
        matrices, skipped_steps (steps with inf or NaN gradients), frozen, shrunk.
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
        device = self._device
        # copy=True: the caller's tensors must not change when this run goes on.
        self._exp_avg_ipt = [t.to(device, copy=True) for t in state["exp_avg_ipt"]]
        self._exp_avg_unc = [t.to(device, copy=True) for t in state["exp_avg_unc"]]
        self._scores = state["scores"].to(device, copy=True)
        self._mask = state["mask"].to(device, copy=True)
        self._skipped = state["skipped"].to(device, copy=True)
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


def _state_dtype(parameter: Tensor) -> torch.dtype:
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def _state_like(parameter: Tensor) -> Tensor:
    return torch.zeros_like(
        parameter, dtype=_state_dtype(parameter), memory_format=torch.contiguous_format
    )


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

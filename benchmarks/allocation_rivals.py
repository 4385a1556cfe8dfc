"""What competes in the allocation step, on a CPU and on a GPU, and what it has to compute."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
from peft import PeftModel
from torch import Tensor

import adalora_kernels
import adalora_kernels.peft
from adalora_kernels import RankAllocator, reference
from adalora_kernels.adapters import Adapter, find_adapters
from benchmarks.harness import check, poisoned_memory
from benchmarks.peft_models import MASKS, SCHEDULE, TARGET_R, UPDATES

PEFT = "PEFT"
APPLIED = "adalora_kernels.peft.apply"
STEP = "RankAllocator.step"
FOREACH = "torch._foreach, no gate"
ORTH_REG = "orth_reg(adapters)"
GRAD_OF_MODEL, GRAD_OF_ADAPTERS = "orth_reg_grad_(model)", "orth_reg_grad_(adapters)"
BATCHED = "batched by shape"

BETA = 0.85
WEIGHT = 0.5
BYTES_PER_ENTRY = 24


def adapters_of(model: PeftModel) -> list[Adapter]:
    """Named as in PEFT's allocator."""
    return find_adapters(model.base_model.model)


def allocator_of(model: PeftModel) -> RankAllocator:
    """With the schedule and the betas of PEFT's."""
    options = {"target_r": TARGET_R, "beta1": BETA, "beta2": BETA, **SCHEDULE}
    return RankAllocator(model.base_model.model, **options)


@dataclass(frozen=True)
class Importance:
    """A rival: `step(5)` updates the importance, and `step(50)` masks, too, where `masks`.

    `averages` are (exp_avg_ipt, exp_avg_unc), each A_0, E_0, B_0, A_1, …; `scores` those of all
    triplets, of which PEFT keeps none.
    """

    model: PeftModel
    step: Callable[[int], object]
    averages: Callable[[], tuple[Sequence[Tensor], Sequence[Tensor]]]
    scores: Callable[[], Tensor] | None = None
    masks: bool = True


def peft_importance(model: PeftModel) -> Importance:
    allocator = model.base_model.rankallocator
    names = [
        adapter.name.replace("lora_E", factor)
        for adapter in adapters_of(model)
        for factor in ("lora_A", "lora_E", "lora_B")
    ]

    def averages() -> tuple[list[Tensor], list[Tensor]]:
        both = allocator.exp_avg_ipt, allocator.exp_avg_unc
        ipt, unc = ([state[name] for name in names] for state in both)
        return ipt, unc

    return Importance(model, model.base_model.update_and_allocate, averages)


def applied_importance(model: PeftModel) -> Importance:
    adalora_kernels.peft.apply(model)
    allocator = model.base_model.rankallocator
    return _ours(model, allocator, model.base_model.update_and_allocate)


def direct_importance(model: PeftModel, allocator: RankAllocator | None = None) -> Importance:
    allocator = allocator or allocator_of(model)
    return _ours(model, allocator, allocator.step)


def _ours(model: PeftModel, allocator: RankAllocator, step: Callable[[int], object]) -> Importance:
    def averages() -> tuple[list[Tensor], list[Tensor]]:
        state = allocator.state_dict()
        return state["exp_avg_ipt"], state["exp_avg_unc"]

    def scores() -> Tensor:
        return torch.cat(list(allocator.scores().values()))

    return Importance(model, step, averages, scores)


class Foreach:
    """The importance update in `torch._foreach_*` over all parameters, and the scores.

    The averages of equal shapes lie in one tensor, so that the scores take a few calls for each
    shape instead of a few for each matrix. It doesn't look for inf and NaN.
    """

    def __init__(self, model: PeftModel) -> None:
        adapters = adapters_of(model)
        self.parameters = [p for adapter in adapters for p in adapter.parameters]
        self.grads = [p.grad for p in self.parameters if p.grad is not None]
        self.exp_avg_ipt: list[Tensor] = [torch.empty(0)] * len(self.parameters)
        self.exp_avg_unc = list(self.exp_avg_ipt)
        r = adapters[0].lora_A.shape[0]
        self.by_triplet = self.parameters[0].new_zeros(len(adapters), r)
        # By shape: the matrices that have it, their averages, and the axis of the triplets' means.
        self._groups: list[tuple[Tensor, Tensor, Tensor, int]] = []
        for which, dim in ((0, 2), (1, 2), (2, 1)):
            own = self.parameters[which::3]
            for shape in dict.fromkeys(p.shape for p in own):
                same = [i for i, p in enumerate(own) if p.shape == shape]
                ipt, unc = (self.by_triplet.new_zeros(len(same), *shape) for _ in range(2))
                for i, one_ipt, one_unc in zip(same, ipt, unc, strict=True):
                    self.exp_avg_ipt[3 * i + which] = one_ipt
                    self.exp_avg_unc[3 * i + which] = one_unc
                rows = torch.tensor(same, device=self.by_triplet.device)
                self._groups.append((rows, ipt, unc, dim))

    @torch.no_grad()
    def update(self) -> None:
        ipt = torch._foreach_mul(self.parameters, self.grads)
        torch._foreach_abs_(ipt)
        torch._foreach_lerp_(self.exp_avg_ipt, ipt, 1.0 - BETA)
        torch._foreach_sub_(ipt, self.exp_avg_ipt)
        torch._foreach_abs_(ipt)
        torch._foreach_lerp_(self.exp_avg_unc, ipt, 1.0 - BETA)
        self.by_triplet.zero_()
        for rows, avg_ipt, avg_unc, dim in self._groups:
            mean = torch.linalg.vecdot(avg_ipt, avg_unc, dim=dim).div_(avg_ipt.shape[dim])
            self.by_triplet.index_add_(0, rows, mean)


def foreach_importance(model: PeftModel, foreach: Foreach | None = None) -> Importance:
    rival = foreach or Foreach(model)
    return Importance(
        model,
        lambda step: rival.update(),
        lambda: (rival.exp_avg_ipt, rival.exp_avg_unc),
        lambda: rival.by_triplet.flatten(),
        masks=False,
    )


def wrong_importance(rivals: Mapping[str, Importance], updates: int = 3) -> dict[str, Exception]:
    """Which rivals, PEFT first, are wrong after some updates and a masking step, or fail.

    All are held against float64; ours, and the others, must have at most twice PEFT's error, with
    memory poisoned.
    """
    theirs = rivals[PEFT].model
    parameters = [p for adapter in adapters_of(theirs) for p in adapter.parameters]
    exact_w = [p.detach().double() for p in parameters]
    exact_g = [p.grad.double() for p in parameters if p.grad is not None]
    exact_ipt, exact_unc = ([torch.zeros_like(w) for w in exact_w] for _ in range(2))
    scores = exact_w[0].new_zeros(sum(w.shape[0] for w in exact_w[1::3]))
    skipped = torch.zeros(1, dtype=torch.int64, device=scores.device)
    eager: Sequence[Tensor | None] = [None] * (2 * len(parameters))
    for _ in range(updates + 1):
        reference.importance_update_(
            exact_w, exact_g, exact_ipt, exact_unc, scores, skipped, BETA, BETA
        )
    budget = allocator_of(theirs).schedule.budget(MASKS)
    kept = reference.top_b_mask(scores, budget)
    threshold = scores[kept].amin()
    # Where rounding may decide.
    close = (scores - threshold).abs() <= 1e-5 * threshold
    wrong = {}
    for name, rival in rivals.items():
        try:
            with contextlib.nullcontext() if name == PEFT else poisoned_memory():
                for _ in range(updates):
                    rival.step(UPDATES)
                rival.step(MASKS)
            averages = list(chain(*rival.averages()))
            for i, exact in enumerate(chain(exact_ipt, exact_unc)):
                check(f"{name}: average {i}", averages[i], exact, eager[i])
            if rival.scores is not None:
                check(f"{name}: scores", rival.scores(), scores, None)
            if rival.masks:
                _check_kept(name, _alive(rival.model), kept, close)
            if name == PEFT:
                eager = averages
        # Anything can go wrong in a kernel, and it is the bench that decides what it ends.
        except Exception as error:
            wrong[name] = error
    return wrong


def _alive(model: PeftModel) -> Tensor:
    return torch.cat([adapter.lora_E.detach().flatten() != 0 for adapter in adapters_of(model)])


def _check_kept(name: str, alive: Tensor, kept: Tensor, close: Tensor) -> None:
    different = int(((alive != kept) & ~close).sum())
    if different or int(alive.sum()) != int(kept.sum()):
        raise ArithmeticError(f"{name} keeps {int(alive.sum())} triplets, {different} wrong ones")


def traffic(entries: int) -> Callable[[], object]:
    """What no implementation can avoid: read w, g and both averages, and write both averages."""
    w, g, ipt, unc = torch.ones(4, entries).unbind()

    def move() -> None:
        torch.dot(w, g)
        ipt.mul_(1.0)
        unc.mul_(1.0)

    return move


@dataclass(frozen=True)
class Orthogonality:
    """A rival: `step` adds the gradients to those of the model and returns the value."""

    model: PeftModel
    step: Callable[[], Tensor]


def peft_orthogonality(model: PeftModel) -> Orthogonality:
    """The real `AdaLoraModel.forward`, around a model that only returns a loss of 0."""
    return Orthogonality(model, partial(_through_model, model))


def applied_orthogonality(model: PeftModel) -> Orthogonality:
    adalora_kernels.peft.apply(model)
    return Orthogonality(model, partial(_through_model, model))


def _through_model(model: PeftModel) -> Tensor:
    # Not `model()`: without a task type PeftModel goes past AdaLoraModel, hence the regulariser.
    loss: Tensor = model.base_model().loss
    loss.backward()
    return loss


def differentiated_orthogonality(model: PeftModel) -> Orthogonality:
    adapters = adapters_of(model)

    def step() -> Tensor:
        loss = adalora_kernels.orth_reg(adapters, WEIGHT)
        loss.backward()
        return loss

    return Orthogonality(model, step)


def direct_orthogonality(model: PeftModel, search: bool = False) -> Orthogonality:
    """`search`: given the model, it looks for the adapters in every call."""
    where = model if search else adapters_of(model)
    return Orthogonality(model, partial(adalora_kernels.orth_reg_grad_, where, WEIGHT))


def batched_orthogonality(model: PeftModel) -> Orthogonality:
    """Stacks what has the same shape, and has the gradient written out: no autograd."""
    adapters = adapters_of(model)
    by_shape: dict[tuple[bool, torch.Size], list[Tensor]] = {}
    for adapter in adapters:
        for wide, factor in ((True, adapter.lora_A), (False, adapter.lora_B)):
            by_shape.setdefault((wide, factor.shape), []).append(factor)
    r = adapters[0].lora_A.shape[0]
    eye = torch.eye(r, device=adapters[0].lora_A.device)
    scale = WEIGHT / (2 * len(adapters))

    @torch.no_grad()
    def step() -> Tensor:
        norms, grads, more = [], [], []
        for (wide, _), factors in by_shape.items():
            stacked = torch.stack(factors)
            rows = stacked if wide else stacked.mT
            residual = torch.baddbmm(eye, rows, rows.mT, beta=-1.0)
            norm = torch.linalg.matrix_norm(residual, keepdim=True)
            norms.append(norm.flatten())
            residual.mul_(torch.where(norm > 0, 2.0 * scale / norm, 0.0))
            grad = torch.bmm(residual, stacked) if wide else torch.bmm(stacked, residual)
            more += grad.unbind()
            grads += [factor.grad for factor in factors]
        torch._foreach_add_(grads, more)
        return scale * torch.cat(norms).sum()

    return Orthogonality(model, step)


def wrong_orthogonality(rivals: Mapping[str, Orthogonality]) -> dict[str, Exception]:
    """Which rivals, PEFT first, are wrong or fail, by the rule of `wrong_importance`."""
    theirs = rivals[PEFT].model
    exact_factors = [p.detach().double().requires_grad_() for p in _factors(theirs)]
    norms, _ = reference.orth_reg(exact_factors[0::2], exact_factors[1::2])
    value = WEIGHT * norms.mean()
    exact = [value, *torch.autograd.grad(value, exact_factors)]
    eager: Sequence[Tensor | None] = [None] * len(exact)
    wrong = {}
    for name, rival in rivals.items():
        before = [_grad(p).clone() for p in _factors(rival.model)]
        for parameter in _factors(rival.model):
            _grad(parameter).zero_()
        try:
            with contextlib.nullcontext() if name == PEFT else poisoned_memory():
                value = rival.step()
            actual = [value, *(_grad(p).clone() for p in _factors(rival.model))]
            for i, (result, wanted, theirs_) in enumerate(zip(actual, exact, eager, strict=True)):
                what = f"gradient {i}" if i else "value"
                check(f"{name}: {what}", result, wanted, theirs_)
            if name == PEFT:
                eager = actual
        except Exception as error:
            wrong[name] = error
        for parameter, grad in zip(_factors(rival.model), before, strict=True):
            _grad(parameter).copy_(grad)
    return wrong


def _factors(model: PeftModel) -> list[Tensor]:
    return list(chain(*((a.lora_A, a.lora_B) for a in adapters_of(model))))


def _grad(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        raise ValueError("a factor without a gradient")
    return parameter.grad


def raise_first(wrong: Mapping[str, Exception]) -> None:
    """For a bench that a wrong rival must end."""
    for error in wrong.values():
        raise error

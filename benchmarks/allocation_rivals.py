"""Who competes in the importance update and the allocation, and what those have to give.

PEFT's, ours, the authors' formulas (loralib) and our definition (reference.py) in plain torch, and
the most that plain torch can do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from peft import PeftModel
from torch import Tensor

import adalora_kernels
import adalora_kernels.peft
from adalora_kernels import BudgetSchedule, RankAllocator, reference
from adalora_kernels.adapters import Adapter, find_adapters
from benchmarks.counting import Call
from benchmarks.numerics import check, poisoned_memory
from benchmarks.peft_models import MASKS, SCHEDULE, UPDATES, Architecture, adapted_model

PEFT = "PEFT"
APPLIED = "adalora_kernels.peft.apply"
LORALIB, REFERENCE = "loralib", "reference.py"
STEP, UPDATE = "RankAllocator.step", "RankAllocator.update"
CAPTURED = "RankAllocator.update, captured"
FOREACH = "torch._foreach, no gate"
OURS = (APPLIED, STEP, UPDATE, CAPTURED)

BETA = 0.85
# Reads w, g and both averages, and writes both averages.
BYTES_PER_ENTRY = 24
# Of models with more entries w and g alone are 32 MB.
_LARGE = 2**22


def models_of(
    architecture: Architecture, names: Sequence[str], device: torch.device
) -> dict[str, PeftModel]:
    """A model for each rival, for a cache might keep the tensors of one for the next.

    A large one takes seconds to make, and no cache keeps it, so it is shared by all that leave
    its modules alone. What they write there the check of their results puts back.
    """
    shared = adapted_model(architecture, device) if architecture.entries > _LARGE else None
    return {
        name: adapted_model(architecture, device) if shared is None or name == APPLIED else shared
        for name in names
    }


def adapters_of(model: PeftModel) -> list[Adapter]:
    """Named as in PEFT's allocator."""
    return find_adapters(model.base_model.model)


def parameters_of(model: PeftModel) -> list[Tensor]:
    """A_0, E_0, B_0, A_1, …"""
    return [p for adapter in adapters_of(model) for p in adapter.parameters]


def allocator_of(model: PeftModel) -> RankAllocator:
    """With the budget, the schedule and the betas of PEFT's."""
    options = {"target_r": _target_r(model), "beta1": BETA, "beta2": BETA, **SCHEDULE}
    return RankAllocator(model.base_model.model, **options)


def _schedule_of(model: PeftModel) -> BudgetSchedule:
    ranks = [adapter.lora_A.shape[0] for adapter in adapters_of(model)]
    return BudgetSchedule(sum(ranks), _target_r(model) * len(ranks), **SCHEDULE)


def _target_r(model: PeftModel) -> int:
    target_r: int = model.peft_config["default"].target_r
    return target_r


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


def direct_importance(model: PeftModel) -> Importance:
    allocator = allocator_of(model)
    return _ours(model, allocator, allocator.step)


def captured_importance(model: PeftModel) -> Importance:
    """What is left of `allocator.step` where the step is part of a CUDA graph.

    The graph is captured here; what that takes, it takes back. On a CPU there is none.
    """
    allocator = allocator_of(model)
    replay: Callable[[], object] = allocator.update
    if allocator.adapters[0].lora_E.is_cuda:
        before = allocator.state_dict()
        allocator.advance(UPDATES)
        allocator.update()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            allocator.update()
        allocator.load_state_dict(before)
        replay = graph.replay

    def step(step: int) -> None:
        allocator.advance(step)
        replay()

    return _ours(model, allocator, step)


def _ours(model: PeftModel, allocator: RankAllocator, step: Callable[[int], object]) -> Importance:
    def averages() -> tuple[list[Tensor], list[Tensor]]:
        state = allocator.state_dict()
        return state["exp_avg_ipt"], state["exp_avg_unc"]

    def scores() -> Tensor:
        return torch.cat(list(allocator.scores().values()))

    return Importance(model, step, averages, scores)


class Loralib:
    """The authors' formulas over the same parameters, one after the other.

    Their own loops look every parameter up by its name; these have them in lists. The reading of
    the threshold, for which the host waits, is theirs.
    """

    def __init__(self, model: PeftModel) -> None:
        self.parameters = parameters_of(model)
        self.exp_avg_ipt = [torch.zeros_like(p) for p in self.parameters]
        self.exp_avg_unc = [torch.zeros_like(p) for p in self.parameters]
        self.schedule = _schedule_of(model)

    @torch.no_grad()
    def step(self, step: int) -> None:
        for i, parameter in enumerate(self.parameters):
            ipt = (parameter * parameter.grad).abs()
            self.exp_avg_ipt[i] = BETA * self.exp_avg_ipt[i] + (1 - BETA) * ipt
            distance = (ipt - self.exp_avg_ipt[i]).abs()
            self.exp_avg_unc[i] = BETA * self.exp_avg_unc[i] + (1 - BETA) * distance
        if self.schedule.masks_at(step):
            self._mask(self.schedule.init_budget - self.schedule.budget(step))

    def _mask(self, dropped: int) -> None:
        entries = [i * u for i, u in zip(self.exp_avg_ipt, self.exp_avg_unc, strict=True)]
        scores = [
            E + A.mean(dim=1, keepdim=True) + B.mean(dim=0).view(-1, 1)
            for A, E, B in zip(entries[0::3], entries[1::3], entries[2::3], strict=True)
        ]
        threshold = torch.kthvalue(torch.cat(scores).flatten(), dropped).values.item()
        for lora_E, score in zip(self.parameters[1::3], scores, strict=True):
            lora_E.masked_fill_(score <= threshold, 0.0)


def loralib_importance(model: PeftModel) -> Importance:
    rival = Loralib(model)
    return Importance(model, rival.step, lambda: (rival.exp_avg_ipt, rival.exp_avg_unc))


class Reference:
    """The definition of our ops, called directly, the lists made once."""

    def __init__(self, model: PeftModel) -> None:
        self.parameters = parameters_of(model)
        self.grads = [p.grad for p in self.parameters]
        self.exp_avg_ipt = [torch.zeros_like(p) for p in self.parameters]
        self.exp_avg_unc = [torch.zeros_like(p) for p in self.parameters]
        self.schedule = _schedule_of(model)
        self.scores = self.parameters[0].new_zeros(self.schedule.init_budget)
        self.skipped = torch.zeros(1, dtype=torch.int64, device=self.scores.device)
        self.budget = torch.zeros_like(self.skipped)
        self.mask = torch.ones_like(self.scores, dtype=torch.bool)

    def step(self, step: int) -> None:
        self.learn()
        if self.schedule.masks_at(step):
            self.budget.fill_(self.schedule.budget(step))
            self.prune()

    @torch.no_grad()
    def learn(self) -> None:
        averages = (self.exp_avg_ipt, self.exp_avg_unc)
        reference.importance_update_(
            self.parameters, self.grads, *averages, self.scores, self.skipped, BETA, BETA
        )

    @torch.no_grad()
    def prune(self) -> None:
        reference.allocate_(self.scores, self.budget, self.mask, self.parameters[1::3])

    def update(self) -> None:
        """Both, for the last budget: a CUDA graph can hold it."""
        self.learn()
        self.prune()


def reference_importance(model: PeftModel) -> Importance:
    rival = Reference(model)
    averages = (rival.exp_avg_ipt, rival.exp_avg_unc)
    return Importance(model, rival.step, lambda: averages, lambda: rival.scores)


class Foreach:
    """The importance update in `torch._foreach_*` over all parameters, and the scores.

    The averages of equal shapes lie in one tensor, so that the scores take a few calls for each
    shape instead of a few for each matrix. It doesn't look for inf and NaN.
    """

    def __init__(self, model: PeftModel) -> None:
        adapters = adapters_of(model)
        self.parameters = parameters_of(model)
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


def foreach_importance(model: PeftModel) -> Importance:
    rival = Foreach(model)
    return Importance(
        model,
        lambda step: rival.update(),
        lambda: (rival.exp_avg_ipt, rival.exp_avg_unc),
        lambda: rival.by_triplet.flatten(),
        masks=False,
    )


MAKE: Mapping[str, Callable[[PeftModel], Importance]] = {
    PEFT: peft_importance,
    APPLIED: applied_importance,
    STEP: direct_importance,
    UPDATE: direct_importance,
    CAPTURED: captured_importance,
    FOREACH: foreach_importance,
    LORALIB: loralib_importance,
    REFERENCE: reference_importance,
}


def wrong_importance(rivals: Mapping[str, Importance]) -> dict[str, Exception]:
    """Which rivals, PEFT first, are wrong after an update and a masking step, or fail.

    All are held against float64, with memory poisoned for all but PEFT. Ours must have at most
    twice PEFT's error, the others must be the same but for rounding. What was masked is put back.
    """
    theirs = rivals[PEFT].model
    parameters = parameters_of(theirs)
    exact_w = [p.detach().double() for p in parameters]
    exact_g = [p.grad.double() for p in parameters if p.grad is not None]
    exact_ipt, exact_unc = ([torch.zeros_like(w) for w in exact_w] for _ in range(2))
    scores = exact_w[0].new_zeros(sum(w.shape[0] for w in exact_w[1::3]))
    skipped = torch.zeros(1, dtype=torch.int64, device=scores.device)
    eager: Sequence[Tensor | None] = [None] * (2 * len(parameters))
    for _ in (UPDATES, MASKS):
        reference.importance_update_(
            exact_w, exact_g, exact_ipt, exact_unc, scores, skipped, BETA, BETA
        )
    kept = reference.top_b_mask(scores, _schedule_of(theirs).budget(MASKS))
    threshold = scores[kept].amin()
    # Where rounding may decide.
    close = (scores - threshold).abs() <= 1e-5 * threshold
    wrong = {}
    for name, rival in rivals.items():
        before = [adapter.lora_E.detach().clone() for adapter in adapters_of(rival.model)]
        try:
            with contextlib.nullcontext() if name == PEFT else poisoned_memory():
                rival.step(UPDATES)
                rival.step(MASKS)
            averages = list(chain(*rival.averages()))
            for i, exact in enumerate(chain(exact_ipt, exact_unc)):
                theirs_ = eager[i] if name in OURS else None
                check(f"{name}: average {i}", averages[i], exact, theirs_)
            if rival.scores is not None:
                check(f"{name}: scores", rival.scores(), scores, None)
            if rival.masks:
                _check_kept(name, _alive(rival.model), kept, close)
            if name == PEFT:
                eager = averages
        # Anything can go wrong in a kernel, and it is the bench that decides what it ends.
        except Exception as error:
            wrong[name] = error
        with torch.no_grad():
            for adapter, lora_E in zip(adapters_of(rival.model), before, strict=True):
                adapter.lora_E.copy_(lora_E)
    return wrong


def _alive(model: PeftModel) -> Tensor:
    return torch.cat([adapter.lora_E.detach().flatten() != 0 for adapter in adapters_of(model)])


def _check_kept(name: str, alive: Tensor, kept: Tensor, close: Tensor) -> None:
    different = int(((alive != kept) & ~close).sum())
    if different or int(alive.sum()) != int(kept.sum()):
        raise ArithmeticError(f"{name} keeps {int(alive.sum())} triplets, {different} wrong ones")


def traffic(entries: int) -> Call:
    """What no implementation can avoid: read w, g and both averages, and write both averages."""
    w, g, ipt, unc = torch.ones(4, entries).unbind()

    def move() -> None:
        torch.dot(w, g)
        ipt.mul_(1.0)
        unc.mul_(1.0)

    return move

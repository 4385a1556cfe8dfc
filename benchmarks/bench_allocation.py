"""`update_and_allocate` on a whole model: PEFT's against ours, in time, ops and host syncs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import peft_models
import pytest
import torch
from harness import CountOps, Row, check, interleaved
from peft import PeftModel
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import adalora_kernels.peft
from adalora_kernels import reference

PEFT, OURS, FLOOR = "PEFT", "adalora_kernels.peft.apply", "memory traffic alone"
STEPS = {"importance only": 5, "importance and masking": 50}
# Design, section 6.
SPEED_GOAL = (">=", 10.0)
OPS_GOAL = ("<=", 40)


def _names(ours: PeftModel) -> list[str]:
    """Of all adapter parameters, in the order of our allocator: A, E, B of each matrix."""
    adapters = ours.base_model.rankallocator.adapters
    return [a.name.replace("lora_E", f) for a in adapters for f in ("lora_A", "lora_E", "lora_B")]


def _check(theirs: PeftModel, ours: PeftModel) -> None:
    """Three importance updates against float64, then one masking step against PEFT's."""
    names = _names(ours)
    parameters = dict(ours.base_model.model.named_parameters())
    exact_w = [parameters[name].detach().double() for name in names]
    exact_g = [parameters[name].grad.double() for name in names]
    exact_ipt, exact_unc = ([torch.zeros_like(w) for w in exact_w] for _ in range(2))
    scores = torch.zeros(12 * len(names) // 3, dtype=torch.float64)
    skipped = torch.zeros(1, dtype=torch.int64)
    for step in (1, 2, 3):
        reference.importance_update_(
            exact_w, exact_g, exact_ipt, exact_unc, scores, skipped, 0.85, 0.85
        )
        for model in (theirs, ours):
            model.base_model.update_and_allocate(step)
    eager, state = theirs.base_model.rankallocator, ours.base_model.rankallocator.state_dict()
    for key, exact in (("exp_avg_ipt", exact_ipt), ("exp_avg_unc", exact_unc)):
        for name, mine, wanted in zip(names, state[key], exact, strict=True):
            rival = getattr(eager, key)[name]
            check(f"PEFT: {key} of {name}", rival, wanted)
            check(f"{OURS}: {key} of {name}", mine, wanted, rival)
    for model in (theirs, ours):
        model.base_model.update_and_allocate(STEPS["importance and masking"])
    if not torch.equal(_alive(theirs), _alive(ours)):
        raise ArithmeticError("PEFT and adalora_kernels keep different triplets")


def _alive(model: PeftModel) -> Tensor:
    return torch.cat([p != 0 for n, p in model.named_parameters() if "lora_E" in n])


def _traffic() -> Callable[[], object]:
    """What no implementation can avoid: read w, g and both averages, and write both averages."""
    parameters = [p for p in peft_models.deberta_matrices().parameters() if p.grad is not None]
    read = [t.detach() for p in parameters for t in (p, p.grad) if t is not None]
    averages = [torch.ones_like(t) for t in read]

    def traffic() -> None:
        torch._foreach_max(read)
        torch._foreach_mul_(averages, 1.0)

    return traffic


@pytest.mark.parametrize("what", STEPS)
def bench_update_and_allocate(benchmark: BenchmarkFixture, record: list[Row], what: str) -> None:
    models = {PEFT: peft_models.deberta_matrices(), OURS: peft_models.deberta_matrices()}
    adalora_kernels.peft.apply(models[OURS])
    _check(*models.values())
    rivals = {
        name: partial(model.base_model.update_and_allocate, STEPS[what])
        for name, model in models.items()
    }
    timings = interleaved(benchmark, {**rivals, FLOOR: _traffic()}, rounds=60, warmup=3)

    row = partial(Row, f"update_and_allocate, {what}", peft_models.SETTINGS)
    for name, goal in ((OURS, SPEED_GOAL), (FLOOR, None)):
        timing = timings[name]
        record.append(row(name, "PEFT's time / time", timing.faster, goal, timing.seconds))
    for name, rival in rivals.items():
        with CountOps() as ops:
            rival()
        ops_goal = OPS_GOAL if name == OURS and what == "importance and masking" else None
        record.append(row(name, "dispatched ops", ops.calls.total(), ops_goal))
        if name == OURS:
            record.append(row(name, "ops inside those", ops.inner.total()))
        record.append(row(name, "host syncs", ops.host_syncs))

"""A masking step of a whole model, `update_and_allocate`: time, memory traffic, ops, host syncs.

On a GPU also what each op over a whole model launches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.allocation_cases import (
    FASTER,
    OPS,
    SYNCS,
    Case,
    architectures,
    counts,
    guarded_steps,
    has_goals,
    measure_steps,
    of_steps,
    whole_models,
)
from benchmarks.allocation_rivals import (
    APPLIED,
    BETA,
    CAPTURED,
    LORALIB,
    OURS,
    PEFT,
    REFERENCE,
    STEP,
    parameters_of,
)
from benchmarks.contest import Context, Outcome
from benchmarks.counting import Call
from benchmarks.peft_models import DEBERTA_BASE, MASKS, Architecture, adapted_model
from benchmarks.results import Row, Run

MASKING, SINGLE_OPS = "masking step", "single ops"
RIVALS = (PEFT, APPLIED, STEP, LORALIB, REFERENCE)
OP_NAMES = (
    "importance_update_",
    "allocate_",
    "orth_reg",
    "orth_reg_backward",
    "orth_reg_grad_",
)
# Design, section 6.
CPU_GOAL, GPU_GOAL = (">=", 10.0), (">=", 30.0)
OPS_GOAL, SYNCS_GOAL = ("<=", 40), ("<=", 0)


def cases(context: Context) -> Sequence[Case]:
    """Steps as a training loop takes them; on a GPU also a captured one, and the single ops."""
    rivals = (*RIVALS, CAPTURED) if context.for_gpu else RIVALS
    single = whole_models(context) if context.for_gpu else ()
    return [
        *of_steps(MASKING, rivals, context, architectures(context)),
        *(Case(SINGLE_OPS, each, OP_NAMES) for each in single),
    ]


def measure(case: Case, context: Context) -> Outcome:
    """Of a case, all rivals."""
    if case.work == SINGLE_OPS:
        return _measure_ops(case, context)
    goals = {(name, SYNCS): SYNCS_GOAL for name in OURS}
    goals |= {(name, OPS): OPS_GOAL for name in OURS}
    if has_goals(case, context):
        goals |= {(name, FASTER): GPU_GOAL if context.for_gpu else CPU_GOAL for name in OURS}
    return measure_steps(case, context, MASKS, goals)


def _measure_ops(case: Case, context: Context) -> Outcome:
    """Only what each asks for: whether it is right is seen where it is part of a step."""
    outcome = Outcome()
    for name, call in single_ops(case.architecture, context.device).items():
        outcome.rows += counts(case, name, call, context.device)
    return outcome


@torch.no_grad()
def single_ops(architecture: Architecture, device: torch.device) -> dict[str, Call]:
    """A call of every op over a whole model."""
    with_grads = parameters_of(adapted_model(architecture, device))
    parameters, grads = [p.detach() for p in with_grads], [p.grad for p in with_grads]
    averages = [[torch.zeros_like(p) for p in parameters] for _ in range(2)]
    A, E, B = parameters[0::3], parameters[1::3], parameters[2::3]
    ranks = sum(e.shape[0] for e in E)
    scores = torch.rand(ranks, device=device)
    whole = partial(torch.zeros, 1, dtype=torch.int64, device=device)
    mask, budget = torch.ones_like(scores, dtype=torch.bool), whole() + ranks // 2
    norms, residuals = torch.ops.adalora.orth_reg(A, B)
    backward = (torch.ones_like(norms), norms, residuals, A, B)
    arguments = (
        (parameters, grads, *averages, scores, whole(), BETA, BETA),
        (scores, budget, mask, [e.clone() for e in E]),
        (A, B),
        backward,
        (*backward, grads[0::3], grads[2::3]),
    )
    return {
        name: partial(getattr(torch.ops.adalora, name), *those)
        for name, those in zip(OP_NAMES, arguments, strict=True)
    }


def guarded(context: Context) -> Iterator[Row]:
    """The counts of all rivals on one model."""
    return guarded_steps(MASKING, DEBERTA_BASE, RIVALS, MASKS, context)


def bench_allocation(outcome: Outcome, rival: str, benchmark: BenchmarkFixture, run: Run) -> None:
    """What one rival gave."""
    outcome.report(rival, benchmark, run)

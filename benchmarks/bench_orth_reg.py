"""The orthogonality regulariser of a whole model, value and gradients.

Every rival adds to gradients that are there already, as those of the loss would be. On a GPU, where
that is bound by the host, what the device does is a case of its own, in CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.allocation_cases import (
    FASTER,
    OPS,
    SYNCS,
    Case,
    against_peft,
    architectures,
    contestants,
    details_of,
    guarded_counts,
    has_goals,
    measure_calls,
    whole_models,
)
from benchmarks.allocation_rivals import APPLIED, LORALIB, PEFT, REFERENCE
from benchmarks.contest import Context, Outcome
from benchmarks.orth_reg_rivals import (
    BATCHED,
    GRAD_OF_ADAPTERS,
    GRAD_OF_MODEL,
    MAKE,
    ORTH_REG,
    OURS,
    wrong_orthogonality,
)
from benchmarks.peft_models import DEBERTA_BASE, adapted_model
from benchmarks.results import Row, Run, speed
from benchmarks.timing import sets_beyond_cache, timings

ORTHOGONALITY, DEVICE = "orthogonality", "orthogonality on the device"
RIVALS = (
    PEFT,
    APPLIED,
    ORTH_REG,
    GRAD_OF_MODEL,
    GRAD_OF_ADAPTERS,
    BATCHED,
    LORALIB,
    REFERENCE,
)
# The ways in and out of the same work cost the same again at every point of a curve.
ON_CURVES = (PEFT, APPLIED, GRAD_OF_ADAPTERS, BATCHED, LORALIB)
# Those whose calls can be captured.
ON_DEVICE = (PEFT, GRAD_OF_ADAPTERS, BATCHED, REFERENCE)
# Design, section 6.
CPU_GOAL, GPU_GOAL = (">=", 3.0), (">=", 30.0)
OPS_GOAL, SYNCS_GOAL = ("<=", 10), ("<=", 0)
# orth_reg_grad_ reads each factor for its Gram matrix and once more for the gradient, which it
# reads and writes; the second reading may come from the L2.
BYTES_PER_ENTRY = 16
RATE = f"GB/s at {BYTES_PER_ENTRY} B per entry"


def cases(context: Context) -> Sequence[Case]:
    """As a training loop asks for it; on a GPU also what the device does."""
    device = whole_models(context) if context.for_gpu else ()
    return [
        *(
            Case(ORTHOGONALITY, each, RIVALS if each.curve is None else ON_CURVES)
            for each in architectures(context)
        ),
        *(Case(DEVICE, each, ON_DEVICE) for each in device),
    ]


def measure(case: Case, context: Context) -> Outcome:
    """Of a case, all rivals."""
    make = {name: MAKE[name] for name in case.rivals}
    outcome, rivals = contestants(case, context, make, wrong_orthogonality, OURS)
    if case.work == DEVICE:
        right = list(rivals)
        # Their models need not stay.
        del rivals
        _measure_device(outcome, case, context, right)
        return outcome
    goals = {(name, SYNCS): SYNCS_GOAL for name in OURS}
    goals |= {(name, OPS): OPS_GOAL for name in (GRAD_OF_MODEL, GRAD_OF_ADAPTERS)}
    if has_goals(case, context):
        goals |= {(name, FASTER): GPU_GOAL if context.for_gpu else CPU_GOAL for name in OURS}
    calls = {name: rival.step for name, rival in rivals.items()}
    measure_calls(outcome, case, context, calls, goals)
    return outcome


def _measure_device(outcome: Outcome, case: Case, context: Context, right: Sequence[str]) -> None:
    """In CUDA graphs over inputs beyond the L2."""
    if not context.timed:
        return
    architecture, device = case.architecture, context.device
    moved = BYTES_PER_ENTRY * architecture.entries
    models = [
        adapted_model(architecture, device)
        for _ in range(sets_beyond_cache(8 * architecture.entries, device))
    ]
    calls = {name: [MAKE[name](model).step for model in models] for name in right}
    least = moved / context.ceilings.copy
    samples = outcome.time(context, calls, seconds=2.0, call_seconds=least)
    outcome.rows += against_peft(case, samples, {})
    for name, timing in timings(samples, PEFT).items() if PEFT in samples else ():
        details = details_of(samples[name]) | {"bytes": moved}
        rate = speed(moved * 1e-9, timing.seconds)
        outcome.rows.append(case.row(name, RATE, rate, seconds=timing.seconds, details=details))


def guarded(context: Context) -> Iterator[Row]:
    """The counts of all rivals on one model."""
    case = Case(ORTHOGONALITY, DEBERTA_BASE, RIVALS)
    return guarded_counts(case, context, MAKE, lambda rival: rival.step)


def bench_orth_reg(outcome: Outcome, rival: str, benchmark: BenchmarkFixture, run: Run) -> None:
    """What one rival gave."""
    outcome.report(rival, benchmark, run)

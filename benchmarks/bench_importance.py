"""The importance update of a whole model, without masking: time, memory traffic, ops, host syncs.

On a GPU, where that is bound by the host, what the device does is a case of its own: the update and
the allocation in CUDA graphs over inputs beyond the L2, against a copy that moves as many bytes.
PEFT and loralib compute no scores in such a step; the others do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from peft import PeftModel
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import allocation_rivals
from benchmarks.allocation_cases import (
    RATE,
    SYNCS,
    Case,
    contestants,
    details_of,
    guarded_steps,
    has_goals,
    measure_steps,
    of_steps,
    whole_models,
)
from benchmarks.allocation_rivals import (
    APPLIED,
    BYTES_PER_ENTRY,
    FOREACH,
    LORALIB,
    MAKE,
    OURS,
    PEFT,
    REFERENCE,
    STEP,
    UPDATE,
    Foreach,
    Reference,
    allocator_of,
)
from benchmarks.contest import Context, Outcome
from benchmarks.counting import Call
from benchmarks.peft_models import (
    DEBERTA_BASE,
    LLAMA_8B,
    MASKS,
    UPDATES,
    Architecture,
    adapted_model,
)
from benchmarks.results import Row, Run, speed
from benchmarks.timing import Sample, sets_beyond_cache, timings

IMPORTANCE, DEVICE = "importance only", "importance + allocation on the device"
RIVALS = (PEFT, APPLIED, STEP, FOREACH, LORALIB, REFERENCE)
COPY = "copy of as many bytes"
RATIO = f"time / {COPY}"
SYNCS_GOAL = ("<=", 0)
# Design, section 6.
COPY_GOAL = ("<=", 1.3)


def cases(context: Context) -> Sequence[Case]:
    """What the device does first, where that is another question than what the host does."""
    device = whole_models(context) if context.for_gpu else ()
    return [
        *(Case(DEVICE, each, (COPY, UPDATE, FOREACH, REFERENCE)) for each in device),
        *of_steps(IMPORTANCE, RIVALS, context, _with_steps(context)),
    ]


def _with_steps(context: Context) -> list[Architecture]:
    """Those of which a masking step, which has all of this in it, does not say enough."""
    models = whole_models(context)
    return list(models) if context.for_gpu else [each for each in models if each is not LLAMA_8B]


def measure(case: Case, context: Context) -> Outcome:
    """Of a case, all rivals."""
    if case.work == DEVICE:
        return _measure_device(case, context)
    return measure_steps(case, context, UPDATES, {(name, SYNCS): SYNCS_GOAL for name in OURS})


def _update_of(model: PeftModel) -> Call:
    allocator = allocator_of(model)
    allocator.advance(MASKS)
    return allocator.update


def _reference_of(model: PeftModel) -> Call:
    reference = Reference(model)
    reference.step(MASKS)
    return reference.update


# What is captured, of a model that has been in no other call.
ON_DEVICE: Mapping[str, Callable[[PeftModel], Call]] = {
    UPDATE: _update_of,
    FOREACH: lambda model: Foreach(model).update,
    REFERENCE: _reference_of,
}


def _measure_device(case: Case, context: Context) -> Outcome:
    make = {name: MAKE[name] for name in (PEFT, *ON_DEVICE)}
    outcome, right = contestants(case, context, make, allocation_rivals.wrong_importance, OURS)
    names = [name for name in ON_DEVICE if name in right]
    del right
    if not context.timed:
        return outcome
    architecture, device = case.architecture, context.device
    count = sets_beyond_cache(16 * architecture.entries, device)
    calls = {COPY: [_copy(architecture, device) for _ in range(count)]}
    models = [adapted_model(architecture, device) for _ in range(count)]
    calls |= {name: [ON_DEVICE[name](model) for model in models] for name in names}
    moved = BYTES_PER_ENTRY * architecture.entries
    least = moved / context.ceilings.copy
    samples = outcome.time(context, calls, seconds=2.0, call_seconds=least)
    goals = {UPDATE: COPY_GOAL} if has_goals(case, context) else {}
    outcome.rows += _against_copy(case, samples, context.ceilings.copy, goals)
    return outcome


def _copy(architecture: Architecture, device: torch.device) -> Call:
    half = BYTES_PER_ENTRY // 2 * architecture.entries
    source, target = (torch.ones(half // 4, device=device) for _ in range(2))
    return partial(target.copy_, source)


def _against_copy(
    case: Case,
    samples: Mapping[str, Sample],
    ceiling: float,
    goals: Mapping[str, tuple[str, float]],
) -> Iterator[Row]:
    moved = BYTES_PER_ENTRY * case.architecture.entries
    for name, timing in timings(samples, COPY).items():
        rate = speed(moved * 1e-9, timing.seconds)
        of_ceiling = {"bytes": moved, "of the ceiling": rate.median * 1e9 / ceiling}
        details = details_of(samples[name]) | of_ceiling
        rest = {"seconds": timing.seconds, "details": details}
        yield case.row(name, RATIO, timing.slower, goal=goals.get(name), **rest)
        yield case.row(name, RATE, rate, **rest)


def guarded(context: Context) -> Iterator[Row]:
    """The counts of all rivals on one model."""
    return guarded_steps(IMPORTANCE, DEBERTA_BASE, RIVALS, UPDATES, context)


def bench_importance(outcome: Outcome, rival: str, benchmark: BenchmarkFixture, run: Run) -> None:
    """What one rival gave."""
    outcome.report(rival, benchmark, run)

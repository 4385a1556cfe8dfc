"""The importance update and the allocation of a whole model: time, memory traffic, ops, host syncs.

Each model with its adapters takes a gigabyte at Llama-8B's shapes, so both benches of an
architecture share the rivals, whose results are checked when they are made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import allocation_rivals as rivals_
from benchmarks.allocation_rivals import APPLIED, BYTES_PER_ENTRY, FOREACH, PEFT, STEP, Importance
from benchmarks.harness import CountOps, Row, against, interleaved, speed
from benchmarks.peft_models import (
    DEBERTA_BASE,
    HOST_ALONE,
    LLAMA_8B,
    MASKS,
    UPDATES,
    Architecture,
    adapted_model,
)

FLOOR = "memory traffic alone"
# The rounds: a step of PEFT's takes 25 ms, or the better part of a second.
ROUNDS = {DEBERTA_BASE.name: 60, LLAMA_8B.name: 15, HOST_ALONE.name: 30}
# Design, section 6: on DeBERTa-base.
SPEED_GOAL = (">=", 10.0)
OPS_GOAL, SYNCS_GOAL = ("<=", 40), ("<=", 0)


@dataclass(frozen=True)
class Contest:
    """An architecture and what competes on it."""

    architecture: Architecture
    rivals: Mapping[str, Importance]


@pytest.fixture(
    scope="module",
    params=(DEBERTA_BASE, LLAMA_8B, HOST_ALONE),
    ids=lambda architecture: architecture.name,
)
def contest(request: pytest.FixtureRequest, one_thread: None) -> Contest:
    make = {
        PEFT: rivals_.peft_importance,
        APPLIED: rivals_.applied_importance,
        STEP: rivals_.direct_importance,
        FOREACH: rivals_.foreach_importance,
    }
    rivals = {name: rival(adapted_model(request.param)) for name, rival in make.items()}
    rivals_.raise_first(rivals_.wrong_importance(rivals))
    return Contest(request.param, rivals)


@pytest.mark.benchmark(group="importance")
def bench_importance(benchmark: BenchmarkFixture, record: list[Row], contest: Contest) -> None:
    """Without masking. PEFT computes no scores in such a step; the others do."""
    _bench(benchmark, record, contest, "importance", UPDATES)


@pytest.mark.benchmark(group="update_and_allocate")
def bench_update_and_allocate(
    benchmark: BenchmarkFixture, record: list[Row], contest: Contest
) -> None:
    """With masking."""
    row = _bench(benchmark, record, contest, "update_and_allocate, masking", MASKS)
    for name, rival in contest.rivals.items():
        if rival.masks:
            with CountOps() as ops:
                rival.step(MASKS)
            goals = (None, None) if name == PEFT else (OPS_GOAL, SYNCS_GOAL)
            record.append(row(name, "dispatched ops", ops.calls.total(), goals[0]))
            if name != PEFT:
                record.append(row(name, "ops inside those", ops.inner.total()))
            record.append(row(name, "host syncs", ops.host_syncs, goals[1]))


def _bench(
    benchmark: BenchmarkFixture, record: list[Row], contest: Contest, case: str, step: int
) -> partial[Row]:
    """The rows of time and traffic; what makes more rows of the same case."""
    architecture = contest.architecture
    calls = {
        name: partial(rival.step, step)
        for name, rival in contest.rivals.items()
        if rival.masks or step == UPDATES
    }
    if architecture is not HOST_ALONE:
        calls[FLOOR] = rivals_.traffic(architecture.entries)
    seconds = interleaved(benchmark, calls, rounds=ROUNDS[architecture.name], warmup=2)
    row = partial(Row, case, architecture.settings)
    has_goal = step == MASKS and architecture is DEBERTA_BASE
    for name, timing in against(PEFT, seconds).items():
        if name != PEFT:
            goal = SPEED_GOAL if has_goal and name != FLOOR else None
            record.append(row(name, "PEFT's time / time", timing.faster, goal, timing.seconds))
    if architecture is HOST_ALONE:
        return row
    for name, timing in against(FLOOR, seconds).items():
        traffic = BYTES_PER_ENTRY * architecture.entries * 1e-9
        rate = speed(traffic, timing.seconds)
        record.append(row(name, "GB/s at 24 B per entry", rate, None, timing.seconds))
        if name != FLOOR:
            record.append(row(name, f"speed / {FLOOR}", timing.faster))
    return row

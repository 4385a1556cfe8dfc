"""The orthogonality regulariser of a whole model, value and gradients: PEFT's against ours."""

from __future__ import annotations

from functools import partial

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import allocation_rivals as rivals_
from benchmarks.allocation_rivals import (
    APPLIED,
    BATCHED,
    GRAD_OF_ADAPTERS,
    GRAD_OF_MODEL,
    ORTH_REG,
    PEFT,
)
from benchmarks.harness import CountOps, Row, against, interleaved
from benchmarks.peft_models import DEBERTA_BASE, HOST_ALONE, LLAMA_8B, Architecture, adapted_model

ROUNDS = {DEBERTA_BASE.name: 60, LLAMA_8B.name: 15, HOST_ALONE.name: 30}
# Design, section 6: on DeBERTa-base.
SPEED_GOAL = (">=", 3.0)
OPS_GOAL = ("<=", 10)
MAKE = {
    PEFT: rivals_.peft_orthogonality,
    APPLIED: rivals_.applied_orthogonality,
    ORTH_REG: rivals_.differentiated_orthogonality,
    GRAD_OF_MODEL: partial(rivals_.direct_orthogonality, search=True),
    GRAD_OF_ADAPTERS: rivals_.direct_orthogonality,
    BATCHED: rivals_.batched_orthogonality,
}


@pytest.mark.benchmark(group="orthogonality")
@pytest.mark.parametrize(
    "architecture", (DEBERTA_BASE, LLAMA_8B, HOST_ALONE), ids=lambda architecture: architecture.name
)
def bench_orth_reg(
    benchmark: BenchmarkFixture, record: list[Row], architecture: Architecture
) -> None:
    """Every rival adds to gradients that are there already, as those of the loss would be."""
    rivals = {name: make(adapted_model(architecture)) for name, make in MAKE.items()}
    rivals_.raise_first(rivals_.wrong_orthogonality(rivals))
    calls = {name: rival.step for name, rival in rivals.items()}
    seconds = interleaved(benchmark, calls, rounds=ROUNDS[architecture.name], warmup=2)
    row = partial(Row, "orthogonality, value and gradients", architecture.settings)
    for name, timing in against(PEFT, seconds).items():
        if name != PEFT:
            is_ours = name != BATCHED and architecture is DEBERTA_BASE
            goal = SPEED_GOAL if is_ours else None
            record.append(row(name, "PEFT's time / time", timing.faster, goal, timing.seconds))
    for name, call in calls.items():
        with CountOps() as ops:
            call()
        ops_goal = OPS_GOAL if name in (GRAD_OF_MODEL, GRAD_OF_ADAPTERS) else None
        record.append(row(name, "dispatched ops", ops.calls.total(), ops_goal))

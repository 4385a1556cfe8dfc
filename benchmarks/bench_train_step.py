"""Whole training steps: what an adapter costs where it is used.

Llama-3.2-1B and DeBERTa-v3-base with random weights on a GPU, small ones of both kinds on a CPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import train_step_rivals as rivals_
from benchmarks.contest import Context, Outcome
from benchmarks.counting import count_ops, host_syncs, peak_extra_memory
from benchmarks.results import Row, Run, speed
from benchmarks.timing import timings
from benchmarks.train_step_rivals import (
    APPLIED,
    CAPTURED,
    COMPILED,
    DEBERTA,
    FROZEN,
    LLAMA,
    LORA,
    OURS,
    PEFT,
    SMALL_DEBERTA,
    SMALL_LLAMA,
    Architecture,
    Batch,
    Trainee,
)

RATIO, AGAINST_FLOOR = f"time / {LORA}", f"time / {FROZEN}"
# Design, section 6, asks the first at Llama-3.2-1B's shapes on a GPU; elsewhere no less is wanted.
TIME_GOAL, SYNCS_GOAL, MEMORY_GOAL = ("<=", 1.0), ("<=", 0), ("<", 1.0)
# Of transformers' models some look at a mask.
OWN_SYNCS = "host syncs, without the model's own"
MEMORY_RATIO = f"peak extra MB / {PEFT}'s"
# Tokens for whose logits and activations a GPU has room, without and with checkpointing.
_LARGEST_BATCH = {False: 16384, True: 32768}
# Of the batch of a check, which a GPU has room for in float64, and a CPU time.
_MOST_TOKENS = {"cuda": 4096, "cpu": 64}


@dataclass(frozen=True)
class TrainStep:
    """Steps of one model on batches of one size; `special` are rivals that not every case has."""

    architecture: Architecture
    rows: int
    tokens: int
    dtype: torch.dtype
    checkpointing: bool = False
    special: tuple[str, ...] = ()

    @property
    def rivals(self) -> Sequence[str]:
        return (LORA, FROZEN, PEFT, APPLIED, *self.special)

    @property
    def settings(self) -> dict[str, Any]:
        compiled = {"rivals": "compiled, too"} if COMPILED in self.special else {}
        return {
            "model": self.architecture.name,
            "micro-batch": self.rows,
            "sequence": self.tokens,
            "checkpointing": self.checkpointing,
            "dtype": str(self.dtype).removeprefix("torch."),
            "LoRA r": 8,
            "AdaLoRA r": "12 to 8",
            **compiled,
        }

    @property
    def expected_seconds(self) -> float:
        """A guess for a GPU: to make the models, and to compile one."""
        return 120.0 if COMPILED in self.special else 15.0

    def __str__(self) -> str:
        checkpointing = ", checkpointing" if self.checkpointing else ""
        compiled = ", compiled" if COMPILED in self.special else ""
        return f"{self.architecture.name} {self.rows}x{self.tokens}{checkpointing}{compiled}"


def cases(context: Context) -> Sequence[TrainStep]:
    """On a GPU those with a goal first, then more and more tokens."""
    if not context.for_gpu:
        small = partial(TrainStep, tokens=64, dtype=torch.float32)
        return (
            small(SMALL_LLAMA, 1, special=(COMPILED,)),
            small(SMALL_LLAMA, 4),
            small(SMALL_LLAMA, 4, checkpointing=True),
            small(SMALL_DEBERTA, 4),
        )
    if context.smoke:
        return (
            TrainStep(SMALL_LLAMA, 1, 16, torch.float32),
            TrainStep(SMALL_DEBERTA, 2, 16, torch.float32, checkpointing=True),
        )
    large = partial(TrainStep, dtype=torch.bfloat16, special=(CAPTURED,))
    goals = [large(LLAMA, 4, 1024), large(DEBERTA, 16, 512)]
    compiled = [replace(case, special=(COMPILED,)) for case in goals]
    sizes = itertools.product((LLAMA, DEBERTA), (False, True), (512, 2048, 4096), (1, 2, 4, 8, 16))
    rest = [
        large(model, rows, tokens, checkpointing=checkpointing)
        for model, checkpointing, tokens, rows in sizes
        if tokens <= model.longest and rows * tokens <= _LARGEST_BATCH[checkpointing]
    ]
    seen = {str(case) for case in goals}
    return [*goals, *compiled, *(case for case in rest if str(case) not in seen)]


# Making them takes longer than a step; one model's at a time has room.
@lru_cache(maxsize=1)
def _trainees(
    architecture: Architecture, names: Sequence[str], device: torch.device, dtype: torch.dtype
) -> dict[str, Trainee]:
    return rivals_.make_trainees(architecture, names, device, dtype)


def measure(case: TrainStep, context: Context) -> Outcome:
    """Gradients first, then time, memory, and where in a step the time goes."""
    device, outcome = context.device, Outcome()
    trainees = dict(_trainees(case.architecture, case.rivals, device, case.dtype))
    rivals_.set_checkpointing(trainees, case.checkpointing)
    fewer = max(1, min(case.rows, _MOST_TOKENS[device.type] // case.tokens))
    small = case.architecture.batch(fewer, case.tokens, device)
    outcome.drop_wrong(trainees, rivals_.wrong_steps(trainees, small), OURS)
    batch = case.architecture.batch(case.rows, case.tokens, device)

    calls = {name: partial(trainee.step, batch) for name, trainee in trainees.items()}
    samples = outcome.time(
        context,
        {name: [call] for name, call in calls.items()},
        seconds=3.0,
        rounds=(4, 40),
        by_host=True,
    )
    row = partial(Row, "training step", case.settings)
    for first, measure in ((LORA, RATIO), (FROZEN, AGAINST_FLOOR)):
        compared = timings(samples, first) if first in samples else {}
        for name, timing in compared.items():
            goal = TIME_GOAL if first == LORA and name in OURS else None
            rate = speed(case.rows * case.tokens, timing.seconds)
            details = {"tokens/s": rate.median, "clock": samples[name].clock}
            ratio = row(name, measure, timing.slower, goal, timing.seconds, details)
            outcome.rows.append(ratio)
    outcome.rows += _counts(case, context, trainees, batch)
    if context.timed:
        outcome.rows += _shares(case, context, trainees, batch)
    return outcome


def _counts(
    case: TrainStep, context: Context, trainees: dict[str, Trainee], batch: Batch
) -> Iterator[Row]:
    """Memory, host syncs and ops of a step."""
    row, device = partial(Row, "training step", case.settings), context.device
    on_gpu = device.type == "cuda"
    peaks, syncs = {}, {}
    for name, trainee in trainees.items():
        step = partial(trainee.step, batch)
        if name != CAPTURED:  # Its graph keeps what it needs for ever.
            peaks[name] = peak_extra_memory(step, device)
            yield row(name, "peak extra MB", peaks[name] / 1e6)
        if on_gpu:
            syncs[name] = host_syncs(step, device)
        elif name != COMPILED:
            ops = count_ops(step)
            syncs[name] = ops.host_syncs
            yield row(name, "dispatched ops", ops.calls.total())
            if name in OURS:
                yield row(name, "ops inside those", ops.inner.total())
    for name in trainees:
        if name in OURS and {name, PEFT} <= peaks.keys():
            yield row(name, MEMORY_RATIO, peaks[name] / peaks[PEFT], MEMORY_GOAL)
        if name in syncs:
            goal = SYNCS_GOAL if name in OURS else None
            yield row(name, OWN_SYNCS, syncs[name] - syncs.get(FROZEN, 0), goal)


def _shares(
    case: TrainStep, context: Context, trainees: dict[str, Trainee], batch: Batch
) -> Iterator[Row]:
    """Which part of a step's time goes where, by the profiler; of what is eager."""
    row = partial(Row, "training step", case.settings)
    if case.checkpointing or (case.rows == 1 and not context.for_gpu):
        return  # Forwards inside a backward would be counted twice; for the other it is too long.
    for name, trainee in trainees.items():
        if name not in (COMPILED, CAPTURED):
            for part, share in rivals_.shares(trainee, batch, context.device).items():
                yield row(name, f"share of the step: {part}", share)


def guarded(context: Context) -> Iterator[Row]:
    """Ops and memory of a step on a CPU."""
    for architecture in (SMALL_LLAMA, SMALL_DEBERTA):
        case = TrainStep(architecture, 1, 32, torch.float32)
        trainees = rivals_.make_trainees(architecture, case.rivals, context.device, case.dtype)
        batch = architecture.batch(case.rows, case.tokens, context.device)
        yield from _counts(case, context, trainees, batch)


def bench_train_step(outcome: Outcome, rival: str, benchmark: BenchmarkFixture, run: Run) -> None:
    """What one rival gave; see `measure`."""
    outcome.report(rival, benchmark, run)

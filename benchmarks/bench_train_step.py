"""Whole training steps: what an adapter costs where it is used.

Llama-3.2-1B and DeBERTa-v3-base with random weights on a GPU, small ones of both kinds on a CPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch

from benchmarks import training
from benchmarks.counting import count_ops, peak_extra_megabytes, waits
from benchmarks.harness import Case, Context, Outcome, time_alone
from benchmarks.training import APPLIED, CAPTURED, COMPILED, FROZEN, LORA, OURS, PEFT

RATIO, MEMORY_RATIO = f"time / {LORA}", f"peak extra MB / {PEFT}'s"
# Of transformers' models some look at a mask.
OWN_SYNCS = "host syncs, without the model's own"
# Design, section 6, asks the first at Llama-3.2-1B's shapes on a GPU; elsewhere no less is wanted.
GOALS = {RATIO: "<= 1", OWN_SYNCS: "<= 0", MEMORY_RATIO: "< 1"}
# Tokens for whose logits and activations a GPU has room, without and with checkpointing.
_LARGEST_BATCH = {False: 16384, True: 32768}
# The batch of a check, which a GPU has room for in float64, and a CPU time.
_MOST_TOKENS = {"cuda": 4096, "cpu": 64}


@dataclass(frozen=True)
class Step:
    """Steps of one model on batches of one size; `special` are providers of some cases only."""

    model: training.Architecture
    rows: int
    tokens: int
    dtype: torch.dtype = torch.float32
    checkpointing: bool = False
    special: tuple[str, ...] = ()

    @property
    def case(self) -> Case:
        dtype, compiled = str(self.dtype).removeprefix("torch."), COMPILED in self.special
        settings = {"model": self.model.name, "micro-batch": self.rows, "sequence": self.tokens}
        settings |= {"checkpointing": self.checkpointing, "dtype": dtype}
        settings |= {"ranks": {"LoRA": "8", "AdaLoRA": "12 to 8"}}
        settings |= {"with torch.compile": True} if compiled else {}
        goals = {(name, measure): goal for name in OURS for measure, goal in GOALS.items()}
        # A guess for a GPU: to make the models, and to compile one.
        seconds = 120.0 if compiled else 15.0
        names = (LORA, FROZEN, PEFT, APPLIED, *self.special)
        return Case("training step", settings, names, goals, self, expected_seconds=seconds)


def cases(context: Context) -> Sequence[Case]:
    """On a GPU those with a goal first, then more and more tokens."""
    small, small_deberta = training.SMALL_LLAMA, training.SMALL_DEBERTA
    steps = [Step(small, 1, 64, special=(COMPILED,)), Step(small, 4, 64)]
    steps += [Step(small, 4, 64, checkpointing=True), Step(small_deberta, 4, 64)]
    if context.smoke:
        steps = [Step(small, 1, 16), Step(small_deberta, 2, 16, checkpointing=True)]
    elif context.for_gpu:
        large = partial(Step, dtype=torch.bfloat16, special=(CAPTURED,))
        goals = [large(training.LLAMA, 4, 1024), large(training.DEBERTA, 16, 512)]
        steps = [*goals, *(replace(step, special=(COMPILED,)) for step in goals)]
        sizes = itertools.product((False, True), (512, 2048, 4096), (1, 2, 4, 8, 16))
        both = (training.LLAMA, training.DEBERTA)
        for model, (checkpointing, tokens, rows) in itertools.product(both, sizes):
            step = large(model, rows, tokens, checkpointing=checkpointing)
            fits = tokens <= model.longest and rows * tokens <= _LARGEST_BATCH[checkpointing]
            steps += [step] if fits and step not in goals else []
    return [step.case for step in steps]


# Making them takes longer than a step; one model's at a time has room.
_trainees = lru_cache(maxsize=1)(training.make_trainees)


def measure(case: Case, context: Context) -> Outcome:
    """Check gradients first, then measure time and memory."""
    device, outcome, step = context.device, Outcome(case), case.of
    made = _trainees(step.model, case.providers, device, step.dtype)
    trainees = {PEFT: made[PEFT], **made}
    for trainee in trainees.values():
        trainee.model.gradient_checkpointing_disable()
        if step.checkpointing:
            training.checkpoint(trainee.model)
    fewer = max(1, min(step.rows, _MOST_TOKENS[device.type] // step.tokens))
    check = training.CheckStep(trainees, step.model.batch(fewer, step.tokens, device))
    # What is compiled for poisoned memory is compiled for that.
    outcome.keep_right(trainees, check, unpoisoned=(COMPILED,))
    batch = step.model.batch(step.rows, step.tokens, device)
    calls = {n: [partial(trainees[n].step, batch)] for n in case.providers if n in trainees}
    samples = outcome.time(context, calls, seconds=2.5, rounds=(4, 40), by_host=True)
    if samples is not None:
        outcome.compare(samples, LORA, RATIO)
        outcome.compare(samples, FROZEN, f"time / {FROZEN}")
    _count(outcome, context, trainees, batch)
    return outcome


def _count(outcome: Outcome, context: Context, trainees: Any, batch: Any) -> None:
    """Count memory, host syncs and ops of a step."""
    peaks, syncs = {}, {}
    for name, trainee in trainees.items():
        step = partial(trainee.step, batch)
        if name != CAPTURED:  # Its graph keeps what it needs for ever.
            peaks[name] = peak_extra_megabytes(step, context.device)
            outcome.add(name, "peak extra MB", peaks[name])
        if context.on_gpu:
            syncs[name] = waits(step)
        elif name != COMPILED:  # Its kernels are called without dispatching anything.
            ops = count_ops(step)
            syncs[name] = ops.host_syncs
            outcome.add(name, "dispatched ops", ops.calls.total())
            outcome.add(name, "ops inside those", ops.inner.total())
    for name in trainees:
        if name in OURS and {name, PEFT} <= peaks.keys():
            outcome.add(name, MEMORY_RATIO, peaks[name] / peaks[PEFT])
        if name in syncs:
            outcome.add(name, OWN_SYNCS, syncs[name] - syncs.get(FROZEN, 0))


def guarded() -> list[Case]:
    """The cases whose counts the guard compares, on a CPU."""
    return [Step(model, 1, 32).case for model in (training.SMALL_LLAMA, training.SMALL_DEBERTA)]


bench_train_step = time_alone

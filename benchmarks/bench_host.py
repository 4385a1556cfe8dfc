"""What the host spends on a layer: where a step waits for it, nothing else counts.

Without a GPU ours launch over a driver that computes nothing (fake_gpu.py), in a process of its
own, and on the CPU they compute. On a GPU the time of the host's CPU stands beside the step's.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import fake_gpu, harness
from benchmarks import host_layers as layers
from benchmarks.harness import Call, Case, Context, Outcome, time_alone
from benchmarks.host_layers import APPLIED, BACKWARD, CPU, FAKE, FORWARD, GPU, LAYER, LORA, Host

TO_LORA, TO_ADALORA = f"time / {LORA}", f"time / {layers.ADALORA}"
GOALS = {FORWARD: "<= 0.45", BACKWARD: "<= 0.6"}
CPU_GOAL = "<= 1"
PYTHON_CALLS, MISSES = "Python calls below the Function", "plans missed after the first call"
CPU_ROWS, GPU_ROWS = (1, 4, 16, 64), (512, 2048)


def cases(context: Context) -> Sequence[Case]:
    """Those of a GPU where there is one, else those over the fake one and those of a CPU."""
    if context.for_gpu:
        rows, columns = ((3,), 32) if context.smoke else (GPU_ROWS, 2048)
        hosts = [Host(GPU, d, 0.0, n, columns) for n in rows for d in (FORWARD, BACKWARD)]
        return [_case(host) for host in hosts]
    hosts = [Host(FAKE, d, p) for d in (FORWARD, BACKWARD, layers.NO_GRAD) for p in (0.0, 0.1)]
    hosts += [Host(FAKE, direction, llama=True) for direction in (FORWARD, BACKWARD)]
    hosts += [Host(CPU, d, 0.0, n, 384) for d in (FORWARD, BACKWARD) for n in CPU_ROWS]
    return [_case(host) for host in hosts]


def _case(host: Host) -> Case:
    dtype = str(host.dtype).removeprefix("torch.")
    settings: dict[str, Any] = {"r": host.r, "dropout": host.dropout, "dtype": dtype}
    goals, curve, work = {}, None, f"host {host.direction}"
    if host.on == FAKE:
        work += ", a layer of a Llama" if host.llama else ""
        limits = {MISSES: "<= 0", PYTHON_CALLS: "<= 0" if host.direction != BACKWARD else None}
        limits |= {} if host.llama else {TO_LORA: GOALS.get(host.direction)}
    else:
        work = f"{host.on} {host.direction}"
        rows, K = host.size(LAYER)
        settings = {"M": rows, "K": K, "N": K, **settings}
        limits, curve = ({TO_ADALORA: CPU_GOAL}, "M") if host.on == CPU else ({}, None)
    for name in (APPLIED, LAYER):
        goals |= {(name, measure): limit for measure, limit in limits.items() if limit}
    # A guess for a GPU, whose kernels have to be compiled.
    return Case(work, settings, host.providers, goals, host, curve, expected_seconds=6.0)


def measure(case: Case, context: Context) -> Outcome:
    """Measure a case here, or what needs the fake GPU in a process that has it."""
    host, outcome = case.of, Outcome(case)
    if host.on == FAKE and not fake_gpu.installed():
        if why := fake_gpu.why_not():
            pytest.skip(why)
        found = _over_the_fake_gpu(context.timed)[str(case)]
        outcome.rows, outcome.wrong = found["rows"], found["wrong"]
        return outcome
    providers = {name: layers.make(host, name, context.device) for name in case.providers}
    exact = layers.CheckLaunches(host) if host.on == FAKE else None
    outcome.keep_right(providers, exact or layers.CheckNumbers(host, providers[layers.ADALORA]))
    calls: dict[str, list[Call]] = {}
    for name, provider in providers.items():
        call: Call = partial(provider.call, host.direction)
        if name == layers.BY_TRITON:
            call = partial(layers.through_triton, call)
        if host.on == FAKE and name in layers.OURS:
            _count(outcome, name, call)
        # Many of a layer are a turn, for one would not be much longer than a look at the clock.
        calls[name] = [call] * (1 if host.llama else 30)
    # All that Python does for Triton's launcher evicts what the others run on, so it is apart.
    for ours in ((APPLIED, LAYER), (layers.BY_TRITON,)):
        among = [name for name in calls if name in ours or name not in layers.OURS]
        if set(among) & set(ours) and context.timed:
            first = ours[0] == APPLIED
            _time(outcome, context, {n: calls[n] for n in among}, among if first else ours)
    return outcome


def _time(outcome: Outcome, context: Context, calls: Any, names: Sequence[str]) -> None:
    """Time the calls, and add the ratios of those that are named."""
    host = outcome.case.of
    effort: Any = {"seconds": 0.5 if host.on == GPU else 1.0, "rounds": (10, 60)}
    outcome.time(context, calls, **effort, clock=harness.CPU)
    of_host = outcome.seconds
    if host.llama:
        of_host = outcome.seconds = of_host.sub(of_host[layers.FROZEN], axis=0) / layers.ADAPTED
        names = [name for name in names if name != layers.FROZEN]
    outcome.compare(LORA, TO_LORA, names)
    outcome.compare(layers.ADALORA, TO_ADALORA, names)
    if host.on == GPU:
        outcome.time(context, calls, **effort, clock=harness.WALL)
        outcome.compare(LORA, f"step's {TO_LORA}", names)
        for name in names:
            share = of_host[name].median() / outcome.seconds[name].median()
            outcome.add(name, "host's time / step's time", float(share))


def _count(outcome: Outcome, name: str, call: Call) -> None:
    """Add what a call launches, and what Python and plans have to do with it, once all is there."""
    call()
    before, missed = fake_gpu.counts(), layers.plan_misses()
    call()
    outcome.add(name, "launches", fake_gpu.counts().launches - before.launches)
    if missed is not None and name != layers.BY_TRITON:
        outcome.add(name, MISSES, (layers.plan_misses() or 0) - missed)
        outcome.add(name, PYTHON_CALLS, layers.python_calls(call))


@cache
def _over_the_fake_gpu(timed: bool) -> dict[str, Any]:
    """Measure all cases that need it, in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "host.json")
        command = [sys.executable, "-m", "benchmarks.host", "--fake", str(file)]
        command += [] if timed else ["--counts"]
        subprocess.run(command, check=True, cwd=Path(__file__).parents[1])
        found: dict[str, Any] = json.loads(file.read_text())
    return found


def measure_over_the_fake_gpu(timed: bool) -> dict[str, Any]:
    """Measure all cases that need it, in this process, which has it."""
    context, found = Context(torch.device("cpu"), timed=timed), {}
    for case in (case for case in cases(context) if case.of.on == FAKE):
        outcome = measure(case, context)
        found[str(case)] = {"rows": outcome.rows, "wrong": outcome.wrong}
    return found


def guarded() -> list[Case]:
    """The cases whose counts the guard compares."""
    if fake_gpu.why_not():
        return []
    return [case for case in cases(Context(torch.device("cpu"))) if case.of.on == FAKE]


bench_host = time_alone

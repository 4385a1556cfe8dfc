"""One SVDLinear against the frozen linear layer, which is the floor, and against its rivals."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any

import torch
import triton.language as tl
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from adalora_kernels.kernels.launch import Launch
from adalora_kernels.kernels.svd_linear import plans
from benchmarks.contest import Context, Outcome
from benchmarks.counting import Call, count_ops, kernels_of, peak_extra_memory
from benchmarks.results import Row, Run
from benchmarks.svd_linear_rivals import (
    AUTO,
    COMPILED,
    CPU_GOAL_SHAPES,
    CPU_GOALS,
    CPU_M,
    CPU_R,
    FEW_ROWS,
    FLOOR,
    FORWARD,
    GOAL_M,
    GOAL_R,
    GOAL_SHAPES,
    MODELS,
    Case,
    Inputs,
    Rival,
    call_once,
    checked_sets,
    least_bytes,
    make_inputs,
    one_compile_thread,
    operations,
    plan_text,
    planned,
    rivals_of,
    wrong_ones,
)
from benchmarks.timing import Sample, sets_beyond_cache, timings

RATIO = "time / F.linear"
# Along each the other settings are those of one point.
GPU_CURVES = {
    "M": (1, 8, 64, 512, 4096, 32768),
    "r": (1, 4, 16, 64, 256),
    "dtype": (torch.bfloat16, torch.float16, torch.float32),
}
CPU_CURVES = {
    "M": (1, 8, 64, 512, 4096, 32768),
    "r": (1, 4, 16, 64, 256),
    "dtype": (torch.float32, torch.bfloat16, torch.float64),
}
# No measured table is for that name: the plans are those of the arithmetic, whatever was tuned.
_H200 = plans.Device("H200, by arithmetic", "sm_90", 132)
# On a CPU a call takes no less, however small; and calls are repeated until a sample takes that.
_LEAST_CALL_SECONDS, _LEAST_SAMPLE_SECONDS = 100e-6, 5e-3


def cases(context: Context) -> Sequence[Case]:
    """Those with a goal first, then the curves, then the others in the order of interest."""
    if context.smoke:
        return _smoke_cases()
    return _gpu_cases() if context.for_gpu else _cpu_cases()


def _gpu_cases() -> list[Case]:
    large = [Case(K, N, GOAL_M, GOAL_R, counted=True) for K, N in GOAL_SHAPES]
    goals = [dataclasses.replace(case, compiled=True) for case in large]
    goals += [Case(K, N, M, GOAL_R) for M in (1, 16, FEW_ROWS) for K, N in GOAL_SHAPES]
    goals += [dataclasses.replace(case, dropout=0.1) for case in large]
    point = Case(4096, 4096, GOAL_M, GOAL_R)
    fewer = dataclasses.replace(point, M=2048)
    curves = _curves(GPU_CURVES, {"M": point, "r": point, "dtype": fewer})
    ranks, rows = (16, 64, 8), (8192, 2048, 16384, 64, 16, 1)
    rest = [Case(K, N, M, r) for r, M, (K, N) in itertools.product(ranks, rows, MODELS)]
    found: dict[str, Case] = {}
    for case in [*goals, *curves, *rest]:
        found.setdefault(str(case), case)
    return list(found.values())


def _cpu_cases() -> list[Case]:
    new = partial(Case, r=CPU_R, dtype=torch.float32, on_gpu=False)
    # The ops of the larger shape are the same, its memory is more by as much as N is, and to
    # compile it takes as long as to measure it.
    goals = [
        new(K, N, CPU_M, dropout=dropout, compiled=K == N and not dropout, counted=K == N)
        for K, N in CPU_GOAL_SHAPES
        for dropout in CPU_GOALS
    ]
    points = {"M": new(384, 384, CPU_M), "r": new(768, 768, 512), "dtype": new(768, 768, 128)}
    return goals + _curves(CPU_CURVES, points)


def _smoke_cases() -> list[Case]:
    """Every kind of case for a GPU, small."""
    tiny = partial(Case, dtype=torch.float16)
    special = [tiny(32, 48, 16, 8, compiled=True), tiny(32, 32, 16, 8, dropout=0.1, counted=True)]
    return [*special, tiny(64, 32, 16, 4), tiny(64, 32, 1, 3, curve="M")]


def _curves(curves: Mapping[str, Sequence[Any]], points: Mapping[str, Case]) -> list[Case]:
    return [
        dataclasses.replace(points[key], **{key: value, "curve": key})
        for key, values in curves.items()
        for value in values
    ]


def measure(case: Case, context: Context) -> Outcome:
    """Check, count and time all rivals of a case, in every direction."""
    outcome, device = Outcome(), context.device
    # On a CPU a second set would change nothing but the time that it takes.
    timed_sets = _sets_beyond_cache(case, device) if device.type == "cuda" else 1
    inputs = make_inputs(case, max(timed_sets, checked_sets(case)), device)
    rivals = rivals_of(case, device)
    wrong = wrong_ones(case, rivals, inputs[: checked_sets(case)])
    outcome.drop_wrong(rivals, wrong, [name for name, rival in rivals.items() if rival.ours])
    for direction in case.directions:
        there = {name: r for name, r in rivals.items() if direction in r.directions}
        if case.counted:
            for name, rival in there.items():
                call = partial(rival.call(direction), inputs[0])
                outcome.rows += counts(case, direction, name, rival, call, device)
        if context.timed:
            samples = _samples(case, direction, there, inputs[:timed_sets], context, outcome)
            outcome.rows += ratios(case, direction, there, samples, device)
    return outcome


def _sets_beyond_cache(case: Case, device: torch.device) -> int:
    return sets_beyond_cache(case.dtype.itemsize * case.K * (case.M + case.N), device)


def counts(
    case: Case, direction: str, name: str, rival: Rival, call: Call, device: torch.device
) -> Iterator[Row]:
    """Memory, dispatched ops and launches of one call."""
    row = partial(Row, f"svd_linear {direction}", case.settings, name)
    yield row("peak extra MB", peak_extra_memory(call, device) / 1e6)
    # Compiled code calls its kernels without dispatching anything.
    if name != COMPILED:
        ops = count_ops(call)
        yield row("dispatched ops", ops.calls.total())
        if rival.ours and ops.inner:
            yield row("ops inside those", ops.inner.total())
    if device.type == "cuda":
        uses = [use for use in kernels_of(call, device) if use.is_kernel]
        launches = {use.name: use.launches for use in uses}
        details = {"kernels": launches}
        yield row("kernel launches", sum(launches.values()), details=details)


def _samples(
    case: Case,
    direction: str,
    rivals: Mapping[str, Rival],
    inputs: Sequence[Inputs],
    context: Context,
    outcome: Outcome,
) -> dict[str, Sample]:
    least = 0.0
    if not context.smoke:
        least = max(
            operations(case, direction, None) / context.ceilings.product,
            least_bytes(case, direction, None) / context.ceilings.copy,
        )
    repeats = 1
    if not context.for_gpu:
        repeats = max(1, round(_LEAST_SAMPLE_SECONDS / max(least, _LEAST_CALL_SECONDS)))
    calls = {
        name: [partial(rival.call(direction), one) for one in inputs] * repeats
        for name, rival in rivals.items()
    }
    effort = _effort(case, direction)
    return outcome.time(context, calls, call_seconds=least, **effort)


def _effort(case: Case, direction: str) -> dict[str, Any]:
    """How long, and how many rounds: small differences take many, large shapes take long."""
    if case.on_gpu:
        return {"seconds": 1.5 if case.goal(AUTO, FORWARD) else 0.25}
    if case.curve:
        return {"seconds": 2.0, "rounds": (5 if case.M <= 4096 else 3, 7)}
    if direction == FORWARD:
        return {"seconds": 1.5, "rounds": (3, 9)}
    return {"seconds": 4.0, "rounds": (5, 25)}


def ratios(
    case: Case,
    direction: str,
    rivals: Mapping[str, Rival],
    samples: Mapping[str, Sample],
    device: torch.device,
) -> Iterator[Row]:
    """The ratios of one case and direction: to the floor, and of PEFT's time to ours."""
    row = partial(Row, f"svd_linear {direction}", case.settings)
    for name, timing in timings(samples, FLOOR).items():
        rival = rivals[name]
        flops = operations(case, direction, rival.adapters)
        moved = least_bytes(case, direction, rival.adapters)
        details: dict[str, Any] = {"rounds": len(samples[name].seconds)}
        details["clock"] = samples[name].clock
        if rival.path == AUTO and device.type != "cuda":
            details["plan"] = "reference"
        elif rival.path is not None:
            launches = planned(case, rival, plans.device_of(device))[direction]
            moved = sum(launch.moved for launch in launches)
            details |= {"plan": plan_text(launches), "launches": len(launches)}
        details |= {
            "operations": flops,
            "bytes": moved,
            "TFLOP/s": flops / timing.seconds.median * 1e-12,
            "GB/s": moved / timing.seconds.median * 1e-9,
        }
        goal = case.goal(name, direction)
        yield row(name, RATIO, timing.slower, goal, timing.seconds, details)
    for name, peft in case.against_peft:
        if {name, peft} <= samples.keys():
            pair = {key: samples[key] for key in (name, peft)}
            ratio, goal = timings(pair, name)[peft].slower, case.peft_goal(peft, direction)
            yield row(name, f"{peft}'s time / time", ratio, goal)


def bench_svd_linear(outcome: Outcome, rival: str, benchmark: BenchmarkFixture, run: Run) -> None:
    outcome.report(rival, benchmark, run)


def guarded(context: Context) -> Iterator[Row]:
    """What is the same in every run: counts and memory on a CPU, and the plans for a GPU."""
    for dropout in CPU_GOALS:
        case = Case(768, 768, 256, CPU_R, dropout, dtype=torch.float32, on_gpu=False)
        (inputs,) = make_inputs(case, 1, context.device)
        for direction in case.directions:
            for name, rival in rivals_of(case, context.device).items():
                call = partial(rival.call(direction), inputs)
                yield from counts(case, direction, name, rival, call, context.device)
    yield from guarded_plans()


def guarded_plans() -> Iterator[Row]:
    """What each path launches on an H200, and the bytes that its kernels read and write."""
    for (K, N), M in itertools.product(GOAL_SHAPES, (GOAL_M, FEW_ROWS)):
        case = Case(K, N, M, GOAL_R)
        rivals = rivals_of(case, torch.device("cpu"))
        settings = {**case.settings, "planned for": _H200.name}
        for name in (AUTO, *case.paths):
            for direction in rivals[name].directions:
                launches = planned(case, rivals[name], _H200)[direction]
                row = partial(Row, f"svd_linear {direction}", settings, name)
                details = {"plan": plan_text(launches)}
                yield row("planned launches", len(launches), details=details)
                yield row("planned bytes", sum(launch.moved for launch in launches))


def prepare(cases: Sequence[Case], context: Context) -> None:
    """Compile what the cases need, in parallel, into the caches on disk.

    Every case is asked for its kernels, and of those that need the same one only the first is
    called. What fails here fails again, and is reported, where it is measured.
    """
    calls = [(case, COMPILED) for case in cases if case.compiled]
    seen: set[object] = set()
    for case in cases:
        for name, rival in rivals_of(case, context.device).items():
            if rival.path is not None:
                gpu = plans.device_of(context.device)
                variants = set(map(_variant, planned(case, rival, gpu)[rival.directions[-1]]))
                if not variants <= seen:
                    calls.append((case, name))
                    seen |= variants
    workers = 1 if context.smoke else min(12, os.cpu_count() or 1)
    spawned = multiprocessing.get_context("spawn")
    with (
        contextlib.suppress(BrokenProcessPool),
        ProcessPoolExecutor(workers, spawned, one_compile_thread) as pool,
    ):
        for failure in pool.map(partial(call_once, context.device), *zip(*calls, strict=True)):
            if failure is not None:
                print(f"warming up: {failure}", flush=True)


def _variant(launch: Launch) -> object:
    """What triton compiles a kernel of its own for: constants, types, and sizes by divisibility."""
    if launch.function is None or launch.arguments is None:
        return None
    parameters = inspect.signature(launch.function.fn).parameters
    # Under the interpreter, where nothing is compiled, there is no such list.
    unspecialised = getattr(launch.function, "do_not_specialize", None) or ()

    def kind(name: str, value: Any) -> object:
        if isinstance(value, tuple):
            return tuple(kind(name, entry) for entry in value)
        if isinstance(value, Tensor):
            return value.dtype
        if name in unspecialised:
            return value is None
        if hasattr(value, "block_shape"):
            return value.base.dtype, tuple(value.block_shape)
        if value is None or name not in parameters:
            return value
        constant = parameters[name].annotation is tl.constexpr
        return value if constant else (value == 1, value % 16 == 0)

    return launch.kernel, tuple((name, kind(name, v)) for name, v in launch.arguments.items())

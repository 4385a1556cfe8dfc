"""The allocation step of a whole model on a GPU: ours against PEFT's, torch._foreach and a copy.

    python -m benchmarks.gpu_allocation --out FOLDER

writes allocation_gpu.json (everything) and allocation_gpu.txt, and prints what counts. The exit
status is 1 if one of our results is wrong or could not be had, whose time is then not reported, or
if the compiled library has no CUDA code: "ours" is plain PyTorch then. `--smoke` takes tiny shapes
through the same code on a CPU; its times mean nothing.

Two clocks. Eager steps, PEFT's and ours, are bound by the host, and are timed by its clock until
the device is done. What the device does is timed in CUDA graphs, over inputs that are together
larger than the L2; the floor there is a copy that moves as many bytes, in the same round.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from adalora_kernels import RankAllocator, ops
from benchmarks import allocation_rivals as rivals_
from benchmarks.allocation_rivals import (
    APPLIED,
    BATCHED,
    BYTES_PER_ENTRY,
    FOREACH,
    GRAD_OF_ADAPTERS,
    GRAD_OF_MODEL,
    ORTH_REG,
    PEFT,
    STEP,
    Foreach,
    Importance,
    Orthogonality,
    adapters_of,
    allocator_of,
)
from benchmarks.gpu_report import Report, Result, at_most, environment, first_line
from benchmarks.gpu_timing import (
    COPY,
    Call,
    Sample,
    host_syncs,
    interleaved,
    kernels_of,
    measure_ceilings,
    peak_extra_memory,
    sets_beyond_cache,
    timings,
    wall_clock,
)
from benchmarks.harness import CountOps, Row, Spread, speed
from benchmarks.peft_models import (
    DEBERTA_BASE,
    LLAMA_8B,
    MASKS,
    UPDATES,
    Architecture,
    adapted_model,
)

NAME = "allocation_gpu"
UPDATE, CAPTURED = "allocator.update()", "captured allocator.update()"
FLOOR = "copy of as many bytes"
RATIO, FASTER, RATE = f"time / {FLOOR}", "PEFT's time / time", "GB/s"
LAUNCHES = "kernel launches"
# The cases.
DEVICE, MASKING, IMPORTANCE = "importance + allocation", "masking step", "importance only"
ORTHOGONALITY, ORTHOGONALITY_DEVICE = "orthogonality", "orthogonality on the device"
SINGLE_OPS = "single ops"
# Design, section 6: Llama-8B.
FLOOR_GOAL, PEFT_GOAL, SYNCS_GOAL = ("<=", 1.3), (">=", 30.0), ("<=", 0)
# orth_reg_grad_ reads each factor for its Gram matrix and once more for the gradient, which it
# reads and writes; the second reading may come from the L2.
ORTH_BYTES_PER_ENTRY = 16
TINY = Architecture("tiny", layers=2, matrices={"wide": (48, 32), "tall": (32, 64)}, r=12)

FORMULAS = {
    "ratio": "median over the rounds of the ratio in a round (p25-p75)",
    RATE: f"{BYTES_PER_ENTRY} B per entry (w, g and both averages read, the averages written) / "
    f"median time; orthogonality: {ORTH_BYTES_PER_ENTRY} B",
    "clocks": "wall: eager, host's clock until the device is done; device: CUDA graphs over inputs "
    "beyond the L2",
    LAUNCHES: "by torch.profiler, copies and memsets not among them; us are those of one call",
}
# The longest that an architecture was assumed to take when the budget ends.
_RESERVE_SECONDS = 20.0


@dataclass(frozen=True)
class Set:
    """A model of ours, with all that belongs to it: what a call reads is no other call's."""

    model: PeftModel
    allocator: RankAllocator
    foreach: Foreach

    @classmethod
    def make(cls, architecture: Architecture, device: torch.device) -> Set:
        model = adapted_model(architecture, device)
        return cls(model, allocator_of(model), Foreach(model))


def note_implementations(report: Report, device_type: str) -> None:
    """Into the environment, and among the refusals what should be CUDA C++ and is not."""
    used = [each for each in ops.implementations(device_type) if not each.op.startswith("svd_")]
    report.environment["implementations"] = {each.op: each.name for each in used}
    missing = [each for each in used if each.name.startswith("reference")]
    if device_type == "cuda" and missing:
        names = ", ".join(each.op for each in missing)
        whys = "; ".join(dict.fromkeys(each.why_not_faster for each in missing))
        why = f"NOT THERE, below {names} are plain PyTorch: {whys}"
        report.refuse("all", "CUDA C++", why, ours=True)


def measure(
    architecture: Architecture, device: torch.device, report: Report, seconds: float
) -> None:
    """Check and time all that there is of an architecture, for `seconds` each."""
    count = sets_beyond_cache(16 * architecture.entries, device)
    sets = [Set.make(architecture, device) for _ in range(count)]
    theirs, applied = (adapted_model(architecture, device) for _ in range(2))
    orthogonality = _orthogonality(theirs, applied, sets[0].model)
    _drop_wrong(report, architecture, orthogonality, rivals_.wrong_orthogonality(orthogonality))
    importance = _importance(theirs, applied, sets[0])
    _drop_wrong(report, architecture, importance, rivals_.wrong_importance(importance))

    _measure_device(architecture, device, report, seconds, sets, importance)
    _measure_steps(architecture, device, report, seconds, sets[0], importance)
    _measure_orthogonality(architecture, device, report, seconds, sets, orthogonality)
    _measure_ops(architecture, device, report, sets[0])


def _importance(theirs: PeftModel, applied: PeftModel, ours: Set) -> dict[str, Importance]:
    return {
        PEFT: rivals_.peft_importance(theirs),
        APPLIED: rivals_.applied_importance(applied),
        # Before the allocator, which masks the lora_E that they share.
        FOREACH: rivals_.foreach_importance(ours.model, ours.foreach),
        STEP: rivals_.direct_importance(ours.model, ours.allocator),
    }


def _orthogonality(
    theirs: PeftModel, applied: PeftModel, ours: PeftModel
) -> dict[str, Orthogonality]:
    return {
        PEFT: rivals_.peft_orthogonality(theirs),
        APPLIED: rivals_.applied_orthogonality(applied),
        ORTH_REG: rivals_.differentiated_orthogonality(ours),
        GRAD_OF_MODEL: rivals_.direct_orthogonality(ours, search=True),
        GRAD_OF_ADAPTERS: rivals_.direct_orthogonality(ours),
        BATCHED: rivals_.batched_orthogonality(ours),
    }


def _drop_wrong(
    report: Report,
    architecture: Architecture,
    rivals: dict[str, Any],
    wrong: Mapping[str, Exception],
) -> None:
    for name, error in wrong.items():
        ours = name not in (PEFT, FOREACH, BATCHED)
        report.refuse(architecture.name, name, first_line(error), ours)
        del rivals[name]


def _measure_device(
    architecture: Architecture,
    device: torch.device,
    report: Report,
    seconds: float,
    sets: Sequence[Set],
    right: Mapping[str, Importance],
) -> None:
    """Importance and allocation in CUDA graphs against a copy of as many bytes."""
    for one in sets:
        one.allocator.advance(MASKS)
    calls: dict[str, list[Call]] = {FLOOR: [_copy(architecture, device) for _ in sets]}
    if STEP in right:
        calls[UPDATE] = [one.allocator.update for one in sets]
    if FOREACH in right:
        calls[FOREACH] = [one.foreach.update for one in sets]
    moved = BYTES_PER_ENTRY * architecture.entries
    least = moved / report.ceilings[COPY] * 1e-9
    samples = interleaved(calls, device, seconds=seconds, call_seconds=least)
    has_goal = architecture is LLAMA_8B
    row = partial(Row, DEVICE, architecture.settings)
    for name, timing in timings(samples, FLOOR).items():
        goal = FLOOR_GOAL if has_goal and name == UPDATE else None
        rate = speed(moved * 1e-9, timing.seconds)
        details = _details(samples[name]) | {
            "bytes": moved,
            "of the ceiling": rate.median / report.ceilings[COPY],
        }
        ratio = row(name, RATIO, timing.slower, goal, timing.seconds)
        report.results.append(Result(architecture.name, ratio, details))
        report.results.append(Result(architecture.name, row(name, RATE, rate), details))


def _copy(architecture: Architecture, device: torch.device) -> Call:
    half = BYTES_PER_ENTRY // 2 * architecture.entries
    source, target = (torch.ones(half // 4, device=device) for _ in range(2))
    return partial(target.copy_, source)


def _measure_steps(
    architecture: Architecture,
    device: torch.device,
    report: Report,
    seconds: float,
    ours: Set,
    rivals: Mapping[str, Importance],
) -> None:
    """`update_and_allocate` as a training loop calls it."""
    calls: dict[str, Call] = {
        name: partial(rival.step, MASKS) for name, rival in rivals.items() if rival.masks
    }
    if STEP in rivals:
        try:
            calls[CAPTURED] = _captured(ours.allocator, device)
        except RuntimeError as error:
            report.refuse(architecture.name, CAPTURED, first_line(error), ours=True)
    _measure_eager(architecture, device, report, seconds, MASKING, calls)
    calls = {name: partial(rival.step, UPDATES) for name, rival in rivals.items()}
    _measure_eager(architecture, device, report, seconds, IMPORTANCE, calls)


def _captured(allocator: RankAllocator, device: torch.device) -> Call:
    """What is left of `allocator.step(50)` where the step is part of a CUDA graph."""
    replay: Callable[[], object] = allocator.update
    if device.type == "cuda":
        allocator.advance(MASKS)
        allocator.update()
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            allocator.update()
        replay = graph.replay

    def step() -> None:
        allocator.advance(MASKS)
        replay()

    return step


def _measure_eager(
    architecture: Architecture,
    device: torch.device,
    report: Report,
    seconds: float,
    case: str,
    calls: Mapping[str, Call],
) -> None:
    """The wall clock of every call against PEFT's, and what each asks of host and device."""
    on_gpu = device.type == "cuda"
    rounds = (9, 60) if on_gpu else (2, 2)
    samples = wall_clock(calls, device, seconds=seconds, rounds=rounds)
    has_goal = architecture is LLAMA_8B and case != IMPORTANCE
    row = partial(Row, case, architecture.settings)
    for name, timing in timings(samples, PEFT).items():
        ours = name not in (PEFT, FOREACH, BATCHED)
        goal = PEFT_GOAL if has_goal and ours else None
        ratio = row(name, FASTER, timing.faster, goal, timing.seconds)
        report.results.append(Result(architecture.name, ratio, _details(samples[name])))
    if case == IMPORTANCE:
        return
    for name, call in calls.items():
        ours = name not in (PEFT, FOREACH, BATCHED)
        syncs, peak = host_syncs(call, device), peak_extra_memory(call, device)
        with CountOps() as counted:
            call()
        row_of = partial(row, name)
        figures = [row_of("dispatched ops", counted.calls.total())]
        if syncs is not None:
            figures.append(row_of("host syncs", syncs, SYNCS_GOAL if ours else None))
        if peak is not None:
            figures.append(row_of("peak extra MB", peak * 1e-6))
        report.results += [Result(architecture.name, figure) for figure in figures]
        _report_kernels(architecture, device, report, case, name, call)


def _report_kernels(
    architecture: Architecture,
    device: torch.device,
    report: Report,
    case: str,
    name: str,
    call: Call,
) -> None:
    used = kernels_of(call, device, calls=1 if name == PEFT else 5)
    if device.type != "cuda":
        return
    launches = sum(use.launches for use in used if use.is_kernel)
    row = Row(case, architecture.settings, name, LAUNCHES, launches)
    kernels = [asdict(use) | {"short name": use.short_name} for use in used[:12]]
    report.results.append(Result(architecture.name, row, {"kernels": kernels}))


def _measure_orthogonality(
    architecture: Architecture,
    device: torch.device,
    report: Report,
    seconds: float,
    sets: Sequence[Set],
    rivals: Mapping[str, Orthogonality],
) -> None:
    calls: dict[str, Call] = {name: rival.step for name, rival in rivals.items()}
    _measure_eager(architecture, device, report, seconds, ORTHOGONALITY, calls)
    make = {
        GRAD_OF_ADAPTERS: rivals_.direct_orthogonality,
        BATCHED: rivals_.batched_orthogonality,
    }
    # PEFT's is alone, and so has what the L2 keeps.
    captured = {PEFT: [rivals[PEFT].step]}
    captured |= {
        name: [one(each.model).step for each in sets]
        for name, one in make.items()
        if name in rivals
    }
    moved = ORTH_BYTES_PER_ENTRY * architecture.entries
    least = moved / report.ceilings[COPY] * 1e-9
    samples = interleaved(captured, device, seconds=seconds, call_seconds=least)
    row = partial(Row, ORTHOGONALITY_DEVICE, architecture.settings)
    for name, timing in timings(samples, PEFT).items():
        details = _details(samples[name]) | {"bytes": moved}
        ratio = row(name, FASTER, timing.faster, None, timing.seconds)
        report.results.append(Result(architecture.name, ratio, details))
        if name != PEFT:
            rate = row(name, RATE, speed(moved * 1e-9, timing.seconds))
            report.results.append(Result(architecture.name, rate, details))


def _measure_ops(
    architecture: Architecture, device: torch.device, report: Report, ours: Set
) -> None:
    """What each op launches; nothing on a CPU."""
    for name, call in single_ops(ours).items():
        _report_kernels(architecture, device, report, SINGLE_OPS, name, call)


@torch.no_grad()
def single_ops(ours: Set) -> dict[str, Call]:
    """A call of every op over a whole model."""
    adapters = adapters_of(ours.model)
    parameters = [p.detach() for adapter in adapters for p in adapter.parameters]
    grads = [p.grad for adapter in adapters for p in adapter.parameters]
    averages = [[torch.zeros_like(p) for p in parameters] for _ in range(2)]
    A, E, B = parameters[0::3], parameters[1::3], parameters[2::3]
    ranks = sum(e.shape[0] for e in E)
    scores = torch.rand(ranks, device=E[0].device)
    whole = partial(torch.zeros, 1, dtype=torch.int64, device=scores.device)
    mask, budget = torch.ones_like(scores, dtype=torch.bool), whole() + ranks // 2
    norms, residuals = torch.ops.adalora.orth_reg(A, B)
    backward = (torch.ones_like(norms), norms, residuals, A, B)
    namespace = torch.ops.adalora
    betas = (rivals_.BETA, rivals_.BETA)
    return {
        "importance_update_": partial(
            namespace.importance_update_, parameters, grads, *averages, scores, whole(), *betas
        ),
        "allocate_": partial(namespace.allocate_, scores, budget, mask, [e.clone() for e in E]),
        "orth_reg": partial(namespace.orth_reg, A, B),
        "orth_reg_backward": partial(namespace.orth_reg_backward, *backward),
        "orth_reg_grad_": partial(namespace.orth_reg_grad_, *backward, grads[0::3], grads[2::3]),
    }


def _details(sample: Sample) -> dict[str, Any]:
    return {"rounds": len(sample.seconds), "clock": sample.clock}


def _seconds(spread: Spread | None) -> str:
    median = math.nan if spread is None else spread.median
    return f"{median * 1e3:.2f} ms" if median >= 1e-3 else f"{median * 1e6:.0f} us"


def _lines(report: Report) -> Iterator[str]:
    """A paragraph for every case."""
    for (model, case), group in itertools.groupby(
        report.results, key=lambda result: (result.case, result.row.case)
    ):
        yield f"{model}, {case}:"
        by_rival: dict[str, list[Result]] = {}
        for result in group:
            by_rival.setdefault(result.row.rival, []).append(result)
        for rival, results in by_rival.items():
            yield f"  {rival:27} {', '.join(map(_text, results))}"


def _text(result: Result) -> str:
    row = result.row
    verdict = f" [{row.verdict}]" if row.goal else ""
    if row.measure == LAUNCHES:
        parts = [
            f"{k['short name']} {k['launches']:g}x {k['microseconds']:.1f} us"
            for k in result.details["kernels"][:3]
        ]
        return f"{row.number:g} launches ({', '.join(parts)})"
    if isinstance(row.value, Spread) and row.seconds is not None:
        eager = " (eager)" if "eager:" in result.details["clock"] else ""
        time_ = f"{_seconds(row.seconds)}{eager}"
        first = row.rival == (FLOOR if row.measure == RATIO else PEFT)
        return time_ if first else f"{time_}, {row.measure} {result.spread}{verdict}"
    if row.measure == RATE:
        share = result.details.get("of the ceiling")
        return f"{row.number:.0f} GB/s" + ("" if share is None else f" = {share:.0%} of the copy")
    return f"{row.measure} {row.number:g}{verdict}"


def table(report: Report) -> Iterator[str]:
    """All that came out."""
    yield from report.header()
    used = report.environment["implementations"]
    for implementation in dict.fromkeys(used.values()):
        names = (op for op, name in used.items() if name == implementation)
        yield f"ours, {implementation}: {', '.join(names)}"
    yield from at_most(8, list(report.refusals()))
    yield from _lines(report)
    yield from (f"not reached: {name}" for name in report.not_reached)


def run(
    architectures: Sequence[Architecture], device: torch.device, folder: Path, seconds: float
) -> Report:
    """Measure the architectures in their order, until the seconds are over; write as it goes."""
    start = time.monotonic()
    report = Report(environment(device), measure_ceilings(device), FORMULAS)
    note_implementations(report, device.type)
    each = seconds / 30 if device.type == "cuda" else 0.0
    for i, architecture in enumerate(architectures):
        if i and time.monotonic() - start > seconds - _RESERVE_SECONDS:
            report.not_reached = [left.name for left in architectures[i:]]
            break
        try:
            measure(architecture, device, report, each)
        # Out of memory, say. The rest is to be measured all the same, if it can be.
        except Exception as error:
            report.refuse(architecture.name, "all", first_line(error), ours=True)
        report.write(folder / f"{NAME}.json")
    report.write(folder / f"{NAME}.json")
    (folder / f"{NAME}.txt").write_text("\n".join(table(report)) + "\n")
    return report


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    parser.add_argument("--seconds", type=float, default=60.0, help="budget of the whole run")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on a CPU")
    args = parser.parse_args(argv)
    if not args.smoke and not torch.cuda.is_available():
        parser.error("no CUDA device; --smoke runs on a CPU")
    device = torch.device("cpu" if args.smoke else "cuda")
    if args.smoke:
        torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    architectures = (TINY,) if args.smoke else (LLAMA_8B, DEBERTA_BASE)
    report = run(architectures, device, args.out, args.seconds)
    print("\n".join(table(report)))
    return int(report.ours_refused)


if __name__ == "__main__":
    sys.exit(main())

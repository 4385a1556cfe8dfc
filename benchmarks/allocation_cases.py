"""What the benches over all adapters of a model share: the cases, and how each is carried out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from peft import PeftModel

from adalora_kernels import ops
from benchmarks import allocation_rivals
from benchmarks.allocation_rivals import BYTES_PER_ENTRY, LORALIB, PEFT, REFERENCE, models_of
from benchmarks.contest import Context, Outcome, Refusal
from benchmarks.counting import Call, count_ops, host_syncs, kernels_of, peak_extra_memory
from benchmarks.peft_models import CURVES, DEBERTA_BASE, HOST_ALONE, LLAMA_8B, SMOKE, Architecture
from benchmarks.results import Row, Spread, first_line, speed
from benchmarks.timing import Sample, timings

TRAFFIC = "memory traffic alone"
FASTER, RATE = "PEFT's time / time", f"GB/s at {BYTES_PER_ENTRY} B per entry"
OPS, SYNCS, LAUNCHES = "dispatched ops", "host syncs", "kernel launches"
# On a CPU the memory is read from a trace, which for more would take longer than all the rest.
_MOST_TRACED = 100
# One call of these is thousands of launches.
_SLOW = (PEFT, LORALIB, REFERENCE)

Rival = TypeVar("Rival")
# By rival and measure.
Goals = Mapping[tuple[str, str], tuple[str, float]]


@dataclass(frozen=True)
class Case:
    """A piece of work on the adapters of an architecture."""

    work: str
    architecture: Architecture
    rivals: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.work}, {self.architecture.name}"

    @property
    def one_of_many(self) -> bool:
        """A point of a curve: not much time is spent on it."""
        return self.architecture.curve is not None

    def row(self, rival: str, measure: str, value: float | Spread, **rest: Any) -> Row:
        """A figure of this case."""
        return Row(self.work, self.architecture.settings, rival, measure, value, **rest)


def architectures(context: Context) -> Sequence[Architecture]:
    """Whole models, the one with goals first, then curves."""
    if context.smoke:
        return SMOKE
    models = (LLAMA_8B, DEBERTA_BASE) if context.for_gpu else (DEBERTA_BASE, LLAMA_8B, HOST_ALONE)
    return (*models, *CURVES)


def whole_models(context: Context) -> Iterator[Architecture]:
    """Those of `architectures` that are no points of a curve."""
    yield from (each for each in architectures(context) if each.curve is None)


def of_steps(
    work: str, rivals: Sequence[str], context: Context, among: Sequence[Architecture]
) -> Iterator[Case]:
    """Steps as a training loop takes them.

    Memory traffic is timed beside them unless all of them are bound by the host, as on a GPU. The
    definition of the ops is no rival that a curve is asked of.
    """
    for architecture in among:
        bound_by_host = context.for_gpu or architecture is HOST_ALONE
        on_curve = architecture.curve is not None
        taking_part = [name for name in rivals if not (on_curve and name == REFERENCE)]
        floor = [] if bound_by_host else [TRAFFIC]
        yield Case(work, architecture, (*taking_part, *floor))


def has_goals(case: Case, context: Context) -> bool:
    """Design, section 6: on a GPU for Llama-8B, on a CPU for DeBERTa-base."""
    return case.architecture is (LLAMA_8B if context.for_gpu else DEBERTA_BASE)


def contestants(
    case: Case,
    context: Context,
    make: Mapping[str, Callable[[PeftModel], Rival]],
    wrong: Callable[[Mapping[str, Rival]], Mapping[str, Exception]],
    ours: Sequence[str],
) -> tuple[Outcome, dict[str, Rival]]:
    """The rivals that give the right result, and what became of the others.

    Args:
        make: of each rival, what puts it on a model; PEFT's first.
        wrong: which of them are wrong, and why.
        ours: not to be wrong, nor plain PyTorch on a GPU.
    """
    outcome = Outcome()
    missing = missing_kernels(context.device)
    names = [name for name in make if not (missing and name in ours)]
    outcome.refused = {name: Refusal(missing, True) for name in make if name not in names}
    rivals: dict[str, Rival] = {}
    for name, model in models_of(case.architecture, names, context.device).items():
        try:
            rivals[name] = make[name](model)
        # A graph that can't be captured, say.
        except Exception as error:
            outcome.refused[name] = Refusal(first_line(error), name in ours)
    outcome.drop_wrong(rivals, wrong(rivals), (*ours, REFERENCE))
    return outcome, rivals


def missing_kernels(device: torch.device) -> str:
    """Why ops over whole models are plain PyTorch on a GPU; empty where they are not."""
    if device.type != "cuda":
        return ""
    over_models = (
        each for each in ops.implementations(device.type) if not each.op.startswith("svd_")
    )
    plain = {
        each.op: each.why_not_faster for each in over_models if each.name.startswith("reference")
    }
    if not plain:
        return ""
    whys = "; ".join(dict.fromkeys(plain.values()))
    return f"NOT THERE, {', '.join(plain)} are plain PyTorch: {whys}"


def measure_steps(case: Case, context: Context, step: int, goals: Goals) -> Outcome:
    """A step of importance and allocation: checked, counted and timed."""
    known = allocation_rivals.MAKE
    make = {name: known[name] for name in case.rivals if name in known}
    wrong = allocation_rivals.wrong_importance
    outcome, rivals = contestants(case, context, make, wrong, allocation_rivals.OURS)
    calls = {name: partial(rival.step, step) for name, rival in rivals.items()}
    floor = None
    if TRAFFIC in case.rivals:
        floor = allocation_rivals.traffic(case.architecture.entries)
    measure_calls(outcome, case, context, calls, goals, floor)
    return outcome


def measure_calls(
    outcome: Outcome,
    case: Case,
    context: Context,
    calls: Mapping[str, Call],
    goals: Goals,
    floor: Call | None = None,
) -> None:
    """Count what each call asks for, and time all as a training loop sees them."""
    for name, call in calls.items():
        outcome.rows += counts(case, name, call, context.device, goals)
    timed = {**calls, TRAFFIC: floor} if floor is not None else calls
    samples = outcome.time(
        context,
        {name: [call] for name, call in timed.items()},
        seconds=0.5 if case.one_of_many else 2.0,
        rounds=(3, 30) if case.one_of_many else (4, 60),
        by_host=True,
    )
    outcome.rows += against_peft(case, samples, goals)
    if TRAFFIC in samples:
        outcome.rows += _against_traffic(case, samples)


def against_peft(case: Case, samples: Mapping[str, Sample], goals: Goals) -> Iterator[Row]:
    """How often the time of each goes into PEFT's; nothing where PEFT's was refused."""
    if PEFT not in samples:
        return
    for name, timing in timings(samples, PEFT).items():
        rest = {"seconds": timing.seconds, "details": details_of(samples[name])}
        yield case.row(name, FASTER, timing.faster, goal=goals.get((name, FASTER)), **rest)


def _against_traffic(case: Case, samples: Mapping[str, Sample]) -> Iterator[Row]:
    moved = BYTES_PER_ENTRY * case.architecture.entries
    for name, timing in timings(samples, TRAFFIC).items():
        rate = speed(moved * 1e-9, timing.seconds)
        yield case.row(name, RATE, rate, seconds=timing.seconds, details={"bytes": moved})
        if name != TRAFFIC:
            yield case.row(name, f"speed / {TRAFFIC}", timing.faster)


def details_of(sample: Sample) -> dict[str, Any]:
    """How the seconds were taken."""
    return {"rounds": len(sample.seconds), "clock": sample.clock}


def counts(
    case: Case, name: str, call: Call, device: torch.device, goals: Goals | None = None
) -> Iterator[Row]:
    """What one call asks of the host and of the memory, and launches on a GPU."""
    counted = count_ops(call)
    on_gpu = device.type == "cuda"
    found: dict[str, float] = {OPS: counted.calls.total()}
    if any(op.startswith("adalora::") for op in counted.calls):
        found["ops inside those"] = counted.inner.total()
    found[SYNCS] = host_syncs(call, device) if on_gpu else counted.host_syncs
    if on_gpu or case.architecture.matrices <= _MOST_TRACED:
        found["peak extra MB"] = peak_extra_memory(call, device) / 1e6
    for measure, value in found.items():
        yield case.row(name, measure, value, goal=(goals or {}).get((name, measure)))
    if on_gpu and not case.one_of_many:
        yield launches(case, name, call, device)


def launches(case: Case, name: str, call: Call, device: torch.device) -> Row:
    """What one call launches on a GPU."""
    used = kernels_of(call, device, calls=1 if name in _SLOW else 5)
    kernels = [asdict(use) | {"short name": use.short_name} for use in used[:12]]
    total = sum(use.launches for use in used if use.is_kernel)
    return case.row(name, LAUNCHES, total, details={"kernels": kernels})


def guarded_counts(
    case: Case,
    context: Context,
    make: Mapping[str, Callable[[PeftModel], Rival]],
    call_of: Callable[[Rival], Call],
) -> Iterator[Row]:
    """The counts of all rivals, unchecked."""
    for name, model in models_of(case.architecture, list(make), context.device).items():
        call = call_of(make[name](model))
        # PEFT makes its state in the first.
        call()
        yield from counts(case, name, call, context.device)


def guarded_steps(
    work: str, architecture: Architecture, rivals: Sequence[str], step: int, context: Context
) -> Iterator[Row]:
    """Those of a step of importance and allocation."""
    case = Case(work, architecture, tuple(rivals))
    make = {name: allocation_rivals.MAKE[name] for name in rivals}
    return guarded_counts(case, context, make, lambda rival: partial(rival.step, step))

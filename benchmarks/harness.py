"""The harness: it checks the providers of a case, then times them in interleaved rounds.

In a round every provider takes its turn, in another order in each. Whatever else the machine is
doing then hits all of them alike, and a ratio is taken within a round.

On a GPU there are three clocks. What the device does is timed in CUDA graphs of calls over rotated
inputs; what a training loop waits for, by the wall's clock until the device is done; what the host
does meanwhile, by its CPU. On a CPU there is one, the time of this process on the CPU, in all its
threads: what an idle machine would take.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import operator
import random
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import pandas as pd
import pytest
import torch
from torch import Tensor

Call: TypeAlias = Callable[[], object]
# All calls of a provider as one, and how many there are.
Work: TypeAlias = tuple[Call, int]
# What a graph takes at least: below it the gap before it would count.
_LEAST_GRAPH_SECONDS = 300e-6
# Before a capture: lazy loading, handles and workspaces, and whatever is compiled at its first use.
_WARM_UP_CALLS = 8
GRAPH, WALL = "CUDA graph", "wall clock, eager, device synchronized"
CPU = "CPU time of the process"
_FLOORS = ("F.linear", "frozen nn.Linear", "memory traffic alone", "copy of as many bytes")
_FLOORS += ("no adapter",)
_MEETS = {"<": operator.lt, "<=": operator.le, ">=": operator.ge}


@dataclass(frozen=True)
class Context:
    """Where the benches run; whether on the cases for a GPU, but tiny; timed, or only counted."""

    device: torch.device
    smoke: bool = False
    timed: bool = True

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def for_gpu(self) -> bool:
        """Whether the cases, and the providers, are those for a GPU."""
        return self.smoke or self.on_gpu


@dataclass(frozen=True, eq=False)
class Case:
    """What a bench measures at a time: the work, on what, and who provides it.

    The goals are by provider and measure, as "<= 1.12", of design.md, section 6. `of` is what the
    bench itself needs to know, `curve` the setting that varies over some cases. A case is not begun
    where its expected seconds are not left.
    """

    work: str
    settings: Mapping[str, Any]
    providers: Sequence[str]
    goals: Mapping[tuple[str, str], str]
    of: Any
    curve: str | None = None
    expected_seconds: float = 0.0

    def __str__(self) -> str:
        curve = f", curve over {self.curve}" if self.curve else ""
        return f"{self.work}: {describe(self.settings)}{curve}"


def describe(settings: Mapping[str, Any]) -> str:
    """Say the settings in words, but for those that are mappings."""
    words = []
    for key, value in settings.items():
        if value is False or (key == "dropout" and not value):
            words.append(f"no {key}")
        elif key in ("model", "dtype"):
            words.append(str(value))
        elif not isinstance(value, Mapping):
            words.append(key if value is True else f"{key} {value}")
    return ", ".join(words)


def kind_of(provider: str) -> str:
    """Tell whose a provider is: a "floor", "theirs", "plain" (PyTorch) or "ours"."""
    if provider.startswith(("PEFT", "loralib")) or provider.endswith(" in PEFT"):
        return "theirs"
    plain = provider.startswith("torch.")
    return "floor" if provider in _FLOORS else "plain" if plain else "ours"


def verdict(row: Mapping[str, Any]) -> str:
    """Say how a figure stands to its goal: met or MISSED; empty where there is no goal."""
    if not isinstance(row.get("goal"), str):
        return ""
    sign, limit = row["goal"].split()
    met = "met" if _MEETS[sign](row["value"], float(limit)) else "MISSED"
    within = row.get("p25", float("nan")) <= float(limit) <= row.get("p75", float("nan"))
    return f"{met}, within the spread" if within else met


def check(name: str, actual: Tensor, exact: Tensor, eager: Tensor | None = None) -> None:
    """Reject a wrong result, which must not be timed, with an ArithmeticError.

    Ours, given the result of plain eager PyTorch, may have twice its error plus one rounding step
    (design.md, section 7). Without it the result has to be the same but for rounding, which is what
    makes a comparison with another provider fair.
    """
    actual_, exact_ = actual.detach().double(), exact.detach().double()
    error = float((actual_ - exact_).norm())
    if eager is None:
        eps = torch.finfo(actual.dtype).eps if actual.is_floating_point() else 0.0
        allowed = max(1e-5, 4 * eps) * float(exact_.norm())
    else:
        rounding = torch.finfo(eager.dtype).eps * float(exact_.norm())
        allowed = 2 * float((eager.detach().double() - exact_).norm()) + rounding
    # Not `error > allowed`: NaN is wrong too.
    if not error <= allowed:
        raise ArithmeticError(f"{name}: error {error:.2e}, allowed {allowed:.2e}")


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Have `torch.empty` give NaN, so that what nobody wrote shows."""
    with warnings.catch_warnings():
        # About ops without a deterministic implementation, which is not what this is for.
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


@dataclass
class Outcome:
    """What a case gave: its figures, whose results were wrong and why, and what was timed.

    `seconds` are those of one call, with a row per round and a column per provider.
    """

    case: Case
    rows: list[dict[str, Any]] = field(default_factory=list)
    wrong: dict[str, str] = field(default_factory=dict)
    calls: dict[str, Call] = field(default_factory=dict)
    seconds: pd.DataFrame = field(default_factory=pd.DataFrame)
    clock: str = ""
    device: torch.device | None = None

    def add(self, provider: str, measure: str, value: float, **rest: Any) -> None:
        """Add a figure, with its goal if it has one."""
        case, settings = self.case, dict(self.case.settings)
        row: dict[str, Any] = {"work": case.work, "case": "", "settings": case.settings}
        row |= {"provider": provider, "kind": kind_of(provider), "measure": measure, "value": value}
        if case.curve:
            row |= {"curve": case.curve, "point": settings.pop(case.curve)}
        if (provider, measure) in case.goals:
            row["goal"] = case.goals[provider, measure]
        self.rows.append({**row, "case": describe(settings), **rest})

    def fail(self, provider: str, error: Exception) -> None:
        """Note why a provider has no figures."""
        self.wrong[provider] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"

    def keep_right(self, providers: dict[str, Any], check_one: Any, unpoisoned: Any = ()) -> None:
        """Drop the providers that are wrong. Ours are checked with memory poisoned."""
        for name, provider in list(providers.items()):
            ours = kind_of(name) in ("ours", "plain") and name not in unpoisoned
            try:
                with poisoned_memory() if ours else contextlib.nullcontext():
                    check_one(name, provider)
            # Anything can go wrong in a kernel or a compiler, and it must not end the run.
            except Exception as error:
                self.fail(name, error)
                del providers[name]

    def time(
        self,
        context: Context,
        calls: dict[str, Sequence[Call]],
        *,
        seconds: float,
        rounds: tuple[int, int] = (7, 100),
        clock: str = GRAPH,
    ) -> None:
        """Time providers in turn; the calls of one, over its sets of inputs, are one unit.

        It spends so many seconds, as far as the least and the greatest number of rounds allow. The
        clock is that of a GPU; on a CPU there is only one.
        """
        if not context.timed:
            return
        if context.smoke:
            seconds, rounds = 0.0, (2, 2)
        self.device = device = context.device
        self.clock, prepare = clock if context.on_gpu else CPU, _eager
        one_round, work = partial(_round, device, self.clock), {}
        if self.clock == GRAPH:
            prepare, one_round = _capturer(device), _round_of_graphs
        for name, sets in calls.items():
            try:
                work[name] = prepare(sets)
                self.calls[name] = sets[0]
            # Of what can't be captured.
            except RuntimeError as error:
                self.fail(name, error)
        if work:
            self.seconds = interleaved(work, one_round, seconds, rounds)

    def compare(self, to: str, measure: str, among: Collection[str] | None = None) -> None:
        """Add the ratios, within the rounds, of all or some providers to the time of one.

        The measure is "time / X", or "X's time / time", which is its inverse.
        """
        if to not in self.seconds:
            return
        ratios = self.seconds.div(self.seconds[to], axis=0)
        ratios = ratios if "time / " in measure.removesuffix("time / time") else 1 / ratios
        for name in among or self.seconds:
            p25, median, p75 = map(float, ratios[name].quantile([0.25, 0.5, 0.75]))
            seconds = float(self.seconds[name].median())
            timing = {"seconds": seconds, "clock": self.clock, "rounds": len(ratios)}
            self.add(name, measure, median, p25=p25, p75=p75, **timing)


def time_alone(outcome: Outcome, provider: str, benchmark: Any) -> None:
    """Let pytest-benchmark time a provider by itself; fail or skip if its result was wrong."""
    if provider in outcome.wrong:
        end = pytest.skip if kind_of(provider) in ("theirs", "floor") else pytest.fail
        end(f"WRONG: {outcome.wrong[provider]}")
    benchmark.group = str(outcome.case)
    own = [row for row in outcome.rows if row["provider"] == provider]
    benchmark.extra_info.update({row["measure"]: row["value"] for row in own})
    if provider in outcome.calls:
        benchmark(_until_done, outcome.calls[provider], outcome.device)


def _until_done(call: Call, device: torch.device) -> None:
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def sets_beyond_cache(bytes_per_set: int, device: torch.device) -> int:
    """How many sets of inputs are together larger than three times the L2; one on a CPU."""
    if device.type != "cuda":
        return 1
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, 1 + 3 * l2 // bytes_per_set)


def interleaved(
    work: Mapping[str, Work], one_round: Any, seconds: float, rounds: tuple[int, int]
) -> pd.DataFrame:
    """Return the seconds of a call, with a row per round and a column per provider."""
    # The garbage would be collected in whose turn it happens to fall into.
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        timed = [one_round(work, list(work))]
        wanted = int(seconds / (time.perf_counter() - start))
        for turn in range(1, min(max(wanted, rounds[0]), rounds[1])):
            # In another order each time: nobody always finds the caches as the same one left them.
            order = random.Random(turn).sample([*work], len(work))
            timed.append(one_round(work, order))
    finally:
        gc.enable()
    return pd.DataFrame(timed)[list(work)]


def _timed(device: torch.device, clock: str, run: Call) -> float:
    now = time.process_time if clock == CPU else time.perf_counter
    _until_done(lambda: None, device)
    start = now()
    # The host's own work is over before the device's, for which it may spin.
    run() if clock == CPU else _until_done(run, device)
    return now() - start


def _round(
    device: torch.device, clock: str, work: Mapping[str, Work], order: list[str]
) -> dict[str, float]:
    return {name: _timed(device, clock, work[name][0]) / work[name][1] for name in order}


def _round_of_graphs(work: Mapping[str, Work], order: list[str]) -> dict[str, float]:
    # Not timed: while it runs, the rest is queued, so that the GPU never waits for the host.
    work[order[0]][0]()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(order) + 1)]
    events[0].record()
    for name, event in zip(order, events[1:], strict=True):
        work[name][0]()
        event.record()
    events[-1].synchronize()
    ends = zip(order, itertools.pairwise(events), strict=True)
    return {name: a.elapsed_time(b) * 1e-3 / work[name][1] for name, (a, b) in ends}


def _call_all(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


def _eager(calls: Sequence[Call]) -> Work:
    """Call once, so that all is there. In a round each finds the caches as the others left them."""
    _call_all(calls)
    return partial(_call_all, calls), len(calls)


def _capturer(device: torch.device) -> Callable[[Sequence[Call]], Work]:
    """Capture one provider after the other; their graphs never run at once and share one pool."""
    stream, pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def capture(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            _call_all(calls)
        return graph

    def prepare(calls: Sequence[Call]) -> Work:
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            _call_all(calls[:_WARM_UP_CALLS])
            graph = capture(calls)
            graph.replay()
            # A short one is captured again, with the sets repeated.
            repeats = math.ceil(_LEAST_GRAPH_SECONDS / _timed(device, WALL, graph.replay))
            calls = [*calls] * repeats
            graph = capture(calls) if repeats > 1 else graph
        return graph.replay, len(calls)

    return prepare

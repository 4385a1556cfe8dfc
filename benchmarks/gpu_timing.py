"""Interleaved timing on a GPU: CUDA graphs of calls over rotated inputs, replayed A B C A B C ….

And what else can be asked of a call: its wall clock, its kernels, its host syncs, its memory.

On a CPU the calls are made in turn without graphs: there only to try a benchmark where no GPU is.
"""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch

from benchmarks.harness import Spread, Timing, against

Call: TypeAlias = Callable[[], object]

COPY, PRODUCT = "copy, GB/s", "bfloat16 product, TFLOP/s"
# Below this the gap between an event and the first kernel of a graph would count.
_LEAST_GRAPH_SECONDS = 300e-6
# No call takes less: one kernel, however small.
_LEAST_CALL_SECONDS = 2e-6
# Before a capture: lazy loading, handles and workspaces, and whatever is compiled at its first use.
_WARM_UP_CALLS = 8


@dataclass(frozen=True)
class Sample:
    """One rival: its seconds per call, one figure for each round, and how they were taken."""

    seconds: list[float]
    clock: str


@dataclass(frozen=True)
class _Prepared:
    """All calls of a rival as one unit of work."""

    replay: Call
    calls: int
    clock: str


def sets_beyond_cache(bytes_per_set: int, device: torch.device) -> int:
    """How many sets of inputs are together larger than three times the L2, at least two."""
    if device.type != "cuda":
        return 2
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, 1 + 3 * l2 // bytes_per_set)


def interleaved(
    rivals: Mapping[str, Sequence[Call]],
    device: torch.device,
    *,
    seconds: float,
    call_seconds: float = 0.0,
    rounds: tuple[int, int] = (7, 100),
) -> dict[str, Sample]:
    """Time rivals in turn, so that whatever else the GPU is doing hits all of them alike.

    Args:
        rivals: of each, one call for every set of inputs.
        seconds: to spend on the rounds, as far as their least and greatest number allow.
        call_seconds: what a call takes at least. Where that is little, a graph repeats the sets.
    """
    sets, repeats = min(map(len, rivals.values())), 1
    if device.type == "cuda":
        once = sets * max(call_seconds, _LEAST_CALL_SECONDS)
        repeats = max(1, round(_LEAST_GRAPH_SECONDS / once))
    prepare = _graphs_of(device) if device.type == "cuda" else _on_cpu
    prepared = {name: prepare([*calls] * repeats) for name, calls in rivals.items()}
    # After an eager rival the GPU may have to wait for the host: let those be the last.
    order = sorted(prepared, key=lambda name: prepared[name].clock.startswith(_EAGER))
    work = [prepared[name] for name in order]
    one_round = _gpu_round if device.type == "cuda" else _cpu_round

    one_round(work)
    start = time.perf_counter()
    timed = [one_round(work)]
    wanted = int(seconds / (time.perf_counter() - start))
    least, most = rounds if device.type == "cuda" else (2, 2)
    timed += [one_round(work) for _ in range(min(max(wanted, least), most) - 1)]
    per_rival = dict(zip(order, zip(*timed, strict=True), strict=True))
    return {name: Sample(list(per_rival[name]), prepared[name].clock) for name in rivals}


def wall_clock(
    rivals: Mapping[str, Call], device: torch.device, *, seconds: float, rounds: tuple[int, int]
) -> dict[str, Sample]:
    """Time eager calls in turn, each until the device is done: what a training loop waits for.

    Args:
        rivals: one call of each.
        seconds: to spend on the rounds, as far as their least and greatest number allow.
    """

    def one_round() -> list[float]:
        taken = []
        for call in rivals.values():
            _synchronize(device)
            start = time.perf_counter()
            call()
            _synchronize(device)
            taken.append(time.perf_counter() - start)
        return taken

    for _ in range(2):
        one_round()
    start = time.perf_counter()
    timed = [one_round()]
    wanted = int(seconds / (time.perf_counter() - start))
    least, most = rounds
    timed += [one_round() for _ in range(min(max(wanted, least), most) - 1)]
    clock = "wall clock, eager, device synchronized"
    return {
        name: Sample(list(taken), clock)
        for name, taken in zip(rivals, zip(*timed, strict=True), strict=True)
    }


@dataclass(frozen=True)
class KernelUse:
    """What one call launches of one kernel (or copy, or memset)."""

    name: str
    launches: float
    microseconds: float  # of all its launches together

    @property
    def is_kernel(self) -> bool:
        return not self.name.startswith(("Memcpy", "Memset"))

    @property
    def short_name(self) -> str:
        """Without namespaces, template arguments and parameters."""
        name = self.name.removeprefix("void ").replace("(anonymous namespace)::", "")
        return name.partition("<")[0].partition("(")[0].rpartition("::")[2].strip()


def kernels_of(call: Call, device: torch.device, calls: int = 5) -> list[KernelUse]:
    """What the profiler sees on the device in a call, the most time first; nothing on a CPU."""
    call()
    if device.type != "cuda":
        return []
    activities = [torch.profiler.ProfilerActivity.CUDA]
    # The first of a process starts up and may miss what comes early.
    with torch.profiler.profile(activities=activities):
        call()
        torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=activities) as trace:
        for _ in range(calls):
            call()
        torch.cuda.synchronize(device)
    found: dict[str, list[float]] = {}
    for event in trace.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found.setdefault(event.name, []).append(event.time_range.elapsed_us())
    uses = [KernelUse(name, len(us) / calls, sum(us) / calls) for name, us in found.items()]
    return sorted(uses, key=lambda use: -use.microseconds)


def host_syncs(call: Call, device: torch.device) -> int | None:
    """How often torch makes the host wait for the device in a call; None on a CPU."""
    if device.type != "cuda":
        return None
    call()
    torch.cuda.synchronize(device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    # Turning it on warns, too.
    what = "called a synchronizing CUDA operation"
    return sum(what in str(warning.message) for warning in caught)


def peak_extra_memory(call: Call, device: torch.device) -> int | None:
    """Bytes that a call needs beside what is allocated before it; None on a CPU."""
    if device.type != "cuda":
        return None
    call()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timings(samples: Mapping[str, Sample], first: str) -> dict[str, Timing]:
    """Medians and quartiles; the ratios are to the rival `first` in the same round."""
    return against(first, {name: sample.seconds for name, sample in samples.items()})


def measure_ceilings(device: torch.device) -> dict[str, float]:
    """What a large copy (bytes read and written) and a large product reach here, on random data."""
    numel, side = (2**29, 8192) if device.type == "cuda" else (2**16, 64)
    source = torch.randn(numel, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    calls = {"copy": partial(target.copy_, source), "product": partial(torch.mm, a, b)}
    median = {}
    for name, call in calls.items():
        samples = interleaved({name: [call] * 4}, device, seconds=0.5, call_seconds=1e-3)
        median[name] = Spread.of(samples[name].seconds).median
    return {
        COPY: 2 * source.nbytes / median["copy"] * 1e-9,
        PRODUCT: 2 * side**3 / median["product"] * 1e-12,
        "bytes copied": source.nbytes,
        "side of the product": side,
    }


_GRAPH, _EAGER, _CPU = "CUDA graph", "CUDA events, eager", "wall clock"


def _graphs_of(device: torch.device) -> Callable[[Sequence[Call]], _Prepared]:
    """Captures one rival after the other; their graphs never run at once and share one pool."""
    stream = torch.cuda.Stream(device)
    pool = torch.cuda.graph_pool_handle()

    def prepare(calls: Sequence[Call]) -> _Prepared:
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for call in calls[:_WARM_UP_CALLS]:
                call()
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, pool=pool, stream=stream):
                    for call in calls:
                        call()
            except RuntimeError as error:
                torch.cuda.synchronize(device)
                why = str(error.__context__ or error).splitlines()[0]
                return _Prepared(lambda: _call_all(calls), len(calls), f"{_EAGER}: {why}")
        return _Prepared(graph.replay, len(calls), _GRAPH)

    return prepare


def _on_cpu(calls: Sequence[Call]) -> _Prepared:
    return _Prepared(lambda: _call_all(calls), len(calls), _CPU)


def _call_all(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


def _gpu_round(work: Sequence[_Prepared]) -> list[float]:
    # Not timed: while it runs, the rest is queued, so that the GPU never waits for the host.
    work[0].replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(work) + 1)]
    events[0].record()
    for rival, event in zip(work, events[1:], strict=True):
        rival.replay()
        event.record()
    events[-1].synchronize()
    pairs = itertools.pairwise(events)
    return [
        start.elapsed_time(end) * 1e-3 / rival.calls
        for (start, end), rival in zip(pairs, work, strict=True)
    ]


def _cpu_round(work: Sequence[_Prepared]) -> list[float]:
    seconds = []
    for rival in work:
        start = time.perf_counter()
        rival.replay()
        seconds.append((time.perf_counter() - start) / rival.calls)
    return seconds

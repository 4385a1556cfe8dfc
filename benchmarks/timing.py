"""Interleaved timing: of every rival one call, A B C, B C A, …, round after round.

Whatever else the machine is doing then hits all rivals alike, and a ratio is taken within a round.

On a GPU there are two clocks. What the device does is timed in CUDA graphs of calls over rotated
inputs; what a training loop waits for, by the host's clock until the device is done. On a CPU there
is one, the time of this process on the CPU, in all its threads: what an idle machine would take.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.counting import Call
from benchmarks.results import Spread, Timing

# Below this the gap between an event and the first kernel of a graph would count.
_LEAST_GRAPH_SECONDS = 300e-6
# No call takes less: one kernel, however small.
_LEAST_CALL_SECONDS = 2e-6
# Before a capture: lazy loading, handles and workspaces, and whatever is compiled at its first use.
_WARM_UP_CALLS = 8
_GRAPH, _EAGER = "CUDA graph", "CUDA events, eager"
_HOST, _CPU = "wall clock, eager, device synchronized", "CPU time of the process"


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
    by_host: bool = False,
) -> dict[str, Sample]:
    """Time rivals in turn.

    Args:
        rivals: of each, one call for every set of inputs; all the calls of a rival are one unit.
        seconds: to spend on the rounds, as far as their least and greatest number allow.
        call_seconds: what a call takes at least. Where that is little, a graph repeats the sets.
        by_host: on a GPU, eager calls, each until the device is done, not graphs.
    """
    on_gpu = device.type == "cuda"
    if on_gpu and not by_host:
        sets = min(map(len, rivals.values()))
        once = sets * max(call_seconds, _LEAST_CALL_SECONDS)
        repeats = max(1, round(_LEAST_GRAPH_SECONDS / once))
        capture = _graphs_of(device)
        prepared = {name: capture([*calls] * repeats) for name, calls in rivals.items()}
        one_round = _gpu_round
    else:
        clock = _HOST if on_gpu else _CPU
        prepared = {
            name: _Prepared(partial(_call_all, calls), len(calls), clock)
            for name, calls in rivals.items()
        }
        one_round = partial(_host_round, device, itertools.count())
    # After an eager rival the GPU may have to wait for the host: let those be the last.
    order = sorted(prepared, key=lambda name: prepared[name].clock.startswith(_EAGER))
    work = [prepared[name] for name in order]
    with _no_garbage_collection():
        timed = _rounds(partial(one_round, work), seconds, rounds)
    per_rival = dict(zip(order, zip(*timed, strict=True), strict=True))
    return {name: Sample(list(per_rival[name]), prepared[name].clock) for name in rivals}


def _rounds(
    one_round: Callable[[], list[float]], seconds: float, rounds: tuple[int, int]
) -> list[list[float]]:
    one_round()
    start = time.perf_counter()
    timed = [one_round()]
    wanted = int(seconds / (time.perf_counter() - start))
    least, most = rounds
    return timed + [one_round() for _ in range(min(max(wanted, least), most) - 1)]


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """It would be whose round it happens to fall into."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timings(samples: Mapping[str, Sample], first: str) -> dict[str, Timing]:
    """Medians and quartiles; the ratios are to the rival `first` in the same round."""
    return {
        name: Timing.of(sample.seconds, samples[first].seconds) for name, sample in samples.items()
    }


@dataclass(frozen=True)
class Ceilings:
    """What a large copy and a large product reach on a device, on random data."""

    copy: float  # bytes read and written per second
    product: float  # floating point operations per second
    dtype: torch.dtype  # of the product

    def as_json(self) -> dict[str, float | str]:
        dtype = str(self.dtype).removeprefix("torch.")
        return {"copy B/s": self.copy, "product op/s": self.product, "dtype": dtype}


def measure_ceilings(device: torch.device) -> Ceilings:
    """In bfloat16 on a GPU, in float32 on a CPU, where each takes about a tenth of a second."""
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    numel, side = (2**29, 8192) if on_gpu else (2**24, 1024)
    source = torch.randn(numel, dtype=dtype, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    calls = {"copy": partial(target.copy_, source), "product": partial(torch.mm, a, b)}
    median = {}
    for name, call in calls.items():
        samples = interleaved({name: [call] * 4}, device, seconds=0.5, call_seconds=1e-3)
        median[name] = Spread.of(samples[name].seconds).median
    copied = 2 * source.nbytes / median["copy"]
    return Ceilings(copied, 2 * side**3 / median["product"], dtype)


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
                return _Prepared(partial(_call_all, calls), len(calls), f"{_EAGER}: {why}")
        return _Prepared(graph.replay, len(calls), _GRAPH)

    return prepare


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


def _host_round(
    device: torch.device, turns: Iterator[int], work: Sequence[_Prepared]
) -> list[float]:
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    seconds = [0.0] * len(work)
    # Another rival begins each time: nobody is always the one who finds the caches of the same.
    turn = next(turns)
    for i in range(len(work)):
        index = (i + turn) % len(work)
        rival = work[index]
        _synchronize(device)
        start = clock()
        rival.replay()
        _synchronize(device)
        seconds[index] = (clock() - start) / rival.calls
    return seconds

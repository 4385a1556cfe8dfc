"""Measure the plans for given layers, for `python -m adalora_kernels --tune`."""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch

from .svd_linear import svd_linear_bwd, svd_linear_fwd
from .svd_linear.plans import (
    PATHS,
    Device,
    Plan,
    Problem,
    device_of,
    gemm_candidates,
    is_allowed,
    padded_rank,
)

Call: TypeAlias = Callable[[], object]
# Copies of the operands, used in turn, are to be several times what the L2 holds.
_ROTATED_BYTES = 256 * 2**20
_ROUNDS = 15


class Layer(NamedTuple):
    """A `Layer` has in_features K, out_features N, M rows of x, and an adapter of rank r."""

    dtype: torch.dtype
    M: int
    K: int
    N: int
    r: int


def seconds_in_turns(calls_of: Mapping[Plan, Sequence[Call]]) -> dict[Plan, float]:
    """Measure the median seconds per call of each plan, in CUDA graphs that take turns.

    A card gets slower as it gets warm, by more than plans differ: one after the other, the first
    would be the fastest.
    """
    cuda: Any = torch.cuda  # Its streams and events have no types.
    stream, pool = cuda.Stream(), torch.cuda.graph_pool_handle()
    stream.wait_stream(torch.cuda.current_stream())
    graphs = {}
    times: dict[Plan, list[float]] = {plan: [] for plan in calls_of}
    with torch.cuda.stream(stream):
        for plan, calls in calls_of.items():
            calls[0]()  # Compiles.
            graphs[plan] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graphs[plan], pool=pool, stream=stream):
                for call in calls:
                    call()
            graphs[plan].replay()
        for turn in range(_ROUNDS):
            order = random.Random(turn).sample([*graphs], len(graphs))
            # Not timed: while it runs, the others are queued.
            graphs[order[0]].replay()
            marks = [cuda.Event(enable_timing=True) for _ in range(len(order) + 1)]
            marks[0].record()
            for plan, mark in zip(order, marks[1:], strict=True):
                graphs[plan].replay()
                mark.record()
            marks[-1].synchronize()
            for plan, (begin, end) in zip(order, itertools.pairwise(marks), strict=True):
                times[plan].append(begin.elapsed_time(end) / 1000 / len(calls_of[plan]))
    return {plan: statistics.median(found) for plan, found in times.items()}


def tune(
    layers: Sequence[Layer],
    device: torch.device,
    seconds: Callable[[Mapping[Plan, Sequence[Call]]], Mapping[Plan, float]] = seconds_in_turns,
) -> Iterator[tuple[Problem, Plan, float]]:
    """Yield the fastest plan for y and for dx of every layer, and its seconds.

    Adapters are float32, scaling 1, no dropout; for dx the whole backward is timed.
    """
    gpu = device_of(device)
    for layer in layers:
        forward, backward = _calls(layer, device)
        for product, calls, k, n in (
            ("y", forward, layer.K, layer.N),
            ("dx", backward, layer.N, layer.K),
        ):
            problem = Problem(layer.dtype, layer.M, k, n, padded_rank(layer.r), product)
            times = seconds(
                {
                    plan: [partial(call, path=plan) for call in calls]
                    for plan in candidates(gpu, problem)
                }
            )
            best = min(times, key=lambda plan: times[plan])
            yield problem, best, times[best]


def candidates(device: Device, problem: Problem) -> list[Plan]:
    """List every plan that is worth a measurement."""
    found = []
    for path in PATHS:
        if is_allowed(path, device, problem):
            blocks = gemm_candidates(device, problem, path)
            # cuBLAS chooses its own blocks.
            found += [Plan(path, b) for b in (blocks[:1] if path == "cublas" else blocks)]
    return found


def _calls(
    layer: Layer, device: torch.device
) -> tuple[list[Callable[..., object]], list[Callable[..., object]]]:
    """Make the forwards and the backwards of one layer on rotated operands, without their path."""
    dtype, M, K, N, r = layer
    new = partial(torch.randn, device=device)
    A, E, B, h = new(r, K), new(r, 1), new(N, r), new(M, r)
    size = dtype.itemsize * (M * K + K * N + M * N)
    forward: list[Callable[..., object]] = []
    backward: list[Callable[..., object]] = []
    for _ in range(max(2, min(_ROTATED_BYTES // size, 64))):
        x, weight, g = (new(*shape, dtype=dtype) for shape in ((M, K), (N, K), (M, N)))
        forward.append(partial(svd_linear_fwd, x, weight, None, A, E, B, None, 1.0, 0.0, None))
        tensors = (g, x, weight, A, E, B, None, h)
        backward.append(partial(svd_linear_bwd, *tensors, 1.0, 0.0, None, True))
    return forward, backward

"""Measures the plans for given layers and keeps the fastest; `python -m adalora_kernels --tune`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import torch

from .plans import (
    ONE_PASS,
    PATHS,
    Device,
    Plan,
    Problem,
    allowed,
    candidates_for,
    device_of,
    padded_rank,
)
from .svd_linear import svd_linear_bwd, svd_linear_fwd

Call: TypeAlias = Callable[[], object]
# Copies of the operands, used in turn, are to be several times what the L2 holds.
_ROTATED_BYTES = 256 * 2**20


class Layer(NamedTuple):
    """A layer of in_features K and out_features N under M rows and an adapter of rank r."""

    dtype: torch.dtype
    M: int
    K: int
    N: int
    r: int


def seconds_in_graph(calls: Sequence[Call]) -> float:
    """Median seconds per call, from a CUDA graph of all of them."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(20):
        start, end = (
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(2)
        )
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return float(torch.tensor(times[3:]).median()) / 1000 / len(calls)


def tune(
    layers: Sequence[Layer],
    device: torch.device,
    seconds: Callable[[Sequence[Call]], float] = seconds_in_graph,
) -> Iterator[tuple[Problem, Plan, float]]:
    """The fastest plan for y and for dx of every layer, and its seconds, one after the other.

    Adapters are float32, scaling 1, no dropout; for dx the whole backward is timed.
    """
    gpu = device_of(device)
    for layer in layers:
        calls = _Calls(layer, device)
        for product in ("y", "dx"):
            k, n = (layer.K, layer.N) if product == "y" else (layer.N, layer.K)
            problem = Problem(layer.dtype, layer.M, k, n, padded_rank(layer.r), product)
            times = {plan: seconds(calls(product, plan)) for plan in candidates(gpu, problem)}
            best = min(times, key=lambda plan: times[plan])
            yield problem, best, times[best]


def candidates(device: Device, problem: Problem) -> list[Plan]:
    """Every plan that is worth a measurement."""
    plans = []
    for path in PATHS:
        if not allowed(path, problem):
            continue
        blocks = candidates_for(device, problem)
        if path == "one_pass":
            blocks = [ONE_PASS[device.family][0 if problem.M <= 16 else 1]]
        # cuBLAS chooses its own blocks.
        plans += [Plan(path, b) for b in (blocks[:1] if path == "cublas" else blocks)]
    return plans


class _Calls:
    """The calls of one layer, on rotated operands."""

    def __init__(self, layer: Layer, device: torch.device) -> None:
        M, K, N, r = layer[1:]
        size = layer.dtype.itemsize * (M * K + K * N + M * N)
        self.sets = [
            {
                "x": torch.randn(M, K, device=device, dtype=layer.dtype),
                "weight": torch.randn(N, K, device=device, dtype=layer.dtype),
                "g": torch.randn(M, N, device=device, dtype=layer.dtype),
            }
            for _ in range(max(2, min(_ROTATED_BYTES // size, 64)))
        ]
        self.A, self.E, self.B, self.h = (
            torch.randn(shape, device=device) for shape in ((r, K), (r, 1), (N, r), (M, r))
        )

    def __call__(self, product: str, plan: Plan) -> list[Call]:
        return [self._call(product, plan, **tensors) for tensors in self.sets]

    def _call(
        self, product: str, plan: Plan, x: torch.Tensor, weight: torch.Tensor, g: torch.Tensor
    ) -> Call:
        A, E, B, h = self.A, self.E, self.B, self.h
        if product == "y":
            return lambda: svd_linear_fwd(x, weight, None, A, E, B, None, 1.0, 0.0, None, plan)
        options = (1.0, 0.0, None, True, plan)
        return lambda: svd_linear_bwd(g, x, weight, A, E, B, None, h, *options)

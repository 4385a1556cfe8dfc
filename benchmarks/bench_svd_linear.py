"""One AdaLoRA layer against the frozen linear layer, its floor, and the other providers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from adalora_kernels.kernels import svd_linear as kernels
from adalora_kernels.kernels.launch import Launch, dry_run
from adalora_kernels.kernels.svd_linear import plans
from benchmarks import svd_linear_layers as layers
from benchmarks.counting import add_counts, peak_extra_megabytes
from benchmarks.harness import Call, Case, Context, Outcome, kind_of, sets_beyond_cache, time_alone
from benchmarks.svd_linear_layers import AUTO, BACKWARD, BASELINE, FORWARD, PEFT, Layer

# (K, N): Llama-8B's q and o, gate and up, down.
GOAL_SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096))
GOAL_M, GOAL_R, FEW_ROWS = 8192, 16, (1, 16, 64)
RATIO = f"time / {BASELINE}"
# Design, section 6. On a GPU for "auto": against F.linear by shape, and PEFT's time against it.
FORWARD_GOALS = dict(zip(GOAL_SHAPES, ("<= 1.06", "<= 1.03", "<= 1.05"), strict=True))
BACKWARD_GOAL, FEW_ROWS_GOAL = "<= 1.09", "<= 1.1"
PEFT_GOALS = {PEFT: ">= 2", "PEFT bf16": ">= 1.4", layers.COMPILED: ">= 1.2"}
# On a CPU for the layers, forward + backward, by dropout.
CPU_GOAL_SHAPES, CPU_M, CPU_R = ((768, 768), (768, 3072)), 2048, 12
CPU_GOALS = {0.0: "<= 1.12", 0.1: "<= 1.35"}
# Along each the other settings are those of one point.
_CURVES: dict[str, tuple[Any, ...]] = {"M": (1, 8, 64, 512, 4096, 32768), "r": (1, 4, 16, 64, 256)}
_GPU_CURVES = {**_CURVES, "dtype": (torch.bfloat16, torch.float16, torch.float32)}
_CPU_CURVES = {**_CURVES, "dtype": (torch.float32, torch.bfloat16, torch.float64)}


def cases(context: Context) -> Sequence[Case]:
    """Those with a goal first, then the curves."""
    if context.smoke:
        tiny = partial(Layer, r=8, dtype=torch.float16)
        special = [tiny(32, 48, 16, compiled=True), tiny(32, 32, 16, dropout=0.1, counted=True)]
        curve = _along({"M": (1, 3)}, {"M": tiny(64, 32, 1, r=3)})
        return [*_cases([*special, tiny(64, 32, 16)]), *curve]
    if context.for_gpu:
        large = [Layer(K, N, GOAL_M, GOAL_R, counted=True) for K, N in GOAL_SHAPES]
        goals = [replace(layer, compiled=True) for layer in large]
        goals += [Layer(K, N, M, GOAL_R) for M in FEW_ROWS for K, N in GOAL_SHAPES]
        goals += [replace(layer, dropout=0.1) for layer in large]
        point = Layer(4096, 4096, GOAL_M, GOAL_R)
        curves = _along(_GPU_CURVES, {"M": point, "r": point, "dtype": replace(point, M=2048)})
        return [*_cases(goals), *curves]
    new = partial(Layer, r=CPU_R, dtype=torch.float32, on_gpu=False)
    # The ops of the larger shape are the same, its memory is more by as much as N is, and to
    # compile it takes as long as to measure it.
    goals = [
        new(K, N, CPU_M, dropout=dropout, compiled=K == N and not dropout, counted=K == N)
        for K, N in CPU_GOAL_SHAPES
        for dropout in CPU_GOALS
    ]
    points = {"M": new(384, 384, CPU_M), "r": new(768, 768, 512), "dtype": new(768, 768, 128)}
    # The curves, which take most of the time, are of whole steps only.
    return [*_cases(goals), *_along(_CPU_CURVES, points, BACKWARD)]


def _cases(both: Sequence[Layer], curve: str | None = None, only: str = "") -> list[Case]:
    """Make a case of each layer in both directions, or in one only."""
    pairs = itertools.product(both, [only] if only else (FORWARD, BACKWARD))
    found = []
    for one in (replace(layer, direction=direction) for layer, direction in pairs):
        goals, work = {} if curve else _goals(one), f"one layer, {one.direction}"
        found.append(Case(work, one.settings, one.providers, goals, one, curve))
    return found


def _along(curves: Any, points: Any, only: str = "") -> list[Case]:
    along = [(replace(points[key], **{key: value}), key) for key in curves for value in curves[key]]
    return [case for layer, key in along for case in _cases([layer], key, only)]


def _goals(layer: Layer) -> dict[tuple[str, str], str]:
    shape, forward = (layer.K, layer.N), layer.direction == FORWARD
    if not layer.on_gpu:
        ours = () if forward else (layers.LAYER, layers.APPLIED)
        return {(name, RATIO): CPU_GOALS[layer.dropout] for name in ours}
    if shape not in GOAL_SHAPES or layer.r != GOAL_R or layer.dropout:
        return {}
    if layer.M != GOAL_M:
        return {(AUTO, RATIO): FEW_ROWS_GOAL} if layer.M in FEW_ROWS and forward else {}
    if forward:
        return {(AUTO, RATIO): FORWARD_GOALS[shape]}
    against = {(ours, f"{peft}'s time / time"): PEFT_GOALS[peft] for ours, peft in _pairs(layer)}
    return {(AUTO, RATIO): BACKWARD_GOAL, **against}


def _pairs(layer: Layer) -> list[tuple[str, str]]:
    """Pairs of a provider of ours and one of PEFT's that do the same."""
    pairs = itertools.product((AUTO, layers.LAYER, layers.APPLIED), (PEFT, layers.COMPILED))
    narrow = (layer.in_dtype(AUTO), layer.in_dtype(PEFT))
    return [pair for pair in (*pairs, narrow) if set(pair) <= set(layer.providers)]


def measure(case: Case, context: Context) -> Outcome:
    """Check, count and time all providers of a case."""
    outcome, device, layer = Outcome(case), context.device, case.of
    if layer.on_gpu and not context.for_gpu:
        for path in (AUTO, *layer.paths):
            there = planned(layer, path, layers.GOAL_GPU)
            outcome.add(path, "planned launches", len(there))
            outcome.add(path, "planned bytes", sum(launch.moved for launch in there))
        return outcome
    per_set = layer.dtype.itemsize * layer.K * (layer.M + layer.N)
    timed = sets_beyond_cache(per_set, device)
    # The few entries of dE in a single set of inputs say too little about an error.
    checked = max(2 if layer.on_gpu else 1, math.ceil(8 / layer.r))
    inputs = [layers.make_inputs(layer, device) for _ in range(max(timed, checked))]
    providers = layers.providers_of(layer, device)
    if context.on_gpu and not context.timed:  # Only the numerics: ours.
        providers = {name: one for name, one in providers.items() if kind_of(name) == "ours"}
    outcome.keep_right(providers, layers.Check(layer, inputs[:checked]))
    calls: dict[str, list[Call]] = {}
    for name, provider in providers.items():
        calls[name] = [partial(provider.call, layer.direction, one) for one in inputs[:timed]]
        if layer.counted:
            outcome.add(name, "peak extra MB", peak_extra_megabytes(calls[name][0], device))
            # Compiled code calls its kernels without dispatching anything.
            if name != layers.COMPILED:
                add_counts(outcome, name, calls[name][0], device)
    outcome.time(context, calls, **_effort(case))
    outcome.compare(BASELINE, RATIO)
    for name, peft in _pairs(layer):
        if name in outcome.seconds:
            outcome.compare(peft, f"{peft}'s time / time", [name])
    return outcome


def _effort(case: Case) -> dict[str, Any]:
    """How long, and how many rounds: small differences take many, large shapes take long."""
    if case.of.on_gpu:
        return {"seconds": 0.8 if case.goals else 0.25}
    if case.curve:
        return {"seconds": 1.5, "rounds": (5 if case.of.M <= 4096 else 3, 7)}
    return {"seconds": 3.0, "rounds": (5, 25)} if case.goals else {"seconds": 1.0, "rounds": (3, 9)}


def planned(layer: Layer, path: str, gpu: plans.Device) -> list[Launch]:
    """List what one of our paths would launch on a GPU, with its bytes."""
    M, K, N, r = layer.M, layer.K, layer.N, layer.r
    new = partial(torch.empty, device="meta", dtype=layer.dtype)
    x, y, weight, bias = new(M, K), new(M, N), new(N, K), new(N) if layer.bias else None
    factors = [new(shape, dtype=layer.adapters) for shape in ((r, K), (r, 1), (N, r))]
    options = (layer.scaling, 0.0, None)
    with dry_run() as found:
        _, h = kernels.svd_linear_fwd(x, weight, bias, *factors, None, *options, path, gpu)
        if layer.direction == BACKWARD:
            kernels.svd_linear_bwd(y, x, weight, *factors, None, h, *options, True, path, gpu)
    return found


def guarded() -> list[Case]:
    """The cases whose counts the guard compares: calls on a CPU, and the plans for a GPU."""
    new = partial(Layer, 768, 768, 256, CPU_R, dtype=torch.float32, on_gpu=False, counted=True)
    plans_for = [Layer(K, N, M, GOAL_R) for K, N in GOAL_SHAPES for M in (GOAL_M, FEW_ROWS[-1])]
    return _cases([*(new(dropout=dropout) for dropout in CPU_GOALS), *plans_for])


bench_svd_linear = time_alone

"""One SVDLinear on a GPU against the frozen linear layer, which is the floor, and against PEFT's.

    python -m benchmarks.gpu_svd_linear --out FOLDER

writes svd_linear_gpu.json (everything) and svd_linear_gpu.txt (a line per case), and prints what
counts. The exit status is 1 if one of our results is wrong or could not be had; its time is then
not reported. `--smoke` takes tiny shapes through the same code on a CPU, with TRITON_INTERPRET=1;
its times mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import inspect
import itertools
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton.language as tl
from peft.tuners.adalora.layer import SVDLinear as PeftSVDLinear
from torch import Tensor, nn

from adalora_kernels import ops, reference
from adalora_kernels.kernels import plans
from adalora_kernels.kernels import svd_linear as kernels
from adalora_kernels.kernels.launch import INTERPRETED, Launch, dry_run
from benchmarks.gpu_report import Report, Result, at_most, environment, first_line
from benchmarks.gpu_timing import (
    COPY,
    PRODUCT,
    Sample,
    interleaved,
    measure_ceilings,
    sets_beyond_cache,
    timings,
)
from benchmarks.harness import Row, check, poisoned_memory
from benchmarks.peft_models import with_adapters

ALPHA = 16
FLOOR, AUTO, PEFT, COMPILED = "F.linear", "auto", "PEFT", "PEFT compiled"
FORWARD, BACKWARD = "forward", "forward + backward"
NAME, RATIO = "svd_linear_gpu", "time / F.linear"

# (K, N): what it is taken from, and whether it has a bias there.
GOAL_SHAPES = {
    (4096, 4096): ("Llama-8B q, o", False),
    (4096, 14336): ("Llama-8B gate, up", False),
    (14336, 4096): ("Llama-8B down", False),
}
MODELS = {
    **GOAL_SHAPES,
    (4096, 1024): ("Llama-8B k, v", False),
    (768, 768): ("DeBERTa-base", True),
    (768, 3072): ("DeBERTa-base", True),
    (3072, 768): ("DeBERTa-base", True),
}
GOAL_M, GOAL_R, FEW_ROWS = 8192, 16, 64
# Design, section 6: time / F.linear of "auto", and PEFT's time / that of "auto".
FORWARD_GOALS = dict(zip(GOAL_SHAPES, (1.06, 1.03, 1.05), strict=True))
BACKWARD_GOAL, FEW_ROWS_GOAL = 1.09, 1.10
PEFT_GOALS = {PEFT: 2.0, "PEFT bf16": 1.4, COMPILED: 1.2}

FORMULAS = {
    "ratio": "median over the rounds of time / time of F.linear in the same round (p25-p75)",
    "TFLOP/s": "operations / median time: 2MKN for y, 2MKN for dx; with an adapter 2Mr(K+N) more "
    "for y and 4Mr(K+N) more for the gradients",
    "GB/s": "bytes / median time; of ours every tensor that one of its kernels reads or writes, "
    "once per kernel; of the others what can't be avoided: x, W, bias, A, E, B and y, and for the "
    "backward g, W, A, E, B, x, dx, dA, dE and dB (F.linear: g, W and dx)",
}
# The longest that a case was assumed to take when the budget ends.
_RESERVE_SECONDS = 8.0
# auto is said to be wrong about the fastest path from here: what differs less is noise.
_DETOUR = 1.02


@dataclass(frozen=True)
class Case:
    """One layer at one number of rows. `compiled`: torch.compile is one of the rivals."""

    K: int
    N: int
    M: int
    r: int
    dropout: float = 0.0
    compiled: bool = False
    dtype: torch.dtype = torch.bfloat16

    @property
    def bias(self) -> bool:
        return self.model[1]

    @property
    def model(self) -> tuple[str, bool]:
        return MODELS.get((self.K, self.N), ("none", True))

    @property
    def scaling(self) -> float:
        return ALPHA / (self.r + 1e-5)

    @property
    def settings(self) -> dict[str, Any]:
        sizes = {"M": self.M, "K": self.K, "N": self.N, "r": self.r, "dropout": self.dropout}
        return {**sizes, "bias": self.bias, "dtype": _name(self.dtype), "model": self.model[0]}

    def __str__(self) -> str:
        dropout = f" dropout {self.dropout:g}" if self.dropout else ""
        return f"{self.K}x{self.N} M={self.M} r={self.r}{dropout}"

    def goal(self, direction: str) -> tuple[str, float] | None:
        """What the design asks of "auto"."""
        shape = (self.K, self.N)
        if shape not in GOAL_SHAPES or self.r != GOAL_R or self.dropout:
            return None
        if self.M == GOAL_M:
            return "<=", FORWARD_GOALS[shape] if direction == FORWARD else BACKWARD_GOAL
        if self.M <= FEW_ROWS and direction == FORWARD:
            return "<=", FEW_ROWS_GOAL
        return None


def all_cases() -> list[Case]:
    """Those with a goal first, then the others in the order of interest."""
    goals = [Case(K, N, GOAL_M, GOAL_R, compiled=True) for K, N in GOAL_SHAPES]
    goals += [Case(K, N, M, GOAL_R) for M in (1, 16, FEW_ROWS) for K, N in GOAL_SHAPES]
    goals += [Case(K, N, GOAL_M, GOAL_R, dropout=0.1) for K, N in GOAL_SHAPES]
    ranks, rows = (16, 64, 8), (8192, 2048, 16384, 64, 16, 1)
    rest = [Case(K, N, M, r) for r, M, (K, N) in itertools.product(ranks, rows, MODELS)]
    cases: dict[tuple[float, ...], Case] = {}
    for case in [*goals, *rest]:
        cases.setdefault((case.K, case.N, case.M, case.r, case.dropout), case)
    return list(cases.values())


def smoke_cases() -> list[Case]:
    """Every kind of case, small."""
    tiny = partial(Case, dtype=torch.float16)
    special = [tiny(32, 48, 16, 8, compiled=True), tiny(32, 32, 16, 8, dropout=0.1)]
    return [*special, tiny(64, 32, 1, 8), tiny(64, 32, 16, 3)]


@dataclass(frozen=True)
class Inputs:
    """What one call reads, the same for every rival; the layers are PEFT's, by adapter dtype."""

    x: Tensor
    g: Tensor
    layers: Mapping[torch.dtype, PeftSVDLinear]

    @property
    def linear(self) -> nn.Linear:
        base: nn.Linear = self.layers[torch.float32].base_layer
        return base

    def factors(self, adapters: torch.dtype) -> list[Tensor]:
        layer = self.layers[adapters]
        return [getattr(layer, name)["default"] for name in ("lora_A", "lora_E", "lora_B")]


def make_inputs(case: Case, count: int, device: torch.device) -> list[Inputs]:
    """Random ones. The two layers of a set share the weight and have equal factors."""
    new = partial(torch.randn, dtype=case.dtype, device=device)
    weights = [new(case.N, case.K).div_(math.sqrt(case.K)) for _ in range(count)]
    biases = [new(case.N) if case.bias else None for _ in range(count)]
    layers: dict[torch.dtype, list[PeftSVDLinear]] = {}
    for adapters in (torch.float32, case.dtype):
        linears = nn.Sequential(*map(_frozen_linear, weights, biases))
        names = [str(i) for i in range(count)]
        # PEFT's default is float32 adapters; the others are `autocast_adapter_dtype=False`.
        options = {"init_r": case.r, "lora_alpha": ALPHA, "lora_dropout": case.dropout}
        model = with_adapters(linears, names, **options)
        if adapters == case.dtype:
            model.to(adapters)
        layers[adapters] = list(model.base_model.model)
    inputs = []
    for wide, narrow in zip(*layers.values(), strict=True):
        if type(wide) is not PeftSVDLinear:
            raise TypeError(f"the rival is a {type(wide).__name__}, not PEFT's SVDLinear")
        x, g = new(case.M, case.K).requires_grad_(), new(case.M, case.N)
        one = Inputs(x, g, {torch.float32: wide, case.dtype: narrow})
        for a, b in zip(one.factors(torch.float32), one.factors(case.dtype), strict=True):
            b.data.normal_(std=0.1)
            a.data.copy_(b.data)
        inputs.append(one)
    return inputs


def _frozen_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    out_features, in_features = weight.shape
    linear = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


@dataclass(frozen=True)
class Rival:
    """One way to compute y. Without `adapters`, the frozen layer; `impl`: ours, by that name."""

    forward: Callable[[Inputs], Tensor]
    adapters: torch.dtype | None = None
    impl: str | None = None

    def step(self, inputs: Inputs) -> list[Tensor]:
        """[y, dx, dA, dE, dB], of the frozen layer [y, dx].

        PEFT's `ranknum`, which happens to be trainable, is left out, to PEFT's advantage.
        """
        leaves = [inputs.x]
        if self.adapters is not None:
            leaves += inputs.factors(self.adapters)
        return _step(self.forward(inputs), leaves, inputs.g)


def _step(y: Tensor, leaves: Sequence[Tensor], g: Tensor) -> list[Tensor]:
    return [y, *torch.autograd.grad(y, leaves, g)]


def rivals_of(case: Case, device: torch.device) -> dict[str, Rival]:
    """By name, the floor first."""
    wide, narrow = torch.float32, case.dtype
    rivals = {
        FLOOR: Rival(lambda inputs: inputs.linear(inputs.x)),
        AUTO: Rival(partial(_ours, case, AUTO, wide), wide, AUTO),
    }
    if not case.dropout:
        for path in _paths(case):
            rivals[path] = Rival(partial(_ours, case, path, wide), wide, path)
        name = f"{AUTO} {_name(narrow)}"
        rivals[name] = Rival(partial(_ours, case, AUTO, narrow), narrow, AUTO)
    rivals[PEFT] = Rival(lambda inputs: inputs.layers[wide](inputs.x), wide)
    if not case.dropout:
        name = f"{PEFT} {_name(narrow)}"
        rivals[name] = Rival(lambda inputs: inputs.layers[narrow](inputs.x), narrow)
    if case.compiled:
        backend = "inductor" if device.type == "cuda" else "eager"
        torch.compiler.reset()
        compiled = torch.compile(lambda layer, x: layer(x), backend=backend, dynamic=False)
        rivals[COMPILED] = Rival(lambda inputs: compiled(inputs.layers[wide], inputs.x), wide)
    return rivals


def _ours(case: Case, impl: str, adapters: torch.dtype, inputs: Inputs) -> Tensor:
    linear, (A, E, B) = inputs.linear, inputs.factors(adapters)
    seed = ops.dropout_seed(inputs.x) if case.dropout else None
    tensors = (inputs.x, linear.weight, linear.bias, A, E, B, None)
    y: Tensor
    y, _ = torch.ops.adalora.svd_linear(*tensors, case.scaling, case.dropout, seed, impl)
    return y


def _paths(case: Case) -> list[str]:
    few = case.M <= plans.ONE_PASS_ROWS and case.r <= plans.ONE_PASS_RANKS
    return [path for path in plans.PATHS if few or path != "one_pass"]


def directions_of(rival: str) -> tuple[str, ...]:
    """one_pass is a path of the forward only."""
    return (FORWARD,) if rival == "one_pass" else (FORWARD, BACKWARD)


def refusals(case: Case, rivals: Mapping[str, Rival], inputs: Sequence[Inputs]) -> dict[str, str]:
    """Which rivals must not be timed, and why: a wrong result, or none.

    Ours are held to the rule of design, section 7, for y and every gradient, with memory poisoned;
    PEFT's have to be the same function. Two sets of inputs are looked at together: of the few
    entries of dE one set says too little about an error.
    """
    sets = inputs[:2]
    exact = _pooled([_plain(case, one, torch.float32, torch.float64) for one in sets])
    eager = {
        adapters: _pooled([_plain(case, one, adapters) for one in sets])
        for adapters in (torch.float32, case.dtype)
    }
    refused = {}
    for name, rival in rivals.items():
        whats = ("y", "dx", "dA", "dE", "dB") if BACKWARD in directions_of(name) else ("y",)
        try:
            with poisoned_memory() if rival.impl else contextlib.nullcontext():
                actual = _pooled([_seeded(case, rival, one) for one in sets])
            if rival.adapters is None:
                continue  # The frozen layer, which is another function.
            for i, what in enumerate(whats):
                if rival.impl is not None:
                    check(what, actual[i], exact[i], eager[rival.adapters][i])
                elif not case.dropout:  # PEFT's draws other masks.
                    _check_same_function(what, actual[i], exact[i], case.dtype)
        # PEFT under torch.compile can raise anything, and no rival is to end the run.
        except Exception as error:
            refused[name] = first_line(error)
    return refused


def _seeded(case: Case, rival: Rival, inputs: Inputs) -> list[Tensor]:
    torch.manual_seed(1)
    return rival.step(inputs)


def _plain(
    case: Case, inputs: Inputs, adapters: torch.dtype, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """What `Rival.step` has to give, by autograd on the plain formula; in `dtype` if given."""
    seed = None
    if case.dropout:
        torch.manual_seed(1)
        seed = ops.dropout_seed(inputs.x)
    linear = inputs.linear
    tensors = (linear.weight, linear.bias, inputs.g, inputs.x, *inputs.factors(adapters))
    weight, bias, g, *leaves = (
        None if t is None else t.detach().to(dtype or t.dtype) for t in tensors
    )
    x, A, E, B = (t.requires_grad_() for t in leaves)
    options = (None, case.scaling, case.dropout, seed)
    y, _ = reference.svd_linear(x, weight, bias, A, E, B, *options)
    return _step(y, [x, A, E, B], g)


def _pooled(draws: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Each result of all draws as one vector."""
    return [torch.cat([t.detach().flatten() for t in same]) for same in zip(*draws, strict=True)]


def _check_same_function(what: str, actual: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    error = float((actual.double() - exact).norm() / exact.norm())
    allowed = max(1e-5, 4 * torch.finfo(dtype).eps)
    if not error <= allowed:
        raise ArithmeticError(f"{what}: relative error {error:.2e}, allowed {allowed:.2e}")


def planned(case: Case, rival: Rival, device: torch.device) -> dict[str, list[Launch]]:
    """What one of ours launches, by direction: forward, and forward and backward."""

    def meta(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    adapters, how = rival.adapters or case.dtype, rival.impl or AUTO
    x, y, weight = meta(case.M, case.K), meta(case.M, case.N), meta(case.N, case.K)
    bias = meta(case.N) if case.bias else None
    shapes = ((case.r, case.K), (case.r, 1), (case.N, case.r))
    A, E, B = (meta(*shape, dtype=adapters) for shape in shapes)
    seed = meta(1, dtype=torch.int64) if case.dropout else None
    options, gpu = (case.scaling, case.dropout, seed), plans.device_of(device)
    with dry_run() as there:
        _, h = kernels.svd_linear_fwd(x, weight, bias, A, E, B, None, *options, how, gpu)
    with dry_run() as back:
        kernels.svd_linear_bwd(y, x, weight, A, E, B, None, h, *options, True, how, gpu)
    return {FORWARD: there, BACKWARD: [*there, *back]}


def _plan(launches: Sequence[Launch]) -> str:
    """The path and the blocks of every large product among the launches."""
    texts = []
    for launch in launches:
        if launch.kernel == "cublas":
            texts.append("cublas")
        elif launch.kernel == "gemm":
            a = launch.arguments or {}
            path = "two_pass" if a["SPLITS"] else "one_pass"
            blocks = "x".join(str(a[name]) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
            flat = " flat" if a["FLATTEN"] else ""
            texts.append(f"{path} {blocks} w{a['num_warps']} s{a['num_stages']}{flat}")
    return ", dx ".join(texts)


def operations(case: Case, direction: str, adapters: torch.dtype | None) -> int:
    """Floating point operations; FORMULAS."""
    low_rank = 2 * case.M * case.r * (case.K + case.N) if adapters else 0
    product = 2 * case.M * case.K * case.N
    return product + low_rank if direction == FORWARD else 2 * product + 3 * low_rank


def least_bytes(case: Case, direction: str, adapters: torch.dtype | None) -> int:
    """What every implementation has to move; FORMULAS."""
    size = case.dtype.itemsize
    x, y, weight = case.M * case.K * size, case.M * case.N * size, case.N * case.K * size
    factors = case.r * (case.K + case.N + 1) * adapters.itemsize if adapters else 0
    forward = x + weight + (case.N * size if case.bias else 0) + factors + y
    if direction == FORWARD:
        return forward
    return forward + y + weight + x + (x + 2 * factors if adapters else 0)


def measure(case: Case, device: torch.device, report: Report, seconds: float) -> None:
    """Check and time all rivals of a case, in both directions, for `seconds` each."""
    size = case.dtype.itemsize * case.K * (case.M + case.N)
    inputs = make_inputs(case, sets_beyond_cache(size, device), device)
    rivals = rivals_of(case, device)
    for name, why in refusals(case, rivals, inputs).items():
        report.refuse(str(case), name, why, ours=rivals.pop(name).impl is not None)
    for direction in (FORWARD, BACKWARD):
        calls: dict[str, list[Callable[[], object]]] = {
            name: [partial(r.forward if direction == FORWARD else r.step, i) for i in inputs]
            for name, r in rivals.items()
            if direction in directions_of(name)
        }
        least = max(
            operations(case, direction, None) / report.ceilings[PRODUCT] * 1e-12,
            least_bytes(case, direction, None) / report.ceilings[COPY] * 1e-9,
        )
        samples = interleaved(calls, device, seconds=seconds, call_seconds=least)
        report.results += results_of(case, direction, rivals, samples, device)


def results_of(
    case: Case,
    direction: str,
    rivals: Mapping[str, Rival],
    samples: Mapping[str, Sample],
    device: torch.device,
) -> Iterator[Result]:
    """The rows of one case and direction."""
    row = partial(Row, f"svd_linear {direction}", case.settings)
    for name, timing in timings(samples, FLOOR).items():
        rival = rivals[name]
        flops = operations(case, direction, rival.adapters)
        moved = least_bytes(case, direction, rival.adapters)
        plan: dict[str, Any] = {}
        if rival.impl == AUTO and device.type != "cuda":
            plan = {"plan": "reference"}
        elif rival.impl is not None:
            launches = planned(case, rival, device)[direction]
            moved = sum(launch.moved for launch in launches)
            plan = {"plan": _plan(launches), "launches": len(launches)}
        details = {
            "operations": flops,
            "bytes": moved,
            "TFLOP/s": flops / timing.seconds.median * 1e-12,
            "GB/s": moved / timing.seconds.median * 1e-9,
            "rounds": len(samples[name].seconds),
            "clock": samples[name].clock,
            **plan,
        }
        goal = case.goal(direction) if name == AUTO else None
        ratio = row(name, RATIO, timing.slower, goal, timing.seconds)
        yield Result(str(case), ratio, details)
    for name in samples:
        ours = AUTO if rivals[name].adapters == torch.float32 else f"{AUTO} {_name(case.dtype)}"
        if name.startswith(PEFT) and ours in samples:
            times = timings({n: samples[n] for n in (ours, name)}, ours)[name].slower
            has_goal = case.M == GOAL_M and direction == BACKWARD and case.goal(direction)
            goal = (">=", PEFT_GOALS[name]) if has_goal else None
            yield Result(str(case), row(name, f"time / {ours}", times, goal))


def warm_up(cases: Sequence[Case], device: torch.device, workers: int) -> int:
    """Compile what the cases need, in parallel, into the caches on disk; how many calls it took.

    Every case is asked for its kernels, and of those that need the same one only the first is
    called. What fails here fails again, and is reported, where it is measured.
    """
    calls = [(case, COMPILED) for case in cases if case.compiled]
    seen: set[object] = set()
    for case in cases:
        for name, rival in rivals_of(dataclasses.replace(case, compiled=False), device).items():
            if rival.impl is not None:
                launches = planned(case, rival, device)[directions_of(name)[-1]]
                variants = set(map(_variant, launches))
                if not variants <= seen:
                    calls.append((case, name))
                    seen |= variants
    context = multiprocessing.get_context("spawn")
    with (
        contextlib.suppress(BrokenProcessPool),
        ProcessPoolExecutor(workers, context, _one_compile_thread) as pool,
    ):
        for failure in pool.map(partial(_call_once, device), *zip(*calls, strict=True)):
            if failure is not None:
                print(f"warming up: {failure}", flush=True)
    return len(calls)


def _variant(launch: Launch) -> object:
    """What triton compiles a kernel of its own for: constants, types, and sizes by divisibility."""
    if launch.function is None or launch.arguments is None:
        return None
    parameters = inspect.signature(launch.function.fn).parameters
    # Under the interpreter, where nothing is compiled, there is no such list.
    unspecialised = getattr(launch.function, "do_not_specialize", None) or ()

    def kind(name: str, value: Any) -> object:
        if name in unspecialised:
            return None
        if isinstance(value, Tensor):
            return value.dtype
        if hasattr(value, "block_shape"):
            return value.base.dtype, tuple(value.block_shape)
        if value is None or name not in parameters:
            return value
        constant = parameters[name].annotation is tl.constexpr
        return value if constant else (value == 1, value % 16 == 0)

    return launch.kernel, tuple((name, kind(name, v)) for name, v in launch.arguments.items())


def _one_compile_thread() -> None:
    # The pool is parallel already. Read by torch when its compiler is imported.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    torch.set_num_threads(1)


def _call_once(device: torch.device, case: Case, name: str) -> str | None:
    """In a process of the pool; what went wrong."""
    try:
        rival = rivals_of(case, device)[name]
        (inputs,) = make_inputs(case, 1, device)
        call = rival.step if BACKWARD in directions_of(name) else rival.forward
        call(inputs)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    except Exception as error:
        return f"{name}, {case}: {first_line(error)}"
    return None


def _groups(report: Report) -> Iterator[dict[str, Result]]:
    """For each case and direction the ratios to F.linear, by rival."""
    ratios = [result for result in report.results if result.row.measure == RATIO]
    for _, group in itertools.groupby(ratios, key=lambda r: (r.case, r.row.case)):
        yield {result.row.rival: result for result in group}


def _line(rivals: Mapping[str, Result]) -> str:
    floor, auto = rivals[FLOOR], rivals.get(AUTO)
    seconds = floor.row.seconds
    start = f"{floor.row.case.removeprefix('svd_linear '):18} {floor.case:33} "
    start += f"{seconds.median * 1e6 if seconds else math.nan:8.1f} us "
    texts = []
    for name, result in rivals.items():
        if name not in (FLOOR, AUTO):
            eager = "(eager)" if "eager" in result.details["clock"] else ""
            texts.append(f"{name.replace(' ', '-')}{eager} {result.row.number:.3f}")
    others = " ".join(texts)
    if auto is None:
        return f"{start} auto refused | {others}"
    speed = f"{auto.details['TFLOP/s']:.0f} TFLOP/s {auto.details['GB/s']:.0f} GB/s"
    verdict = f" {auto.row.verdict}" if auto.row.goal else ""
    return f"{start} {auto.spread}{verdict} | {others} | {speed} | {auto.details['plan']}"


def _header(report: Report) -> Iterator[str]:
    yield from report.header()
    yield (
        f"columns: time of {FLOOR}, ratio of auto (quartiles) | ratios of the others | speed of "
        "auto | its plan"
    )


def short_table(report: Report, most: int = 8) -> Iterator[str]:
    """The goals, and what is wrong or slower than it has to be."""
    yield from _header(report)
    groups = list(_groups(report))
    for rivals in groups:
        auto = rivals.get(AUTO)
        if auto is not None and (auto.row.goal or auto.row.settings["dropout"]):
            yield _line(rivals)
    against_peft = [r for r in report.results if r.row.measure != RATIO and r.row.goal]
    for case, group in itertools.groupby(against_peft, key=lambda r: r.case):
        texts = (f"{r.row.rival} {r.spread} {r.row.verdict}" for r in group)
        yield f"PEFT's time / ours, {BACKWARD}, {case}: {'; '.join(texts)}"
    yield from at_most(most, list(_detours(groups)))
    yield from at_most(most, list(report.refusals()))
    yield f"{len(report.not_reached)} cases not reached"


def _detours(groups: Sequence[Mapping[str, Result]]) -> Iterator[str]:
    """Where auto does not take the fastest path, worst first."""
    found = []
    for rivals in groups:
        paths = [rivals[path] for path in plans.PATHS if path in rivals]
        if AUTO in rivals and paths:
            auto, best = rivals[AUTO], min(paths, key=lambda result: result.row.number)
            found.append((auto.row.number / best.row.number, best.row.rival, auto))
    for factor, path, auto in sorted(found, key=lambda entry: -entry[0]):
        if factor > _DETOUR:
            yield f"auto takes {factor:.3f} x the time of {path}: {auto.row.case}, {auto.case}"


def long_table(report: Report) -> Iterator[str]:
    """A line for every case and direction."""
    yield from _header(report)
    yield from map(_line, _groups(report))
    yield from report.refusals()
    yield from (f"not reached: {case}" for case in report.not_reached)


def _name(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def profile(device: torch.device) -> None:
    """A forward and backward of each path, for a profiler that begins when it is told to."""
    case = all_cases()[0]
    (inputs,) = make_inputs(case, 1, device)
    rivals = [r for n, r in rivals_of(case, device).items() if n in (FLOOR, *plans.PATHS)]
    for rival in rivals:
        rival.step(inputs)
    torch.cuda.synchronize(device)
    with torch.cuda.profiler.profile():
        for rival in rivals:
            rival.step(inputs)
        torch.cuda.synchronize(device)


def run(
    cases: Sequence[Case], device: torch.device, folder: Path, seconds: float, workers: int
) -> Report:
    """Measure the cases in their order, until the seconds are over; write as it goes."""
    start = time.monotonic()
    calls = warm_up(cases, device, workers)
    print(f"warmed up with {calls} calls in {time.monotonic() - start:.0f} s", flush=True)
    report = Report(environment(device), measure_ceilings(device), FORMULAS)
    for i, case in enumerate(cases):
        if time.monotonic() - start > seconds - _RESERVE_SECONDS:
            report.not_reached = [str(case) for case in cases[i:]]
            break
        try:
            measure(case, device, report, seconds=1.5 if case.goal(FORWARD) else 0.25)
        # Out of memory, say. The rest is to be measured all the same, if it can be.
        except Exception as error:
            report.refuse(str(case), "all", first_line(error), ours=True)
        report.write(folder / f"{NAME}.json")
    report.write(folder / f"{NAME}.json")
    (folder / f"{NAME}.txt").write_text("\n".join(long_table(report)) + "\n")
    return report


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    parser.add_argument("--seconds", type=float, default=270.0, help="budget of the whole run")
    parser.add_argument("--workers", type=int, default=min(12, os.cpu_count() or 1))
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on a CPU")
    parser.add_argument("--profile", action="store_true", help="only make the calls to profile")
    args = parser.parse_args(argv)
    if args.smoke and not INTERPRETED:
        parser.error("--smoke needs TRITON_INTERPRET=1 in the environment")
    if not args.smoke and not torch.cuda.is_available():
        parser.error("no CUDA device; --smoke runs on a CPU")
    device = torch.device("cpu" if args.smoke else "cuda")
    if args.profile:
        profile(device)
        return 0
    if args.smoke:
        torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    cases = smoke_cases() if args.smoke else all_cases()
    report = run(cases, device, args.out, args.seconds, args.workers)
    print("\n".join(short_table(report)))
    return int(report.ours_refused)


if __name__ == "__main__":
    sys.exit(main())

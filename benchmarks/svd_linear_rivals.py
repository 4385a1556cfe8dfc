"""One SVDLinear and its rivals: the frozen layer, PEFT's, the authors', and all of ours.

Whatever can be said of a case without timing anything is here: its inputs, who takes part and how,
whether their results are right, the operations and bytes of the problem, what our kernels launch.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from peft.tuners.adalora.layer import SVDLinear as PeftSVDLinear
from torch import Tensor, nn

import adalora_kernels
import adalora_kernels.peft
from adalora_kernels import ops, reference
from adalora_kernels.kernels import svd_linear as kernels
from adalora_kernels.kernels.launch import Launch, ceil_div, dry_run
from adalora_kernels.kernels.svd_linear import plans
from benchmarks.numerics import check, poisoned_memory
from benchmarks.peft_models import with_adapters
from benchmarks.results import first_line

ALPHA = 16
FLOOR, PEFT, COMPILED, LORALIB = "F.linear", "PEFT", "PEFT compiled", "loralib"
REFERENCE, LAYER, APPLIED, AUTO = "reference.py", "SVDLinear", "peft.apply", "auto"
FORWARD, BACKWARD = "forward", "forward + backward"
FACTORS = ("lora_A", "lora_E", "lora_B")

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
    (384, 384): ("MiniLM-L6", True),
}
GOAL_M, GOAL_R, FEW_ROWS = 8192, 16, 64
# Design, section 6: time / F.linear of "auto", and PEFT's time / that of "auto".
FORWARD_GOALS = dict(zip(GOAL_SHAPES, (1.06, 1.03, 1.05), strict=True))
BACKWARD_GOAL, FEW_ROWS_GOAL = 1.09, 1.10
PEFT_GOALS = {PEFT: 2.0, "PEFT bf16": 1.4, COMPILED: 1.2}
# The same on a CPU, of the layers, forward + backward, by dropout.
CPU_GOAL_SHAPES, CPU_M, CPU_R = ((768, 768), (768, 3072)), 2048, 12
CPU_GOALS = {0.0: 1.12, 0.1: 1.35}
# Of the few entries of dE a single set of inputs says too little about an error.
_LEAST_CHECKED_RANKS = 8

# lora_A, lora_E and lora_B by dtype, and what makes a rival's layers with them.
_Factors: TypeAlias = Mapping[torch.dtype, Sequence[nn.Parameter]]
_Maker: TypeAlias = Callable[[Sequence[nn.Linear], Sequence[_Factors]], Sequence[nn.Module]]


@dataclass(frozen=True)
class Case:
    """One layer at one number of rows.

    Attributes:
        compiled: torch.compile is one of the rivals.
        counted: memory, ops and launches are looked at, too, which takes its time.
        on_gpu: ours are the paths of the Triton kernels by name, over float32 adapters (PEFT's
            default); otherwise our layers, and all adapters have the dtype of x.
        curve: the setting that varies over the cases that this is one of.
    """

    K: int
    N: int
    M: int
    r: int
    dropout: float = 0.0
    compiled: bool = False
    counted: bool = False
    dtype: torch.dtype = torch.bfloat16
    on_gpu: bool = True
    curve: str | None = None

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
    def adapters(self) -> torch.dtype:
        """Of lora_A, lora_E and lora_B, where the name of the rival names no other."""
        return torch.float32 if self.on_gpu else self.dtype

    @property
    def settings(self) -> dict[str, Any]:
        sizes = {"M": self.M, "K": self.K, "N": self.N, "r": self.r, "dropout": self.dropout}
        types = {
            "dtype": str(self.dtype).removeprefix("torch."),
            "adapters": "float32 unless named" if self.on_gpu else "in the same dtype",
        }
        origin = {"bias": self.bias, "model": self.model[0]}
        return {**sizes, **types, **origin, **({"curve": self.curve} if self.curve else {})}

    def __str__(self) -> str:
        text = f"{self.K}x{self.N} M={self.M} r={self.r}"
        if self.dropout:
            text += f" dropout {self.dropout:g}"
        return f"{text} {_short(self.dtype)}, curve over {self.curve}" if self.curve else text

    @property
    def directions(self) -> tuple[str, ...]:
        """On a CPU, where the curves take most of the time, they are of whole steps only."""
        return (BACKWARD,) if self.curve and not self.on_gpu else (FORWARD, BACKWARD)

    @property
    def paths(self) -> list[str]:
        """Those of our kernels that this can take."""
        few = self.M <= plans.ONE_PASS_ROWS and self.r <= plans.ONE_PASS_RANKS
        one_pass = few and self.dtype != torch.float32
        return [path for path in plans.PATHS if one_pass or path != "one_pass"]

    @property
    def rivals(self) -> list[str]:
        if not self.on_gpu:
            compiled = [COMPILED] if self.compiled else []
            return [FLOOR, PEFT, *compiled, LORALIB, REFERENCE, LAYER, APPLIED]
        if self.dropout:
            return [FLOOR, AUTO, PEFT]
        names = [FLOOR, AUTO, *self.paths, PEFT]
        if self.curve is None:
            names += [self.narrow(AUTO), self.narrow(PEFT)]
        return [*names, COMPILED, LORALIB, REFERENCE] if self.compiled else names

    def narrow(self, rival: str) -> str:
        """The name of a rival over adapters in the dtype of x."""
        return f"{rival} {_short(self.dtype)}"

    @property
    def against_peft(self) -> list[tuple[str, str]]:
        """Pairs of one of ours and one of PEFT's that do the same."""
        ours = [AUTO] if self.on_gpu else [LAYER, APPLIED]
        pairs = [(name, peft) for peft in (PEFT, COMPILED) for name in ours]
        pairs.append((self.narrow(AUTO), self.narrow(PEFT)))
        return [pair for pair in pairs if set(pair) <= set(self.rivals)]

    def goal(self, rival: str, direction: str) -> tuple[str, float] | None:
        """What the design asks of one of ours, as a multiple of F.linear."""
        shape = (self.K, self.N)
        if self.curve:
            return None
        if not self.on_gpu:
            sizes = (self.M, self.r) == (CPU_M, CPU_R) and shape in CPU_GOAL_SHAPES
            asked = sizes and rival in (LAYER, APPLIED) and direction == BACKWARD
            return ("<=", CPU_GOALS[self.dropout]) if asked else None
        if rival != AUTO or shape not in GOAL_SHAPES or self.r != GOAL_R or self.dropout:
            return None
        if self.M == GOAL_M:
            return "<=", FORWARD_GOALS[shape] if direction == FORWARD else BACKWARD_GOAL
        if self.M <= FEW_ROWS and direction == FORWARD:
            return "<=", FEW_ROWS_GOAL
        return None

    def peft_goal(self, peft: str, direction: str) -> tuple[str, float] | None:
        """The same, as PEFT's time in multiples of ours."""
        asked = self.on_gpu and self.M == GOAL_M and direction == BACKWARD
        return (">=", PEFT_GOALS[peft]) if asked and self.goal(AUTO, direction) else None


def _short(dtype: torch.dtype) -> str:
    kind = "bf" if dtype == torch.bfloat16 else "fp"
    return f"{kind}{8 * dtype.itemsize}"


class LoralibLinear(nn.Module):
    """The authors' layer, written as theirs is."""

    def __init__(self, linear: nn.Linear, factors: Sequence[nn.Parameter], dropout: float) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_A, self.lora_E, self.lora_B = factors
        ranknum = linear.weight.new_full((1,), float(len(self.lora_A)))
        self.ranknum = nn.Parameter(ranknum, requires_grad=False)
        self.lora_dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.scaling = ALPHA

    def forward(self, x: Tensor) -> Tensor:
        result = F.linear(x, self.weight, self.bias)
        low_rank = self.lora_dropout(x) @ (self.lora_A * self.lora_E).T @ self.lora_B.T
        result += low_rank * self.scaling / (self.ranknum + 1e-5)
        return result


@dataclass(frozen=True)
class Inputs:
    """What one call reads, the same for every rival.

    Attributes:
        x, g: the input, and the gradient of the output.
        linear: the frozen layer, whose weight and bias all layers share.
        factors: lora_A, lora_E and lora_B by dtype, of equal values; all layers share them, too.
        layers: by the name of the rival, of those that are layers.
    """

    x: Tensor
    g: Tensor
    linear: nn.Linear
    factors: _Factors
    layers: Mapping[str, nn.Module]


def make_inputs(case: Case, count: int, device: torch.device) -> list[Inputs]:
    """Random ones."""
    linears = [_frozen_linear(case, device) for _ in range(count)]
    factors = [_factors(case, device) for _ in range(count)]
    makers = _layer_makers(case)
    names = [name for name in makers if name in case.rivals]
    made = {name: makers[name](linears, factors) for name in names}
    new = partial(torch.randn, dtype=case.dtype, device=device)
    return [
        Inputs(
            new(case.M, case.K).requires_grad_(),
            new(case.M, case.N),
            linears[i],
            factors[i],
            {name: layers[i] for name, layers in made.items()},
        )
        for i in range(count)
    ]


def _frozen_linear(case: Case, device: torch.device) -> nn.Linear:
    new = partial(torch.randn, dtype=case.dtype, device=device)
    linear = nn.Linear(case.K, case.N, bias=case.bias, device="meta")
    weight = new(case.N, case.K).div_(math.sqrt(case.K))
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if case.bias:
        linear.bias = nn.Parameter(new(case.N), requires_grad=False)
    return linear


def _factors(case: Case, device: torch.device) -> _Factors:
    shapes = ((case.r, case.K), (case.r, 1), (case.N, case.r))
    values = [torch.empty(s, dtype=case.dtype, device=device).normal_(std=0.1) for s in shapes]
    return {
        dtype: [nn.Parameter(value.to(dtype, copy=True)) for value in values]
        for dtype in (case.adapters, case.dtype)
    }


def _layer_makers(case: Case) -> dict[str, _Maker]:
    """By rival, what makes its layers."""
    return {
        PEFT: partial(_peft_layers, case, case.adapters, False),
        case.narrow(PEFT): partial(_peft_layers, case, case.dtype, False),
        LORALIB: partial(_loralib_layers, case),
        LAYER: partial(_svd_linears, case),
        APPLIED: partial(_peft_layers, case, case.adapters, True),
    }


def _peft_layers(
    case: Case,
    adapters: torch.dtype,
    applied: bool,
    linears: Sequence[nn.Linear],
    factors: Sequence[_Factors],
) -> Sequence[nn.Module]:
    names = [str(i) for i in range(len(linears))]
    options = {"init_r": case.r, "lora_alpha": ALPHA, "lora_dropout": case.dropout}
    model = with_adapters(nn.Sequential(*linears), names, **options)
    if adapters == case.dtype:
        # PEFT's default is float32; this is what `autocast_adapter_dtype=False` gives.
        model.to(adapters)
    layers = list(model.base_model.model)
    for layer, by_dtype in zip(layers, factors, strict=True):
        if type(layer) is not PeftSVDLinear:
            raise TypeError(f"the rival is a {type(layer).__name__}, not PEFT's SVDLinear")
        for name, parameter in zip(FACTORS, by_dtype[adapters], strict=True):
            getattr(layer, name)["default"] = parameter
    if applied:
        adalora_kernels.peft.apply(model)
    return layers


def _loralib_layers(
    case: Case, linears: Sequence[nn.Linear], factors: Sequence[_Factors]
) -> Sequence[nn.Module]:
    # It has no adapters in another dtype than that of the weight.
    return [
        LoralibLinear(linear, by_dtype[case.dtype], case.dropout)
        for linear, by_dtype in zip(linears, factors, strict=True)
    ]


def _svd_linears(
    case: Case, linears: Sequence[nn.Linear], factors: Sequence[_Factors]
) -> Sequence[nn.Module]:
    layers = []
    for linear, by_dtype in zip(linears, factors, strict=True):
        layer = adalora_kernels.SVDLinear.from_linear(linear, case.r, ALPHA, case.dropout)
        for name, parameter in zip(FACTORS, by_dtype[case.dtype], strict=True):
            setattr(layer, name, parameter)
        layers.append(layer)
    return layers


@dataclass(frozen=True)
class Rival:
    """One way to compute y.

    Attributes:
        adapters: the dtype of its factors; None: it is the frozen layer.
        ours: it is held to the rule of design, section 7, with memory poisoned.
        path: by which our kernels are asked for it.
    """

    forward: Callable[[Inputs], Tensor]
    adapters: torch.dtype | None = None
    ours: bool = False
    path: str | None = None

    def step(self, inputs: Inputs) -> list[Tensor]:
        """[y, dx, dA, dE, dB], of the frozen layer [y, dx].

        PEFT's `ranknum`, which happens to be trainable on a GPU, is left out, to PEFT's advantage.
        """
        factors = () if self.adapters is None else inputs.factors[self.adapters]
        return _step(self.forward(inputs), [inputs.x, *factors], inputs.g)

    @property
    def directions(self) -> tuple[str, ...]:
        """one_pass is a path of the forward only."""
        return (FORWARD,) if self.path == "one_pass" else (FORWARD, BACKWARD)

    def call(self, direction: str) -> Callable[[Inputs], object]:
        return self.forward if direction == FORWARD else self.step


def _step(y: Tensor, leaves: Sequence[Tensor], g: Tensor) -> list[Tensor]:
    return [y, *torch.autograd.grad(y, leaves, g)]


def rivals_of(case: Case, device: torch.device) -> dict[str, Rival]:
    """By name, the floor first."""
    wide, narrow = case.adapters, case.dtype
    rivals = {
        FLOOR: Rival(lambda inputs: inputs.linear(inputs.x)),
        PEFT: Rival(partial(_layer, PEFT), wide),
        case.narrow(PEFT): Rival(partial(_layer, case.narrow(PEFT)), narrow),
        LORALIB: Rival(partial(_layer, LORALIB), narrow),
        REFERENCE: Rival(partial(_reference, case), wide, ours=True),
        LAYER: Rival(partial(_layer, LAYER), narrow, ours=True),
        APPLIED: Rival(partial(_layer, APPLIED), wide, ours=True),
    }
    for path in (AUTO, *plans.PATHS):
        rivals[path] = Rival(partial(_kernels, case, path, wide), wide, ours=True, path=path)
    auto = partial(_kernels, case, AUTO, narrow)
    rivals[case.narrow(AUTO)] = Rival(auto, narrow, ours=True, path=AUTO)
    if case.compiled:
        # With the cases for a GPU on a CPU only the code is tried.
        backend = "eager" if case.on_gpu and device.type != "cuda" else "inductor"
        torch.compiler.reset()
        compiled = torch.compile(lambda layer, x: layer(x), backend=backend, dynamic=False)
        rivals[COMPILED] = Rival(lambda inputs: compiled(inputs.layers[PEFT], inputs.x), wide)
    return {name: rivals[name] for name in case.rivals}


def _layer(name: str, inputs: Inputs) -> Tensor:
    y: Tensor = inputs.layers[name](inputs.x)
    return y


def _reference(case: Case, inputs: Inputs) -> Tensor:
    linear, factors = inputs.linear, inputs.factors[case.adapters]
    options = {"bias": linear.bias, "scaling": case.scaling, "dropout_p": case.dropout}
    return adalora_kernels.svd_linear(
        inputs.x, linear.weight, *factors, **options, impl="reference"
    )


def _kernels(case: Case, path: str, adapters: torch.dtype, inputs: Inputs) -> Tensor:
    linear, (A, E, B) = inputs.linear, inputs.factors[adapters]
    seed = ops.dropout_seed(inputs.x) if case.dropout else None
    tensors = (inputs.x, linear.weight, linear.bias, A, E, B, None)
    y: Tensor
    y, _ = torch.ops.adalora.svd_linear(*tensors, case.scaling, case.dropout, seed, path)
    return y


def checked_sets(case: Case) -> int:
    """How many sets of inputs `wrong_ones` has to be given."""
    return max(2 if case.on_gpu else 1, ceil_div(_LEAST_CHECKED_RANKS, case.r))


def wrong_ones(
    case: Case, rivals: Mapping[str, Rival], inputs: Sequence[Inputs]
) -> dict[str, Exception]:
    """Which rivals must not be timed, and why: a wrong result, or none.

    Ours are held to the rule of design, section 7, for y and every gradient, with memory poisoned;
    the others have to be the same function, in which dropout, of which they draw masks of their
    own, is turned off. All sets of inputs are looked at together.
    """
    exact = {
        p: _pooled([_plain(case, one, case.adapters, p, torch.float64) for one in inputs])
        for p in {case.dropout, 0.0}
    }
    eager = {
        adapters: _pooled([_plain(case, one, adapters, case.dropout) for one in inputs])
        for adapters in inputs[0].factors
    }
    wrong: dict[str, Exception] = {}
    for name, rival in rivals.items():
        if rival.adapters is None:
            continue  # The frozen layer, which is another function.
        whats = ("y", "dx", "dA", "dE", "dB") if BACKWARD in rival.directions else ("y",)
        try:
            with poisoned_memory() if rival.ours else _without_dropout(name, inputs):
                actual = _pooled([_seeded(rival, one) for one in inputs])
            # Of an error in float64 an oracle in float64 knows nothing.
            held_to_rule = rival.ours and case.dtype != torch.float64
            bounds = eager[rival.adapters] if held_to_rule else [None] * len(actual)
            expected = exact[case.dropout if rival.ours else 0.0]
            for what, *results in zip(whats, actual, expected, bounds, strict=False):
                check(what, *results)
        # PEFT under torch.compile can raise anything, and no rival is to end the run.
        except Exception as error:
            wrong[name] = error
    return wrong


@contextlib.contextmanager
def _without_dropout(name: str, inputs: Sequence[Inputs]) -> Iterator[None]:
    layers = [one.layers[name] for one in inputs if name in one.layers]
    for layer in layers:
        layer.eval()
    try:
        yield
    finally:
        for layer in layers:
            layer.train()


def _seeded(rival: Rival, inputs: Inputs) -> list[Tensor]:
    torch.manual_seed(1)
    return rival.step(inputs)


def _plain(
    case: Case,
    inputs: Inputs,
    adapters: torch.dtype,
    dropout: float,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """What `Rival.step` has to give, by autograd on the plain formula; in `dtype` if given."""
    seed = None
    if dropout:
        torch.manual_seed(1)
        seed = ops.dropout_seed(inputs.x)
    linear = inputs.linear
    tensors = (linear.weight, linear.bias, inputs.g, inputs.x, *inputs.factors[adapters])
    weight, bias, g, *leaves = (
        None if t is None else t.detach().to(dtype or t.dtype) for t in tensors
    )
    x, A, E, B = (t.requires_grad_() for t in leaves)
    y, _ = reference.svd_linear(x, weight, bias, A, E, B, None, case.scaling, dropout, seed)
    return _step(y, [x, A, E, B], g)


def _pooled(draws: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Each result of all draws as one vector."""
    return [torch.cat([t.detach().flatten() for t in same]) for same in zip(*draws, strict=True)]


def operations(case: Case, direction: str, adapters: torch.dtype | None) -> int:
    """Floating point operations.

    2MKN for y and 2MKN for dx; with an adapter 2Mr(K + N) more for y, and 4Mr(K + N) more for the
    gradients.
    """
    low_rank = 2 * case.M * case.r * (case.K + case.N) if adapters else 0
    product = 2 * case.M * case.K * case.N
    return product + low_rank if direction == FORWARD else 2 * product + 3 * low_rank


def least_bytes(case: Case, direction: str, adapters: torch.dtype | None) -> int:
    """What every implementation has to move.

    x, W, bias, A, E, B and y, and for the backward g, W, A, E, B, x, dx, dA, dE and dB; without an
    adapter g, W and dx.
    """
    size = case.dtype.itemsize
    x, y, weight = case.M * case.K * size, case.M * case.N * size, case.N * case.K * size
    factors = case.r * (case.K + case.N + 1) * adapters.itemsize if adapters else 0
    forward = x + weight + (case.N * size if case.bias else 0) + factors + y
    if direction == FORWARD:
        return forward
    return forward + y + weight + x + (x + 2 * factors if adapters else 0)


def planned(case: Case, rival: Rival, gpu: plans.Device) -> dict[str, list[Launch]]:
    """What one of our paths launches, by direction: forward, and forward and backward."""

    def meta(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    adapters, how = rival.adapters or case.adapters, rival.path or AUTO
    x, y, weight = meta(case.M, case.K), meta(case.M, case.N), meta(case.N, case.K)
    bias = meta(case.N) if case.bias else None
    shapes = ((case.r, case.K), (case.r, 1), (case.N, case.r))
    A, E, B = (meta(*shape, dtype=adapters) for shape in shapes)
    seed = meta(1, dtype=torch.int64) if case.dropout else None
    options = (case.scaling, case.dropout, seed)
    with dry_run() as there:
        _, h = kernels.svd_linear_fwd(x, weight, bias, A, E, B, None, *options, how, gpu)
    with dry_run() as back:
        kernels.svd_linear_bwd(y, x, weight, A, E, B, None, h, *options, True, how, gpu)
    return {FORWARD: there, BACKWARD: [*there, *back]}


def plan_text(launches: Sequence[Launch]) -> str:
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


def one_compile_thread() -> None:
    """To begin a process of a pool with, which is parallel already."""
    # Read by torch when its compiler is imported.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    torch.set_num_threads(1)


def call_once(device: torch.device, case: Case, name: str) -> str | None:
    """Make one call of a rival, so that what it compiles is on disk; returns what went wrong."""
    try:
        rival = rivals_of(case, device)[name]
        (inputs,) = make_inputs(case, 1, device)
        rival.call(rival.directions[-1])(inputs)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    except Exception as error:
        return f"{name}, {case}: {first_line(error)}"
    return None

"""One SVDLinear against the frozen linear layer, which is the floor, and against PEFT's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from peft.tuners.adalora.layer import SVDLinear as PeftSVDLinear
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

import adalora_kernels
import adalora_kernels.peft
from adalora_kernels import ops, reference
from benchmarks.harness import Row, against, check, interleaved
from benchmarks.peft_models import with_adapters

# (M, K, N), and the rounds: small differences take many, large shapes take long.
SHAPES = {(2048, 768, 768): 25, (2048, 768, 3072): 9}
R, ALPHA = 12, 16
# Design, section 6: forward + backward / F.linear, by dropout.
GOALS = {0.0: ("<=", 1.12), 0.1: ("<=", 1.35)}
FACTORS = ("lora_A", "lora_E", "lora_B")
FLOOR, PEFT = "frozen F.linear", "PEFT SVDLinear"
OURS, APPLIED = "adalora_kernels.SVDLinear", "adalora_kernels.peft.apply"


def _layers(linear: nn.Linear, dropout: float) -> dict[str, nn.Module]:
    """The rivals with equal parameters. Each has its own copy of the weight: equally cold."""
    options = {"init_r": R, "lora_alpha": ALPHA, "lora_dropout": dropout}
    theirs = with_adapters(nn.Sequential(copy.deepcopy(linear)), ["0"], **options)
    applied = copy.deepcopy(theirs)
    adalora_kernels.peft.apply(applied)
    layers = {
        PEFT: theirs.base_model.model[0],
        OURS: adalora_kernels.SVDLinear.from_linear(copy.deepcopy(linear), R, ALPHA, dropout),
        APPLIED: applied.base_model.model[0],
    }
    if type(layers[PEFT]) is not PeftSVDLinear:
        raise TypeError(f"the rival is a {type(layers[PEFT]).__name__}, not PEFT's SVDLinear")
    for values in zip(*(map(_factors, layers.values())), strict=True):
        value = torch.randn_like(values[0]) * 0.1
        for parameter in values:
            parameter.data.copy_(value)
    return layers


def _factors(layer: nn.Module) -> list[Tensor]:
    owners = [getattr(layer, factor) for factor in FACTORS]
    return [o if isinstance(o, Tensor) else o["default"] for o in owners]


def _step(forward: Callable[[Tensor], Tensor], inputs: list[Tensor], g: Tensor) -> list[Tensor]:
    """[y, dx, …]: the output for inputs[0], and the gradients of all inputs."""
    y = forward(inputs[0])
    return [y, *torch.autograd.grad(y, inputs, g)]


def _reference(
    x: Tensor, linear: nn.Linear, factors: list[Tensor], g: Tensor, p: float, dtype: torch.dtype
) -> list[Tensor]:
    """What `_step` of an SVDLinear has to give, by autograd on the plain formula, in `dtype`."""
    seed = None
    if p:
        torch.manual_seed(1)
        seed = ops.dropout_seed(x)
    tensors = (linear.weight, linear.bias, g, x, *factors)
    weight, bias, g, *inputs = (t.detach().to(dtype) for t in tensors)
    x, A, E, B = (t.requires_grad_() for t in inputs)

    def forward(x: Tensor) -> Tensor:
        scaling = ALPHA / (R + 1e-5)
        return reference.svd_linear(x, weight, bias, A, E, B, None, scaling, p, seed)[0]

    return _step(forward, [x, A, E, B], g)


def _check(layers: dict[str, nn.Module], linear: nn.Linear, x: Tensor, g: Tensor, p: float) -> None:
    factors = _factors(layers[OURS])
    for name, layer in layers.items():
        # PEFT's dropout draws other masks, so that its layer is checked without.
        dropout = 0.0 if name == PEFT else p
        layer.train(name != PEFT)
        eager, exact = (
            _reference(x, linear, factors, g, dropout, dtype) for dtype in (x.dtype, torch.float64)
        )
        torch.manual_seed(1)
        actual = _step(layer, [x, *_factors(layer)], g)
        layer.train()
        for i, what in enumerate(("y", "dx", *FACTORS)):
            check(f"{name}: {what}", actual[i], exact[i], None if name == PEFT else eager[i])


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("dropout", GOALS, ids="dropout={}".format)
@pytest.mark.parametrize("shape", SHAPES, ids="{0[0]}x{0[1]}x{0[2]}".format)
def bench_svd_linear(
    benchmark: BenchmarkFixture,
    record: list[Row],
    shape: tuple[int, int, int],
    dropout: float,
    backward: bool,
) -> None:
    rows, in_features, out_features = shape
    linear = nn.Linear(in_features, out_features).requires_grad_(False)
    layers = _layers(linear, dropout)
    x = torch.randn(rows, in_features, requires_grad=True)
    g = torch.randn(rows, out_features)
    _check(layers, linear, x, g, dropout)

    def floor(x: Tensor) -> Tensor:
        return F.linear(x, linear.weight, linear.bias)

    rivals: dict[str, Callable[[], object]]
    if backward:
        rivals = {FLOOR: partial(_step, floor, [x], g)}
        rivals |= {
            n: partial(_step, layer, [x, *_factors(layer)], g) for n, layer in layers.items()
        }
    else:
        rivals = {FLOOR: partial(floor, x)}
        rivals |= {name: partial(layer, x) for name, layer in layers.items()}
    timings = against(FLOOR, interleaved(benchmark, rivals, rounds=SHAPES[shape], warmup=2))

    case = f"svd_linear {'forward + backward' if backward else 'forward'}"
    shapes = {"M": rows, "K": in_features, "N": out_features, "r": R}
    settings = {**shapes, "dropout": dropout, "dtype": "float32"}
    for name in layers:
        goal = GOALS[dropout] if backward and name != PEFT else None
        ratio, seconds = timings[name].slower, timings[name].seconds
        record.append(Row(case, settings, name, "time / F.linear", ratio, goal, seconds))

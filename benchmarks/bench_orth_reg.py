"""The orthogonality regulariser of a whole model, forward and backward: PEFT's against ours.

PEFT's is timed through the real `AdaLoraModel.forward`, around a model whose own forward only
returns a loss of 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import peft_models
import torch
from harness import Row, check, interleaved
from peft import PeftModel
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import adalora_kernels
import adalora_kernels.peft
from adalora_kernels import reference

WEIGHT = 0.5
PEFT = "PEFT AdaLoraModel"
# Design, section 6.
GOAL = (">=", 3.0)


def _through_model(model: PeftModel) -> Tensor:
    # Not `model()`: without a task type PeftModel goes past AdaLoraModel, hence the regulariser.
    loss: Tensor = model.base_model().loss
    loss.backward()
    return loss


def _orth_reg(model: PeftModel) -> Tensor:
    loss = adalora_kernels.orth_reg(model, WEIGHT)
    loss.backward()
    return loss


def _orth_reg_grad_(model: PeftModel) -> Tensor:
    return adalora_kernels.orth_reg_grad_(model, WEIGHT)


RIVALS = {
    PEFT: _through_model,
    "adalora_kernels.peft.apply": _through_model,
    "adalora_kernels.orth_reg(model)": _orth_reg,
    "adalora_kernels.orth_reg_grad_(model)": _orth_reg_grad_,
}


def _factors(model: PeftModel) -> list[Tensor]:
    return [p for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n]


def _grads(model: PeftModel) -> list[Tensor]:
    return [p.grad for p in _factors(model) if p.grad is not None]


def _exact(model: PeftModel) -> list[Tensor]:
    """[value, gradients …] in float64."""
    factors = [p.detach().double().requires_grad_() for p in _factors(model)]
    norms, _ = reference.orth_reg(factors[0::2], factors[1::2])
    value = WEIGHT * norms.mean()
    return [value, *torch.autograd.grad(value, factors)]


def _check(models: dict[str, PeftModel]) -> None:
    exact = _exact(models[PEFT])
    eager: Sequence[Tensor | None] = [None] * len(exact)
    for name, model in models.items():
        model.zero_grad()
        value = RIVALS[name](model)
        actual = [value, *_grads(model)]
        for i, (result, wanted, rival) in enumerate(zip(actual, exact, eager, strict=True)):
            check(f"{name}: {f'gradient {i}' if i else 'value'}", result, wanted, rival)
        if name == PEFT:
            eager = actual


def bench_orth_reg(benchmark: BenchmarkFixture, record: list[Row]) -> None:
    models = {name: peft_models.deberta_matrices() for name in RIVALS}
    adalora_kernels.peft.apply(models["adalora_kernels.peft.apply"])
    _check(models)
    # The gradients stay, as those of the loss would be there: every rival adds to them.
    rivals = {name: partial(RIVALS[name], models[name]) for name in RIVALS}
    timings = interleaved(benchmark, rivals, rounds=60, warmup=3)
    row = partial(Row, "orthogonality forward + backward", peft_models.SETTINGS)
    for name, timing in timings.items():
        if name != PEFT:
            record.append(row(name, "PEFT's time / time", timing.faster, GOAL, timing.seconds))

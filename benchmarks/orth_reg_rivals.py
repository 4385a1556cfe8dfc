"""Who competes in the orthogonality regulariser, its value and gradients, and what it has to be.

PEFT's, ours, the authors' formula (loralib) and our definition (reference.py) in plain torch, and
the most that plain torch can do. Every rival adds to gradients that are there already, as those of
the loss would be.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from peft import PeftModel
from torch import Tensor

import adalora_kernels
import adalora_kernels.peft
from adalora_kernels import reference
from benchmarks.allocation_rivals import (
    APPLIED,
    LORALIB,
    PEFT,
    REFERENCE,
    adapters_of,
    parameters_of,
)
from benchmarks.numerics import check, poisoned_memory
from benchmarks.peft_models import ORTH_REG_WEIGHT

ORTH_REG = "orth_reg(adapters)"
GRAD_OF_MODEL, GRAD_OF_ADAPTERS = "orth_reg_grad_(model)", "orth_reg_grad_(adapters)"
BATCHED = "batched by shape"
OURS = (APPLIED, ORTH_REG, GRAD_OF_MODEL, GRAD_OF_ADAPTERS)


@dataclass(frozen=True)
class Orthogonality:
    """A rival: `step` adds the gradients to those of the model and returns the value."""

    model: PeftModel
    step: Callable[[], Tensor]


def peft_orthogonality(model: PeftModel) -> Orthogonality:
    """The real `AdaLoraModel.forward`, around a model that only returns a loss of 0."""
    return Orthogonality(model, partial(_through_model, model))


def applied_orthogonality(model: PeftModel) -> Orthogonality:
    adalora_kernels.peft.apply(model)
    return Orthogonality(model, partial(_through_model, model))


def _through_model(model: PeftModel) -> Tensor:
    # Not `model()`: without a task type PeftModel goes past AdaLoraModel, hence the regulariser.
    loss: Tensor = model.base_model().loss
    loss.backward()
    return loss


def differentiated_orthogonality(model: PeftModel) -> Orthogonality:
    adapters = adapters_of(model)

    def step() -> Tensor:
        loss = adalora_kernels.orth_reg(adapters, ORTH_REG_WEIGHT)
        loss.backward()
        return loss

    return Orthogonality(model, step)


def direct_orthogonality(model: PeftModel, search: bool = False) -> Orthogonality:
    """`search`: given the model, it looks for the adapters in every call."""
    where = model if search else adapters_of(model)
    return Orthogonality(model, partial(adalora_kernels.orth_reg_grad_, where, ORTH_REG_WEIGHT))


def loralib_orthogonality(model: PeftModel) -> Orthogonality:
    """The authors' formula, one factor after the other, differentiated by autograd."""
    adapters = adapters_of(model)

    def step() -> Tensor:
        total = torch.zeros((), device=adapters[0].lora_A.device)
        for adapter in adapters:
            A, _, B = adapter.parameters
            for gram in (A @ A.T, B.T @ B):
                eye = torch.eye(*gram.shape, out=torch.empty_like(gram))
                total = total + torch.linalg.matrix_norm(gram - eye)
        loss = ORTH_REG_WEIGHT / (2 * len(adapters)) * total
        loss.backward()
        return loss

    return Orthogonality(model, step)


def reference_orthogonality(model: PeftModel) -> Orthogonality:
    """The definition of our ops, called directly, the lists made once."""
    parameters = parameters_of(model)
    A, B = parameters[0::3], parameters[2::3]
    grads = [[p.grad for p in factors] for factors in (A, B)]

    @torch.no_grad()
    def step() -> Tensor:
        norms, residuals = reference.orth_reg(A, B)
        grad_norms = torch.full_like(norms, ORTH_REG_WEIGHT / len(norms))
        reference.orth_reg_grad_(grad_norms, norms, residuals, A, B, *grads)
        return ORTH_REG_WEIGHT * norms.mean()

    return Orthogonality(model, step)


def batched_orthogonality(model: PeftModel) -> Orthogonality:
    """Stacks what has the same shape, and has the gradient written out: no autograd."""
    adapters = adapters_of(model)
    by_shape: dict[tuple[bool, torch.Size], list[Tensor]] = {}
    for adapter in adapters:
        for wide, factor in ((True, adapter.lora_A), (False, adapter.lora_B)):
            by_shape.setdefault((wide, factor.shape), []).append(factor)
    r = adapters[0].lora_A.shape[0]
    eye = torch.eye(r, device=adapters[0].lora_A.device)
    scale = ORTH_REG_WEIGHT / (2 * len(adapters))

    @torch.no_grad()
    def step() -> Tensor:
        norms, grads, more = [], [], []
        for (wide, _), factors in by_shape.items():
            stacked = torch.stack(factors)
            rows = stacked if wide else stacked.mT
            residual = torch.baddbmm(eye, rows, rows.mT, beta=-1.0)
            norm = torch.linalg.matrix_norm(residual, keepdim=True)
            norms.append(norm.flatten())
            residual.mul_(torch.where(norm > 0, 2.0 * scale / norm, 0.0))
            grad = torch.bmm(residual, stacked) if wide else torch.bmm(stacked, residual)
            more += grad.unbind()
            grads += [factor.grad for factor in factors]
        torch._foreach_add_(grads, more)
        return scale * torch.cat(norms).sum()

    return Orthogonality(model, step)


MAKE: Mapping[str, Callable[[PeftModel], Orthogonality]] = {
    PEFT: peft_orthogonality,
    APPLIED: applied_orthogonality,
    ORTH_REG: differentiated_orthogonality,
    GRAD_OF_MODEL: partial(direct_orthogonality, search=True),
    GRAD_OF_ADAPTERS: direct_orthogonality,
    BATCHED: batched_orthogonality,
    LORALIB: loralib_orthogonality,
    REFERENCE: reference_orthogonality,
}


def wrong_orthogonality(rivals: Mapping[str, Orthogonality]) -> dict[str, Exception]:
    """Which rivals, PEFT first, are wrong or fail, by the rule of `wrong_importance`."""
    theirs = rivals[PEFT].model
    exact_factors = [p.detach().double().requires_grad_() for p in _factors(theirs)]
    norms, _ = reference.orth_reg(exact_factors[0::2], exact_factors[1::2])
    value = ORTH_REG_WEIGHT * norms.mean()
    exact = [value, *torch.autograd.grad(value, exact_factors)]
    eager: Sequence[Tensor | None] = [None] * len(exact)
    wrong = {}
    for name, rival in rivals.items():
        before = [_grad(p).clone() for p in _factors(rival.model)]
        for parameter in _factors(rival.model):
            _grad(parameter).zero_()
        try:
            with contextlib.nullcontext() if name == PEFT else poisoned_memory():
                value = rival.step()
            actual = [value, *(_grad(p).clone() for p in _factors(rival.model))]
            for i, (result, wanted, theirs_) in enumerate(zip(actual, exact, eager, strict=True)):
                what = f"gradient {i}" if i else "value"
                check(f"{name}: {what}", result, wanted, theirs_ if name in OURS else None)
            if name == PEFT:
                eager = actual
        except Exception as error:
            wrong[name] = error
        for parameter, grad in zip(_factors(rival.model), before, strict=True):
            _grad(parameter).copy_(grad)
    return wrong


def _factors(model: PeftModel) -> list[Tensor]:
    """A_0, B_0, A_1, …"""
    parameters = parameters_of(model)
    return [p for i, p in enumerate(parameters) if i % 3 != 1]


def _grad(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        raise ValueError("a factor without a gradient")
    return parameter.grad

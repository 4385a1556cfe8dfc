"""Who provides the importance update, the allocation and the regulariser of a whole model.

PEFT's, ours, the authors' formulas (the twin of loralib that the tests have), and the most that
plain PyTorch can do for the update. In float64 the authors' formulas are what all are held to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import adalora_kernels
import adalora_kernels.peft
from adalora_kernels import RankAllocator
from benchmarks import adapted_models as models
from benchmarks.adapted_models import ORTH_REG_WEIGHT, adapters_of, parameters_of
from tests.loralib_twin import TwinAllocator, twin_orth

PEFT, APPLIED, LORALIB = "PEFT", "peft.apply", "loralib"
STEP, UPDATE = "RankAllocator.step", "RankAllocator.update"
CAPTURED, FOREACH = "RankAllocator.update, captured", "torch._foreach, no gate"
GRAD_OF_ADAPTERS = "orth_reg_grad_(adapters)"


class Provider(NamedTuple):
    """A way to do the work on one model: a step takes its number, a regulariser nothing.

    `call` is timed; `results` does the work and returns what is to be checked, and puts back what
    it writes.
    """

    call: Callable[..., Any]
    results: Callable[[], Sequence[Tensor]]


def _put_back(tensors: Sequence[Tensor], work: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
    before = [tensor.detach().clone() for tensor in tensors]
    try:
        return work()
    finally:
        with torch.no_grad():
            torch._foreach_copy_(list(tensors), before)


def _triplets(parameters: Sequence[Tensor]) -> nn.ModuleList:
    """Make what the authors' formulas ask for: modules with lora_A, lora_E and lora_B."""
    layers = nn.ModuleList()
    for i, parameter in enumerate(parameters):
        layers.extend([nn.Module()] if i % 3 == 0 else [])
        setattr(layers[-1], ("lora_A", "lora_E", "lora_B")[i % 3], parameter)
    return layers


def _in_double(model: Any, grads: bool) -> list[Tensor]:
    copies: list[Tensor] = []
    for parameter in parameters_of(model):
        copies.append(nn.Parameter(parameter.detach().double()))
        copies[-1].grad = parameter.grad.double() if grads else None
    return copies


def _step(parameters: Sequence[Tensor], call: Any, averages: Any, masks: bool = True) -> Provider:
    """Provide steps: the first number updates the importance, the second one masks, too.

    `averages` are exp_avg_ipt of A_0, E_0, B_0, A_1, …, and then exp_avg_unc of the same.
    """

    def work() -> Sequence[Tensor]:
        call(models.UPDATES)
        call(models.MASKS)
        kept = torch.cat([E.detach().flatten() != 0 for E in parameters[1::3]])
        return [*averages(), *([kept] if masks else [])]

    return Provider(call, partial(_put_back, parameters[1::3], work))


def _peft_step(model: Any) -> Provider:
    allocator, factors = model.base_model.rankallocator, ("lora_A", "lora_E", "lora_B")
    names = [a.name.replace("lora_E", factor) for a in adapters_of(model) for factor in factors]

    def averages() -> list[Tensor]:
        return [state[n] for state in (allocator.exp_avg_ipt, allocator.exp_avg_unc) for n in names]

    return _step(parameters_of(model), model.base_model.update_and_allocate, averages)


def allocator_of(model: Any) -> RankAllocator:
    """Make our allocator, with the budget, the schedule and the betas of PEFT's."""
    options = {"beta1": models.BETA, "beta2": models.BETA, **models.SCHEDULE}
    target_r = model.peft_config["default"].target_r
    return RankAllocator(model.base_model.model, target_r=target_r, **options)


def our_step(model: Any, allocator: Any = None, call: Any = None) -> Provider:
    """Provide steps of our allocator, of one that is made or of one that is there."""
    allocator = allocator or allocator_of(model)

    def averages() -> list[Tensor]:
        state = allocator.state_dict()
        return [*state["exp_avg_ipt"], *state["exp_avg_unc"]]

    return _step(parameters_of(model), call or allocator.step, averages)


def _applied_step(model: Any) -> Provider:
    allocator = adalora_kernels.peft.apply(model).allocator
    return our_step(model, allocator, model.base_model.update_and_allocate)


def _captured_step(model: Any) -> Provider:
    """What is left of `allocator.step` where the step is part of a CUDA graph.

    The graph is captured here; what that changes is put back. On a CPU there is none.
    """
    allocator = allocator_of(model)
    replay: Callable[[], object] = allocator.update
    if allocator.adapters[0].lora_E.is_cuda:
        before, graph = allocator.state_dict(), torch.cuda.CUDAGraph()
        allocator.advance(models.UPDATES)
        allocator.update()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            allocator.update()
        allocator.load_state_dict(before)
        replay = graph.replay
    return our_step(model, allocator, lambda step: (allocator.advance(step), replay()))


def authors_step(model: Any, parameters: Sequence[Tensor]) -> Provider:
    """The authors' loops, over the parameters of a model or over copies of them."""
    s, target_r = models.SCHEDULE, model.peft_config["default"].target_r
    times = (s["tinit"], s["tfinal"], s["deltaT"], models.BETA, models.BETA, s["total_step"])
    allocator = TwinAllocator(_triplets(parameters), target_r, *times)

    def averages() -> list[Tensor]:
        return [allocator.state[p][which] for which in (0, 1) for p in parameters]

    return _step(parameters, allocator.update_and_mask, averages)


def _foreach_step(model: Any) -> Provider:
    """The update in `torch._foreach_*` over all parameters, without scores or a look for NaN."""
    parameters = parameters_of(model)
    averages = [torch.zeros_like(p) for p in parameters * 2]
    exp_avg_ipt, exp_avg_unc = averages[: len(parameters)], averages[len(parameters) :]

    @torch.no_grad()
    def call(step: int) -> None:
        ipt = torch._foreach_mul(parameters, [p.grad for p in parameters])
        torch._foreach_abs_(ipt)
        torch._foreach_lerp_(exp_avg_ipt, ipt, 1.0 - models.BETA)
        torch._foreach_sub_(ipt, exp_avg_ipt)
        torch._foreach_abs_(ipt)
        torch._foreach_lerp_(exp_avg_unc, ipt, 1.0 - models.BETA)

    return _step(parameters, call, lambda: averages, masks=False)


def regulariser(model: Any, call: Callable[[], Tensor]) -> Provider:
    """Provide the value, and gradients that are added to those that are there already."""
    grads = [p.grad for i, p in enumerate(parameters_of(model)) if i % 3 != 1]

    def work() -> Sequence[Tensor]:
        torch._foreach_zero_(grads)
        return [call(), *(grad.clone() for grad in grads)]

    return Provider(call, partial(_put_back, grads, work))


def _backward(loss_of: Callable[[], Tensor]) -> Tensor:
    loss = loss_of()
    loss.backward()
    return loss


def _through_model(model: Any, applied: bool) -> Provider:
    """The real `AdaLoraModel.forward`, around a model that only returns a loss of 0."""
    if applied:
        adalora_kernels.peft.apply(model)
    # Not `model()`: without a task type PeftModel goes past AdaLoraModel, hence the regulariser.
    return regulariser(model, partial(_backward, lambda: model.base_model().loss))


def _our_regulariser(model: Any, search: bool = False, graph: bool = False) -> Provider:
    """With `search` it looks for the adapters in every call; with `graph` it is differentiated."""
    where = model if search else adapters_of(model)
    penalty = partial(adalora_kernels.orth_reg, where, ORTH_REG_WEIGHT)
    direct = partial(adalora_kernels.orth_reg_grad_, where, ORTH_REG_WEIGHT)
    return regulariser(model, partial(_backward, penalty) if graph else direct)


def _authors_penalty(parameters: Sequence[Tensor]) -> Callable[[], Tensor]:
    """The authors' formula, differentiated by autograd."""
    triplets = _triplets(parameters)

    def call() -> Tensor:
        with parameters[0].device:
            return _backward(partial(twin_orth, triplets, ORTH_REG_WEIGHT))

    return call


STEPS: dict[str, Callable[[Any], Provider]] = {
    PEFT: _peft_step,
    APPLIED: _applied_step,
    STEP: our_step,
    UPDATE: our_step,
    CAPTURED: _captured_step,
    FOREACH: _foreach_step,
    LORALIB: lambda model: authors_step(model, parameters_of(model)),
}
REGULARISERS: dict[str, Callable[[Any], Provider]] = {
    PEFT: partial(_through_model, applied=False),
    APPLIED: partial(_through_model, applied=True),
    "orth_reg(adapters)": partial(_our_regulariser, graph=True),
    "orth_reg_grad_(model)": partial(_our_regulariser, search=True),
    GRAD_OF_ADAPTERS: _our_regulariser,
    LORALIB: lambda model: regulariser(model, _authors_penalty(parameters_of(model))),
}


def exact_step(model: Any) -> Sequence[Tensor]:
    """What an update and a masking step have to give, in float64."""
    return authors_step(model, _in_double(model, grads=True)).results()


def exact_regulariser(model: Any) -> Sequence[Tensor]:
    """The value and the gradients of lora_A and lora_B that a regulariser has to give."""
    copies = _in_double(model, grads=False)
    value = _authors_penalty(copies)()
    return [value, *(copy.grad for copy in copies if copy.grad is not None)]

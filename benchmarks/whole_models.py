"""Models with PEFT's adapters on every matrix, and who does the work on all of them.

A model is what its adapters need of it. The importance update, the allocation and the regulariser
are PEFT's and ours, and the most that plain PyTorch can do for the update. In float64 the authors'
formulas, the twin of loralib that the tests have, are what all are held to.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import adalora_kernels
import adalora_kernels.peft
from adalora_kernels import RankAllocator
from adalora_kernels.adapters import Adapter, find_adapters
from tests.loralib_twin import TwinAllocator, twin_orth

PEFT, APPLIED = "PEFT", "peft.apply"
STEP, UPDATE = "RankAllocator.step", "RankAllocator.update"
FOREACH, GRAD_OF_ADAPTERS = "torch._foreach, no gate", "orth_reg_grad_(adapters)"
SCHEDULE = {"total_step": 100, "tinit": 10, "tfinal": 20, "deltaT": 1}
TARGET_R, BETA, ORTH_REG_WEIGHT = 8, 0.85, 0.5
# With that schedule: a step that only updates the importance, and one that masks, too.
UPDATES, MASKS = 5, 50


@dataclass(frozen=True, eq=False)
class Architecture:
    """A model as far as its adapters need it: the matrices of one layer, as (out, in).

    `curve` is set for one point of a curve: the key of its settings that varies.
    """

    name: str
    layers: int
    shapes: Mapping[str, tuple[int, int]]
    r: int
    curve: str | None = None

    @property
    def settings(self) -> dict[str, Any]:
        sizes = {"matrices": self.layers * len(self.shapes), "r": self.r, "dtype": "float32"}
        return {"model": self.name, **sizes, "shapes": dict(self.shapes)}

    @property
    def entries(self) -> int:
        """How many entries all lora_A, lora_E and lora_B have."""
        return self.layers * sum(self.r * (i + o + 1) for o, i in self.shapes.values())


def _square(count: int, side: int, r: int, curve: str) -> Architecture:
    return Architecture(f"{side}x{side}", count, {"matrix": (side, side)}, r, curve)


# The six matrices that the paper adapts.
_ATTENTION = dict.fromkeys(("query", "key", "value", "attention_output"), (768, 768))
DEBERTA_BASE = Architecture(
    "DeBERTa-base", 12, {**_ATTENTION, "intermediate": (3072, 768), "output": (768, 3072)}, r=12
)
_LLAMA = {
    **dict.fromkeys(("q", "o"), (4096, 4096)),
    **dict.fromkeys(("k", "v"), (1024, 4096)),
    **dict.fromkeys(("gate", "up"), (14336, 4096)),
    "down": (4096, 14336),
}
LLAMA_8B = Architecture("Llama-8B", 32, _LLAMA, r=16)
# As many adapters as Llama-8B has, with next to no entries: what is left is the host's work, which
# is what an eager step costs where a GPU does the rest.
HOST_ALONE = Architecture("224 matrices of 4x4", 32, dict.fromkeys(_LLAMA, (4, 4)), r=16)
CURVES = (
    *(_square(count, 256, 12, "matrices") for count in (1, 10, 100, 1000)),
    *(_square(24, 768, r, "r") for r in (1, 4, 16, 64, 256)),
)
# Only to try the code that is meant for the others.
SMOKE = (
    Architecture("tiny", 2, {"wide": (48, 32), "tall": (32, 64)}, r=12),
    *(_square(count, 16, 4, "matrices") for count in (1, 3)),
)


class _Matrices(nn.Module):
    """All adapted matrices, whose weights take no memory, with a forward that only has a loss."""

    def __init__(self, architecture: Architecture, device: torch.device) -> None:
        super().__init__()
        self.zero = torch.zeros((), device=device)
        self.layers = nn.ModuleList(nn.ModuleDict() for _ in range(architecture.layers))
        for layer, (name, shape) in itertools.product(self.layers, architecture.shapes.items()):
            layer[name] = nn.Linear(*shape[::-1], bias=False, device="meta")
            layer[name].weight = nn.Parameter(self.zero.expand(shape), False)

    def forward(self) -> SimpleNamespace:
        return SimpleNamespace(loss=self.zero.clone())


def with_adapters(model: nn.Module, target_modules: list[str], **options: Any) -> PeftModel:
    """Call `get_peft_model` for AdaLoRA."""
    options = {"target_r": TARGET_R, **SCHEDULE, **options}
    return get_peft_model(model, AdaLoraConfig(target_modules=target_modules, **options))


def adapted_model(architecture: Architecture, device: torch.device) -> PeftModel:
    """Put an adapter on every matrix, with random factors and gradients, equal in every call."""
    # What is so small that PEFT's default would prune nothing, PEFT can't prune.
    options: Any = {"init_r": architecture.r, "target_r": min(TARGET_R, architecture.r - 1)}
    # Not initialized: that follows.
    options |= {"orth_reg_weight": ORTH_REG_WEIGHT, "init_lora_weights": False}
    matrices = _Matrices(architecture, device)
    model = with_adapters(matrices, list(architecture.shapes), **options)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in parameters_of(model):
        nn.init.normal_(parameter, std=0.02, generator=generator)
        parameter.grad = torch.empty_like(parameter).normal_(std=1e-3, generator=generator)
    return model


def adapters_of(model: PeftModel) -> list[Adapter]:
    """Find the adapters, named as in PEFT's allocator."""
    return find_adapters(model.base_model.model)


def parameters_of(model: PeftModel) -> list[Tensor]:
    """List A_0, E_0, B_0, A_1, …; PEFT's `ranknum`, trainable on a GPU, is none of them."""
    return [p for adapter in adapters_of(model) for p in adapter.parameters]


class Provider(NamedTuple):
    """A way to do the work on one model: a step takes its number, a regulariser nothing.

    `call` is timed. `results` does the work and returns what is checked; it writes `written`.
    """

    call: Callable[..., Any]
    results: Callable[[], Sequence[Tensor]]
    written: Sequence[Tensor]


def _as_modules(parameters: Sequence[Tensor]) -> nn.ModuleList:
    """Make what the authors' formulas ask for: modules with lora_A, lora_E and lora_B."""
    triplets = zip(parameters[::3], parameters[1::3], parameters[2::3], strict=True)
    names = ("lora_A", "lora_E", "lora_B")
    return nn.ModuleList(nn.ParameterDict(zip(names, each, strict=True)) for each in triplets)


def _in_double(model: Any) -> list[Tensor]:
    copies: list[Tensor] = []
    for parameter in parameters_of(model):
        copies.append(nn.Parameter(parameter.detach().double()))
        copies[-1].grad = parameter.grad.double()
    return copies


def _step(parameters: Sequence[Tensor], call: Any, averages: Any, masks: bool = True) -> Provider:
    """Provide steps: the first number updates the importance, the second one masks, too.

    `averages` are exp_avg_ipt of A_0, E_0, B_0, A_1, …, and then exp_avg_unc of the same.
    """

    def results() -> Sequence[Tensor]:
        call(UPDATES)
        call(MASKS)
        kept = torch.cat([E.detach().flatten() != 0 for E in parameters[1::3]])
        return [*averages(), *([kept] if masks else [])]

    return Provider(call, results, parameters[1::3])


def _peft_step(model: Any) -> Provider:
    allocator, factors = model.base_model.rankallocator, ("lora_A", "lora_E", "lora_B")
    names = [a.name.replace("lora_E", factor) for a in adapters_of(model) for factor in factors]
    both = (allocator.exp_avg_ipt, allocator.exp_avg_unc)
    call = model.base_model.update_and_allocate
    return _step(parameters_of(model), call, lambda: [avg[name] for avg in both for name in names])


def allocator_of(model: Any) -> RankAllocator:
    """Make our allocator, with the budget, the schedule and the betas of PEFT's."""
    options = {"beta1": BETA, "beta2": BETA, **SCHEDULE}
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


def _foreach_step(model: Any) -> Provider:
    """The update in `torch._foreach_*` over all parameters, without scores or a look for NaN."""
    parameters = parameters_of(model)
    exp_avg_ipt, exp_avg_unc = ([torch.zeros_like(p) for p in parameters] for _ in range(2))

    @torch.no_grad()
    def call(step: int) -> None:
        ipt = torch._foreach_mul(parameters, [p.grad for p in parameters])
        torch._foreach_abs_(ipt)
        torch._foreach_lerp_(exp_avg_ipt, ipt, 1.0 - BETA)
        torch._foreach_sub_(ipt, exp_avg_ipt)
        torch._foreach_abs_(ipt)
        torch._foreach_lerp_(exp_avg_unc, ipt, 1.0 - BETA)

    return _step(parameters, call, lambda: exp_avg_ipt + exp_avg_unc, masks=False)


def regulariser(model: Any, call: Callable[[], Tensor]) -> Provider:
    """Provide the value, and gradients that are added to those that are there already."""
    grads = [p.grad for i, p in enumerate(parameters_of(model)) if i % 3 != 1]

    def results() -> Sequence[Tensor]:
        torch._foreach_zero_(grads)
        return [call(), *(grad.clone() for grad in grads)]

    return Provider(call, results, grads)


def _differentiated(model: Any, loss_of: Callable[[], Tensor]) -> Provider:
    def call() -> Tensor:
        loss = loss_of()
        loss.backward()
        return loss

    return regulariser(model, call)


def _through_model(model: Any) -> Provider:
    # Not `model()`: without a task type PeftModel goes past AdaLoraModel, hence the regulariser.
    return _differentiated(model, lambda: model.base_model().loss)


def _applied(model: Any) -> Provider:
    adalora_kernels.peft.apply(model)
    return _through_model(model)


def _penalty(model: Any) -> Provider:
    where = adapters_of(model)
    return _differentiated(model, lambda: adalora_kernels.orth_reg(where, ORTH_REG_WEIGHT))


def _direct(model: Any) -> Provider:
    where = adapters_of(model)
    return regulariser(model, lambda: adalora_kernels.orth_reg_grad_(where, ORTH_REG_WEIGHT))


STEPS: dict[str, Callable[[Any], Provider]] = {
    PEFT: _peft_step,
    APPLIED: _applied_step,
    STEP: our_step,
    UPDATE: our_step,
    FOREACH: _foreach_step,
}
REGULARISERS: dict[str, Callable[[Any], Provider]] = {
    PEFT: _through_model,
    APPLIED: _applied,
    "orth_reg(adapters)": _penalty,
    GRAD_OF_ADAPTERS: _direct,
}


def exact_step(model: Any) -> Sequence[Tensor]:
    """What an update and a masking step have to give, by the authors' loops, in float64."""
    parameters, s = _in_double(model), SCHEDULE
    times = (s["tinit"], s["tfinal"], s["deltaT"], BETA, BETA, s["total_step"])
    twin = TwinAllocator(_as_modules(parameters), model.peft_config["default"].target_r, *times)
    twin.update_and_mask(UPDATES)
    twin.update_and_mask(MASKS)
    kept = torch.cat([E.detach().flatten() != 0 for E in parameters[1::3]])
    return [*(twin.state[p][i] for i in (0, 1) for p in parameters), kept]


def exact_regulariser(model: Any) -> Sequence[Tensor]:
    """The value and the gradients of lora_A and lora_B that a regulariser has to give."""
    copies = _in_double(model)
    with copies[0].device:
        value = twin_orth(_as_modules(copies), ORTH_REG_WEIGHT)
    factors = [copy for i, copy in enumerate(copies) if i % 3 != 1]
    return [value, *torch.autograd.grad(value, factors)]

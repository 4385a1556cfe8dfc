"""Models with PEFT's adapters on every matrix, as far as the adapters need a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from adalora_kernels.adapters import Adapter, find_adapters

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
        for _ in range(architecture.layers):
            layer = nn.ModuleDict()
            for name, (rows, columns) in architecture.shapes.items():
                layer[name] = nn.Linear(columns, rows, bias=False, device="meta")
                layer[name].weight = nn.Parameter(self.zero.expand(rows, columns), False)
            self.add_module(f"layer_{len(self._modules)}", layer)

    def forward(self) -> SimpleNamespace:
        return SimpleNamespace(loss=self.zero.clone())


def with_adapters(model: nn.Module, target_modules: list[str], **options: Any) -> PeftModel:
    """Call `get_peft_model` for AdaLoRA."""
    options = {"target_r": TARGET_R, **SCHEDULE, **options}
    return get_peft_model(model, AdaLoraConfig(target_modules=target_modules, **options))


def adapted_model(architecture: Architecture, device: torch.device) -> PeftModel:
    """Put an adapter on every matrix, with random factors and gradients, equal in every call."""
    # What is so small that PEFT's default would prune nothing, PEFT can't prune.
    ranks = {"init_r": architecture.r, "target_r": min(TARGET_R, architecture.r - 1)}
    # Not initialized: that follows.
    options = {"orth_reg_weight": ORTH_REG_WEIGHT, "init_lora_weights": False}
    matrices = _Matrices(architecture, device)
    model = with_adapters(matrices, list(architecture.shapes), **ranks, **options)
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

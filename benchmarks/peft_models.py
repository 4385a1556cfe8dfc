"""The models that the benches put PEFT's adapters on, the same for every rival."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

SCHEDULE = {"total_step": 100, "tinit": 10, "tfinal": 20, "deltaT": 1}
TARGET_R = 8
ORTH_REG_WEIGHT = 0.5
# With that schedule: a step that only updates the importance, and one that masks, too.
UPDATES, MASKS = 5, 50


@dataclass(frozen=True)
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
        """For the rows of a report. Along a curve all but one of them are equal."""
        sizes = {"matrices": self.matrices, "r": self.r, "dtype": "float32"}
        if self.curve is not None:
            ((rows, columns),) = self.shapes.values()
            return {"shape": f"{rows}x{columns}", **sizes, "curve": self.curve}
        of_a_layer = {"layers": self.layers, "shapes": dict(self.shapes)}
        return {"model": self.name, **of_a_layer, **sizes, "entries": self.entries}

    @property
    def matrices(self) -> int:
        """How many are adapted."""
        return self.layers * len(self.shapes)

    @property
    def entries(self) -> int:
        """Of all lora_A, lora_E and lora_B."""
        return self.layers * sum(self.r * (i + o + 1) for o, i in self.shapes.values())

    @property
    def target_r(self) -> int:
        """PEFT's default, but for what is so small that nothing would be pruned: PEFT can't."""
        return min(TARGET_R, self.r - 1)


def equal_matrices(count: int, side: int, r: int, curve: str) -> Architecture:
    """A point of a curve: square matrices, each with an adapter of rank r."""
    name = f"{count} of {side}x{side}, r={r}"
    return Architecture(name, layers=count, shapes={"matrix": (side, side)}, r=r, curve=curve)


# The six matrices that the paper adapts.
DEBERTA_BASE = Architecture(
    "DeBERTa-base",
    layers=12,
    shapes={
        "query": (768, 768),
        "key": (768, 768),
        "value": (768, 768),
        "attention_output": (768, 768),
        "intermediate": (3072, 768),
        "output": (768, 3072),
    },
    r=12,
)
LLAMA_8B = Architecture(
    "Llama-8B",
    layers=32,
    shapes={
        "q": (4096, 4096),
        "k": (1024, 4096),
        "v": (1024, 4096),
        "o": (4096, 4096),
        "gate": (14336, 4096),
        "up": (14336, 4096),
        "down": (4096, 14336),
    },
    r=16,
)
# As many adapters as Llama-8B has, with next to no entries: what is left is the host's work, which
# is what an eager step costs where a GPU does the rest.
HOST_ALONE = Architecture(
    "224 matrices of 4x4", layers=32, shapes=dict.fromkeys(LLAMA_8B.shapes, (4, 4)), r=16
)
CURVES = (
    *(equal_matrices(count, 256, 12, "matrices") for count in (1, 10, 100, 1000)),
    *(equal_matrices(24, 768, r, "r") for r in (1, 4, 16, 64, 256)),
)


# Only to try the code that is meant for the others.
SMOKE = (
    Architecture("tiny", layers=2, shapes={"wide": (48, 32), "tall": (32, 64)}, r=12),
    *(equal_matrices(count, 16, 4, "matrices") for count in (1, 3)),
)


class _Matrices(nn.Module):
    """All adapted matrices; a forward that costs nothing and has a loss."""

    def __init__(self, architecture: Architecture, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {name: _hollow(*shape, device) for name, shape in architecture.shapes.items()}
            )
            for _ in range(architecture.layers)
        )

    def forward(self) -> SimpleNamespace:
        return SimpleNamespace(loss=torch.zeros((), device=self._device))


def _hollow(out_features: int, in_features: int, device: torch.device) -> nn.Linear:
    """A linear layer whose weight takes no memory: these benches only use the adapters."""
    linear = nn.Linear(in_features, out_features, bias=False, device="meta")
    weight = torch.zeros((), device=device).expand(out_features, in_features)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def adapted_model(architecture: Architecture, device: torch.device | None = None) -> PeftModel:
    """An adapter on every matrix, with random factors and gradients, equal in every call."""
    device = device or torch.device("cpu")
    matrices = _Matrices(architecture, device)
    ranks = {"init_r": architecture.r, "target_r": architecture.target_r}
    # Not initialized: that follows.
    options = {"orth_reg_weight": ORTH_REG_WEIGHT, "init_lora_weights": False}
    model = with_adapters(matrices, list(architecture.shapes), **ranks, **options)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in trained(model):
        nn.init.normal_(parameter, std=0.02, generator=generator)
        parameter.grad = torch.empty_like(parameter).normal_(std=1e-3, generator=generator)
    return model


def trained(model: PeftModel) -> list[Tensor]:
    """Every lora_A, lora_E and lora_B; PEFT's `ranknum`, trainable on a GPU, is none of them."""
    return [p for name, p in model.named_parameters() if ".lora_" in name]


def with_adapters(model: nn.Module, target_modules: list[str], **options: Any) -> PeftModel:
    """`get_peft_model` for AdaLoRA."""
    options = {"target_r": TARGET_R, **SCHEDULE, **options}
    config = AdaLoraConfig(target_modules=target_modules, **options)
    return get_peft_model(model, config)

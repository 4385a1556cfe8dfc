"""The models that the benches put PEFT's adapters on, the same for every rival."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from torch import nn

# DeBERTa-base: the matrices of one of its 12 layers that the paper adapts, as (out, in).
MATRICES = {
    "query": (768, 768),
    "key": (768, 768),
    "value": (768, 768),
    "attention_output": (768, 768),
    "intermediate": (3072, 768),
    "output": (768, 3072),
}
SETTINGS: dict[str, Any] = {
    "model": "DeBERTa-base",
    "layers": 12,
    "matrices": MATRICES,
    "r": 12,
    "dtype": "float32",
}


class _Matrices(nn.Module):
    """All adapted matrices; a forward that costs nothing and has a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: _hollow(*shape) for name, shape in MATRICES.items()})
            for _ in range(12)
        )

    def forward(self) -> SimpleNamespace:
        return SimpleNamespace(loss=torch.zeros(()))


def _hollow(out_features: int, in_features: int) -> nn.Linear:
    """A linear layer whose weight takes no memory: these benches only use the adapters."""
    linear = nn.Linear(in_features, out_features, bias=False, device="meta")
    weight = torch.zeros(()).expand(out_features, in_features)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def deberta_matrices() -> PeftModel:
    """72 adapters with random factors and gradients, equal in every call.

    Steps up to 10 only update the importance; from 11 to 79 every step masks (deltaT = 1).
    """
    model = with_adapters(_Matrices(), list(MATRICES), init_r=12, orth_reg_weight=0.5)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.02, generator=generator)
            parameter.grad = 1e-3 * torch.randn(parameter.shape, generator=generator)
    return model


def with_adapters(model: nn.Module, target_modules: list[str], **options: Any) -> PeftModel:
    """`get_peft_model` for AdaLoRA."""
    schedule = {"total_step": 100, "tinit": 10, "tfinal": 20, "deltaT": 1}
    config = AdaLoraConfig(target_modules=target_modules, target_r=8, **schedule, **options)
    return get_peft_model(model, config)

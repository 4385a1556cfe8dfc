"""Fused kernels for AdaLoRA fine-tuning (Zhang et al., ICLR 2023, arXiv 2303.10512).

`SVDLinear`, `RankAllocator` and the functional ops work on any device. The integrations are
submodules, imported when they are first used: `adalora_kernels.peft`, `adalora_kernels.trainer`,
`adalora_kernels.lightning`, `adalora_kernels.export`, `adalora_kernels.loralib`,
`adalora_kernels.plot`.
"""

import importlib
from typing import Any

from .allocator import BudgetSchedule, RankAllocator
from .functional import orth_reg, orth_reg_grad_, svd_delta, svd_linear
from .modules import SVDLinear, lora_state_dict, mark_only_lora_as_trainable

__version__ = "0.2.0"

__all__ = [
    "BudgetSchedule",
    "RankAllocator",
    "SVDLinear",
    "__version__",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "orth_reg",
    "orth_reg_grad_",
    "svd_delta",
    "svd_linear",
]


def __getattr__(name: str) -> Any:
    if name in ("export", "lightning", "loralib", "peft", "plot", "trainer"):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

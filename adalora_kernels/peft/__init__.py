"""Makes the AdaLoRA layers, allocator and regulariser of PEFT models ours, in place.

A swapped object keeps its identity and everything in it; only its class becomes a subclass of the
PEFT class it had. Hence `isinstance`, names, `state_dict`, hooks, copies and pickles all work.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from peft import PeftModel
from peft.tuners.adalora import AdaLoraModel
from torch import nn

from ..allocator import RankAllocator
from .allocator import PeftRankAllocator
from .config import allocator_in
from .layers import FusedLayer, adalora_layers, swap_forward
from .model import AdaptedModel, refuse_final_ranks, take_over

__all__ = [
    "ApplyReport",
    "PeftRankAllocator",
    "allocator_of",
    "apply",
    "disable",
    "enable",
    "is_adalora",
]


@dataclasses.dataclass
class ApplyReport:
    """What `apply` did.

    Attributes:
        swapped: names of the layers that now run our forward.
        left: names of the AdaLoRA layers that keep PEFT's forward, each with the reason. They
            take part in the allocation all the same.
        allocator: the allocator that `update_and_allocate` steps; None for an inference adapter.
        notes: what the training loop has to know.
    """

    swapped: list[str] = dataclasses.field(default_factory=list)
    left: dict[str, str] = dataclasses.field(default_factory=dict)
    allocator: RankAllocator | None = None
    notes: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"adalora_kernels: {len(self.swapped)} AdaLoRA layers swapped"]
        if self.allocator is None:
            lines.append("no trainable adapter: nothing to allocate")
        else:
            schedule = self.allocator.schedule
            lines.append(
                f"budget {schedule.init_budget} -> {schedule.target_budget} triplets "
                f"over {len(self.allocator.adapters)} matrices"
            )
        lines += [f"left to PEFT: {name} ({reason})" for name, reason in self.left.items()]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def apply(peft_model: nn.Module) -> ApplyReport:
    """Swap an AdaLoRA model's forward, allocator and regulariser for ours, in place.

    Parameters, their names, the `state_dict`, hooks and the training loop stay as they are.
    Somebody has to step the allocator, which starts from the averages of PEFT's if that has
    already run: `trainer.AdaLoraCallback` in a Trainer, `report.allocator.attach(optimizer)`, or
    `model.base_model.update_and_allocate(step)` as in PEFT. With the last, `model(...).loss` holds
    the regulariser in training mode; with the others it goes into the gradients. Applying twice
    changes nothing.

    Args:
        peft_model: what `get_peft_model(model, AdaLoraConfig(...))` returns, mixed or not; its
            `base_model`; or any module in which PEFT has put AdaLoRA layers
            (`inject_adapter_in_model`, `model.add_adapter`), which then gets the
            `update_and_allocate` that PEFT does not give it.

    Returns:
        An `ApplyReport`.

    Raises:
        TypeError: not a model with AdaLoRA adapters of PEFT.
        ValueError: no AdaLoRA layer in it, several trainable AdaLoRA adapters, or as
            `RankAllocator`. Nothing has been changed then.
    """
    adapted = AdaptedModel.find_in(peft_model)
    if adapted is None:
        inside = getattr(peft_model, "base_model", None)
        raise TypeError(
            "peft_model must be a model with an AdaLoraConfig, got "
            f"{type(peft_model).__name__}"
            + (f" over {type(inside).__name__}" if isinstance(inside, nn.Module) else "")
        )
    if not adalora_layers(adapted.root):
        raise ValueError("peft_model has no AdaLoRA layer")
    refuse_final_ranks(adapted)
    report = ApplyReport(allocator=take_over(adapted))
    for name, layer in adalora_layers(adapted.root).items():
        if isinstance(layer, FusedLayer):
            report.swapped.append(name)
        else:
            report.left[name] = f"{type(layer).__name__} keeps PEFT's forward; it is allocated"
    if report.allocator is not None and type(peft_model) is PeftModel:
        report.notes.append(
            "without a task_type PEFT's model(...) bypasses the regulariser in the loss: call "
            "allocator.attach(optimizer), or model.base_model(...), or add orth_reg(model, weight)"
        )
    return report


def is_adalora(model: nn.Module) -> bool:
    """Whether `model` is one that `apply` takes."""
    return AdaptedModel.find_in(model) is not None


def allocator_of(model: nn.Module) -> RankAllocator | None:
    """The allocator that `apply`, or PEFT after `enable`, gave to `model`; None if there is none.

    Args:
        model: as in `apply`, or anything around such a model.
    """
    adapted = AdaptedModel.find_in(model)
    if adapted is None:
        return None
    return next(filter(None, map(allocator_in, adapted.configs.values())), None)


# The attributes of PEFT's AdaLoraModel that enable() replaces, as they were.
_originals: dict[str, Any] = {}


def enable() -> None:
    """Make every AdaLoRA model ours that PEFT creates from now on, as by `apply`.

    That is: by `get_peft_model`, `PeftModel.from_pretrained`, `inject_adapter_in_model`,
    `model.add_adapter`, or `AdaLoraModel` itself. In mixed models the layers are; `apply` gives
    them an allocator, which PEFT has none of. Without effect if called twice.
    """
    if _originals:
        return
    for name in ("__init__", "_create_new_module"):
        _originals[name] = AdaLoraModel.__dict__[name]
    make_model = AdaLoraModel.__init__
    make_layer = AdaLoraModel._create_new_module

    @functools.wraps(make_model)
    def __init__(self: AdaLoraModel, *args: Any, **kwargs: Any) -> None:
        make_model(self, *args, **kwargs)
        take_over(AdaptedModel(self.model, self.peft_config, self))

    @functools.wraps(make_layer)
    def _create_new_module(*args: Any, **kwargs: Any) -> nn.Module:
        layer = make_layer(*args, **kwargs)
        swap_forward(layer)
        return layer

    AdaLoraModel.__init__ = __init__
    AdaLoraModel._create_new_module = staticmethod(_create_new_module)


def disable() -> None:
    """Undo `enable`. Models that have been created in between stay ours."""
    for name, original in _originals.items():
        setattr(AdaLoraModel, name, original)
    _originals.clear()

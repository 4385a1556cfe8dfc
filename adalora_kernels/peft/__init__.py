"""Makes the AdaLoRA layers, allocator and regulariser of PEFT models ours, in place.

A swapped object keeps its identity and everything in it; only its class becomes a subclass of the
PEFT class it had. Hence `isinstance`, names, `state_dict`, hooks, copies and pickles all work. The
config is the exception: several models may have it, so it stays as it is, and each model gets one
of its own beside it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import AdaLoraConfig, PeftModel
from peft.tuners.adalora import AdaLoraModel
from torch import nn

from .allocator import PeftRankAllocator
from .config import refuse_lora_ranks
from .layers import FusedLayer, adalora_layers, swap_forward
from .model import AdaptedModel, the_trained

__all__ = [
    "ApplyReport",
    "PeftRankAllocator",
    "allocator_of",
    "apply",
    "disable",
    "enable",
    "is_adalora",
]


@dataclass
class ApplyReport:
    """What `apply` did.

    Attributes:
        swapped: names of the layers that now run our forward. Where there are several adapted
            models, their names come first.
        left: names of the AdaLoRA layers that keep PEFT's forward, each with the reason. They
            take part in the allocation all the same.
        allocator: the allocator that `update_and_allocate` steps; None for an inference adapter.
    """

    swapped: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    allocator: PeftRankAllocator | None = None
    _bypasses_regulariser: bool = False

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Attach the allocator to `optimizer`; see `RankAllocator.attach`.

        Raises:
            ValueError: there is no allocator, because no adapter is trainable.
            TypeError, ValueError, RuntimeError: as `RankAllocator.attach`.
        """
        if self.allocator is None:
            raise ValueError(
                "there is no allocator to attach: the model has no trainable AdaLoRA adapter"
            )
        self.allocator.attach(optimizer)

    @property
    def notes(self) -> list[str]:
        """What one should know before the training, as it is now. Reads the device."""
        if self.allocator is None:
            return []
        notes, config, summary = [], self.allocator.config, self.allocator.summary()
        if summary["init_budget"] <= summary["target_budget"]:
            numbers = f"target_r is {config.target_r}, init_r {config.init_r}"
            swapped = ": are they swapped?" if config.target_r > config.init_r else ""
            notes.append(f"nothing will be pruned, {numbers}{swapped}")
        if summary["untrained"]:
            notes.append(
                "these are not trained, and have no share in the budget: "
                + ", ".join(summary["untrained"])
            )
        if config.total_step is None:
            notes.append(
                "total_step is not known yet: AdaLoraCallback takes the Trainer's; elsewhere set "
                "total_step on the config, or call allocator.set_total_step, before the first step"
            )
        if (
            self._bypasses_regulariser
            and not self.allocator.attached
            and config.orth_reg_weight > 0
        ):
            notes.append(
                "in a hand-written loop, without a task_type, PEFT's model(...) bypasses the "
                "regulariser in the loss: call report.attach(optimizer), or model.base_model(...), "
                "or add orth_reg(model, weight)"
            )
        return notes

    def __str__(self) -> str:
        lines = [f"adalora_kernels: {len(self.swapped)} AdaLoRA layers swapped"]
        if self.allocator is None:
            lines.append("no trainable adapter: nothing to allocate")
        else:
            lines.append(
                "budget {init_budget} -> {target_budget} triplets over {matrices} matrices".format(
                    **self.allocator.summary()
                )
            )
        lines += [f"left to PEFT: {name} ({reason})" for name, reason in self.left.items()]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def apply(peft_model: nn.Module) -> ApplyReport:
    """Swap an AdaLoRA model's forward, allocator and regulariser for ours, in place.

    Parameters, their names, the `state_dict`, hooks and the training loop stay as they are.
    Somebody has to step the allocator, which starts from the averages of PEFT's if that has
    already run: `trainer.AdaLoraCallback` in a Trainer, `report.attach(optimizer)`, or
    `model.base_model.update_and_allocate(step)` as in PEFT. With the last, `model(...).loss` holds
    the regulariser in training mode; with the others it goes into the gradients. Applying twice
    changes nothing.

    The allocator belongs to the model, also where several models have one config object, which
    stays as it is. `config.total_step = n` may follow later, on that object or on
    `model.peft_config[name]`; PEFT's constructor takes no None, but afterwards
    `config.total_step = None` says that it is not known yet.

    Args:
        peft_model: what `get_peft_model(model, AdaLoraConfig(...))` returns, mixed or not; its
            `base_model`; or any module in which PEFT has put AdaLoRA layers
            (`inject_adapter_in_model`, `model.add_adapter`), which then gets the
            `update_and_allocate` that PEFT does not give it; or a module that holds such models,
            one of which is trained.

    Returns:
        An `ApplyReport`.

    Raises:
        TypeError: not a model with AdaLoRA adapters of PEFT.
        ValueError: no AdaLoRA layer in it, several trainable AdaLoRA adapters or models, a
            rank_pattern of ranks, or as `RankAllocator`. Nothing has been changed then.
    """
    adapted = AdaptedModel.find_all(peft_model)
    if not adapted:
        raise TypeError(_why_not_ours(peft_model))
    trainable = {n: one for n, one in adapted.items() if one.trainable_adapter() is not None}
    trained = the_trained(trainable)
    for one in adapted.values():
        one.check()
    allocators = [one.make_allocator() for one in adapted.values()]
    report = ApplyReport()
    for (name, one), allocator in zip(adapted.items(), allocators, strict=True):
        one.take_over(allocator)
        if one is trained:
            report.allocator = allocator
        prefix = f"{name}." if name and len(adapted) > 1 else ""
        for layer_name, layer in adalora_layers(one.root).items():
            if isinstance(layer, FusedLayer):
                report.swapped.append(prefix + layer_name)
            else:
                report.left[prefix + layer_name] = (
                    f"{type(layer).__name__} keeps PEFT's forward; it is allocated"
                )
    report._bypasses_regulariser = type(peft_model) is PeftModel
    return report


def _why_not_ours(model: object) -> str:
    modules = model.modules() if isinstance(model, nn.Module) else ()
    kinds = {
        type(config).__name__
        for configs in (getattr(module, "peft_config", None) for module in modules)
        for config in (configs.values() if isinstance(configs, dict) else ())
        if not isinstance(config, AdaLoraConfig)
    }
    if kinds:
        return (
            f"peft_model has adapters of another kind ({', '.join(sorted(kinds))}): to train "
            "AdaLoRA, use AdaLoraConfig in get_peft_model(model, AdaLoraConfig(...))"
        )
    return f"peft_model must be a model with an AdaLoraConfig, got {type(model).__name__}"


def is_adalora(model: nn.Module) -> bool:
    """Whether `model` is one that `apply` takes."""
    return bool(AdaptedModel.find_all(model))


def allocator_of(model: nn.Module) -> PeftRankAllocator | None:
    """The allocator that `apply`, or PEFT after `enable`, gave to `model`; None if there is none.

    Args:
        model: as in `apply`, or anything around such a model.

    Raises:
        ValueError: several models in it have one, and are trained.
    """
    adapted = AdaptedModel.find_all(model)
    trained = the_trained({n: one for n, one in adapted.items() if one.allocator is not None})
    return None if trained is None else trained.allocator


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
    def __init__(
        self: AdaLoraModel, model: nn.Module, config: Any, *args: Any, **kwargs: Any
    ) -> None:
        for new in config.values() if isinstance(config, dict) else [config]:
            refuse_lora_ranks(vars(new).get("rank_pattern"))
        make_model(self, model, config, *args, **kwargs)
        adapted = AdaptedModel(self.model, self.peft_config, self)
        adapted.take_over(adapted.make_allocator())

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

"""Makes the AdaLoRA layers, allocator and regulariser of PEFT models ours, in place.

A swapped object keeps its identity and everything in it; only its class becomes a subclass of the
PEFT class it had. Hence `isinstance`, names, `state_dict`, hooks, copies and pickles all work. The
config is the exception: several models may have it, so it stays as it is, and each model gets one
of its own beside it.
"""

from __future__ import annotations

import functools
from typing import Any

from peft import AdaLoraConfig, PeftModel
from peft.tuners.adalora import AdaLoraModel
from peft.tuners.adalora.layer import AdaLoraLayer
from torch import nn

from ..allocator.state import check_importance
from ..distributed.groups import Group, check_group
from ..starts import check_start, start_, start_adapters_
from .allocator import PeftRankAllocator
from .config import refuse_lora_ranks
from .layers import FusedLayer, adalora_layers, swap_forward
from .model import AdaptedModel, the_trained
from .report import ApplyReport

__all__ = [
    "ApplyReport",
    "PeftRankAllocator",
    "allocator_of",
    "apply",
    "disable",
    "enable",
    "is_adalora",
]


def apply(
    peft_model: nn.Module,
    start: str = "paper",
    *,
    importance: str | None = None,
    check_replicas: bool | Group | None = None,
    process_group: Group | None = None,
) -> ApplyReport:
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
        start: "paper" leaves the adapters as they are, which is PEFT's start if they are new.
            "lora" gives the trainable adapter LoRA's: lora_A Kaiming-uniform, lora_B 0, lora_E 1;
            what it adds is exactly 0 with either (docs/recipe.md). It draws from torch's global
            random numbers: processes that train together need the same seed here. This reads the
            device.
        importance, check_replicas, process_group: those of the model's `RankAllocator`; None
            leaves it as it is. With the last, all processes of the group have to call this
            together.

    Returns:
        An `ApplyReport`.

    Raises:
        TypeError: not a model with AdaLoRA adapters of PEFT; or check_replicas or process_group
            is of another type.
        RuntimeError: importance is another one than that of the run, which has begun.
        ValueError: no AdaLoRA layer in it, several trainable AdaLoRA adapters or models, a
            rank_pattern of ranks, or as `RankAllocator`; start is another one, or "lora" where
            no adapter is trainable, or where it has been trained or loaded; or importance is
            another one. Nothing has been changed then.
    """
    start = check_start(start)
    if importance is not None:
        check_importance(importance)
    check_group("check_replicas", check_replicas)
    check_group("process_group", process_group)
    adapted = AdaptedModel.find_all(peft_model)
    if not adapted:
        raise TypeError(_why_not_ours(peft_model))
    trainable = {n: one for n, one in adapted.items() if one.trainable_adapter() is not None}
    trained = the_trained(trainable)
    for one in adapted.values():
        one.check()
    new = [] if trained is None else trained.trainable_adapters()
    if start != "paper" and not new:
        raise ValueError(f"start={start!r} needs a trainable adapter, and peft_model has none")
    allocators = [one.make_allocator() for one in adapted.values()]
    for one, allocator in zip(adapted.values(), allocators, strict=True):
        if one is trained and allocator is not None and importance is not None:
            allocator.importance = importance
    start_adapters_(new, start)
    report = ApplyReport()
    for (name, one), allocator in zip(adapted.items(), allocators, strict=True):
        one.take_over(allocator)
        if one is trained:
            report.allocator = allocator
            if allocator is not None and check_replicas is not None:
                allocator.check_replicas = check_replicas
            if allocator is not None and process_group is not None:
                allocator.share_budget(process_group)
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


# What enable() replaces in PEFT's classes, as it was.
_originals: dict[tuple[type, str], Any] = {}


def enable(start: str = "paper") -> None:
    """Make every AdaLoRA model ours that PEFT creates from now on, as by `apply`.

    That is: by `get_peft_model`, `PeftModel.from_pretrained`, `inject_adapter_in_model`,
    `model.add_adapter`, or `AdaLoraModel` itself. In mixed models the layers are; `apply` gives
    them an allocator, which PEFT has none of. If called twice, only the later `start` counts.

    Args:
        start: what every adapter is that PEFT initialises: "paper" for PEFT's own start, "lora"
            for LoRA's, as in `apply`. Values that PEFT loads come in their place.

    Raises:
        ValueError: start is another one.
    """
    start = check_start(start)
    disable()
    make_model = _original(AdaLoraModel, "__init__")
    make_layer = _original(AdaLoraModel, "_create_new_module")

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
    if start == "paper":
        return
    reset = _original(AdaLoraLayer, "reset_lora_parameters")

    @functools.wraps(reset)
    def reset_lora_parameters(self: AdaLoraLayer, adapter_name: str) -> None:
        if adapter_name in self.lora_A:
            A, E, B = (getattr(self, name)[adapter_name] for name in ("lora_A", "lora_E", "lora_B"))
            start_(A, E, B, start)

    AdaLoraLayer.reset_lora_parameters = reset_lora_parameters


def _original(of: type, name: str) -> Any:
    """A function of PEFT's that is about to be replaced; `disable` puts it back."""
    original = _originals[of, name] = vars(of)[name]
    return original.__func__ if isinstance(original, staticmethod) else original


def disable() -> None:
    """Undo `enable`. Models that have been created in between stay ours."""
    for (of, name), original in _originals.items():
        setattr(of, name, original)
    _originals.clear()

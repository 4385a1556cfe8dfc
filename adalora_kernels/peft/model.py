"""PEFT's AdaLoraModel over our allocator, and the taking over of a model that PEFT has made."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from peft import AdaLoraConfig, PeftMixedModel, PeftModel
from peft.tuners.adalora import AdaLoraModel
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from .. import functional
from ..adapters import find_adapters
from ..allocator import RankAllocator
from .allocator import PeftRankAllocator
from .config import AllocatedConfig, allocator_in
from .layers import adalora_layers, freeze_ranknums, swap_forward
from .saving import FACTORS, adapted_layers, module_name, state_for_file


@dataclasses.dataclass
class AdaptedModel:
    """What PEFT has made of one model.

    Attributes:
        root: the model that holds the adapted layers. Adapters are named from here.
        configs: PEFT's configs by adapter name.
        tuner: PEFT's AdaLoraModel around `root`. None where PEFT has thrown it away (an injected
            adapter), or where it is that of a mixed model.
    """

    root: nn.Module
    configs: dict[str, Any]
    tuner: AdaLoraModel | None

    @classmethod
    def find_in(cls, model: nn.Module) -> AdaptedModel | None:
        """The first one in `model` with an AdaLoraConfig."""
        if not isinstance(model, nn.Module):
            return None
        tuner = None
        for module in model.modules():
            if isinstance(module, AdaLoraModel):
                tuner = module
            if isinstance(module, PeftModel | PeftMixedModel | BaseTuner):
                continue
            configs = module.__dict__.get("peft_config")
            if isinstance(configs, dict) and any(
                isinstance(config, AdaLoraConfig) for config in configs.values()
            ):
                return cls(module, configs, tuner)
        return None

    def trainable_adapter(self) -> str | None:
        """The name of the adapter to allocate, if there is one."""
        names = [
            name
            for name, config in self.configs.items()
            if isinstance(config, AdaLoraConfig) and not config.inference_mode
        ]
        if len(names) > 1:
            raise ValueError(f"peft_model has several trainable AdaLoRA adapters: {names}")
        return names[0] if names else None

    def pefts_allocator(self) -> Any:
        """PEFT's own allocator, if it has made one and we have not replaced it."""
        allocator = getattr(self.tuner, "rankallocator", None)
        return None if isinstance(allocator, RankAllocator) else allocator


def refuse_final_ranks(adapted: AdaptedModel) -> None:
    """Raise ValueError if PEFT has trained so far that it has forgotten the importance.

    An adapter whose parameters have been cut to its final pattern is another matter: it starts
    anew.
    """
    theirs, name = adapted.pefts_allocator(), adapted.trainable_adapter()
    if name is None or theirs is None or theirs.exp_avg_ipt:
        return
    pattern = adapted.configs[name].rank_pattern or {}
    ranks = [adapter.lora_A.shape[0] for adapter in find_adapters(adapted.root, name)]
    pruned = not all(all(alive) for alive in pattern.values())
    if pruned and sorted(map(len, pattern.values())) == sorted(ranks):
        raise ValueError("peft_model's ranks are final already: apply before that, or not at all")


def take_over(adapted: AdaptedModel) -> PeftRankAllocator | None:
    """Make ours what is not ours yet; returns the trainable adapter's allocator, new or old."""
    name = adapted.trainable_adapter()
    allocator: PeftRankAllocator | None = None
    if name is not None:
        allocator = allocator_in(adapted.configs[name]) or _new_allocator(adapted, name)
    for layer in adalora_layers(adapted.root).values():
        swap_forward(layer)
    freeze_ranknums(adapted.root)
    if adapted.tuner is not None:
        adapted.tuner.__class__ = AllocatedAdaLoraModel
    # PEFT's functions for saving and loading look for these in the model itself where it keeps no
    # tuner; and it may throw this one away when it has injected the adapter.
    without_tuner = dataclasses.replace(adapted, tuner=None)
    for method, function in _METHODS_OF_ROOT.items():
        setattr(adapted.root, method, functools.partial(function, without_tuner))
    if allocator is not None:
        allocator.bind(adapted.root, adapted.tuner)
    return allocator


def _new_allocator(adapted: AdaptedModel, adapter_name: str) -> PeftRankAllocator:
    """An allocator that starts from the averages of PEFT's, if there are any."""
    allocator = PeftRankAllocator(adapted.root, adapted.configs[adapter_name], adapter_name)
    theirs = adapted.pefts_allocator()
    if theirs is None or not theirs.exp_avg_ipt:
        return allocator
    names = [
        f"{module_name(adapter.name, adapter_name)}.{factor}.{adapter_name}"
        for adapter in allocator.adapters
        for factor, _ in FACTORS
    ]
    state = allocator.state_dict()
    for key in ("exp_avg_ipt", "exp_avg_unc"):
        averages = getattr(theirs, key)
        state[key] = [
            averages[name].to(ours.dtype) for name, ours in zip(names, state[key], strict=True)
        ]
    allocator.load_state_dict(state)
    return allocator


def _resize_state_dict(
    adapted: AdaptedModel, rank_pattern: Any, state_dict: dict[str, Tensor], adapter_name: str
) -> dict[str, Tensor]:
    """PEFT's resize_state_dict_by_rank_pattern: choose what it is about to save.

    PEFT's own cuts by the names in the pattern, which it garbles where an adapter is called like a
    module, and writes what only `PeftModel` reads; this goes by the allocator (`state_for_file`).
    """
    config = adapted.configs[adapter_name]
    if not isinstance(config, AllocatedConfig):
        return state_dict  # It is cut as PEFT has cut it, and its config says so.
    allocator = config.allocator
    adapters = [a for a in find_adapters(adapted.root, adapter_name) if a.key == adapter_name]
    layers = adapted_layers(adapters, allocator, int(config.init_r), config.first_rank_pattern)
    return state_for_file(
        layers, state_dict, checkpoint=allocator is not None and allocator.saves_all
    )


@torch.no_grad()
def _resize_modules(adapted: AdaptedModel, rank_pattern: dict[str, Any], adapter_name: str) -> None:
    """PEFT's resize_modules_by_rank_pattern: cut the layers before a pruned adapter is loaded.

    It works for all names of adapters, and the allocator starts anew with what is left.
    """
    config = adapted.configs[adapter_name]
    allocator = allocator_in(config)
    if allocator is not None and allocator.begun:
        return  # This pattern is that of the run itself, whose checkpoints hold all triplets.
    resized = False
    for name, alive in rank_pattern.items():
        module = module_name(name, adapter_name)
        layer: Any = adapted.root.get_submodule(module)
        numbers = torch.as_tensor(alive).bool().view(-1).nonzero().squeeze(1)
        rows = len(layer.lora_E[adapter_name])
        if rows == len(numbers):
            continue
        if rows != len(alive):
            raise ValueError(f"rank_pattern has {len(alive)} entries for {module}, it has {rows}")
        _cut_layer(layer, numbers, adapter_name, config)
        resized = True
    if resized and allocator is not None:
        _new_allocator(adapted, adapter_name).bind(adapted.root, adapted.tuner)


def _cut_layer(layer: Any, numbers: Tensor, adapter_name: str, config: AdaLoraConfig) -> None:
    """Leave the triplets with these numbers (n,) int64; the scaling is that of the initial rank."""
    ranknum, scaling = layer.ranknum[adapter_name].clone(), layer.scaling[adapter_name]
    parts = {}
    for factor, dim in FACTORS:
        whole = getattr(layer, factor)[adapter_name]
        if not whole.is_meta:  # as it is before a load that assigns
            parts[factor] = whole.index_select(dim, numbers.to(whole.device))
    layer.update_layer(adapter_name, len(numbers), config.lora_alpha, config=config)
    for factor, part in parts.items():
        # Not by copy_: PEFT may have cast the adapter to more than the base layer's dtype.
        getattr(layer, factor)[adapter_name].data = part
    layer.scaling[adapter_name] = scaling
    layer.ranknum[adapter_name].copy_(ranknum).requires_grad_(False)


_METHODS_OF_ROOT: dict[str, Callable[..., Any]] = {
    "resize_state_dict_by_rank_pattern": _resize_state_dict,
    "resize_modules_by_rank_pattern": _resize_modules,
}


class AllocatedAdaLoraModel(AdaLoraModel):
    """PEFT's AdaLoraModel over our allocator and regulariser."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """PEFT's forward; the regulariser is added where training needs it there, and only there.

        Not in evaluation, with disabled adapters, at weight 0, for an adapter that is not trained,
        or where the optimizer adds its gradient (`RankAllocator.attach`).
        """
        outputs = self.model.forward(*args, **kwargs)
        allocator = self._own_allocator()
        if (
            allocator is not None
            and not allocator.attached
            and self.training
            and allocator.orth_reg_weight > 0
            and not allocator.adapters[0].module.disable_adapters
            and isinstance(getattr(outputs, "loss", None), Tensor)
        ):
            penalty = functional.orth_reg(allocator.adapters, allocator.orth_reg_weight)
            outputs.loss = outputs.loss + penalty.to(outputs.loss.dtype)
        return outputs

    def _adapted(self) -> AdaptedModel:
        return AdaptedModel(self.model, self.peft_config, self)

    def _own_allocator(self) -> PeftRankAllocator | None:
        # Not getattr, with which PEFT would go on to look in the model.
        return self.__dict__.get("rankallocator")

    def _cast_adapter_dtype(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super()._cast_adapter_dtype(adapter_name, *args, **kwargs)
        freeze_ranknums(self.model)  # It makes new parameters.

    def update_and_allocate(self, global_step: int) -> None:
        """Step our allocator: after `optimizer.step()` and before `zero_grad()`, as in PEFT.

        Does nothing while an optimizer does it (`RankAllocator.attach`).
        """
        self.rankallocator.update_and_allocate(global_step)

    def resize_state_dict_by_rank_pattern(
        self, rank_pattern: Any, state_dict: dict[str, Tensor], adapter_name: str
    ) -> dict[str, Tensor]:
        """PEFT's, for all adapter names and for ranks that were pruned before."""
        return _resize_state_dict(self._adapted(), rank_pattern, state_dict, adapter_name)

    def resize_modules_by_rank_pattern(
        self, rank_pattern: dict[str, Any], adapter_name: str
    ) -> None:
        """PEFT's, for all adapter names; training then starts with the budget that is there."""
        _resize_modules(self._adapted(), rank_pattern, adapter_name)

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """PEFT's, after which a trainable adapter has an allocator also if it is not the first."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        take_over(self._adapted())

    def delete_adapter(self, adapter_name: str) -> None:
        """PEFT's; the allocator goes with its adapter."""
        super().delete_adapter(adapter_name)
        allocator = self._own_allocator()
        if allocator is not None and allocator.adapter_name == adapter_name:
            del self.rankallocator, self.trainable_adapter_name
            del self.model.update_and_allocate

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        for name in ("update_and_allocate", *_METHODS_OF_ROOT):
            model.__dict__.pop(name, None)
        return model

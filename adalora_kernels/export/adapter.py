"""Finds what a file is made of, or loaded into, in any model with an AdaLoRA adapter."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, cast

from peft import AdaLoraConfig, PeftMixedModel, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..adapters import Adapter, find_adapters
from ..allocator import RankAllocator
from ..distributed.shards import whole_tensor
from ..modules import SVDLinear
from ..peft import allocator_of
from ..peft.model import AdaptedModel, listed
from ..peft.saving import (
    AdaptedLayer,
    adapted_layers,
    config_for_file,
    known_total_step,
    module_name,
    positive_alpha,
)

# Before the name of a layer in PEFT's files.
PREFIX = "base_model.model."


def scaling_and_ranknum(adapter: Adapter) -> tuple[float, float]:
    """The adapter's layer multiplies lora_E by scaling / (ranknum + 1e-5)."""
    module, key = cast(Any, adapter.module), adapter.key
    if key is not None:
        return float(module.scaling[key]), float(whole_tensor(module.ranknum[key]))
    ranknum = float(whole_tensor(module.ranknum))
    return float(positive_alpha(module.lora_alpha, ranknum)), ranknum


def lora_E_factor(layer: AdaptedLayer, scaling: float, ranknum: float) -> float:
    """What turns the layer's lora_E into that of a layer with these two numbers."""
    # PEFT forgets the ranknum of a layer without triplets.
    own_scaling, own_ranknum = scaling_and_ranknum(layer.adapter)
    if len(layer.stored) == 0 or (own_scaling, own_ranknum) == (scaling, ranknum):
        return 1.0
    return own_scaling / (own_ranknum + 1e-5) * (ranknum + 1e-5) / scaling


@dataclass
class OpenedAdapter:
    """A model with one AdaLoRA adapter, whoever has made its layers.

    Attributes:
        model: the model without DDP's and torch.compile's wrappers.
        root: the base model in it.
        key: PEFT's name of the adapter; None for a model of `SVDLinear` layers.
        config: what an adapter_config.json says; the rank_pattern is for the caller to set.
        layers: the adapted layers.
        allocator: the allocator of this adapter, if there is one.
    """

    model: Any
    root: nn.Module
    key: str | None
    config: dict[str, Any]
    layers: list[AdaptedLayer]
    allocator: RankAllocator | None

    @property
    def scaling_and_ranknum(self) -> tuple[float, float]:
        """Those of all layers that PEFT makes from this config."""
        return float(self.config["lora_alpha"]), float(self.config["init_r"])

    def other_tensors(self, embeddings: bool | str = "auto") -> tuple[dict[str, Tensor], set[str]]:
        """The adapter's tensors beside the triplets: biases, modules_to_save.

        Args:
            embeddings: PEFT's save_embedding_layers.

        Returns:
            The tensors, which share the model's storage, by their names in our files; and the set
            of those names and the ones that PEFT gives them in its own.
        """
        return self._biases() if self.key is None else self._pefts_tensors(self.key, embeddings)

    def _biases(self) -> tuple[dict[str, Tensor], set[str]]:
        found = {
            f"{PREFIX}{layer.name}.base_layer.bias": layer.module.bias.detach()
            for layer in self.layers
            if self.config["bias"] != "none" and layer.module.bias is not None
        }
        return found, set(found)

    def _pefts_tensors(
        self, adapter_name: str, embeddings: bool | str
    ) -> tuple[dict[str, Tensor], set[str]]:
        model, prefix = self.model, _prefix(self.model)
        state: dict[str, Tensor] = model.state_dict()
        configs = model.peft_config
        config = configs[adapter_name]
        # PEFT cuts by its rank_pattern as it collects, and fails where that is not the model's.
        configs[adapter_name] = copy.copy(config)
        configs[adapter_name].rank_pattern = None
        try:
            selected = get_peft_model_state_dict(
                model, state, adapter_name=adapter_name, save_embedding_layers=embeddings
            )
        finally:
            configs[adapter_name] = config
        names = {
            f"{name}.{ours}": f"{name}.{saved}"
            for name, module in model.named_modules()
            if isinstance(module, AuxiliaryTrainingWrapper)
            for saved, ours in module.adapter_state_dict_load_map(adapter_name).items()
        }
        triplets = tuple(f"{prefix}{layer.name}.lora_" for layer in self.layers)
        keys = {id(tensor): key for key, tensor in state.items()}
        found, known = {}, set()
        for saved, tensor in selected.items():
            # PEFT's own name may lack a module that is called as the adapter is.
            key = keys[id(tensor)]
            if not key.startswith(triplets):
                found[PREFIX + names.get(key, key).removeprefix(prefix)] = tensor
                known.add(PREFIX + saved.removeprefix(prefix))
        return found, known | found.keys()


def open_adapter(
    model: nn.Module, key: str | None, allocator: RankAllocator | None
) -> OpenedAdapter:
    """Find the adapter `key` in `model`, and check that it is one that can be written.

    Raises:
        TypeError, ValueError: as `save_adapter`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    model = _adapted_model_in(_without_wrappers(model))
    root = model.get_submodule(_prefix(model).removesuffix("."))
    configs: Any = getattr(model, "peft_config", None)
    if configs:
        key = _adapter_name(configs, key)
    elif key is not None:
        raise ValueError(f"adapter_name is for PEFT's models, got {key!r}")
    adapters = [adapter for adapter in find_adapters(root, key) if adapter.key == key]
    if not adapters:
        raise ValueError(f"no AdaLoRA adapter in this {type(model).__name__}")
    if allocator is None:
        allocator = allocator_of(model)
        if allocator is not None and allocator.adapters[0].key != key:
            allocator = None  # It is another adapter's.
    config = configs[key] if configs else _config_for_own_layers(adapters, allocator)
    written = config_for_file(config, None if allocator is None else allocator.schedule.total_step)
    # Not as it is read: while a run goes on, that is what has been pruned.
    pattern = getattr(config, "first_rank_pattern", written.rank_pattern)
    layers = adapted_layers(adapters, allocator, written.init_r, pattern)
    return OpenedAdapter(model, root, key, _as_loaded(written, root), layers, allocator)


def _adapted_model_in(model: nn.Module) -> nn.Module:
    """The only PEFT model in `model`, or the model that has an injected adapter; else itself."""
    names = list(AdaptedModel.find_all(model))
    if len(names) > 1:
        raise ValueError(
            f"model has several AdaLoRA models, each an adapter of its own: {listed(names)}. "
            "Give them one by one"
        )
    return model.get_submodule(names[0]) if names else model


def _as_loaded(config: AdaLoraConfig, root: nn.Module) -> dict[str, Any]:
    """The config as a dict that names its base model, and is for inference."""
    result: dict[str, Any] = config.to_dict()
    if not result["base_model_name_or_path"]:
        result["base_model_name_or_path"] = getattr(root, "name_or_path", None) or None
    if result["task_type"] is None:
        base = type(root)
        result["auto_mapping"] = {
            "base_model_class": base.__name__,
            "parent_library": base.__module__,
        }
    result["inference_mode"] = True
    return result


def _prefix(model: nn.Module) -> str:
    """What stands before the base model's names among those of `model`."""
    if isinstance(model, PeftModel | PeftMixedModel):
        return PREFIX
    return "model." if isinstance(model, BaseTuner) else ""


def _without_wrappers(model: nn.Module) -> nn.Module:
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:  # torch.compile's
            model = model.get_submodule("_orig_mod")
        else:
            return model


def _adapter_name(configs: dict[str, Any], name: str | None) -> str:
    names = [n for n, config in configs.items() if isinstance(config, AdaLoraConfig)]
    if name is None and len(names) > 1:
        trainable = [n for n in names if not configs[n].inference_mode]
        name = trainable[0] if len(trainable) == 1 else None
    elif name is None and names:
        name = names[0]
    if name not in names:
        raise ValueError(f"adapter_name must be one of the AdaLoRA adapters {names}, got {name!r}")
    return name


def _config_for_own_layers(
    adapters: list[Adapter], allocator: RankAllocator | None
) -> AdaLoraConfig:
    """The AdaLoraConfig for a model of `SVDLinear` layers."""
    numbers, modules = {}, []
    for adapter in adapters:
        name, module = module_name(adapter.name, None), adapter.module
        if not isinstance(module, SVDLinear):
            raise TypeError(f"{name} must be an SVDLinear, is a {type(module).__name__}")
        modules.append(module)
        numbers[name] = scaling_and_ranknum(adapter)
    first, (scaling, ranknum) = next(iter(numbers.items()))
    for name, pair in numbers.items():
        if pair != (scaling, ranknum):
            raise ValueError(
                "PEFT's config has one lora_alpha and one init_r: "
                f"{first} has {(scaling, ranknum)}, {name} has {pair}"
            )
    options: dict[str, Any] = {"total_step": 1}
    if allocator is not None:
        schedule = allocator.schedule
        options = {name: getattr(schedule, name) for name in ("tinit", "tfinal", "deltaT")}
        options["total_step"] = known_total_step(
            schedule.total_step, schedule.tinit, schedule.tfinal
        )
        options["target_r"] = schedule.target_budget // len(allocator.adapters)
        options |= {"beta1": allocator.beta1, "beta2": allocator.beta2}
    trained = any(m.bias is not None and m.bias.requires_grad for m in modules)
    return AdaLoraConfig(
        init_r=int(ranknum),
        lora_alpha=scaling,
        lora_dropout=getattr(modules[0].lora_dropout, "p", 0.0),
        fan_in_fan_out=any(m.fan_in_fan_out for m in modules),
        bias="lora_only" if trained else "none",
        **options,
    )

"""PEFT's AdaLoraModel over our allocator, and the taking over of a model that PEFT has made."""

from __future__ import annotations

import dataclasses
import operator
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from peft import AdaLoraConfig, PeftMixedModel, PeftModel
from peft.tuners.adalora import AdaLoraModel
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from .. import functional
from ..adapters import Adapter, find_adapters
from ..allocator import RankAllocator
from ..checks import as_int
from .allocator import PeftRankAllocator
from .config import AllocatedConfig, allocator_in, refuse_lora_ranks
from .layers import adalora_layers, freeze_ranknums, swap_forward
from .saving import FACTORS, adapted_layers, by_module, module_name, state_for_file


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
    def find_all(cls, model: object) -> dict[str, AdaptedModel]:
        """All in `model` with an AdaLoraConfig, by the names that PEFT's outermost modules have."""
        if not isinstance(model, nn.Module):
            return {}
        found: dict[str, AdaptedModel] = {}
        # PEFT's modules around a model and the model itself have one dict of configs.
        names: dict[int, str] = {}
        tuners: dict[int, AdaLoraModel] = {}
        for name, module in model.named_modules():
            is_around = isinstance(module, PeftModel | PeftMixedModel | BaseTuner)
            configs = module.peft_config if is_around else module.__dict__.get("peft_config")
            if not isinstance(configs, dict):
                continue
            outermost = names.setdefault(id(configs), name)
            if isinstance(module, AdaLoraModel):
                tuners[id(configs)] = module
            if not is_around and any(isinstance(c, AdaLoraConfig) for c in configs.values()):
                found.setdefault(outermost, cls(module, configs, tuners.get(id(configs))))
        return found

    @property
    def allocator(self) -> PeftRankAllocator | None:
        """Our allocator, if there is one. The model keeps it alive while it has its adapter."""
        allocator = getattr(self.root.__dict__.get("update_and_allocate"), "__self__", None)
        if not isinstance(allocator, PeftRankAllocator):
            return None
        is_there = self.configs.get(allocator.adapter_name) is allocator.config
        return allocator if is_there else None

    def _must_replace(self, config: Any) -> bool:
        """Whether a config that has no allocator here is another model's, or of a pruned adapter.

        Any other one is left to PEFT, which gives its user the same object back.
        """
        if isinstance(config, AllocatedConfig):
            return config.allocator not in (None, self.allocator)
        return isinstance(config, AdaLoraConfig) and config.rank_pattern is not None

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

    def trainable_adapters(self) -> list[Adapter]:
        """What the adapter to allocate has in each layer; nothing if there is none."""
        name = self.trainable_adapter()
        if name is None:
            return []
        # Not an SVDLinear of the user's own, which has no name.
        return [a for a in find_adapters(self.root, name) if a.key == name]

    def pefts_allocator(self) -> Any:
        """PEFT's own allocator, if it has made one and we have not replaced it."""
        allocator = getattr(self.tuner, "rankallocator", None)
        return None if isinstance(allocator, RankAllocator) else allocator

    def check(self) -> None:
        """Raise ValueError if this can't become ours."""
        if not adalora_layers(self.root):
            raise ValueError("peft_model has no AdaLoRA layer")
        for config in self.configs.values():
            if isinstance(config, AdaLoraConfig):
                refuse_lora_ranks(vars(config).get("rank_pattern"))
        if self._has_final_ranks():
            raise ValueError(
                "peft_model's ranks are final already: apply before that, or not at all"
            )

    def _has_final_ranks(self) -> bool:
        """Whether PEFT has trained so far that it has forgotten the importance.

        Neither an adapter whose parameters have been cut to its final pattern has: it starts anew;
        nor one whose pattern another model has left in the config that both have.
        """
        theirs, name = self.pefts_allocator(), self.trainable_adapter()
        if name is None or theirs is None or theirs.exp_avg_ipt:
            return False
        pattern = by_module(vars(self.configs[name]).get("rank_pattern"), name)
        kept, used = [], []
        for adapter in find_adapters(self.root, name):
            alive = pattern.get(module_name(adapter.name, name), [])
            if len(alive) != len(adapter.lora_E) or adapter.lora_E.is_meta:
                return False
            kept += alive
            used += (adapter.lora_E.detach().flatten() != 0).tolist()
        return any(used) and not all(kept) and all(map(operator.le, used, kept))

    def make_allocator(self) -> PeftRankAllocator | None:
        """The trainable adapter's allocator: the one of this model, or one for `take_over`.

        A new one starts from the averages of PEFT's, if there are any.
        """
        name, own = self.trainable_adapter(), self.allocator
        if name is None:
            return None
        if own is not None and own.adapter_name == name:
            own.count_triplets()  # Weights may have been loaded.
            return own
        allocator = PeftRankAllocator(self.root, self.configs[name], name)
        theirs = self.pefts_allocator()
        if theirs is not None and theirs.exp_avg_ipt:
            _load_averages(allocator, theirs, name)
        return allocator

    def take_over(self, allocator: PeftRankAllocator | None) -> None:
        """Make ours what is not ours yet; `allocator` is what `make_allocator` has returned."""
        for name, config in self.configs.items():
            if self._must_replace(config):
                self.configs[name] = AllocatedConfig.beside(config)
        for layer in adalora_layers(self.root).values():
            swap_forward(layer)
        freeze_ranknums(self.root)
        if self.tuner is not None:
            self.tuner.__class__ = AllocatedAdaLoraModel
        # PEFT's functions for saving and loading look for these in the model itself where it keeps
        # no tuner; and it may throw this one away when it has injected the adapter.
        for method, function in _METHODS_OF_ROOT.items():
            setattr(self.root, method, _MethodOfRoot(function, self.root))
        if allocator is None:
            return
        self.configs[allocator.adapter_name] = allocator.config
        self.root.update_and_allocate = allocator.update_and_allocate  # type: ignore[assignment]
        if self.tuner is not None:
            self.tuner.rankallocator = allocator
            self.tuner.trainable_adapter_name = allocator.adapter_name


def the_trained(adapted: dict[str, AdaptedModel]) -> AdaptedModel | None:
    """Find the one that is trained: the only one, or the only one whose adapter is not frozen.

    Returns:
        It, or None if there is none at all.

    Raises:
        ValueError: there are several. It names them.
    """
    trained = {name: one for name, one in adapted.items() if _is_trained(one.root)} or adapted
    if len(trained) > 1:
        raise ValueError(
            f"model has several AdaLoRA models that are trained: {listed(trained)}. Each has its "
            "own budget: give them to apply one by one, and attach each one's allocator to the "
            "optimizer"
        )
    return next(iter(trained.values()), None)


def listed(names: Iterable[str]) -> str:
    """Names of modules, as messages have them."""
    return ", ".join(repr(name) if name else "the model itself" for name in names)


def _is_trained(root: nn.Module) -> bool:
    layers: Any = adalora_layers(root).values()
    return any(lora_E.requires_grad for layer in layers for lora_E in layer.lora_E.values())


def _load_averages(allocator: PeftRankAllocator, theirs: Any, adapter_name: str) -> None:
    """Let our allocator go on from PEFT's averages."""
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


def _resize_state_dict(
    adapted: AdaptedModel, rank_pattern: Any, state_dict: dict[str, Tensor], adapter_name: str
) -> dict[str, Tensor]:
    """PEFT's resize_state_dict_by_rank_pattern: choose what it is about to save.

    PEFT's own cuts by the names in the pattern, which it garbles where an adapter is called like a
    module, and writes what only `PeftModel` reads; this goes by the allocator (`state_for_file`).
    """
    config = adapted.configs[adapter_name]
    if not isinstance(config, AllocatedConfig):
        return state_dict  # The pattern has been set since, and the parameters were cut to it.
    allocator = config.allocator
    adapters = [a for a in find_adapters(adapted.root, adapter_name) if a.key == adapter_name]
    layers = adapted_layers(
        adapters, allocator, as_int("init_r", config.init_r, 1), config.first_rank_pattern
    )
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
        numbers = torch.as_tensor(alive, device="cpu").bool().view(-1).nonzero().squeeze(1)
        rows = len(layer.lora_E[adapter_name])
        if rows == len(numbers):
            continue
        if rows != len(alive):
            raise ValueError(f"rank_pattern has {len(alive)} entries for {module}, it has {rows}")
        _cut_layer(layer, numbers, adapter_name, config)
        resized = True
    if resized and allocator is not None:
        allocator.begin_anew(adapted.root)


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


class _MethodOfRoot:
    """A method of a model that is no class's: calls a function with the model that it stands in.

    It holds that model weakly, so that `del model` frees it at once; a copy or a pickle of the
    model has one for itself.
    """

    def __init__(self, function: Callable[..., Any], root: nn.Module) -> None:
        self._function, self._root = function, weakref.ref(root)

    def __call__(self, *args: Any) -> Any:
        root: Any = self._root()
        return self._function(AdaptedModel(root, root.peft_config, None), *args)

    def __reduce__(self) -> tuple[Any, ...]:
        return _MethodOfRoot, (self._function, self._root())


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
            and isinstance(getattr(outputs, "loss", None), Tensor)
            and (adapters := allocator.adapters_left)
            and not adapters[0].module.disable_adapters
        ):
            penalty = functional.orth_reg(adapters, allocator.orth_reg_weight)
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
        allocator = self._own_allocator()
        if allocator is not None:
            allocator.count_triplets()  # PEFT calls this when it has loaded an adapter.

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
        refuse_lora_ranks(vars(self.peft_config[adapter_name]).get("rank_pattern"))
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        adapted = self._adapted()
        adapted.take_over(adapted.make_allocator())

    def delete_adapter(self, adapter_name: str) -> None:
        """PEFT's; the allocator goes with its adapter."""
        super().delete_adapter(adapter_name)
        allocator = self._own_allocator()
        if allocator is not None and allocator.adapter_name == adapter_name:
            allocator.detach()
            del self.rankallocator, self.trainable_adapter_name
            del self.model.update_and_allocate

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        allocator = self._own_allocator()
        if allocator is not None:
            allocator.detach()
        for name in ("update_and_allocate", *_METHODS_OF_ROOT):
            model.__dict__.pop(name, None)
        return model

"""Makes the AdaLoRA layers, allocator and regulariser of PEFT models ours, in place.

A swapped object keeps its identity and everything in it; only its class becomes a subclass of the
PEFT class it had. Hence `isinstance`, names, `state_dict`, hooks, copies and pickles all work.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from peft import AdaLoraConfig, PeftMixedModel, PeftModel
from peft.import_utils import is_bnb_4bit_available, is_bnb_available
from peft.tuners.adalora import AdaLoraModel, SVDQuantLinear
from peft.tuners.adalora import SVDLinear as PeftSVDLinear
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from . import functional
from .adapters import find_adapters
from .allocator import BudgetSchedule, RankAllocator

# What an AdaLoraConfig and a BudgetSchedule have in common.
_SCHEDULE = ("total_step", "tinit", "tfinal", "deltaT")
# The three parameters, and where their triplets are counted.
_FACTORS = (("lora_A", 0), ("lora_E", 0), ("lora_B", 1))


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
    host = _Host.of(peft_model)
    if host is None:
        inside = getattr(peft_model, "base_model", None)
        raise TypeError(
            "peft_model must be a model with an AdaLoraConfig, got "
            f"{type(peft_model).__name__}"
            + (f" over {type(inside).__name__}" if isinstance(inside, nn.Module) else "")
        )
    if not host.layers():
        raise ValueError("peft_model has no AdaLoRA layer")
    _refuse_final(host)
    report = ApplyReport(allocator=_take_over(host))
    for name, layer in host.layers().items():
        if isinstance(layer, _Layer):
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
    return _Host.of(model) is not None


def allocator_of(model: nn.Module) -> RankAllocator | None:
    """The allocator that `apply`, or PEFT after `enable`, gave to `model`; None if there is none.

    Args:
        model: as in `apply`, or anything around such a model.
    """
    host = _Host.of(model)
    if host is None:
        return None
    return next(filter(None, map(_allocator_in, host.configs.values())), None)


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
        _take_over(_Host(self.model, self.peft_config, self))

    @functools.wraps(make_layer)
    def _create_new_module(*args: Any, **kwargs: Any) -> nn.Module:
        layer = make_layer(*args, **kwargs)
        _swap(layer)
        return layer

    AdaLoraModel.__init__ = __init__
    AdaLoraModel._create_new_module = staticmethod(_create_new_module)


def disable() -> None:
    """Undo `enable`. Models that have been created in between stay ours."""
    for name, original in _originals.items():
        setattr(AdaLoraModel, name, original)
    _originals.clear()


@dataclasses.dataclass
class _Host:
    """Where PEFT keeps what belongs to one model."""

    root: nn.Module  # the model that holds the adapted layers; adapters are named from here
    configs: dict[str, Any]  # PEFT's configs by adapter name
    tuner: AdaLoraModel | None  # None where PEFT has not kept one, or it is a mixed one

    @classmethod
    def of(cls, model: nn.Module) -> _Host | None:
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

    def layers(self) -> dict[str, AdaLoraLayer]:
        return {n: m for n, m in self.root.named_modules() if isinstance(m, AdaLoraLayer)}

    def trainable_adapter(self) -> str | None:
        names = [
            name
            for name, config in self.configs.items()
            if isinstance(config, AdaLoraConfig) and not config.inference_mode
        ]
        if len(names) > 1:
            raise ValueError(f"peft_model has several trainable AdaLoRA adapters: {names}")
        return names[0] if names else None


def _refuse_final(host: _Host) -> None:
    """PEFT has trained this so far that it has forgotten the importance, but has not resized it."""
    theirs, name = getattr(host.tuner, "rankallocator", None), host.trainable_adapter()
    if name is None or theirs is None or isinstance(theirs, RankAllocator) or theirs.exp_avg_ipt:
        return
    pattern = host.configs[name].rank_pattern or {}
    ranks = [adapter.lora_A.shape[0] for adapter in find_adapters(host.root, name)]
    pruned = not all(all(alive) for alive in pattern.values())
    if pruned and sorted(map(len, pattern.values())) == sorted(ranks):
        raise ValueError("peft_model's ranks are final already: apply before that, or not at all")


def _take_over(host: _Host) -> PeftRankAllocator | None:
    """Swap what is not ours yet; the allocator of the trainable adapter, new or as it was."""
    name = host.trainable_adapter()
    allocator: PeftRankAllocator | None = None
    if name is not None:
        allocator = _allocator_in(host.configs[name]) or _new_allocator(host, name)
    for layer in host.layers().values():
        _swap(layer)
    _freeze_ranknums(host.root)
    if host.tuner is not None:
        host.tuner.__class__ = _AdaLoraModel
    without_tuner = dataclasses.replace(host, tuner=None)
    for method, function in _TUNER_METHODS.items():
        host.root.__dict__[method] = functools.partial(function, without_tuner)
    if allocator is not None:
        allocator.bind(host)
    return allocator


def _freeze_ranknums(root: nn.Module) -> None:
    """PEFT's become trainable where the adapter is cast to another dtype or moved."""
    for layer in root.modules():
        if isinstance(layer, AdaLoraLayer):
            for ranknum in layer.ranknum.values():
                ranknum.requires_grad_(False)


def _new_allocator(host: _Host, adapter_name: str) -> PeftRankAllocator:
    config = host.configs[adapter_name]
    allocator = PeftRankAllocator(host.root, config, adapter_name)
    theirs = getattr(host.tuner, "rankallocator", None)
    if theirs is None or isinstance(theirs, RankAllocator):
        return allocator
    if theirs.exp_avg_ipt:
        names = [
            f"{_module_name(adapter.name, adapter_name)}.{factor}.{adapter_name}"
            for adapter in allocator.adapters
            for factor, _ in _FACTORS
        ]
        state = allocator.state_dict()
        for key in ("exp_avg_ipt", "exp_avg_unc"):
            averages = getattr(theirs, key)
            state[key] = [
                averages[name].to(t.dtype) for name, t in zip(names, state[key], strict=True)
            ]
        allocator.load_state_dict(state)
    return allocator


class PeftRankAllocator(RankAllocator):
    """Ours, with the schedule and the weight of the regulariser that stand in an AdaLoraConfig.

    Scripts set total_step and the like on the config when they know them.

    Attributes:
        saves_all: PEFT's save writes all triplets: a checkpoint to go on from.
    """

    def __init__(self, root: nn.Module, config: AdaLoraConfig, adapter_name: str) -> None:
        self._config = config
        self._schedule: BudgetSchedule
        self._followed: tuple[int | None, ...]
        self.saves_all = False
        super().__init__(
            root,
            target_r=config.target_r,
            total_step=config.total_step,
            tinit=config.tinit,
            tfinal=config.tfinal,
            deltaT=config.deltaT,
            beta1=config.beta1,
            beta2=config.beta2,
            adapter_name=adapter_name,
            orth_reg_weight=config.orth_reg_weight,
        )

    @property
    def schedule(self) -> BudgetSchedule:
        """The `BudgetSchedule` of the config."""
        current = self._settings()
        if current != self._followed:
            options: dict[str, Any] = dict(zip(_SCHEDULE, current[1:], strict=True))
            if current[0] != self._followed[0]:
                options["target_budget"] = self._config.target_r * len(self.adapters)
            self._schedule = dataclasses.replace(self._schedule, **options)
            self._followed = current
        return self._schedule

    @schedule.setter
    def schedule(self, schedule: BudgetSchedule) -> None:
        for name in _SCHEDULE:
            setattr(self._config, name, getattr(schedule, name))
        self._schedule, self._followed = schedule, self._settings()

    def _settings(self) -> tuple[int | None, ...]:
        return tuple(getattr(self._config, name) for name in ("target_r", *_SCHEDULE))

    @property
    def orth_reg_weight(self) -> float:
        """The config's."""
        return self._config.orth_reg_weight

    @orth_reg_weight.setter
    def orth_reg_weight(self, weight: float) -> None:
        self._config.orth_reg_weight = weight

    @property
    def begun(self) -> bool:
        """Whether there may be something that is pruned."""
        return self.global_step > 0 or self.frozen

    def update_and_allocate(self, global_step: int) -> None:
        """PEFT's name of `step`. Does nothing while an optimizer does it (`attach`)."""
        if not self.attached:
            self.step(global_step)

    def bind(self, host: _Host) -> None:
        """Let config and tuner know this allocator, and the model keep it alive."""
        self._config.__class__ = _AdaLoraConfig
        if host.tuner is not None:
            host.tuner.rankallocator = self
            host.tuner.trainable_adapter_name = self.adapters[0].key
        host.root.__dict__["update_and_allocate"] = self.update_and_allocate
        self._link()

    def _link(self) -> None:
        self._config._follow(self)
        if self.global_step == 0:
            _expect_steps(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._link()

    def kept(self) -> list[Tensor]:
        """Of each matrix, the triplets (r,) bool that a saved adapter needs. Reads the device.

        Between two prunings some of the pruned ones begin to come back: they are part of the
        function.
        """
        masks = [mask.cpu() for mask in self._masks()]
        if self.shrunk:
            return masks
        values = [adapter.lora_E.detach().cpu().squeeze(1) for adapter in self.adapters]
        return [mask | (e != 0) for mask, e in zip(masks, values, strict=True)]

    def resized(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """The adapter's state dict, keys as in the model, as it is to be saved.

        Without the triplets that are not needed; or with all of them, zeros for those that
        `shrink` has dropped, if it `saves_all`.
        """
        if self.saves_all != self.shrunk:
            return state_dict
        result = dict(state_dict)
        for adapter, kept in zip(self.adapters, self.kept(), strict=True):
            module = _module_name(adapter.name, adapter.key)
            for factor, dim in _FACTORS:
                key = f"{module}.{factor}.{adapter.key}"
                key = key if key in result else f"base_model.model.{key}"
                part = result[key]
                rows = kept.to(part.device).nonzero().squeeze(1)
                if self.shrunk:
                    result[key] = spread(part.detach(), dim, rows, len(kept))
                else:
                    result[key] = part.index_select(dim, rows)
        return result


def spread(part: Tensor, dim: int, slots: Tensor, length: int) -> Tensor:
    """`length` entries along `dim`: those of `part` at `slots` (n,) int64, and zeros."""
    shape = list(part.shape)
    shape[dim] = length
    return part.new_zeros(shape).index_copy_(dim, slots, part)


# Allocators that have not been stepped yet, with the number of optimizer steps since they exist.
_waiting: weakref.WeakKeyDictionary[PeftRankAllocator, int] = weakref.WeakKeyDictionary()
_waiting_hook: RemovableHandle | None = None


def _expect_steps(allocator: PeftRankAllocator) -> None:
    global _waiting_hook
    _waiting[allocator] = 0
    if _waiting_hook is None:
        _waiting_hook = register_optimizer_step_post_hook(_after_any_optimizer_step)


def _after_any_optimizer_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Warn where an optimizer trains adapters that nobody allocates; look no more once one does."""
    global _waiting_hook
    for allocator, missed in list(_waiting.items()):
        if allocator.global_step > 0 or allocator.attached:
            del _waiting[allocator]
            continue
        lora_E = allocator.adapters[0].lora_E
        if not any(p is lora_E for group in optimizer.param_groups for p in group["params"]):
            continue
        # In a hand-written loop the allocator's turn comes after the first.
        _waiting[allocator] = missed + 1
        if missed == 1:
            del _waiting[allocator]
            warnings.warn(
                "AdaLoRA is training as plain LoRA: the optimizer has stepped twice, but nobody "
                "has stepped the rank allocator. In a transformers Trainer add "
                "callbacks=[adalora_kernels.trainer.AdaLoraCallback()]; elsewhere call "
                "allocator.attach(optimizer), or update_and_allocate(step) in every step",
                stacklevel=2,
            )
    if not _waiting and _waiting_hook is not None:
        _waiting_hook.remove()
        _waiting_hook = None


def _module_name(name: str, adapter_name: str | None) -> str:
    """Of the layer, from the name of its lora_E in one of PEFT's two forms."""
    return name.removesuffix(f".{adapter_name}").removesuffix(".lora_E")


def _resize_state_dict(
    host: _Host, rank_pattern: Any, state_dict: dict[str, Tensor], adapter_name: str
) -> dict[str, Tensor]:
    """PEFT's resize_state_dict_by_rank_pattern, but not by PEFT's names: it garbles some."""
    allocator = _allocator_in(host.configs[adapter_name])
    # Without an allocator the parameters have the pattern's ranks already.
    return state_dict if allocator is None else allocator.resized(state_dict)


@torch.no_grad()
def _resize_modules(host: _Host, rank_pattern: dict[str, Any], adapter_name: str) -> None:
    """PEFT's resize_modules_by_rank_pattern, for all adapter names; the allocator starts anew."""
    config = host.configs[adapter_name]
    allocator = _allocator_in(config)
    if allocator is not None and allocator.begun:
        return  # This pattern is that of the run itself, whose checkpoints hold all triplets.
    resized = False
    for name, alive in rank_pattern.items():
        module = _module_name(name, adapter_name)
        layer: Any = host.root.get_submodule(module)
        kept = torch.as_tensor(alive).bool().view(-1).nonzero().squeeze(1)
        rows = len(layer.lora_E[adapter_name])
        if rows == len(kept):
            continue
        if rows != len(alive):
            raise ValueError(f"rank_pattern has {len(alive)} entries for {module}, it has {rows}")
        ranknum, scaling = layer.ranknum[adapter_name].clone(), layer.scaling[adapter_name]
        parts = {}
        for factor, dim in _FACTORS:
            whole = getattr(layer, factor)[adapter_name]
            if not whole.is_meta:  # as it is before a load that assigns
                parts[factor] = whole.index_select(dim, kept.to(whole.device))
        layer.update_layer(adapter_name, len(kept), config.lora_alpha, config=config)
        for factor, part in parts.items():
            # Not by copy_: PEFT may have cast the adapter to more than the base layer's dtype.
            getattr(layer, factor)[adapter_name].data = part
        # Both stay what they are for the initial rank.
        layer.scaling[adapter_name] = scaling
        layer.ranknum[adapter_name].copy_(ranknum).requires_grad_(False)
        resized = True
    if resized and allocator is not None:
        _new_allocator(host, adapter_name).bind(host)


# Methods of PEFT's tuner that its functions for saving and loading also look for in models for
# which no tuner is kept.
_TUNER_METHODS: dict[str, Callable[..., Any]] = {
    "resize_state_dict_by_rank_pattern": _resize_state_dict,
    "resize_modules_by_rank_pattern": _resize_modules,
}


class _Layer:
    """The forward of a PEFT layer over `functional.svd_linear` and `svd_delta`."""

    # ranknum + 1e-5 as floats: read from the device once, not in every forward.
    _ranknums: dict[str, float]

    def _scaling(self: Any, adapter: str) -> float:
        if adapter not in self._ranknums:
            self._ranknums[adapter] = float(self.ranknum[adapter].detach()) + 1e-5
        return self.scaling[adapter] / self._ranknums[adapter]

    def _adapter(self: Any, name: str) -> dict[str, Any]:
        dropout = self.lora_dropout[name]
        active = isinstance(dropout, nn.Dropout) and dropout.training
        return {
            "lora_A": self.lora_A[name],
            "lora_E": self.lora_E[name],
            "lora_B": self.lora_B[name],
            "mask": getattr(self, f"_mask_{name}", None),
            "scaling": self._scaling(name),
            "dropout_p": dropout.p if active else 0.0,
        }

    def update_layer(self: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's; it makes a new ranknum, whose value the caller may still change."""
        self._ranknums.pop(adapter_name, None)
        super().update_layer(adapter_name, *args, **kwargs)  # type: ignore[misc]

    def set_mask(self: Any, mask: Tensor | None, key: str | None) -> None:
        """The allocator's frozen pattern (r,) bool for the adapter `key`."""
        self.register_buffer(f"_mask_{key}", mask, persistent=False)

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """PEFT's forward, with the base layer and the adapter in one op where that is possible."""
        adapters = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or not adapters:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        base = self.base_layer
        first, *others = (self._adapter(name) for name in adapters)
        if not args and not kwargs and _is_plain(base):
            weight = base.weight.T if isinstance(base, Conv1D) else base.weight
            result = functional.svd_linear(x, weight, bias=base.bias, **first)
        else:
            result = functional.svd_delta(base(x, *args, **kwargs), x, **first)
        for other in others:
            result = functional.svd_delta(result, x, **other)
        return result


class _SVDLinear(_Layer, PeftSVDLinear):
    pass


class _SVDQuantLinear(_Layer, SVDQuantLinear):
    pass


_OURS: dict[type, type] = {PeftSVDLinear: _SVDLinear, SVDQuantLinear: _SVDQuantLinear}

if is_bnb_available():
    from peft.tuners.adalora import SVDLinear8bitLt

    class _SVDLinear8bitLt(_Layer, SVDLinear8bitLt):
        pass

    _OURS[SVDLinear8bitLt] = _SVDLinear8bitLt

if is_bnb_4bit_available():
    from peft.tuners.adalora import SVDLinear4bit

    class _SVDLinear4bit(_Layer, SVDLinear4bit):
        pass

    _OURS[SVDLinear4bit] = _SVDLinear4bit


def _swap(layer: nn.Module) -> None:
    """Our class for a layer of PEFT's, if there is one for it."""
    ours: Any = _OURS.get(type(layer))
    if ours is None:
        return
    layer.__class__ = ours
    layer.__dict__["_ranknums"] = {}
    for adapter, ranknum in layer.ranknum.items():  # type: ignore[operator,union-attr]
        if not ranknum.is_meta:
            layer._scaling(adapter)  # type: ignore[operator]


def _is_plain(base: Any) -> bool:
    """Whether base(x) is nothing but its matrix product: no subclass, hook or patched forward."""
    return (
        type(base) in (nn.Linear, Conv1D)
        and "forward" not in base.__dict__
        and not (base._forward_hooks or base._forward_pre_hooks)
        and not (base._backward_hooks or base._backward_pre_hooks)
        and base.weight.is_floating_point()
    )


class _AdaLoraModel(AdaLoraModel):
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

    def _host(self) -> _Host:
        return _Host(self.model, self.peft_config, self)

    def _own_allocator(self) -> PeftRankAllocator | None:
        return self.__dict__.get("rankallocator")

    def _cast_adapter_dtype(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super()._cast_adapter_dtype(adapter_name, *args, **kwargs)
        _freeze_ranknums(self.model)  # It makes new parameters.

    def update_and_allocate(self, global_step: int) -> None:
        """Step our allocator: after `optimizer.step()` and before `zero_grad()`, as in PEFT.

        Does nothing while an optimizer does it (`RankAllocator.attach`).
        """
        self.rankallocator.update_and_allocate(global_step)

    def resize_state_dict_by_rank_pattern(
        self, rank_pattern: Any, state_dict: dict[str, Tensor], adapter_name: str
    ) -> dict[str, Tensor]:
        """PEFT's, for all adapter names and for ranks that were pruned before."""
        return _resize_state_dict(self._host(), rank_pattern, state_dict, adapter_name)

    def resize_modules_by_rank_pattern(
        self, rank_pattern: dict[str, Any], adapter_name: str
    ) -> None:
        """PEFT's, for all adapter names; training then starts with the budget that is there."""
        _resize_modules(self._host(), rank_pattern, adapter_name)

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """PEFT's, after which a trainable adapter has an allocator also if it is not the first."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        _take_over(self._host())

    def delete_adapter(self, adapter_name: str) -> None:
        """PEFT's; the allocator goes with its adapter."""
        super().delete_adapter(adapter_name)
        allocator = self._own_allocator()
        if allocator is not None and allocator.adapters[0].key == adapter_name:
            del self.rankallocator, self.trainable_adapter_name
            del self.model.update_and_allocate

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        for name in ("update_and_allocate", *_TUNER_METHODS):
            model.__dict__.pop(name, None)
        return model


class _AdaLoraConfig(AdaLoraConfig):
    """An AdaLoraConfig whose rank_pattern is read from the allocator when somebody asks for it."""

    def _follow(self, allocator: PeftRankAllocator) -> None:
        self.__dict__["_allocator"] = weakref.ref(allocator)

    @property
    def allocator(self) -> PeftRankAllocator | None:
        """The allocator that it follows, while that exists."""
        reference = self.__dict__.get("_allocator")
        return None if reference is None else reference()

    @property
    def rank_pattern(self) -> dict[str, Any] | None:
        """PEFT's rank_pattern over the triplets that an adapter starts with, by their lora_E.

        Where nothing has been pruned, it is what has been assigned; PEFT assigns a shortened
        pattern when it saves, which is not needed.
        """
        allocator = self.allocator
        if allocator is None or not allocator.begun:
            return self.__dict__.get("rank_pattern")
        return self._since_start(allocator.rank_pattern, allocator.adapters[0].key)

    @rank_pattern.setter
    def rank_pattern(self, pattern: dict[str, Any] | None) -> None:
        if self.allocator is None or not self.allocator.begun:
            self.__dict__["rank_pattern"] = pattern

    def _since_start(
        self, pattern: dict[str, list[bool]], key: str | None
    ) -> dict[str, Any] | None:
        """The pattern of a run, over the triplets of the run that it goes on from, if it does."""
        started: dict[str, Any] | None = self.__dict__["rank_pattern"]
        if all(all(alive) for alive in pattern.values()):
            return started
        before = {_module_name(name, key): alive for name, alive in (started or {}).items()}
        result = {}
        for name, alive in pattern.items():
            outer = before.get(_module_name(name, key), alive)
            inner = iter(alive)
            # Where PEFT's own pattern of this very run is replaced, the lengths are equal.
            same = len(outer) == len(alive)
            result[name] = alive if same else [o and next(inner) for o in outer]
        return result

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """PEFT's, with the rank_pattern by the names in PEFT's files: without the adapter's.

        It says which triplets are in the file. A checkpoint that holds all has the pattern that
        the run has started from.
        """
        allocator, written = self.allocator, copy.copy(self)
        if allocator is not None:
            key = allocator.adapters[0].key
            pattern = self.__dict__["rank_pattern"]
            if allocator.begun and not allocator.saves_all:
                kept = zip(allocator.adapters, allocator.kept(), strict=True)
                pattern = self._since_start({a.name: mask.tolist() for a, mask in kept}, key)
            written.rank_pattern = pattern and {
                f"{_module_name(name, key)}.lora_E": alive for name, alive in pattern.items()
            }
        if written.lora_alpha <= 0:  # for which PEFT would take the rank that is left
            written.lora_alpha = written.init_r
        if written.total_step is None:  # with which PEFT reads no config
            written.total_step = written.tinit + written.tfinal + 1
        super(_AdaLoraConfig, written).save_pretrained(save_directory, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "rank_pattern": self.rank_pattern}
        state.pop("_allocator", None)
        return state


def _allocator_in(config: Any) -> PeftRankAllocator | None:
    return config.allocator if isinstance(config, _AdaLoraConfig) else None

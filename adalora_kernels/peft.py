"""Makes the AdaLoRA layers, allocator and regulariser of a PEFT model ours, in place.

A swapped object keeps its identity and everything in it; only its class becomes a subclass of the
PEFT class it had. Hence `isinstance`, names, `state_dict`, hooks, copies and pickles all work.
"""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

from peft import AdaLoraConfig, PeftModel
from peft.tuners.adalora import AdaLoraModel
from peft.tuners.adalora import SVDLinear as PeftSVDLinear
from peft.tuners.adalora.layer import AdaLoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from . import functional
from .allocator import RankAllocator

# What an AdaLoraConfig and a BudgetSchedule have in common.
_SCHEDULE = ("total_step", "tinit", "tfinal", "deltaT")


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


def apply(peft_model: PeftModel | AdaLoraModel) -> ApplyReport:
    """Swap an AdaLoRA model's forward, allocator and regulariser for ours, in place.

    Parameters, their names, the `state_dict`, hooks and the training loop stay as they are:
    `model(...).loss` holds the regulariser in training mode, and
    `model.base_model.update_and_allocate(step)` steps our allocator, which starts from the
    averages of PEFT's if that has already run. Applying twice changes nothing.

    Args:
        peft_model: what `get_peft_model(model, AdaLoraConfig(...))` returns, or its `base_model`.

    Returns:
        An `ApplyReport`.

    Raises:
        TypeError: not a PEFT model with AdaLoRA adapters.
        ValueError: no AdaLoRA layer in it, or as `RankAllocator`. Nothing has been changed then.
    """
    tuner = peft_model.base_model if isinstance(peft_model, PeftModel) else peft_model
    if not isinstance(tuner, AdaLoraModel):
        raise TypeError(
            "peft_model must be a PeftModel with an AdaLoraConfig, got "
            f"{type(peft_model).__name__} over {type(tuner).__name__}"
        )
    layers = {
        name: module
        for name, module in tuner.model.named_modules()
        if isinstance(module, AdaLoraLayer)
    }
    if not layers:
        raise ValueError("peft_model has no AdaLoRA layer")
    report = ApplyReport()
    adapter_name = getattr(tuner, "trainable_adapter_name", None)
    if isinstance(tuner, _AdaLoraModel):
        report.allocator = tuner.rankallocator
    elif adapter_name is not None:
        report.allocator = _make_allocator(tuner, adapter_name)
    for name, layer in layers.items():
        reason = _why_left(layer)
        if reason is None:
            _swap(layer)
            report.swapped.append(name)
        else:
            report.left[name] = reason
    if report.allocator is not None and type(peft_model) is PeftModel:
        report.notes.append(
            "without a task_type PEFT's model(...) bypasses the regulariser: "
            "call model.base_model(...), or add orth_reg(model, weight) to the loss"
        )
    if report.allocator is not None and not isinstance(tuner, _AdaLoraModel):
        config = tuner.peft_config[adapter_name]
        config.__class__ = _AdaLoraConfig
        config._follow(report.allocator)
        tuner.__class__ = _AdaLoraModel
        tuner.rankallocator = report.allocator
    return report


def _swap(layer: PeftSVDLinear) -> None:
    layer.__class__ = _SVDLinear
    layer._ranknums = {}
    for adapter in layer.ranknum:
        layer._scaling(adapter)


def _why_left(layer: nn.Module) -> str | None:
    if type(layer) in (PeftSVDLinear, _SVDLinear):
        return None
    return f"{type(layer).__name__} is not swapped yet, but its adapter is allocated"


def _options(config: AdaLoraConfig, *names: str) -> dict[str, Any]:
    return {name: getattr(config, name) for name in names}


def _make_allocator(tuner: AdaLoraModel, adapter_name: str) -> RankAllocator:
    config = tuner.peft_config[adapter_name]
    options = _options(config, "target_r", *_SCHEDULE, "beta1", "beta2")
    allocator = RankAllocator(tuner.model, adapter_name=adapter_name, **options)
    theirs = tuner.rankallocator
    pattern = config.rank_pattern or {}
    ranks = [adapter.lora_A.shape[0] for adapter in allocator.adapters]
    if not theirs.exp_avg_ipt and sorted(map(len, pattern.values())) == sorted(ranks):
        raise ValueError("peft_model's ranks are final already: apply before that, or not at all")
    if theirs.exp_avg_ipt:
        names = [
            adapter.name.replace("lora_E", factor)
            for adapter in allocator.adapters
            for factor in ("lora_A", "lora_E", "lora_B")
        ]
        state = allocator.state_dict()
        for key in ("exp_avg_ipt", "exp_avg_unc"):
            averages = getattr(theirs, key)
            state[key] = [
                averages[name].to(t.dtype) for name, t in zip(names, state[key], strict=True)
            ]
        allocator.load_state_dict(state)
    return allocator


class _SVDLinear(PeftSVDLinear):
    """PEFT's SVDLinear over `functional.svd_linear`."""

    # ranknum + 1e-5 as floats: read from the device once, not in every forward.
    _ranknums: dict[str, float]

    def _scaling(self, adapter: str) -> float:
        if adapter not in self._ranknums:
            self._ranknums[adapter] = float(self.ranknum[adapter]) + 1e-5
        return self.scaling[adapter] / self._ranknums[adapter]

    def _adapter(self, name: str) -> dict[str, Any]:
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

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's; it makes a new ranknum, whose value the caller may still change."""
        self._ranknums.pop(adapter_name, None)
        super().update_layer(adapter_name, *args, **kwargs)

    def set_mask(self, mask: Tensor | None, key: str | None) -> None:
        """The allocator's frozen pattern (r,) bool for the adapter `key`."""
        self.register_buffer(f"_mask_{key}", mask, persistent=False)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """PEFT's forward, with the base layer and the adapter in one op where that is possible."""
        adapters = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or not adapters:
            return super().forward(x, *args, **kwargs)
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
        """PEFT's forward; the regulariser is added in training mode only, and not at weight 0."""
        outputs = self.model.forward(*args, **kwargs)
        weight = self.peft_config[self.trainable_adapter_name].orth_reg_weight
        if self.training and weight > 0 and isinstance(getattr(outputs, "loss", None), Tensor):
            penalty = functional.orth_reg(self.rankallocator.adapters, weight)
            outputs.loss = outputs.loss + penalty
        return outputs

    def update_and_allocate(self, global_step: int) -> None:
        """Step our allocator: after `optimizer.step()` and before `zero_grad()`, as in PEFT."""
        config = self.peft_config[self.trainable_adapter_name]
        allocator: RankAllocator = self.rankallocator
        # Scripts set total_step and the like on the config when they know them.
        allocator.schedule = dataclasses.replace(
            allocator.schedule,
            target_budget=config.target_r * len(allocator.adapters),
            **_options(config, *_SCHEDULE),
        )
        allocator.step(global_step)
        config._follow(allocator)


class _AdaLoraConfig(AdaLoraConfig):
    """An AdaLoraConfig whose rank_pattern is read from the allocator when somebody asks for it."""

    def _follow(self, allocator: RankAllocator) -> None:
        self.__dict__["_allocator"] = weakref.ref(allocator)

    @property
    def rank_pattern(self) -> dict[str, Any] | None:
        """PEFT's rank_pattern, or None before anything was pruned."""
        reference = self.__dict__.get("_allocator")
        allocator = None if reference is None else reference()
        pattern = {} if allocator is None else allocator.rank_pattern
        if all(all(alive) for alive in pattern.values()):
            return self.__dict__.get("rank_pattern")
        return pattern

    @rank_pattern.setter
    def rank_pattern(self, pattern: dict[str, Any] | None) -> None:
        # PEFT writes it when it saves and loads; from then on, until the next step, it is that.
        self.__dict__["_allocator"] = None
        self.__dict__["rank_pattern"] = pattern

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "rank_pattern": self.rank_pattern}
        state.pop("_allocator", None)
        return state

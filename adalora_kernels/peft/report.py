"""What `apply` tells its caller: what it did, and what one should know before the training."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from peft import AdaLoraConfig

from .. import launching
from ..distributed.groups import Group
from ..starts import slow_path, start_of
from .allocator import PeftRankAllocator

# LoRA's scaling where lora_alpha is 2 r, as it usually is.
_USUAL_SCALING = 2.0
# The learning rate that `notes` reckon with while nobody knows the optimizer.
_USUAL_RATE = 1e-3


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

    def attach(
        self,
        optimizer: torch.optim.Optimizer | torch.nn.Module,
        sync_gradients: bool | Group = False,
    ) -> None:
        """Attach the allocator to `optimizer`; see `RankAllocator.attach`.

        Raises:
            ValueError: there is no allocator, because no adapter is trainable.
            TypeError, ValueError, RuntimeError: as `RankAllocator.attach`.
        """
        if self.allocator is None:
            raise ValueError(
                "there is no allocator to attach: the model has no trainable AdaLoRA adapter"
            )
        self.allocator.attach(optimizer, sync_gradients)

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
        devices = {adapter.lora_A.device for adapter in self.allocator.adapters_left}
        return notes + list(_notes_on_speed(devices)) + list(self._notes_on_start())

    @property
    def start(self) -> str | None:
        """The start at which the trainable adapter stands: "paper" or "lora". Reads the device.

        None if it has been trained or loaded since, or if there is none.
        """
        if self.allocator is None:
            return None
        return start_of([a for a in self.allocator.adapters_left if a.key is not None])

    def _notes_on_start(self) -> Iterator[str]:
        """What makes a new adapter slow, by the arithmetic of `adalora_kernels.starts`."""
        allocator, start = self.allocator, self.start
        if allocator is None or start is None:
            return
        config, schedule = allocator.config, allocator.schedule
        yield from _notes_on_scaling(config)
        if start == "lora" and config.orth_reg_weight > 0:
            yield (
                f"orth_reg_weight is {config.orth_reg_weight:g}, and start='lora' wants 0: the "
                "regulariser has no gradient where lora_B is 0, and then drives the columns of "
                "lora_B to norm 1, whatever the loss wants"
            )
        if start == "paper" and schedule.init_budget > schedule.target_budget:
            rate, whose = _learning_rate(allocator)
            widest = max(a.lora_A.shape[1] for a in allocator.adapters_left)
            steps = math.ceil(slow_path(widest) / rate) if rate > 0 else 0
            if steps > schedule.tinit:
                yield (
                    f"pruning begins after tinit = {schedule.tinit} steps, but {whose} rate of "
                    f"{rate:g} it takes about {steps} until the adapter has moved as far as LoRA's "
                    "would, and scores from before say little: raise tinit or the rate, or "
                    "apply(model, start='lora')"
                )

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
        if self.start == "lora":
            lines.append("starts like LoRA: lora_B is 0, lora_E is 1")
        lines += [f"left to PEFT: {name} ({reason})" for name, reason in self.left.items()]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def _notes_on_speed(devices: set[torch.device]) -> Iterator[str]:
    """What makes the layers on `devices` slower than they need be."""
    why_not = launching.why_not_library()
    if why_not is not None and any(device.type == "cuda" for device in devices):
        yield (
            f"the kernels of a layer are launched by Triton, which takes the host longer: {why_not}"
        )


def _notes_on_scaling(config: AdaLoraConfig) -> Iterator[str]:
    """Whether the scaling is under a tenth of LoRA's."""
    if config.lora_alpha <= 0:
        return  # The scaling is 1 then.
    scaling = config.lora_alpha / config.init_r
    rivals = {"the usual lora_alpha = 2 r": _USUAL_SCALING}
    if config.target_r > 0:
        same = f"the same lora_alpha and r = target_r = {config.target_r}"
        rivals[same] = config.lora_alpha / config.target_r
    with_, highest = max(rivals.items(), key=operator.itemgetter(1))
    if scaling < 0.1 * highest:
        yield (
            f"scaling is lora_alpha / init_r = {scaling:.3g}, LoRA's {highest:.3g} with {with_}: "
            f"at one learning rate, LoRA moves {highest / scaling:.0f} times as far in a step. Set "
            "lora_alpha to init_r or more"
        )


def _learning_rate(allocator: PeftRankAllocator) -> tuple[float, str]:
    """The learning rate of lora_E, before any warm-up, and whose it is; 0 if it is not Adam's."""
    optimizers = allocator.followed
    if not optimizers:
        return _USUAL_RATE, "at a usual learning"
    own = {id(adapter.lora_E) for adapter in allocator.adapters_left}
    rates = [
        float(group.get("initial_lr", group["lr"]))
        for optimizer in optimizers
        if "adam" in type(optimizer).__name__.lower()
        for group in optimizer.param_groups
        if any(id(p) in own for p in group["params"])
    ]
    return max(rates, default=0.0), "at its learning"

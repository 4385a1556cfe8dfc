"""AdaLoRA under `transformers.Trainer`: one callback."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from . import peft
from .allocator import RankAllocator
from .export import STATE_NAME, load_state, save_state
from .plot import LOGGED


class AdaLoraCallback(TrainerCallback):  # type: ignore[misc]
    """Makes AdaLoRA work in a Trainer: `Trainer(..., callbacks=[AdaLoraCallback()])`.

    - Every optimizer step updates the importance and prunes, under the Trainer's own step numbers:
      1 is the first, `max_steps` the last. A step that mixed precision skips changes no average.
    - The orthogonality regulariser goes into the gradients, once per optimizer step, whatever
      is accumulated; no loss holds it, neither in training nor in evaluation. It comes after
      gradient clipping.
    - The logs hold adalora/budget, adalora/total_rank, adalora/skipped_steps and adalora/orth_reg.
    - Checkpoints hold all triplets and the allocator's state (`adalora_state.safetensors`), so that
      `train(resume_from_checkpoint=...)` goes on bitwise. What is saved afterwards is pruned.

    A PEFT model on which nobody has called `peft.apply` is taken over when the Trainer is made.

    Args:
        allocator: for models that are not PEFT's; by default the model's own, from its config.
        total_step: the steps of the schedule. By default those of the AdaLoraConfig or of the
            allocator; but the Trainer's `max_steps` where that is None, or more than the training
            has (with a warning), because the target budget would not be reached.

    Raises:
        TypeError: allocator is not a RankAllocator, or total_step not an int.
        ValueError: when the training begins: a model without a trainable adapter, a schedule that
            does not fit into the training, or as `RankAllocator.attach`.
        RuntimeError: when a training is resumed from a checkpoint without the allocator's state.
    """

    def __init__(
        self, allocator: RankAllocator | None = None, *, total_step: int | None = None
    ) -> None:
        if allocator is not None and not isinstance(allocator, RankAllocator):
            raise TypeError(f"allocator must be a RankAllocator, got {type(allocator).__name__}")
        if isinstance(total_step, bool) or not isinstance(total_step, int | None):
            raise TypeError(f"total_step must be an int, got {type(total_step).__name__}")
        self.allocator = allocator
        self.total_step = total_step
        self._training: RankAllocator | None = None

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Take the model over before the Trainer loads a checkpoint into it."""
        if self.allocator is None and model is not None and peft.is_adalora(model):
            peft.apply(model)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Find the allocator, bring it to where the Trainer is, and attach it to the optimizer."""
        if model is None or optimizer is None:
            raise ValueError("on_train_begin needs a model and an optimizer")
        self._end()  # of a training that was interrupted
        allocator = self.allocator or _allocator_of(model)
        self._set_total_step(allocator, state.max_steps)
        trainer, resumed = _trainer_that_calls()
        if state.global_step > 0:
            folder = _checkpoint(args, state) if resumed is None else Path(resumed)
            allocator.load_state_dict(load_state(_state_file(folder)))
        allocator.global_step = state.global_step
        allocator.detach()  # from one of another training, that was interrupted
        allocator.attach(optimizer)
        self._begin(allocator)
        if trainer is not None:
            _put_first(self, trainer)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count a step that did not reach the optimizer, because gradients overflowed."""
        allocator, step = self._training, state.global_step + 1
        if allocator is not None and allocator.global_step < step:
            allocator.skip(step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add how things stand to the logs of the training."""
        allocator = self._training
        if allocator is None or logs is None or "loss" not in logs:
            return
        summary = allocator.summary()
        own = {LOGGED + key: summary[key] for key in ("budget", "total_rank", "skipped_steps")}
        if allocator.orth_reg is not None:
            own[LOGGED + "orth_reg"] = allocator.orth_reg.item()
        logs.update(own)
        state.log_history[-1].update(own)  # a copy, made before the callbacks are called

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the allocator's state into the checkpoint."""
        if self._training is not None and args.should_save:
            save_state(self._training, _checkpoint(args, state) / STATE_NAME)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the optimizer; with load_best_model_at_end, the allocator is that model's."""
        if self._training is None:
            return
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            file = _state_file(Path(state.best_model_checkpoint))
            self._training.load_state_dict(load_state(file))
        self._end()

    def _begin(self, allocator: RankAllocator) -> None:
        self._training = allocator
        if isinstance(allocator, peft.PeftRankAllocator):
            allocator.saves_all = True

    def _end(self) -> None:
        allocator, self._training = self._training, None
        if allocator is not None:
            allocator.detach()
            if isinstance(allocator, peft.PeftRankAllocator):
                allocator.saves_all = False

    def _set_total_step(self, allocator: RankAllocator, max_steps: int) -> None:
        if self.total_step is not None:
            allocator.set_total_step(self.total_step)
            return
        total_step = allocator.schedule.total_step
        if total_step is not None and total_step <= max_steps:
            return
        allocator.set_total_step(max_steps)
        if total_step is not None:
            warnings.warn(
                f"AdaLoRA's total_step is {total_step}, but this training has {max_steps} steps, "
                f"which is used; AdaLoraCallback(total_step={total_step}) would not come to the "
                "target budget",
                stacklevel=2,
            )


def _allocator_of(model: nn.Module) -> RankAllocator:
    allocator = peft.allocator_of(model)
    if allocator is None:
        try:
            allocator = peft.apply(model).allocator
        except TypeError as error:
            raise ValueError(
                "model has no AdaLoRA adapter of PEFT; for other layers give "
                "AdaLoraCallback(allocator) a RankAllocator"
            ) from error
    if allocator is None:
        raise ValueError("model has no trainable AdaLoRA adapter, only one for inference")
    return allocator


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _state_file(folder: Path) -> Path:
    """The allocator's state in the checkpoint `folder`."""
    file = folder / STATE_NAME
    if not file.is_file():
        raise RuntimeError(
            f"{folder} has no {STATE_NAME}, which AdaLoraCallback writes into checkpoints, and "
            "without which the training can't go on from one"
        )
    return file


def _trainer_that_calls() -> tuple[Trainer | None, str | None]:
    """The Trainer that has called, and the folder from which it resumes.

    It tells its callbacks neither that folder nor where the list is that they stand in.
    """
    frame = inspect.currentframe()
    while frame is not None:
        names = frame.f_locals
        if isinstance(names.get("self"), Trainer) and "resume_from_checkpoint" in names:
            return names["self"], names["resume_from_checkpoint"]
        frame = frame.f_back
    return None, None


def _put_first(callback: AdaLoraCallback, trainer: Trainer) -> None:
    """Before the reporters, who get the same `logs` one after the other.

    The Trainer puts its own callbacks before its user's.
    """
    callbacks = trainer.callback_handler.callbacks
    if callback in callbacks:
        callbacks.remove(callback)
        callbacks.insert(0, callback)

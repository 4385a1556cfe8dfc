"""AdaLoRA under `transformers.Trainer`: one callback."""

from __future__ import annotations

import os
import uuid
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
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .allocator import LOG_PREFIX, RankAllocator
from .export import STATE_NAME, load_state
from .export.state import whole_state, write_state
from .training import AllocatingCallback, logs_of

__all__ = ["AdaLoraCallback"]

# Our entry among the callbacks' states in a checkpoint's trainer_state.json. The callback is no
# ExportableState: the Trainer may replace one by a new one, which would have no allocator.
_ENTRY = "adalora_kernels"


class AdaLoraCallback(AllocatingCallback, TrainerCallback):  # type: ignore[misc]
    """Makes AdaLoRA work in a Trainer: `Trainer(..., callbacks=[AdaLoraCallback()])`.

    - Every optimizer step updates the importance and prunes, under the Trainer's own step numbers:
      1 is the first, `max_steps` the last. A step that mixed precision skips changes no average.
    - The orthogonality regulariser goes into the gradients, once per optimizer step, whatever
      is accumulated; no loss holds it, neither in training nor in evaluation. It comes after
      gradient clipping.
    - The logs hold adalora/budget, adalora/total_rank, adalora/skipped_steps and adalora/orth_reg.
      The Trainer puts the reporters of `report_to` before its user's callbacks: they get these keys
      after `before_reporters(trainer)`.
    - With `deepspeed=…` in the TrainingArguments (ZeRO 1 to 3) all of this is the same.
    - Checkpoints hold all triplets and the allocator's state (`adalora_state.safetensors`), so that
      `train(resume_from_checkpoint=...)` goes on bitwise. What is saved afterwards is pruned.

    A PEFT model on which nobody has called `peft.apply` is taken over when the Trainer is made.

    The Trainer does not tell its callbacks which folder it resumes from. This one looks where the
    checkpoint was written, in `args.output_dir` and at `args.resume_from_checkpoint`, and takes a
    state only if it is the one that was saved with this very checkpoint. A checkpoint that has been
    moved elsewhere needs `resume_from`.

    Args:
        allocator: for models that are not PEFT's; by default the model's own, from its config.
        total_step: the steps of the schedule. By default those of the AdaLoraConfig or of the
            allocator; but the Trainer's `max_steps` where that is None, or more than the training
            has (with a warning), because the target budget would not be reached.
        resume_from: the checkpoint folder that is given to `train(resume_from_checkpoint=...)`.
            Only needed if that folder has been moved or renamed, or comes from a version that did
            not yet mark its checkpoints. A training from the start does not look at it.
        start: "lora" gives PEFT's adapter, if it is new, LoRA's start in place of PEFT's, as
            `peft.apply` does, when the Trainer is made. A training that is resumed, or that follows
            another one of the same model, goes on with the values that are there.

    Raises:
        TypeError: allocator is not a RankAllocator, total_step no number, or resume_from no path.
        ValueError: total_step is not a whole number of at least 1; start is another one, or "lora"
            beside an allocator; or when the training begins: a model without a trainable adapter,
            or with several PEFT models that have one, or whose adapter has been trained or loaded
            before it could get start "lora"; a schedule that does not fit into the training, a
            malformed state, or as `RankAllocator.attach`.
        RuntimeError: when a training is resumed, and the allocator's state of its checkpoint is not
            found, or resume_from has that of another one.
    """

    def __init__(
        self,
        allocator: RankAllocator | None = None,
        *,
        total_step: int | None = None,
        resume_from: str | os.PathLike[str] | None = None,
        start: str = "paper",
    ) -> None:
        super().__init__(allocator, total_step, start)
        if not isinstance(resume_from, str | os.PathLike | None):
            raise TypeError(f"resume_from must be a path, got {type(resume_from).__name__}")
        self.resume_from = resume_from
        self._run = ""  # marks the checkpoints of one call of train()
        self._is_before_reporters = False

    def before_reporters(self, trainer: Trainer) -> None:
        """Let the reporters of `report_to` (TensorBoard, W&B, …) see the adalora/* keys as well.

        All callbacks get the same `logs`, one after the other; the reporters move to the end of
        the line. Call it once, when the Trainer has been made. It is not needed for reporters
        that are given to the Trainer as callbacks, behind this one.

        Args:
            trainer: the Trainer that has this callback.
        """
        for reporter in get_reporting_integration_callbacks(trainer.args.report_to):
            callback = trainer.pop_callback(reporter)
            if callback is not None:
                trainer.add_callback(callback)
        self._is_before_reporters = True

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Take the model over before the Trainer loads a checkpoint into it."""
        if model is not None:
            self._take_over(model)

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
        saved = self._saved_state(args, state) if state.global_step > 0 else None
        self._begin(self._allocator_for(model), [optimizer], state.max_steps, state=saved)
        self._run = uuid.uuid4().hex
        state.stateful_callbacks[_ENTRY] = {
            "run": self._run,
            "output_dir": os.fspath(args.output_dir),
        }
        self._warn_of_reporters(args, state)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count a step that did not reach the optimizer, because gradients overflowed."""
        self._catch_up(state.global_step + 1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add budget, ranks, skipped steps and the regulariser to the logs of the training."""
        allocator = self._training
        if allocator is None or logs is None or "loss" not in logs:
            return
        own = logs_of(allocator)
        logs.update(own)
        state.log_history[-1].update(own)  # a copy, made before the callbacks are called

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the allocator's state into the checkpoint."""
        allocator = self._training
        if allocator is None or not (args.should_save or allocator.is_sharded):
            return
        whole = whole_state(allocator)  # for which all processes talk, where it is sharded
        if args.should_save:
            folders = _checkpoints_in(args.output_dir, state)
            # In a search for hyperparameters the Trainer does not say which run's folder it has
            # written; our entry in what it has just written there does.
            folder = next(filter(self._is_of_this_run, folders), folders[0])
            extra = {"run": self._run, "step": state.global_step}
            write_state(whole | extra, folder / STATE_NAME)

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

    def _is_of_this_run(self, checkpoint: Path) -> bool:
        file = checkpoint / TRAINER_STATE_NAME
        if not file.is_file():
            return False
        entry = TrainerState.load_from_json(file).stateful_callbacks.get(_ENTRY, {})
        return bool(entry.get("run") == self._run)

    def _saved_state(self, args: TrainingArguments, state: TrainerState) -> dict[str, Any]:
        """Read the allocator's state of the checkpoint that the Trainer has just loaded.

        Another run may have written a folder of the same name. Hence every checkpoint is marked
        with its run, in trainer_state.json (`state` is made from it) and in the allocator's state.
        """
        entry = state.stateful_callbacks.get(_ENTRY, {})
        mark = entry.get("run"), state.global_step
        if self.resume_from is not None:
            saved = load_state(_state_file(Path(self.resume_from)))
            if _mark_of(saved) != mark:
                raise RuntimeError(
                    f"resume_from: {self.resume_from} is not the checkpoint at step "
                    f"{state.global_step} from which the Trainer resumes"
                )
            return saved
        # Without a mark no state can be known as this checkpoint's.
        folders = _likely_folders(args, state, entry["output_dir"]) if entry else []
        for folder in folders:
            if (folder / STATE_NAME).is_file():
                saved = load_state(folder / STATE_NAME)
                if _mark_of(saved) == mark:
                    return saved
        where = f"; looked in {', '.join(map(str, folders))}" if folders else ""
        raise RuntimeError(
            f"found no {STATE_NAME} that belongs to the checkpoint from which the Trainer resumes"
            f"{where}. If that checkpoint was written with an AdaLoraCallback, give its folder to "
            "AdaLoraCallback(resume_from=...)"
        )

    def _warn_of_reporters(self, args: TrainingArguments, state: TrainerState) -> None:
        if args.report_to and state.is_world_process_zero and not self._is_before_reporters:
            warnings.warn(
                f"{', '.join(args.report_to)} will not show {LOG_PREFIX}*, because the Trainer "
                "calls reporters before AdaLoraCallback: call callback.before_reporters(trainer) "
                "once the Trainer has been made",
                stacklevel=3,
            )


def _checkpoints_in(output_dir: str, state: TrainerState) -> list[Path]:
    """Where the checkpoint of the step may be; a search has a folder for each of its runs."""
    name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
    folders = [Path(output_dir, name)]
    if state.is_hyper_param_search:
        folders += sorted(Path(output_dir).rglob(name))
    return folders


def _likely_folders(args: TrainingArguments, state: TrainerState, written_in: str) -> list[Path]:
    """Where the checkpoint may be that the Trainer resumes from; it does not tell its callbacks."""
    folders = _checkpoints_in(written_in, state) + _checkpoints_in(args.output_dir, state)
    if isinstance(args.resume_from_checkpoint, str):
        folders.append(Path(args.resume_from_checkpoint))
    return list(dict.fromkeys(folders))


def _mark_of(saved: dict[str, Any]) -> tuple[str | None, int]:
    """(run, the Trainer's step), which tell a checkpoint from all others."""
    return saved.get("run"), saved.get("step", saved["global_step"])


def _state_file(folder: Path) -> Path:
    """The path of the allocator's state in the checkpoint `folder`."""
    file = folder / STATE_NAME
    if not file.is_file():
        raise RuntimeError(
            f"{folder} has no {STATE_NAME}, which AdaLoraCallback writes into checkpoints, and "
            "without which the training can't go on from one"
        )
    return file

"""AdaLoRA under Lightning's Trainer: one callback."""

from __future__ import annotations

import importlib
import math
import weakref
from importlib.util import find_spec
from typing import Any

import torch

from .allocator import RankAllocator
from .training import AllocatingCallback, logs_of, written_total_step

__all__ = ["AdaLoraCallback"]


def _callback_class() -> Any:
    """Lightning's Callback. The package has two names, and the Trainer of each takes either's."""
    for package, module in (
        ("lightning", "lightning.pytorch"),
        ("pytorch_lightning", "pytorch_lightning"),
    ):
        if find_spec(package):
            return importlib.import_module(module).Callback
    raise ModuleNotFoundError("adalora_kernels.lightning needs the package lightning")


_Callback: Any = _callback_class()


class AdaLoraCallback(AllocatingCallback, _Callback):  # type: ignore[misc]
    """Makes AdaLoRA work in Lightning: `Trainer(..., callbacks=[AdaLoraCallback()])`.

    - Every step of the optimizer updates the importance and prunes. A step that mixed precision
      skips changes no average.
    - The orthogonality regulariser goes into the gradients, once per optimizer step, whatever is
      accumulated; no loss holds it. It comes after gradient clipping.
    - adalora/budget, adalora/total_rank, adalora/skipped_steps and adalora/orth_reg are logged by
      the LightningModule, every `log_every_n_steps` steps: loggers, the progress bar's metrics and
      a ModelCheckpoint's `monitor` know them.
    - Checkpoints hold the allocator's state, as tensors and plain values, so that
      `fit(ckpt_path=...)` goes on bitwise where the data and dropout do (Lightning itself keeps no
      random numbers). Where `validate`, `test` or `predict` load a checkpoint, the allocator comes
      to that state too, so that what is saved afterwards has its ranks.

    A PEFT model in the LightningModule on which nobody has called `peft.apply` is taken over when
    `fit` begins, also if `configure_model` makes it. With manual optimization every step of an
    optimizer that holds the adapters counts.

    Both packages' Trainers are served, `lightning` and `pytorch_lightning`. Lightning loads weights
    before it asks any callback, so that a checkpoint of a model that `shrink` has cut fits only a
    model that has been cut alike: shrink after the training.

    Args:
        allocator: for models that are not PEFT's; by default the model's own, from its config.
        total_step: the steps of the schedule. By default those of the AdaLoraConfig or of the
            allocator; but the training's steps where that is None, or more than the training has
            (with a warning), because the target budget would not be reached. Needed where the
            config has None and nobody knows the training's steps: with an iterable dataset of
            unknown length, or several optimizers that are stepped by hand.
        start: "lora" gives PEFT's adapter, if it is new, LoRA's start in place of PEFT's, as
            `peft.apply` does, when `fit` begins. A training that is resumed, or that follows
            another one of the same model, goes on with the values that are there.

    Raises:
        TypeError: allocator is not a RankAllocator, or total_step no number.
        ValueError: total_step is not a whole number of at least 1; start is another one, or "lora"
            beside an allocator; or when the training begins: a LightningModule without a trainable
            adapter, or with several PEFT models that have one, or whose adapter has been trained or
            loaded before it could get start "lora"; a schedule that does not fit into the
            training, or as `RankAllocator.attach`. When a checkpoint is loaded: it is of another
            model.
        RuntimeError: when a training goes on from a checkpoint without the allocator's state.
    """

    def __init__(
        self,
        allocator: RankAllocator | None = None,
        *,
        total_step: int | None = None,
        start: str = "paper",
    ) -> None:
        super().__init__(allocator, total_step, start)
        # The allocator of the latest training, for checkpoints that are saved after it.
        self._latest: weakref.ref[RankAllocator] | None = None
        self._is_loaded = False
        self._optimizers: list[torch.optim.Optimizer] = []
        self._ahead = 0  # the Trainer's step number minus the allocator's
        self._due = 0  # the step at which the allocator has to be
        self._logged = 0

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Take the model over, if there is one already, before anything is loaded into it."""
        self._is_loaded = False
        if stage == "fit":
            self._take_over(pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Bring the allocator to where the Trainer is, and attach it to the optimizers."""
        self._end()  # of a training that was interrupted
        allocator = self._allocator_for(pl_module)
        if trainer.ckpt_path and trainer.global_step > 0 and not self._is_loaded:
            raise RuntimeError(
                f"{trainer.ckpt_path} has no state of an AdaLoraCallback, without which the "
                "training can't go on from it"
            )
        # Without a checkpoint, a Trainer whose max_epochs has been raised goes on, too.
        continues = self._is_loaded or (trainer.global_step > 0 and self._last() is allocator)
        self._ahead = trainer.global_step - (allocator.global_step if continues else 0)
        self._optimizers = _holders(allocator, trainer.optimizers)
        steps = _steps_of(trainer, pl_module, allocator)
        self._begin(
            allocator,
            self._optimizers,
            None if steps is None else steps - self._ahead,
            continues=continues,
        )
        self._ahead = trainer.global_step - allocator.global_step
        self._due = self._logged = allocator.global_step
        self._latest = weakref.ref(allocator)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Note a step that a scaler may skip, where there may be several in a batch."""
        if pl_module.automatic_optimization or not _scales(trainer):
            return
        if any(optimizer is one for one in self._optimizers):
            self._catch_up(self._due)
            self._due += 1

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Count what did not reach the optimizer, and log where Lightning does."""
        if pl_module.automatic_optimization:
            self._due = trainer.global_step - self._ahead
        self._catch_up(self._due)
        allocator, every = self._training, trainer.log_every_n_steps
        if allocator is None or allocator.global_step <= self._logged:
            return
        self._logged = allocator.global_step
        if every and self._logged % every == 0:
            pl_module.log_dict(logs_of(allocator))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Leave the optimizers."""
        self._end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the optimizers."""
        self._end()

    def state_dict(self) -> dict[str, Any]:
        """The allocator's state for a checkpoint, in a training and after it; empty before."""
        allocator = self._last()
        return {} if allocator is None else allocator.state_dict()

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Bring the allocator to the state of the weights that have just been loaded."""
        state = checkpoint["callbacks"].get(self.state_key)
        if state:
            allocator = self._allocator_for(pl_module)
            allocator.load_state_dict(state)
            self._is_loaded, self._latest = True, weakref.ref(allocator)

    def _last(self) -> RankAllocator | None:
        return None if self._latest is None else self._latest()

    def _end(self) -> None:
        super()._end()
        self._optimizers = []

    def __getstate__(self) -> dict[str, Any]:
        # A copy in another process has no training yet, and weak references can't be pickled.
        return {**self.__dict__, "_latest": None}


def _holders(
    allocator: RankAllocator, optimizers: list[torch.optim.Optimizer]
) -> list[torch.optim.Optimizer]:
    """The optimizers that hold any of the adapters; all if none does, for `attach` to refuse."""
    own = {id(p) for adapter in allocator.adapters for p in adapter.parameters}
    return [
        optimizer
        for optimizer in optimizers
        if any(id(p) in own for group in optimizer.param_groups for p in group["params"])
    ] or optimizers


def _steps_of(trainer: Any, pl_module: Any, allocator: RankAllocator) -> int | None:
    """The optimizer steps of the whole training, by the Trainer's count; None if not known."""
    if trainer.fast_dev_run:
        # No training but a test of the code, in which the schedule need not come to its end.
        schedule = allocator.schedule
        return written_total_step(allocator) or schedule.tinit + schedule.tfinal + 1
    limit = math.inf if trainer.max_steps == -1 else trainer.max_steps
    if not pl_module.automatic_optimization:
        # Who steps by hand need not do it once in every batch. max_steps counts all optimizers'.
        return None if limit == math.inf or len(trainer.optimizers) > 1 else int(limit)
    batches, epochs = trainer.num_training_batches, trainer.max_epochs
    if epochs == -1 or batches == math.inf:
        return None if limit == math.inf else int(limit)
    scheduler = next(
        (c for c in trainer.callbacks if hasattr(c, "get_accumulate_grad_batches")), None
    )
    steps = 0
    for epoch in range(max(epochs, 1)):
        accumulated = (
            scheduler.get_accumulate_grad_batches(epoch)
            if scheduler
            else trainer.accumulate_grad_batches
        )
        steps += math.ceil(batches / accumulated)
        if steps >= limit:
            return int(limit)
    return steps


def _scales(trainer: Any) -> bool:
    return getattr(trainer.precision_plugin, "scaler", None) is not None

"""Checkpoints of Lightning's Trainer with `AdaLoraCallback`, and resuming from them, bitwise."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_runs import Module, data, fit, lightning_trainer
from trainer_runs import (
    BATCH,
    FINAL_STEP,
    STEPS,
    assert_same_run,
    in_plain_peft,
    logits_of,
    make,
)

from adalora_kernels.lightning import AdaLoraCallback
from adalora_kernels.peft import allocator_of

full = pytest.mark.full
pytestmark = pytest.mark.filterwarnings("error::UserWarning:adalora_kernels")


@pytest.fixture(scope="module")
def full_run(tmp_path_factory):
    """An uninterrupted run with a checkpoint at every step, and dropout: (model, folder)."""
    out = tmp_path_factory.mktemp("full")
    torch.manual_seed(5)
    module = Module(make(lora_dropout=0.1))
    fit(lightning_trainer(out, callbacks=[AdaLoraCallback(), Seeds()], every=1), module)
    return module.model, out


class Seeds(pl.Callback):
    """Lightning does not save the state of random numbers: each step has a seed of its own."""

    def on_train_batch_start(self, trainer, pl_module, *_):
        torch.manual_seed(trainer.global_step)


@pytest.mark.parametrize("total_step", [STEPS, None], ids=["total_step", "none"])
@pytest.mark.parametrize("step", [1, 5, FINAL_STEP, FINAL_STEP + 1])
def test_resume_is_bitwise_the_uninterrupted_run(step, total_step, full_run, tmp_path):
    expected, folder = full_run
    module = Module(make(seed=2, lora_dropout=0.1, total_step=total_step))
    trainer = lightning_trainer(callbacks=[AdaLoraCallback(), Seeds()])
    checkpoint = folder / f"step={step}.ckpt"
    # As Lightning does it where it does not trust the file: tensors and plain values only.
    fit(trainer, module, ckpt_path=str(checkpoint), weights_only=True)
    assert trainer.global_step == STEPS
    assert_same_run(module.model, expected)


def test_resume_without_the_allocators_state_is_refused(tmp_path):
    fit(lightning_trainer(tmp_path, callbacks=[], every=5, max_steps=5), Module())
    trainer = lightning_trainer()
    with pytest.raises(RuntimeError, match=r"step=5\.ckpt has no state of an AdaLoraCallback"):
        fit(trainer, Module(), ckpt_path=str(tmp_path / "step=5.ckpt"))


def test_resume_of_a_checkpoint_of_another_model_is_refused(full_run):
    _, folder = full_run
    module = Module(make(init_r=6))
    module.strict_loading = False
    with pytest.raises((ValueError, RuntimeError), match=r"state is for|size mismatch"):
        fit(lightning_trainer(), module, ckpt_path=str(folder / "step=5.ckpt"))


@pytest.mark.parametrize("fn", ["test", pytest.param("validate", marks=full)])
@pytest.mark.parametrize("best", [4, pytest.param(10, marks=full)])
def test_the_best_checkpoint(best, fn, tmp_path):
    module, states = Module(), {}

    class Keep(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            states[trainer.global_step] = (
                logits_of(module.model),
                allocator_of(module.model).ranks(),
            )

    module.scores = {best: 1.0}
    keeper = ModelCheckpoint(tmp_path, monitor="score", mode="max")
    trainer = lightning_trainer(
        callbacks=[AdaLoraCallback(), Keep(), keeper], enable_checkpointing=True,
        val_check_interval=2, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, data(), data(BATCH))
    getattr(trainer, fn)(module, data(BATCH), ckpt_path="best")
    logits, ranks = states[best]
    # One model, one function: in memory, in the allocator's view and in what is saved.
    assert torch.equal(logits_of(module.model), logits)
    assert allocator_of(module.model).ranks() == ranks
    module.model.save_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(in_plain_peft(tmp_path / "adapter"), logits)
    # A fresh process has the same from the file.
    other = Module(make(seed=2))
    getattr(lightning_trainer(), fn)(other, data(BATCH), ckpt_path=keeper.best_model_path)
    assert torch.equal(logits_of(other.model), logits)
    assert allocator_of(other.model).ranks() == ranks

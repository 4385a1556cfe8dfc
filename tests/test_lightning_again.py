"""Trainings after trainings, and trainings of another length than the schedule's, in Lightning."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning_runs import Module, Records, data, fit, lightning_trainer
from trainer_runs import (
    BATCH,
    BUDGET,
    STEPS,
    assert_at_target,
    make,
    rows,
    snapshot,
)

from adalora_kernels.lightning import AdaLoraCallback
from adalora_kernels.peft import allocator_of

full = pytest.mark.full
pytestmark = pytest.mark.filterwarnings("error::UserWarning:adalora_kernels")


@pytest.mark.parametrize(
    ("options", "batches", "steps"),
    [
        pytest.param({"limit_train_batches": 5, "max_epochs": 3}, 8, 15, id="limit"),
        pytest.param({"max_epochs": 3, "accumulate_grad_batches": 2}, 5, 9, id="accumulation"),
        pytest.param({"max_epochs": 5, "max_steps": 11}, 8, 11, id="both", marks=full),
        pytest.param({"limit_train_batches": 0.5, "max_epochs": 3}, 10, 15, id="half", marks=full),
        pytest.param({"overfit_batches": 4, "max_epochs": 3}, 10, 12, id="overfit", marks=full),
    ],
)
def test_the_trainings_steps(options, batches, steps):
    model = make(total_step=None)
    trainer = lightning_trainer(**{"max_steps": -1, **options})
    fit(trainer, Module(model), data(batches * BATCH))
    assert trainer.global_step == steps == model.peft_config["default"].total_step
    assert_at_target(model)


def test_accumulation_that_changes():
    model, changes = make(total_step=None), GradientAccumulationScheduler({0: 1, 1: 2, 2: 4})
    trainer = lightning_trainer(callbacks=[AdaLoraCallback(), changes], max_steps=-1, max_epochs=3)
    fit(trainer, Module(model), data(8 * BATCH))
    assert trainer.global_step == 8 + 4 + 2 == model.peft_config["default"].total_step
    assert_at_target(model)


def test_a_dataset_of_unknown_length():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(rows(STEPS * BATCH))

    def loader():
        return torch.utils.data.DataLoader(Stream(), batch_size=BATCH)

    epochs = {"max_steps": -1, "max_epochs": 1}
    with pytest.raises(ValueError, match="total_step is None"):
        fit(lightning_trainer(**epochs), Module(make(total_step=None)), loader())
    for model, callback in (
        (make(), AdaLoraCallback()),
        (make(total_step=None), AdaLoraCallback(total_step=STEPS)),
    ):
        fit(lightning_trainer(callbacks=[callback], **epochs), Module(model), loader())
        assert_at_target(model)
    model = make(total_step=None)
    fit(lightning_trainer(), Module(model), loader())
    assert_at_target(model)


def test_a_total_step_that_does_not_fit():
    with pytest.warns(UserWarning, match="total_step is 100, but this training has 12 steps"):
        fit(lightning_trainer(), Module(make(total_step=100)))
    with pytest.warns(UserWarning, match="total_step is 9, .* 12 steps: .* final from step 5 on"):
        fit(lightning_trainer(), Module(make(total_step=9)))
    with pytest.raises(ValueError, match=r"training of 12 steps .*tinit=20 .*tfinal=4 .* is 100"):
        fit(lightning_trainer(), Module(make(total_step=100, tinit=20)))


@pytest.mark.parametrize("total_step", [1000, None])
def test_fast_dev_run(total_step):
    model = make(total_step=total_step)
    fit(lightning_trainer(fast_dev_run=2, max_steps=-1), Module(model))
    assert allocator_of(model).global_step == 2
    model = make(total_step=total_step)
    fit(lightning_trainer(callbacks=[AdaLoraCallback(total_step=STEPS)]), Module(model))
    assert_at_target(model)


class Interrupt(Exception):
    pass


class InterruptAt(pl.Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == self.step:
            raise Interrupt


def test_training_again_after_an_interrupt():
    module, callback = Module(), AdaLoraCallback()
    with pytest.raises(Interrupt):
        fit(lightning_trainer(callbacks=[callback, InterruptAt(5)]), module)
    allocator = allocator_of(module.model)
    assert not allocator.attached and not allocator.saves_all and allocator.global_step == 5
    fit(lightning_trainer(callbacks=[callback]), module)
    assert allocator.global_step == STEPS
    assert_at_target(module.model)


@pytest.mark.parametrize("other_callback", [False, pytest.param(True, marks=full)])
def test_training_twice(other_callback):
    module, callback, records = Module(), AdaLoraCallback(), Records()
    fit(lightning_trainer(callbacks=[callback]), module)
    ranks, before = allocator_of(module.model).ranks(), snapshot(module.model)
    callback = AdaLoraCallback() if other_callback else callback
    fit(lightning_trainer(callbacks=[callback], logger=records), module)
    assert allocator_of(module.model).global_step == STEPS
    assert allocator_of(module.model).ranks() == ranks
    after = snapshot(module.model)
    assert not all(torch.equal(before[name], after[name]) for name in before)
    rows_ = [row for _, row in records.rows if "adalora/budget" in row]
    assert {row["adalora/total_rank"] for row in rows_} == {BUDGET["llama"]}
    assert {row["adalora/budget"] for row in rows_} == {BUDGET["llama"]}


def test_a_trainer_that_goes_on():
    # First half an hour, then more epochs: the same Trainer, model and callback.
    model = make(total_step=None)
    trainer = lightning_trainer(
        callbacks=[AdaLoraCallback(total_step=15)], max_steps=-1, max_epochs=1
    )
    module = fit(trainer, Module(model), data(5 * BATCH))
    allocator = allocator_of(model)
    assert allocator.global_step == 5 and not allocator.frozen
    trainer.fit_loop.max_epochs = 3
    fit(trainer, module, data(5 * BATCH))
    assert trainer.global_step == allocator.global_step == 15
    assert_at_target(model)
    # Once the ranks are final, they stay it.
    ranks = allocator.ranks()
    trainer.fit_loop.max_epochs = 4
    with pytest.warns(UserWarning, match="schedule has come to its end at step 15"):
        fit(trainer, module, data(5 * BATCH))
    assert allocator.global_step == 20 and allocator.ranks() == ranks

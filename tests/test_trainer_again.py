"""Trainings after trainings, and trainings of another length than the schedule's, in a Trainer."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from trainer_runs import (
    BUDGET,
    FINAL_STEP,
    STATE_FILE,
    STEPS,
    assert_at_target,
    assert_same_run,
    assert_saves_its_function,
    make,
    rows,
    save_every,
    snapshot,
    total_rank,
    trainable,
    trainer_of,
)
from transformers import TrainerCallback
from transformers.integrations import integration_utils
from transformers.trainer_utils import HPSearchBackend

import adalora_kernels.peft
from adalora_kernels.peft import allocator_of
from adalora_kernels.trainer import AdaLoraCallback

full = pytest.mark.full
ALL = 4 * 4 * 2  # triplets of the tiny Llama


class InterruptAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def logged(trainer):
    """(budget, total rank) at each step of the latest training."""
    records = [r for r in trainer.state.log_history if "loss" in r]
    return [(r["adalora/budget"], r["adalora/total_rank"]) for r in records]


def assert_logs_are_consistent(trainer, first):
    logs = logged(trainer)
    assert logs[0] == (first, first)
    assert all(budget >= rank for budget, rank in logs)
    assert logs[-1] == (BUDGET["llama"], BUDGET["llama"])


@pytest.mark.parametrize(
    "other_trainer",
    [pytest.param(False, id="same_trainer"), pytest.param(True, id="other_trainer")],
)
def test_training_twice(other_trainer, tmp_path):
    model = make()
    trainer = trainer_of(model, tmp_path)
    trainer.train()
    assert_logs_are_consistent(trainer, ALL)
    before = snapshot(model)
    if other_trainer:
        trainer = trainer_of(model, tmp_path)
    trainer.train()
    # A run of its own, which begins with the triplets that are there, and those are the target.
    assert allocator_of(model).global_step == trainer.state.global_step == STEPS
    assert_at_target(model)
    assert_logs_are_consistent(trainer, BUDGET["llama"])
    assert set(logged(trainer)) == {(BUDGET["llama"], BUDGET["llama"])}
    after = snapshot(model)
    assert not all(torch.equal(before[name], after[name]) for name in before)
    assert_saves_its_function(trainer, tmp_path / "final")


def test_training_twice_to_a_smaller_target(tmp_path):
    model = make(target_r=3)
    trainer_of(model, tmp_path).train()
    assert total_rank(model) == 24
    model.peft_config["default"].target_r = 2
    trainer = trainer_of(model, tmp_path)
    trainer.train()
    assert_at_target(model)
    assert_logs_are_consistent(trainer, 24)


def test_a_model_per_fold(tmp_path):
    # The adapters are initialised again: nothing is left of the fold before.
    model = make()
    initial, folds = copy.deepcopy(model.state_dict()), [rows(24, seed=1), rows(24, seed=2)]
    for name in initial:
        if "lora_E" in name:
            initial[name].zero_()
    for data in folds:
        model.load_state_dict(initial)
        trainer = trainer_of(model, tmp_path, data=data)
        trainer.train()
        assert_at_target(model)
        assert_logs_are_consistent(trainer, ALL)
    alone = make()
    alone.load_state_dict(initial)
    trainer_of(alone, tmp_path, data=folds[1]).train()
    assert_same_run(model, alone)


@pytest.mark.parametrize(
    "other_trainer",
    [pytest.param(False, id="same_trainer"), pytest.param(True, id="other_trainer", marks=full)],
)
@pytest.mark.parametrize("step", [5, pytest.param(FINAL_STEP + 1, marks=full)])
def test_training_again_after_an_interrupt(step, other_trainer, tmp_path):
    model = make()
    trainer = trainer_of(model, tmp_path, callbacks=[AdaLoraCallback(), InterruptAt(step)])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    there = total_rank(model)
    assert BUDGET["llama"] <= there < ALL
    trainer.remove_callback(InterruptAt)
    if other_trainer:
        trainer = trainer_of(model, tmp_path)
    trainer.train()
    assert_at_target(model)
    assert_logs_are_consistent(trainer, there)
    assert_saves_its_function(trainer, tmp_path / "final")


def test_training_a_shrunk_model_again(tmp_path):
    model = make()
    trainer_of(model, tmp_path).train()
    allocator_of(model).shrink()
    ranks, before = allocator_of(model).ranks(), snapshot(model)
    trainer = trainer_of(model, tmp_path, **save_every(5))
    with pytest.warns(UserWarning, match=r"ranks are final \(16 triplets\).*shrunk"):
        trainer.train()
    assert allocator_of(model).ranks() == ranks
    assert set(logged(trainer)) == {(BUDGET["llama"], BUDGET["llama"])}
    after = snapshot(model)
    assert not all(torch.equal(before[name], after[name]) for name in before)
    assert_saves_its_function(trainer, tmp_path / "final")
    resumed = make(seed=2)
    trainer_of(resumed, tmp_path / "other").train(str(tmp_path / "checkpoint-5"))
    assert_same_run(resumed, model)


def test_an_allocator_that_somebody_has_attached(tmp_path):
    expected, model = make(), make()
    trainer_of(expected, tmp_path).train()
    allocator = adalora_kernels.peft.apply(model).allocator
    allocator.attach(torch.optim.SGD(trainable(model).values(), lr=1.0))
    trainer_of(model, tmp_path).train()
    assert_same_run(model, expected)
    # To the very optimizer that the Trainer is given.
    model = make()
    allocator = adalora_kernels.peft.apply(model).allocator
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2, weight_decay=0.0)
    allocator.attach(optimizer)
    trainer = trainer_of(model, tmp_path)
    trainer.optimizer = optimizer
    trainer.train()
    assert_at_target(model)
    assert allocator.global_step == STEPS


class Two(nn.Module):
    """An encoder and a decoder, each a PEFT model."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = make(), make(seed=2)

    def forward(self, **batch):
        return {"loss": self.encoder(**batch).loss + self.decoder(**batch).loss}


def test_two_models_to_be_trained_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"encoder.*decoder"):
        trainer_of(Two(), tmp_path)


def test_total_step_of_the_callback_and_of_the_config(tmp_path):
    cases = {
        "callback": (make(total_step=100), AdaLoraCallback(total_step=10), 10),
        "config": (make(total_step=STEPS), AdaLoraCallback(), STEPS),
        "neither": (make(total_step=None), AdaLoraCallback(), STEPS),
    }
    for case, (model, callback, total_step) in cases.items():
        trainer_of(model, tmp_path, callbacks=[callback]).train()
        assert allocator_of(model).schedule.total_step == total_step, case
        assert_at_target(model)


def test_a_total_step_that_is_longer_than_the_training(tmp_path):
    model = make(total_step=100)
    trainer = trainer_of(model, tmp_path)
    with pytest.warns(UserWarning, match="total_step is 100, but this training has 12 steps"):
        trainer.train()
    assert allocator_of(model).schedule.total_step == STEPS
    assert_at_target(model)


def test_a_total_step_that_is_shorter_than_the_training(tmp_path):
    model = make(total_step=9)
    trainer = trainer_of(model, tmp_path)
    with pytest.warns(UserWarning, match=r"is 9, .* 12 steps: .* from step 5 on .*total_step=9\)"):
        trainer.train()
    assert allocator_of(model).schedule.final_step == 5
    assert [budget for budget, _ in logged(trainer)][4:] == [BUDGET["llama"]] * 8
    # Whoever says so means it.
    trainer_of(make(total_step=9), tmp_path, callbacks=[AdaLoraCallback(total_step=9)]).train()


@pytest.mark.parametrize(
    ("options", "total_step", "words"),
    [
        ({"total_step": 100, "tinit": 20}, None, ["of 12 steps", "tinit=20", "tfinal=4", "is 100"]),
        ({"total_step": None, "tfinal": 10}, None, ["of 12 steps", "tinit=2", "=10", "is None"]),
        ({"total_step": 100}, 6, ["AdaLoraCallback(total_step=6)", "tinit=2", "tfinal=4", "100"]),
    ],
)
def test_a_schedule_that_does_not_fit_is_told_in_its_users_numbers(
    options, total_step, words, tmp_path
):
    model = make(**options)
    trainer = trainer_of(model, tmp_path, callbacks=[AdaLoraCallback(total_step=total_step)])
    with pytest.raises(ValueError) as error:
        trainer.train()
    assert all(word in str(error.value) for word in words), error.value
    assert model.peft_config["default"].total_step == options["total_step"]


def test_what_the_user_has_written_is_remembered(tmp_path):
    # Trainings of different lengths: each has its own number where the config has none.
    model = make(total_step=None)
    for steps in (STEPS, 20):
        trainer_of(model, tmp_path, max_steps=steps, data=rows(2 * steps)).train()
        assert model.peft_config["default"].total_step == steps
    model = make(total_step=100)
    with pytest.warns(UserWarning, match="total_step is 100, but this training has 12 steps"):
        trainer_of(model, tmp_path).train()
    with pytest.warns(UserWarning, match="total_step is 100, but this training has 20 steps"):
        trainer_of(model, tmp_path, max_steps=20, data=rows(40)).train()
    model.peft_config["default"].total_step = 11
    with pytest.warns(UserWarning, match="total_step is 11, but this training has 12 steps"):
        trainer_of(model, tmp_path).train()


def test_a_longer_training_goes_on_from_final_ranks(tmp_path):
    trainer_of(make(total_step=None), tmp_path, **save_every(FINAL_STEP + 1)).train()
    model = make(total_step=None, seed=2)
    trainer = trainer_of(model, tmp_path, max_steps=20, data=rows(40))
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{FINAL_STEP + 1}"))
    assert_at_target(model)
    assert set(logged(trainer)[-11:]) == {(BUDGET["llama"], BUDGET["llama"])}


@pytest.mark.parametrize("run", ["run-1", pytest.param("lr/second", marks=full)])
def test_a_search_for_hyperparameters(run, tmp_path, monkeypatch):
    # Each of its runs has a folder of its own, which the Trainer tells nobody. What optuna would
    # do is done here: no library for searches is needed.
    monkeypatch.setattr(integration_utils, "hp_params", lambda trial: trial.params)
    trainer = trainer_of(
        None, tmp_path, model_init=lambda: make(), callbacks=[AdaLoraCallback()], **save_every(5)
    )
    trainer.hp_search_backend, trainer.hp_space = HPSearchBackend.OPTUNA, lambda trial: {}
    if run != "run-1":
        trainer.hp_name = lambda trial: ["lr/first", run][trial.number]
    for number in range(2):
        trainer.train(trial=SimpleNamespace(number=number, params={}))
        assert_at_target(trainer.model)
    for step in (5, 10):
        assert not (tmp_path / f"checkpoint-{step}").exists()
        assert (tmp_path / run / f"checkpoint-{step}" / STATE_FILE).is_file()
    model = make(seed=2)
    checkpoint = str(tmp_path / run / "checkpoint-5")
    trainer_of(model, tmp_path / "out").train(resume_from_checkpoint=checkpoint)
    assert_same_run(model, trainer.model)

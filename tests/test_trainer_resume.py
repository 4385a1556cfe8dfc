"""Checkpoints of a Trainer with `AdaLoraCallback`: what is in them, and resuming, bitwise."""

import json
import shutil

import pytest
import torch
from helpers import triplets_in
from peft import AdaLoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from trainer_runs import (
    BUDGET,
    FINAL_STEP,
    KINDS,
    SCHEDULE,
    STATE_FILE,
    STEPS,
    Recorder,
    adapter_config,
    assert_at_target,
    assert_same_run,
    assert_saves_its_function,
    base_model,
    in_plain_peft,
    logits_of,
    make,
    minilm,
    rows,
    save_every,
    trainable,
    trainer_of,
)
from transformers import TrainerCallback

import adalora_kernels.peft
from adalora_kernels.peft import allocator_of
from adalora_kernels.trainer import AdaLoraCallback

full = pytest.mark.full


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


class Shrink(TrainerCallback):
    """Drops the pruned triplets as soon as the pattern is final, which saves work."""

    def on_step_end(self, args, state, control, model, optimizer, **kwargs):
        allocator = allocator_of(model)
        if allocator.frozen:
            allocator.shrink(optimizer.optimizer)


@pytest.fixture(scope="module")
def full_run(tmp_path_factory):
    """An uninterrupted run with a checkpoint at every step, and dropout: (model, folder, saved)."""
    out = tmp_path_factory.mktemp("full")
    model, recorder = make(lora_dropout=0.1), Recorder()
    trainer_of(model, out, callbacks=[recorder, AdaLoraCallback()], **save_every(1)).train()
    return model, out, recorder.saved


def resumed(out, checkpoint, *, resume_from=None, **options):
    """Resumes a model that has nothing in common with the run, and trains it to the end."""
    model = make(seed=2, lora_dropout=0.1)
    callbacks = [AdaLoraCallback(resume_from=resume_from)]
    trainer = trainer_of(model, out, callbacks=callbacks, **options)
    trainer.train(resume_from_checkpoint=checkpoint if checkpoint is True else str(checkpoint))
    assert trainer.state.global_step == STEPS
    return model


@pytest.mark.parametrize("step", [5, pytest.param(FINAL_STEP, marks=full), FINAL_STEP + 1])
def test_resume_in_another_folder_is_bitwise_the_uninterrupted_run(step, full_run, tmp_path):
    expected, folder, _ = full_run
    assert_same_run(resumed(tmp_path, folder / f"checkpoint-{step}"), expected)


@pytest.mark.parametrize("step", [5, pytest.param(FINAL_STEP + 1, marks=full)])
def test_resume_of_an_interrupted_run_in_its_own_folder(step, full_run, tmp_path):
    expected, _, _ = full_run
    callbacks = [AdaLoraCallback(), StopAt(step)]
    out = tmp_path / "old"
    trainer_of(make(lora_dropout=0.1), out, callbacks=callbacks, **save_every(step)).train()
    assert_same_run(resumed(out, True, **save_every(step)), expected)
    # Its checkpoints may be resumed in turn, also where the whole folder has a new name.
    out.rename(tmp_path / "new")
    assert_same_run(resumed(tmp_path / "new", tmp_path / "new" / f"checkpoint-{step}"), expected)


def test_resume_with_the_trainer_that_was_interrupted(full_run, tmp_path):
    # The same process goes on: the optimizer and the allocator are those of before.
    expected, folder, _ = full_run
    model = make(lora_dropout=0.1)
    trainer = trainer_of(model, tmp_path)
    trainer.train()
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-5"))
    assert_same_run(model, expected)


@minilm
def test_resume_minilm(tmp_path):
    schedule = {"total_step": 6, "tinit": 1, "tfinal": 2}
    expected = make("minilm", **schedule)
    options = {"max_steps": 6, "accumulation": 2, "data": rows(24, "minilm")}
    trainer_of(expected, tmp_path, **save_every(3), **options).train()
    model = make("minilm", seed=2, **schedule)
    # The head, which is trained too, comes from the checkpoint like the adapters.
    checkpoint = str(tmp_path / "checkpoint-3")
    trainer_of(model, tmp_path / "other", **options).train(resume_from_checkpoint=checkpoint)
    assert_same_run(model, expected)


@pytest.mark.parametrize("step", [1, 5, FINAL_STEP, STEPS])
def test_checkpoints_are_full_rank_and_load_in_plain_peft(step, full_run):
    _, folder, saved = full_run
    checkpoint = folder / f"checkpoint-{step}"
    assert (checkpoint / STATE_FILE).is_file()
    assert adapter_config(checkpoint)["rank_pattern"] is None
    torch.testing.assert_close(in_plain_peft(checkpoint), saved[step][0])


def test_resume_of_a_run_that_shrinks(tmp_path):
    expected, recorder = make(), Recorder()
    callbacks = [AdaLoraCallback(), Shrink(), recorder]
    trainer = trainer_of(expected, tmp_path, callbacks=callbacks, **save_every(5))
    trainer.train()
    stored = sum(len(p) for n, p in trainable(expected).items() if "lora_E" in n)
    assert stored == BUDGET["llama"]
    assert_saves_its_function(trainer, tmp_path / "final")
    # Checkpoints hold all triplets all the same.
    torch.testing.assert_close(in_plain_peft(tmp_path / "checkpoint-10"), recorder.saved[10][0])
    for step in (5, 10):
        model = make(seed=2)
        trainer = trainer_of(model, tmp_path / "other", callbacks=[AdaLoraCallback(), Shrink()])
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_same_run(model, expected)


def test_resume_with_another_adapter_name(tmp_path):
    arguments = {"target_modules": KINDS["llama"], "total_step": STEPS, **SCHEDULE}

    def named():
        # Also part of the names of modules, which confuses PEFT itself.
        config = AdaLoraConfig(task_type="CAUSAL_LM", **arguments)
        return get_peft_model(base_model(), config, adapter_name="proj")

    expected = named()
    trainer = trainer_of(expected, tmp_path, **save_every(5))
    trainer.train()
    assert_at_target(expected)
    trainer.save_model(tmp_path / "final")
    loaded = in_plain_peft(tmp_path / "final" / "proj")
    torch.testing.assert_close(loaded, logits_of(expected))
    model = named()
    checkpoint = str(tmp_path / "checkpoint-5")
    trainer_of(model, tmp_path / "other").train(resume_from_checkpoint=checkpoint)
    assert_same_run(model, expected)


@pytest.fixture
def moved(full_run, tmp_path):
    """A checkpoint that was moved, with one of another run in its place: (model, folder, out)."""
    expected, folder, _ = full_run
    out, checkpoint = tmp_path / "out", tmp_path / "elsewhere" / "the-fifth"
    shutil.copytree(folder / "checkpoint-5", checkpoint)
    trainer_state = json.loads((checkpoint / "trainer_state.json").read_text())
    trainer_state["stateful_callbacks"]["adalora_kernels"]["output_dir"] = str(out)
    (checkpoint / "trainer_state.json").write_text(json.dumps(trainer_state))
    other = make(seed=3)
    trainer_of(other, out, callbacks=[AdaLoraCallback(), StopAt(5)], **save_every(5)).train()
    return expected, checkpoint, out


@pytest.mark.parametrize("by", ["callback", pytest.param("args", marks=full)])
def test_resume_from_a_checkpoint_that_was_moved(by, moved):
    expected, checkpoint, out = moved
    if by == "callback":
        model = resumed(out, checkpoint, resume_from=checkpoint)
    else:
        model = resumed(out, checkpoint, resume_from_checkpoint=str(checkpoint))
    assert_same_run(model, expected)


def test_a_moved_checkpoint_never_gets_the_state_of_another(moved, full_run):
    _, checkpoint, out = moved
    _, folder, _ = full_run
    with pytest.raises(RuntimeError, match=r"resume_from=") as error:
        resumed(out, checkpoint)
    assert str(out / "checkpoint-5") in str(error.value)
    for wrong in (out / "checkpoint-5", folder / "checkpoint-6"):
        with pytest.raises(RuntimeError, match=r"is not the checkpoint at step 5"):
            resumed(out, checkpoint, resume_from=wrong)


def test_a_checkpoint_that_was_half_overwritten_is_refused(moved):
    # A run that dies while it saves leaves its model beside the state of the run before.
    _, _, out = moved
    state = out / "checkpoint-5" / STATE_FILE
    before = state.read_bytes()
    trainer_of(make(), out, callbacks=[AdaLoraCallback(), StopAt(5)], **save_every(5)).train()
    state.write_bytes(before)
    with pytest.raises(RuntimeError, match=STATE_FILE):
        resumed(out, True)


def unmark(checkpoint):
    """Makes it one that was written before checkpoints were marked with their run."""
    trainer_state = json.loads((checkpoint / "trainer_state.json").read_text())
    del trainer_state["stateful_callbacks"]["adalora_kernels"]
    (checkpoint / "trainer_state.json").write_text(json.dumps(trainer_state))
    with safe_open(checkpoint / STATE_FILE, framework="pt") as file:
        metadata = file.metadata()
    state = json.loads(metadata["adalora_state"])
    del state["values"]["run"]
    metadata["adalora_state"] = json.dumps(state)
    save_file(load_file(checkpoint / STATE_FILE), checkpoint / STATE_FILE, metadata=metadata)


def test_a_checkpoint_without_a_mark_has_to_be_named(moved):
    expected, checkpoint, out = moved
    unmark(checkpoint)
    unmark(out / "checkpoint-5")
    with pytest.raises(RuntimeError, match=r"resume_from="):
        resumed(out, checkpoint)
    assert_same_run(resumed(out, checkpoint, resume_from=checkpoint), expected)


def test_resume_under_enable_without_a_total_step(full_run, tmp_path):
    expected, folder, _ = full_run
    adalora_kernels.peft.enable()
    try:
        model = make(seed=2, lora_dropout=0.1, total_step=None)
        trainer_of(model, tmp_path).train(resume_from_checkpoint=str(folder / "checkpoint-5"))
    finally:
        adalora_kernels.peft.disable()
    assert_same_run(model, expected)


@pytest.mark.parametrize("named", [False, pytest.param(True, marks=full)])
def test_a_missing_or_damaged_state_is_refused(named, moved):
    _, checkpoint, out = moved
    shutil.rmtree(out)
    checkpoint = checkpoint.rename(out.parent / "checkpoint-5")
    whole = (checkpoint / STATE_FILE).read_bytes()
    options = {"resume_from": checkpoint if named else None}
    (checkpoint / STATE_FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=STATE_FILE):
        resumed(checkpoint.parent, checkpoint, **options)
    (checkpoint / STATE_FILE).unlink()
    with pytest.raises(RuntimeError, match=STATE_FILE):
        resumed(checkpoint.parent, checkpoint, **options)


@pytest.mark.parametrize(
    ("best", "deltaT"),
    [pytest.param(4, 1, marks=full), (4, 3), pytest.param(FINAL_STEP, 1, marks=full), (10, 1)],
)
def test_load_best_model_at_end(best, deltaT, tmp_path):
    model, recorder = make(deltaT=deltaT), Recorder()
    trainer = trainer_of(
        model,
        tmp_path,
        callbacks=[recorder, AdaLoraCallback()],
        eval_strategy="steps",
        eval_steps=2,
        **save_every(2),
        eval_dataset=rows(4, seed=9),
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
        compute_metrics=lambda _: {"score": -abs(trainer.state.global_step - best)},
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    logits, pattern = recorder.saved[best]
    torch.testing.assert_close(logits_of(model), logits)
    allocator = allocator_of(model)
    assert allocator.rank_pattern == pattern
    assert sum(allocator.ranks().values()) == allocator.schedule.budget(best // deltaT * deltaT)
    trainer.save_model(tmp_path / "final")
    if deltaT == 1:
        # Else triplets that were pruned have come back, and are part of the function.
        ranks = {name.partition(".lora_E")[0]: sum(alive) for name, alive in pattern.items()}
        assert triplets_in(tmp_path / "final") == ranks
    torch.testing.assert_close(in_plain_peft(tmp_path / "final"), logits)

"""`AdaLoraCallback` in the real transformers.Trainer, and `attach` in an Accelerate loop.

The oracle is plain PEFT, trained by a loop that calls its allocator and its regulariser by hand.
"""

import json
import math
import warnings

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from helpers import triplets_in
from torch import nn
from trainer_runs import (
    BATCH,
    BUDGET,
    FINAL_STEP,
    STATE_FILE,
    STEPS,
    Recorder,
    adapter_config,
    assert_at_target,
    assert_close,
    assert_equal_state,
    assert_saves_its_function,
    base_model,
    collated,
    in_plain_peft,
    logits_of,
    make,
    minilm,
    plain,
    plain_rows,
    rows,
    save_every,
    snapshot,
    total_rank,
    train_by_hand,
    trainable,
    trainer_of,
)
from transformers import Trainer, TrainerCallback
from transformers.integrations import integration_utils

import adalora_kernels.peft
from adalora_kernels import RankAllocator, orth_reg
from adalora_kernels.peft import allocator_of
from adalora_kernels.trainer import AdaLoraCallback

full = pytest.mark.full


class HandTrainer(Trainer):
    """A Trainer whose fp16 works on a CPU, and which overflows at the step `overflow_at`.

    `overflow_in` is the part of a parameter's name whose gradient becomes infinite.
    """

    overflow_at, overflow_in, init_scale = None, "lora_A", 2.0**10

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        if self.args.fp16:
            # Accelerate makes a scaler for GPUs only.
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=self.init_scale)
            self.accelerator.native_amp = True

    def training_step(self, model, *args, **kwargs):
        loss = super().training_step(model, *args, **kwargs)
        if self.state.global_step + 1 == self.overflow_at:
            name = self.overflow_in
            next(p for n, p in trainable(model).items() if name in n).grad.fill_(math.inf)
        return loss


def losses_of(trainer):
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


@pytest.fixture
def enabled():
    adalora_kernels.peft.enable()
    yield
    adalora_kernels.peft.disable()


@pytest.mark.parametrize(
    ("name", "accumulation"),
    [
        pytest.param("llama", 1, marks=full),
        ("llama", 4),
        pytest.param("minilm", 1, marks=minilm),
        pytest.param("minilm", 4, marks=[minilm, full]),
    ],
)
def test_trains_to_the_budget_and_saves_it(name, accumulation, tmp_path):
    steps = STEPS if name == "llama" else 4
    schedule = {} if name == "llama" else {"total_step": 4, "tinit": 1, "tfinal": 1}
    model = make(name, **schedule)
    data = rows(steps * BATCH * accumulation, name)
    trainer = trainer_of(model, tmp_path, accumulation=accumulation, max_steps=steps, data=data)
    trainer.train()
    budget = BUDGET[name]
    allocator = allocator_of(model)
    assert allocator.frozen and allocator.global_step == steps and not allocator.attached
    assert sum(allocator.ranks().values()) == budget == total_rank(model)
    trainer.save_model(tmp_path / "final")
    assert sum(triplets_in(tmp_path / "final").values()) == budget
    torch.testing.assert_close(in_plain_peft(tmp_path / "final", name), logits_of(model, name))


@pytest.mark.parametrize(
    ("options", "accumulation"),
    [
        pytest.param({}, 1, id="causal_lm-1", marks=full),
        pytest.param({}, 4, id="causal_lm-4"),
        pytest.param({"task_type": None}, 2, id="no_task_type-2"),
        pytest.param({"orth_reg_weight": 0.0}, 1, id="no_regulariser-1"),
        pytest.param({"deltaT": 3, "tfinal": 0}, 1, id="tfinal_0-1"),
    ],
)
def test_follows_plain_peft_trained_by_hand(options, accumulation, tmp_path):
    # In float64: what differs by more than rounding is wrong.
    theirs, ours = (make(dtype=torch.float64, **options) for _ in range(2))
    data = rows(STEPS * BATCH * accumulation)
    weight = options.get("orth_reg_weight", 0.1)
    losses, patterns = train_by_hand(theirs, data, accumulation, weight)
    trainer = trainer_of(ours, tmp_path, accumulation=accumulation, data=data)
    trainer.train()
    # The loss that the Trainer shows is the task's alone.
    assert losses_of(trainer) == pytest.approx(losses, rel=1e-6, abs=0)
    assert_close(snapshot(ours), snapshot(theirs))
    assert allocator_of(ours).rank_pattern == {
        name.removeprefix("base_model.model."): alive for name, alive in patterns[-1].items()
    }


def test_a_loss_computed_outside_of_the_model(tmp_path):
    def outside(outputs, labels, num_items_in_batch):
        assert outputs.get("loss") is None
        logits, labels = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return nn.functional.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch

    theirs, ours = (make(dtype=torch.float64) for _ in range(2))
    data = rows(STEPS * BATCH * 2)
    losses, _ = train_by_hand(theirs, data, 2)
    trainer = trainer_of(ours, tmp_path, accumulation=2, data=data, compute_loss_func=outside)
    trainer.train()
    assert losses_of(trainer) == pytest.approx(losses, rel=1e-6, abs=0)
    assert_close(snapshot(ours), snapshot(theirs))


def test_bf16_autocast(tmp_path):
    runs = {}
    for bf16 in (False, True):
        model = make()
        trainer = trainer_of(model, tmp_path, bf16=bf16)
        trainer.train()
        assert trainer.accelerator.native_amp == bf16
        assert {p.dtype for p in trainable(model).values()} == {torch.float32}
        assert_at_target(model)
        assert allocator_of(model).summary()["skipped_steps"] == 0
        runs[bf16] = losses_of(trainer)
    assert runs[True] != runs[False]
    assert runs[True] == pytest.approx(runs[False], rel=2e-2)


class Watch(TrainerCallback):
    """Parameters and importance averages after each step. Has to come after AdaLoraCallback."""

    def __init__(self):
        self.parameters, self.averages, self.skipped = {}, {}, {}

    def on_step_end(self, args, state, control, model, optimizer, **kwargs):
        step, allocator = state.global_step, allocator_of(model)
        self.parameters[step] = snapshot(model)
        self.averages[step] = allocator.state_dict()["exp_avg_ipt"]
        self.skipped[step] = allocator.summary()["skipped_steps"]
        assert allocator.global_step == step


@pytest.mark.parametrize(
    ("overflow_at", "optim"),
    [
        (5, "adamw_torch_fused"),
        pytest.param(5, "adamw_torch", marks=full),
        pytest.param(FINAL_STEP, "adamw_torch_fused", marks=full),
        (FINAL_STEP, "adamw_torch"),
        (STEPS, "adamw_torch_fused"),
        pytest.param(STEPS, "adamw_torch", marks=full),
    ],
)
def test_fp16_step_that_overflows(overflow_at, optim, tmp_path):
    model, watch = make(), Watch()
    trainer = trainer_of(
        model, tmp_path, cls=HandTrainer, callbacks=[AdaLoraCallback(), watch], fp16=True,
        optim=optim,
    )  # fmt: skip
    trainer.overflow_at = overflow_at
    trainer.train()
    # Counted as long as there is an importance to be learned.
    counted = [int(FINAL_STEP > overflow_at <= step) for step in range(1, 13)]
    assert list(watch.skipped.values()) == counted
    if overflow_at < FINAL_STEP:
        # Nothing was learned in that step, but the budget went down as the schedule says.
        before, after = (watch.averages[step] for step in (overflow_at - 1, overflow_at))
        assert_equal_state(after, before)
        assert any(not torch.equal(a, b) for a, b in zip(after, watch.averages[6], strict=True))
        before, after = (watch.parameters[step] for step in (overflow_at - 1, overflow_at))
        for name in before:
            if "lora_E" not in name:
                assert torch.equal(before[name], after[name]), name
            else:
                assert bool(((after[name] == before[name]) | (after[name] == 0)).all()), name
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    records = [r for r in trainer.state.log_history if "loss" in r]
    assert [r["adalora/skipped_steps"] for r in records] == list(watch.skipped.values())
    schedule = allocator_of(model).schedule
    assert [r["adalora/budget"] for r in records] == [schedule.budget(s) for s in range(1, 13)]
    assert_at_target(model)


@pytest.mark.parametrize("overflow_in", [pytest.param("lora_A", marks=full), "modules_to_save"])
def test_fused_and_unfused_optimizers_skip_alike(overflow_in, tmp_path):
    # A fused optimizer is stepped even then, and skips inside; and the adapters' own gradients are
    # finite where only another parameter's overflowed.
    runs = []
    for optim in ("adamw_torch_fused", "adamw_torch"):
        model, watch = make(modules_to_save=["lm_head"]), Watch()
        # In half precision a last bit of a weight can change a product by a thousandth.
        inner = model.get_base_model()
        inner.forward = torch.autocast("cpu", enabled=False)(inner.forward)
        trainer = trainer_of(
            model, tmp_path, cls=HandTrainer, callbacks=[AdaLoraCallback(), watch], fp16=True,
            optim=optim,
        )  # fmt: skip
        trainer.overflow_at, trainer.overflow_in = 5, overflow_in
        trainer.train()
        assert_equal_state(watch.averages[5], watch.averages[4])
        assert watch.skipped[5] == watch.skipped[12] == 1
        assert_at_target(model)
        runs.append((watch.averages[6], allocator_of(model).ranks()))
    for fused, unfused in zip(runs[0][0], runs[1][0], strict=True):
        torch.testing.assert_close(fused, unfused, rtol=1e-5, atol=1e-8)
    assert runs[0][1] == runs[1][1]


@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=full), 2])
def test_epochs_under_enable(accumulation, enabled, tmp_path):
    # 5 batches an epoch: at accumulation 2 the third step of each has one batch only.
    model = make(total_step=None)
    assert isinstance(allocator_of(model), RankAllocator)
    epochs = {"max_steps": -1, "num_train_epochs": 3}
    data = rows(5 * BATCH)
    trainer = trainer_of(model, tmp_path, accumulation=accumulation, data=data, **epochs)
    trainer.train()
    steps = 15 if accumulation == 1 else 9
    allocator = allocator_of(model)
    assert trainer.state.global_step == allocator.global_step == steps
    assert allocator.schedule.total_step == steps
    assert_at_target(model)
    adalora_kernels.peft.disable()
    assert_saves_its_function(trainer, tmp_path / "final")
    assert adapter_config(tmp_path / "final")["total_step"] == steps


@pytest.mark.parametrize("deltaT", [pytest.param(1, marks=full), 5])
def test_training_that_ends_before_the_final_phase(deltaT, tmp_path):
    model = make(deltaT=deltaT)
    trainer = trainer_of(model, tmp_path, callbacks=[AdaLoraCallback(total_step=100)])
    trainer.train()
    allocator = allocator_of(model)
    assert not allocator.frozen
    budget = allocator.schedule.budget(STEPS // deltaT * deltaT)
    assert BUDGET["llama"] < budget < 32 and sum(allocator.ranks().values()) == budget
    # What has been pruned at step 10 has come back since then, and is part of the function.
    assert (total_rank(model) == budget) == (deltaT == 1)
    assert_saves_its_function(trainer, tmp_path / "final")


@pytest.fixture
def reporter(monkeypatch):
    """A reporter that the Trainer makes itself, for `report_to="recorder"`."""
    made = []

    class Reporter(Recorder):
        def __init__(self):
            super().__init__()
            made.append(self)

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "recorder", Reporter)
    return made


def assert_logged(records, allocator, penalties, logging_steps):
    records = [record for record in records if "loss" in record]
    steps = range(logging_steps, STEPS + 1, logging_steps)
    assert len(records) == len(steps)
    for step, record in zip(steps, records, strict=True):
        assert record["adalora/budget"] == allocator.schedule.budget(step)
        assert record["adalora/total_rank"] == record["adalora/budget"]
        assert record["adalora/skipped_steps"] == 0
        assert record["adalora/orth_reg"] == pytest.approx(penalties[step - 1])
        assert {type(v) for k, v in record.items() if "adalora/" in k} <= {int, float}


@pytest.mark.parametrize("logging_steps", [pytest.param(1, marks=full), 5])
def test_logs(logging_steps, reporter, tmp_path):
    model, callback, behind = make(orth_reg_weight=0.1), AdaLoraCallback(), Recorder()
    trainer = trainer_of(
        model, tmp_path, callbacks=[callback, behind], logging_steps=logging_steps,
        report_to="recorder",
    )  # fmt: skip
    callback.before_reporters(trainer)
    trainer.train()
    assert behind.steps == [(step, step) for step in range(1, STEPS + 1)]
    assert len(reporter) == 1
    for records in (trainer.state.log_history, behind.logs, reporter[0].logs):
        assert_logged(records, allocator_of(model), behind.penalties, logging_steps)
    json.dumps(trainer.state.log_history)


def test_reporters_that_miss_the_logs_are_warned_of(reporter, tmp_path):
    model, behind = make(orth_reg_weight=0.1), Recorder()
    callbacks = [AdaLoraCallback(), behind]
    trainer = trainer_of(model, tmp_path, callbacks=callbacks, report_to="recorder")
    with pytest.warns(UserWarning, match=r"recorder will not show .*before_reporters\(trainer\)"):
        trainer.train()
    assert not any("adalora/budget" in record for record in reporter[0].logs)
    for records in (trainer.state.log_history, behind.logs):
        assert_logged(records, allocator_of(model), behind.penalties, 1)


def test_eval_loss_holds_no_regulariser(tmp_path):
    model, recorder = make(orth_reg_weight=0.5), Recorder()
    trainer_of(
        model, tmp_path, callbacks=[recorder, AdaLoraCallback()], eval_strategy="steps",
        eval_steps=3, eval_dataset=rows(6, seed=9),
    ).train()  # fmt: skip
    assert len(recorder.evaluated) == 4
    assert recorder.evaluated == pytest.approx(recorder.eval_losses, rel=1e-6)


@pytest.mark.parametrize("callback", [False, True], ids=["without", "with"])
def test_training_without_the_callback_warns_once(callback, tmp_path):
    model = make()
    adalora_kernels.peft.apply(model)
    trainer = trainer_of(model, tmp_path, callbacks=[AdaLoraCallback()] if callback else [])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    messages = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    messages = [m for m in messages if "alloca" in m or "adalora" in m.lower()]
    assert len(messages) == (0 if callback else 1), messages


def test_not_an_adalora_model(tmp_path):
    trainer = trainer_of(base_model(), tmp_path, data=rows(4))
    with pytest.raises((TypeError, ValueError), match="AdaLoRA"):
        trainer.train()


def test_callback_arguments():
    model = make()
    report = adalora_kernels.peft.apply(model)
    with pytest.raises(TypeError, match="allocator must be a RankAllocator"):
        AdaLoraCallback(model)
    with pytest.raises(TypeError, match=r"AdaLoraCallback\(report\.allocator\)"):
        AdaLoraCallback(report)
    for wrong in (1.5, 0):
        with pytest.raises(ValueError, match="total_step"):
            AdaLoraCallback(total_step=wrong)
    for wrong in ("12", True):
        with pytest.raises(TypeError, match="total_step"):
            AdaLoraCallback(total_step=wrong)
    for total_step in (np.int64(12), torch.tensor(12), 24 / 2):
        callback = AdaLoraCallback(report.allocator, total_step=total_step)
        assert callback.total_step == 12 and type(callback.total_step) is int
    with pytest.raises(TypeError, match="resume_from"):
        AdaLoraCallback(resume_from=True)


def test_a_plain_torch_model(tmp_path):
    data = plain_rows(STEPS * BATCH * 4)
    theirs, by_hand = plain()
    optimizer = torch.optim.AdamW(trainable(theirs).values(), lr=1e-2, weight_decay=0.0)
    batches = collated(data)
    losses = []
    for step in range(1, STEPS + 1):
        total = sum(theirs(**b)["loss"] / 4 for b in batches[4 * step - 4 : 4 * step])
        total.backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        orth_reg(theirs, 0.1).backward()
        optimizer.step()
        by_hand.step(step)
        optimizer.zero_grad()
        losses.append(total.item())
    ours, allocator = plain(total_step=None)
    trainer = trainer_of(
        ours, tmp_path, callbacks=[AdaLoraCallback(allocator)], accumulation=4, data=data,
        **save_every(5),
    )  # fmt: skip
    trainer.train()
    assert losses_of(trainer) == pytest.approx(losses, rel=1e-6, abs=0)
    assert_close(snapshot(ours), snapshot(theirs))
    assert allocator.schedule.total_step == STEPS
    assert allocator.ranks() == by_hand.ranks() and sum(allocator.ranks().values()) == 4
    for step in (5, 10):
        resumed, other = plain(seed=3)
        checkpoint = tmp_path / f"checkpoint-{step}"
        assert (checkpoint / STATE_FILE).is_file()
        resumed_trainer = trainer_of(
            resumed, tmp_path / "out", callbacks=[AdaLoraCallback(other)], accumulation=4,
            data=data, restore_callback_states_from_checkpoint=step == 10,
        )  # fmt: skip
        resumed_trainer.train(resume_from_checkpoint=str(checkpoint))
        assert_equal_state(resumed.state_dict(), ours.state_dict())
        assert_equal_state(other.state_dict(), allocator.state_dict())


def accelerated(scaler, accumulation):
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    # As with fp16 on a GPU, where Accelerate makes one.
    accelerator.scaler = scaler
    return accelerator


def train_accelerated(model, data, *, order, scaler=None, fused=False, overflow_at=None):
    """The loop of Accelerate's documentation, and two lines for AdaLoRA."""
    accelerator = accelerated(scaler, len(data) // (STEPS * BATCH))
    allocator = adalora_kernels.peft.apply(model).allocator
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2, weight_decay=0.0, fused=fused)
    if order == "before":
        allocator.attach(optimizer)
    model, optimizer = accelerator.prepare(model, optimizer)
    if order == "after":
        allocator.attach(optimizer)
    model.train()
    step = 0
    for batch in collated(data):
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            if accelerator.sync_gradients:
                step += 1
                if step == overflow_at:
                    next(iter(trainable(model).values())).grad.fill_(math.inf)
            optimizer.step()
            if accelerator.sync_gradients and accelerator.optimizer_step_was_skipped:
                allocator.skip(step)
            optimizer.zero_grad()
        assert allocator.global_step == step
    return allocator


@pytest.mark.parametrize("order", [pytest.param("before", marks=full), "after"])
def test_accelerate_loop(order):
    data = rows(STEPS * BATCH * 4)
    theirs, ours = (make(dtype=torch.float64) for _ in range(2))
    _, patterns = train_by_hand(theirs, data, 4, clip=None)
    allocator = train_accelerated(ours, data, order=order)
    assert_close(snapshot(ours), snapshot(theirs))
    assert list(allocator.rank_pattern.values()) == list(patterns[-1].values())
    assert sum(allocator.ranks().values()) == BUDGET["llama"]


@pytest.mark.parametrize(
    ("fused", "order"),
    [
        pytest.param(False, "before", id="unfused-before", marks=full),
        pytest.param(True, "before", id="fused-before", marks=full),
        pytest.param(True, "after", id="fused-after"),
    ],
)
def test_accelerate_loop_with_a_scaler(fused, order):
    # Without clipping nobody unscales the gradients: a fused optimizer does it inside its step.
    data = rows(STEPS * BATCH * 2)
    expected, ours = make(), make()
    by_hand = train_accelerated(expected, data, order=order, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    allocator = train_accelerated(ours, data, order=order, fused=fused, scaler=scaler)
    assert scaler.get_scale() > 2.0**10
    # Powers of two: the same numbers but for the last bits.
    assert_close(snapshot(ours), snapshot(expected), tolerance=1e-5)
    assert allocator.ranks() == by_hand.ranks()
    state, other = allocator.state_dict(), by_hand.state_dict()
    torch.testing.assert_close(state["scores"], other["scores"], rtol=1e-3, atol=1e-12)
    assert allocator.summary()["skipped_steps"] == 0


@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
@pytest.mark.parametrize("overflow_at", [5, FINAL_STEP])
def test_accelerate_loop_that_overflows(overflow_at, fused):
    data = rows(STEPS * BATCH * 2)
    model = make()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    options = {"order": "after", "scaler": scaler, "fused": fused, "overflow_at": overflow_at}
    allocator = train_accelerated(model, data, **options)
    assert scaler.get_scale() == 2.0**9
    assert allocator.summary()["skipped_steps"] == int(overflow_at < FINAL_STEP)
    assert_at_target(model)
    assert all(bool(p.isfinite().all()) for p in model.parameters())

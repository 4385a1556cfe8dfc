"""`AdaLoraCallback` in Lightning's own Trainer.

The oracle is plain PEFT, trained by a loop that calls its allocator and its regulariser by hand.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning_runs import Loader, Manual, Module, Records, data, fit, lightning_trainer
from torch import nn
from trainer_runs import (
    BATCH,
    BUDGET,
    FINAL_STEP,
    STEPS,
    assert_at_target,
    assert_close,
    assert_equal_state,
    assert_same_run,
    base_model,
    make,
    plain,
    plain_rows,
    rows,
    snapshot,
    total_rank,
    train_by_hand,
    trainable,
)

import adalora_kernels.lightning
import adalora_kernels.peft
import adalora_kernels.trainer
from adalora_kernels import RankAllocator
from adalora_kernels.lightning import AdaLoraCallback
from adalora_kernels.peft import allocator_of

full = pytest.mark.full
pytestmark = pytest.mark.filterwarnings("error::UserWarning:adalora_kernels")


@pytest.mark.parametrize(
    ("options", "accumulation"),
    [
        pytest.param({}, 1, id="causal_lm-1", marks=full),
        pytest.param({}, 4, id="causal_lm-4"),
        pytest.param({"task_type": None}, 2, id="no_task_type-2"),
        pytest.param({"orth_reg_weight": 0.0}, 1, id="no_regulariser-1"),
        pytest.param({"deltaT": 3, "tfinal": 0}, 1, id="tfinal_0-1", marks=full),
    ],
)
def test_follows_plain_peft_trained_by_hand(options, accumulation):
    # In float64: what differs by more than rounding is wrong.
    theirs, ours = (make(dtype=torch.float64, **options) for _ in range(2))
    losses, patterns = train_by_hand(
        theirs,
        rows(STEPS * BATCH * accumulation),
        accumulation,
        options.get("orth_reg_weight", 0.1),
    )
    trainer = lightning_trainer(accumulate_grad_batches=accumulation)
    module = fit(trainer, Module(ours), data(STEPS * BATCH * accumulation))
    # The loss is the task's alone.
    means = torch.tensor(module.losses, dtype=torch.float64).view(-1, accumulation).mean(1)
    assert means.tolist() == pytest.approx(losses, rel=1e-6, abs=0)
    assert_close(snapshot(ours), snapshot(theirs))
    allocator = allocator_of(ours)
    assert list(allocator.rank_pattern.values()) == list(patterns[-1].values())
    assert allocator.global_step == trainer.global_step == STEPS and not allocator.attached


class Penalties(pl.Callback):
    """Notes the regulariser before each step, and the ranks after it."""

    def __init__(self):
        self.ranks = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.ranks.append(total_rank(pl_module.model))


@pytest.mark.parametrize("every", [pytest.param(1, marks=full), 5])
def test_logs(every, monkeypatch):
    summary, read = RankAllocator.summary, []
    monkeypatch.setattr(RankAllocator, "summary", lambda self: read.append(1) or summary(self))
    records, ranks = Records(), Penalties()
    trainer = lightning_trainer(
        callbacks=[AdaLoraCallback(), ranks], logger=records, log_every_n_steps=every
    )
    module = fit(trainer, Module())
    logged = [(step, row) for step, row in records.rows if "adalora/budget" in row]
    assert [step + 1 for step, _ in logged] == list(range(every, STEPS + 1, every))
    assert len(read) == len(logged), "the device is read for what is logged only"
    schedule = allocator_of(module.model).schedule
    for step, row in logged:
        assert row["adalora/budget"] == schedule.budget(step + 1)
        assert row["adalora/total_rank"] == row["adalora/budget"] == ranks.ranks[step]
        assert row["adalora/skipped_steps"] == 0 and row["adalora/orth_reg"] > 0
    assert trainer.callback_metrics["adalora/total_rank"] == logged[-1][1]["adalora/total_rank"]


def test_bf16_mixed():
    module = fit(lightning_trainer(precision="bf16-mixed"), Module())
    assert_at_target(module.model)
    assert {p.dtype for p in trainable(module).values()} == {torch.float32}
    expected = fit(lightning_trainer(), Module()).losses
    assert module.losses != expected
    assert module.losses == pytest.approx(expected, rel=2e-2)


class Watch(pl.Callback):
    """Averages and skipped steps after each step; an overflow at the step `overflow_at`."""

    def __init__(self, overflow_at):
        self.overflow_at, self.backwards = overflow_at, 0
        self.averages, self.skipped = {}, {}

    def on_after_backward(self, trainer, pl_module):
        self.backwards += 1
        if self.backwards == self.overflow_at:
            next(iter(trainable(pl_module.model).values())).grad.fill_(math.inf)

    def on_train_batch_end(self, trainer, pl_module, *_):
        allocator = allocator_of(pl_module.model)
        self.averages[self.backwards] = allocator.state_dict()["exp_avg_ipt"]
        self.skipped[self.backwards] = allocator.summary()["skipped_steps"]
        assert allocator.global_step == self.backwards


@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=full)], ids=["", "fused"])
@pytest.mark.parametrize("cls", [Module, Manual], ids=["automatic", "manual"])
@pytest.mark.parametrize("overflow_at", [5, pytest.param(STEPS, marks=full)])
def test_fp16_step_that_overflows(overflow_at, cls, fused):
    # Lightning makes a scaler for GPUs only.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    watch, manual = Watch(overflow_at), cls is Manual
    trainer = lightning_trainer(
        callbacks=[AdaLoraCallback(), watch],
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
        gradient_clip_val=None if manual or fused else 1.0,
        max_steps=2 * STEPS if manual else STEPS,
    )
    module = fit(trainer, cls(fused=fused))
    assert scaler.get_scale() < 2.0**10
    counted = [int(FINAL_STEP > overflow_at <= step) for step in range(1, STEPS + 1)]
    assert list(watch.skipped.values()) == counted
    if overflow_at < FINAL_STEP:
        assert_equal_state(watch.averages[overflow_at], watch.averages[overflow_at - 1])
    assert_at_target(module.model)


@pytest.mark.parametrize("every", [1, pytest.param(2, marks=full)])
def test_manual_optimization(every, tmp_path):
    # Two optimizers are stepped, so the Trainer counts twice as many steps.
    options = {"gradient_clip_val": None, "max_steps": 2 * STEPS}
    expected = Manual(make(), every)
    fit(lightning_trainer(tmp_path, every=2, **options), expected, data(STEPS * BATCH * every))
    assert allocator_of(expected.model).global_step == STEPS
    assert_at_target(expected.model)
    alone = Module(make())
    clip = {"gradient_clip_val": None, "accumulate_grad_batches": every}
    fit(lightning_trainer(**clip), alone, data(STEPS * BATCH * every))
    assert_equal_state(snapshot(expected.model), snapshot(alone.model))
    for step in (5, FINAL_STEP + 1):
        module = Manual(make(seed=2), every)
        checkpoint = str(tmp_path / f"step={2 * step}.ckpt")
        fit(lightning_trainer(**options), module, data(STEPS * BATCH * every), ckpt_path=checkpoint)
        assert_same_run(module.model, expected.model)


def test_an_optimizer_that_has_some_of_the_adapters_is_refused():
    class Halves(Manual):
        def configure_optimizers(self):
            parameters = list(trainable(self.model).values())
            return torch.optim.SGD(parameters), torch.optim.SGD(parameters[:5])

    module = Halves()
    trainer = lightning_trainer(gradient_clip_val=None)
    with pytest.raises(ValueError, match="optimizer must have all trainable adapter parameters"):
        fit(trainer, module)
    assert not allocator_of(module.model).attached


def test_manual_optimization_needs_a_total_step():
    trainer = lightning_trainer(gradient_clip_val=None, max_steps=2 * STEPS)
    with pytest.raises(ValueError, match=r"total_step is None.*AdaLoraCallback\(total_step="):
        fit(trainer, Manual(make(total_step=None)))


class Configured(Module):
    """Makes its model in `configure_model`."""

    def __init__(self, seed=1):
        super().__init__(nn.Identity())
        self.seed = seed

    def configure_model(self):
        if isinstance(self.model, nn.Identity):
            self.model = make(seed=self.seed)


def test_a_model_that_configure_model_makes(tmp_path):
    module = Configured()
    fit(lightning_trainer(tmp_path, every=5), module)
    assert_at_target(module.model)
    expected = fit(lightning_trainer(), Module())
    assert_same_run(module.model, expected.model)
    resumed = Configured(seed=2)
    fit(lightning_trainer(), resumed, ckpt_path=str(tmp_path / "step=5.ckpt"))
    assert_same_run(resumed.model, expected.model)


def test_an_allocator_that_was_attached_by_hand():
    class Attached(Module):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            self.allocator.attach(optimizer)
            return optimizer

    module = Attached()
    module.allocator = adalora_kernels.peft.apply(module.model).allocator
    fit(lightning_trainer(), module)
    assert_same_run(module.model, fit(lightning_trainer(), Module()).model)
    # Without the callback, this is all that a LightningModule needs.
    module = Attached()
    module.allocator = adalora_kernels.peft.apply(module.model).allocator
    fit(lightning_trainer(callbacks=[]), module)
    assert_same_run(module.model, fit(lightning_trainer(), Module()).model)


def test_not_an_adalora_model():
    module = Module()
    module.model = base_model()
    with pytest.raises(ValueError, match="no AdaLoRA adapter"):
        fit(lightning_trainer(), module)


def test_two_models_to_be_trained_are_refused():
    two = Module()
    two.other = make(seed=2)
    with pytest.raises(ValueError, match=r"model.*other"):
        fit(lightning_trainer(), two)


def test_callback_arguments():
    model = make()
    report = adalora_kernels.peft.apply(model)
    with pytest.raises(TypeError, match=r"report\.allocator"):
        AdaLoraCallback(report)
    with pytest.raises(TypeError, match="allocator must be a RankAllocator"):
        AdaLoraCallback(model)
    assert AdaLoraCallback(report.allocator, total_step=24 / 2).total_step == 12


def test_the_other_trainers_callback():
    with pytest.raises(AttributeError, match=r"that of adalora_kernels\.trainer, Lightning's"):
        fit(lightning_trainer(callbacks=[adalora_kernels.trainer.AdaLoraCallback()]), Module())


class PlainModule(pl.LightningModule):
    def __init__(self, seed=0):
        super().__init__()
        self.net, self.allocator = plain(total_step=None, seed=seed)

    def training_step(self, batch, batch_idx):
        return self.net(**batch)["loss"]

    def configure_optimizers(self):
        return torch.optim.AdamW(trainable(self).values(), lr=1e-2)


def test_a_plain_torch_model(tmp_path):
    loader = Loader(plain_rows(STEPS * BATCH), batch_size=BATCH)
    module = PlainModule()
    fit(
        lightning_trainer(tmp_path, callbacks=[AdaLoraCallback(module.allocator)], every=5),
        module,
        loader,
    )
    assert isinstance(module.allocator, RankAllocator)
    assert module.allocator.frozen and sum(module.allocator.ranks().values()) == 4
    resumed = PlainModule(seed=3)
    fit(
        lightning_trainer(callbacks=[AdaLoraCallback(resumed.allocator)]), resumed, loader,
        ckpt_path=str(tmp_path / "step=5.ckpt"),
    )  # fmt: skip
    assert_equal_state(resumed.net.state_dict(), module.net.state_dict())
    assert_equal_state(resumed.allocator.state_dict(), module.allocator.state_dict())


def test_the_other_package_name():
    other = pytest.importorskip("pytorch_lightning")

    class Other(other.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = make()

        def training_step(self, batch, batch_idx):
            return self.model(**batch).loss

        configure_optimizers = Module.configure_optimizers
        fused = False

    module = fit(lightning_trainer(cls=other.Trainer), Other())
    assert_same_run(module.model, fit(lightning_trainer(), Module()).model)


def test_the_other_package_alone(monkeypatch):
    other = pytest.importorskip("pytorch_lightning")
    monkeypatch.setitem(sys.modules, "lightning", None)
    spec = importlib.util.spec_from_file_location(
        "adalora_kernels.lightning_again", adalora_kernels.lightning.__file__
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert issubclass(module.AdaLoraCallback, other.Callback)


def test_two_processes(tmp_path):
    script = Path(__file__).with_name("lightning_ddp.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, script, tmp_path],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    reports = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("rank*.json"))]
    assert len(reports) == 2
    # Two halves of a batch are the whole one, and both processes have the same.
    assert reports[0]["ranks"] == reports[1]["ranks"] == reports[0]["expected"]
    assert reports[0]["checksum"] == reports[1]["checksum"]
    assert reports[0]["difference"] < 1e-6
    assert reports[0]["step"] == STEPS and sum(reports[0]["ranks"].values()) == BUDGET["llama"]

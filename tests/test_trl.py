"""TRL's own trainers, which make the PEFT model themselves from an AdaLoraConfig."""

import functools

import pytest
import torch
from datasets import Dataset
from loralib_twin import twin_orth
from peft import AdaLoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from trainer_runs import (
    BATCH,
    BUDGET,
    KINDS,
    SCHEDULE,
    STEPS,
    assert_at_target,
    assert_close,
    assert_same_run,
    base_model,
    in_plain_peft,
    logits_of,
    make,
    snapshot,
    total_rank,
)
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

import adalora_kernels.peft
from adalora_kernels.peft import allocator_of
from adalora_kernels.trainer import AdaLoraCallback

full = pytest.mark.full
WORDS = ["<pad>", "<s>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz"]


def tokenizer():
    """A tokenizer for the 32 tokens of the tiny Llama."""
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>",
    )  # fmt: skip


def sentences(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(4, len(WORDS), (n, 8), generator=generator)
    return [" ".join(WORDS[i] for i in row) for row in numbers.tolist()]


def distinct_letters(completions, **kwargs):
    return [float(len(set(text))) for text in completions]


class PeftByHand(TrainerCallback):
    """What PEFT needs here: its allocator stepped, its ranknum kept from being trained, and its
    regulariser in the gradients. PEFT adds that to the model's own loss, which TRL does not use.
    """

    def on_init_end(self, args, state, control, model, **kwargs):
        for name, p in model.named_parameters():
            if "ranknum" in name:
                p.requires_grad_(False)

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        twin_orth(model, 0.1).backward()

    def on_optimizer_step(self, args, state, control, model, **kwargs):
        model.base_model.update_and_allocate(state.global_step + 1)


ADALORA = {
    "task_type": "CAUSAL_LM",
    "target_modules": KINDS["llama"],
    "lora_alpha": 16,
    "orth_reg_weight": 0.1,
    "total_step": STEPS,
    **SCHEDULE,
}


def trl_trainer(cls, config, out, rows, *, model=None, callbacks=None, **options):
    torch.manual_seed(1)
    trainer = cls(
        model=model or base_model(dtype=torch.float64),
        args=config(
            output_dir=str(out),
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            **{"save_strategy": "no", **options},
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        peft_config=None if model else AdaLoraConfig(**ADALORA),
        callbacks=[AdaLoraCallback()] if callbacks is None else callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def sft(out, **options):
    rows = [{"text": text} for text in sentences(STEPS * BATCH)]
    return trl_trainer(SFTTrainer, SFTConfig, out, rows, **options)


def dpo(out, **options):
    texts = sentences(3 * STEPS * BATCH)
    rows = [
        {"prompt": a, "chosen": " " + b, "rejected": " " + c}
        for a, b, c in zip(texts[::3], texts[1::3], texts[2::3], strict=True)
    ]
    return trl_trainer(DPOTrainer, DPOConfig, out, rows, **options)


@pytest.mark.parametrize("make_trainer", [sft, dpo])
def test_follows_plain_peft(make_trainer, tmp_path):
    theirs = make_trainer(tmp_path, callbacks=[PeftByHand()])
    theirs.train()
    ours = make_trainer(tmp_path)
    ours.train()
    assert_close(snapshot(ours.model), snapshot(theirs.model))
    assert_at_target(ours.model)
    assert total_rank(theirs.model) == BUDGET["llama"]
    pattern = theirs.model.peft_config["default"].rank_pattern
    assert list(allocator_of(ours.model).rank_pattern.values()) == list(pattern.values())
    ours.save_model(tmp_path / "final")
    saved = in_plain_peft(tmp_path / "final", dtype=torch.float64)
    torch.testing.assert_close(saved, logits_of(ours.model))


@pytest.mark.parametrize("beta", [0.1, pytest.param(0.0, marks=full)])
def test_grpo(beta, tmp_path):
    # With beta the model without its adapters is the reference, in the middle of a step.
    trainer = trl_trainer(
        functools.partial(GRPOTrainer, reward_funcs=distinct_letters), GRPOConfig, tmp_path,
        [{"prompt": text} for text in sentences(STEPS * BATCH)], beta=beta, num_generations=2,
        max_completion_length=4,
    )  # fmt: skip
    trainer.train()
    assert_at_target(trainer.model)
    records = [r for r in trainer.state.log_history if "adalora/budget" in r]
    schedule = allocator_of(trainer.model).schedule
    assert [r["adalora/budget"] for r in records] == [schedule.budget(s) for s in range(1, 13)]


@pytest.mark.parametrize("make_trainer", [sft, pytest.param(dpo, marks=full)])
def test_resumes_bitwise(make_trainer, tmp_path):
    expected = make_trainer(tmp_path, save_strategy="steps", save_steps=5)
    expected.train()
    for step in (5, 10):
        trainer = make_trainer(tmp_path / "other")
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_same_run(trainer.model, expected.model)


def test_a_model_that_has_adapters_already(tmp_path):
    # As for SFT after SFT: TRL takes the PeftModel as it is.
    model = make(dtype=torch.float64)
    trainer = sft(tmp_path, model=model)
    assert allocator_of(trainer.model) is allocator_of(model)
    trainer.train()
    assert_at_target(model)


def test_a_reference_adapter_is_pefts_error(tmp_path):
    # DPO without peft_config wants a copy of the adapter, and PEFT allows AdaLoRA no second one.
    for ours in (False, True):
        model = make(dtype=torch.float64)
        if ours:
            adalora_kernels.peft.apply(model)
        with pytest.raises(ValueError, match="supports only 1 trainable adapter"):
            dpo(tmp_path, model=model, callbacks=[])

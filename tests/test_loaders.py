"""What we save goes through the loaders of PEFT, transformers, sentence-transformers, diffusers."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import triplets_in
from peft import (
    AdaLoraConfig,
    AutoPeftModelForCausalLM,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    BertTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import adalora_kernels.peft
from adalora_kernels.export import export_lora, load_adapter, save_adapter
from adalora_kernels.trainer import AdaLoraCallback

STEPS = 12
SCHEDULE = {"init_r": 6, "target_r": 3, "tinit": 2, "tfinal": 3, "total_step": STEPS}
IDS = torch.arange(24).reshape(2, 12) + 3
full = pytest.mark.full


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_attention_heads=4,
            num_hidden_layers=2,
            max_position_embeddings=64,
        )
    )


def config(**options):
    targets = ["q_proj", "v_proj"]
    return AdaLoraConfig(**{**SCHEDULE, "target_modules": targets, **options})


def train(model, forward, steps=STEPS):
    """Through the optimizer; the allocator."""
    allocator = adalora_kernels.peft.apply(model).allocator
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    allocator.attach(optimizer)
    model.train()
    for _ in range(steps):
        forward().backward()
        optimizer.step()
        optimizer.zero_grad()
    allocator.detach()
    model.eval()
    return allocator


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
            model = get_peft_model(model, config(task_type="CAUSAL_LM"))
        else:
            model.add_adapter(config(task_type="CAUSAL_LM"))
        allocator = train(model, lambda: model(input_ids=IDS, labels=IDS).loss)
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


@pytest.mark.parametrize("enabled", [False, True], ids=["plain", "enabled"])
@pytest.mark.parametrize("loader", LOADERS)
def test_loaders_of_peft_and_transformers(loader, enabled, saved):
    for name in ("saved", "trainer"):
        folder = saved.folder / name
        assert sum(triplets_in(folder).values()) == 12
        if enabled:
            adalora_kernels.peft.enable()
        try:
            model = LOADERS[loader](saved, folder)
        finally:
            adalora_kernels.peft.disable()
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


def test_state_dict_round_trip(saved):
    state = get_peft_model_state_dict(saved.model)
    plain = get_peft_model(based(saved.base), config(task_type="CAUSAL_LM"))
    if not any(name.startswith("base_model") for name in state):
        state = {f"base_model.model.{name}": tensor for name, tensor in state.items()}
    set_peft_model_state_dict(plain, state)
    torch.testing.assert_close(logits(plain), saved.expected)


@pytest.mark.parametrize("writer", ["compact", "checkpoint", "peft"])
@pytest.mark.parametrize("enabled", [False, True], ids=["plain", "enabled"])
def test_pefts_own_form_still_loads(writer, enabled, saved, tmp_path):
    """What `save_adapter` writes, earlier versions wrote, and PEFT itself: with a rank_pattern."""
    expected = saved.expected
    if writer == "peft":
        model = get_peft_model(based(saved.base), config(task_type="CAUSAL_LM"))
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
    if enabled:
        adalora_kernels.peft.enable()
    try:
        model = PeftModel.from_pretrained(based(saved.base), tmp_path)
        other = get_peft_model(based(saved.base), config(task_type="CAUSAL_LM"))
    finally:
        adalora_kernels.peft.disable()
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
    if how == "enable":
        adalora_kernels.peft.enable()
    try:
        if how == "load_adapter":
            model = get_peft_model(based(saved.base), config(task_type="CAUSAL_LM"))
            adalora_kernels.peft.apply(model)
            load_adapter(model, folder)
        else:
            model = PeftModel.from_pretrained(based(saved.base), folder, is_trainable=True)
    finally:
        adalora_kernels.peft.disable()
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


# Hosts


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    path = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnop"]
    (path / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(path / "vocab.txt")).save_pretrained(path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=21, intermediate_size=24, **sizes)).save_pretrained(path)
    return path


def test_sentence_transformers(bert, tmp_path):
    library = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    models = pytest.importorskip("sentence_transformers.models")
    words = ["a b c", "n o p"]

    def make():
        transformer = models.Transformer(str(bert))
        return library.SentenceTransformer(
            modules=[transformer, models.Pooling(transformer.get_word_embedding_dimension())]
        )

    model = make()
    model.add_adapter(config(target_modules=["query", "value"], task_type="FEATURE_EXTRACTION"))
    allocator = train(
        model, lambda: model(model.tokenize(words))["sentence_embedding"].square().mean()
    )
    assert sum(allocator.ranks().values()) == 12
    expected = model.encode(words)
    assert np.abs(expected - make().encode(words)).max() > 1e-3
    model.save(str(tmp_path / "saved"))
    assert sum(triplets_in(tmp_path / "saved").values()) == 12
    whole = library.SentenceTransformer(str(tmp_path / "saved"))
    save_adapter(model, tmp_path / "compact")
    save_adapter(model, tmp_path / "checkpoint", full_rank=True)
    export_lora(model, tmp_path / "lora")
    results = [whole]
    for folder in ("saved", "checkpoint", "lora"):
        results.append(make())
        results[-1].load_adapter(str(tmp_path / folder))
    for other in results:
        np.testing.assert_allclose(other.encode(words), expected, atol=1e-6)
    # Only PEFT's own loader reads that form.
    with pytest.raises(RuntimeError, match="mismatch"):
        make().load_adapter(str(tmp_path / "compact"))
    plain = PeftModel.from_pretrained(BertModel.from_pretrained(bert), tmp_path / "compact").eval()
    tokens = {n: t for n, t in model.tokenize(words).items() if isinstance(t, torch.Tensor)}
    ours = model[0](dict(tokens))["token_embeddings"]
    torch.testing.assert_close(plain(**tokens).last_hidden_state, ours)


def unet(library):
    torch.manual_seed(0)
    return library.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        norm_num_groups=4,
        attention_head_dim=4,
    )


def test_diffusers(tmp_path):
    library = pytest.importorskip("diffusers", reason="needs diffusers")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([1, 2])
    x = *x, torch.randn(2, 3, 8, generator=generator)

    def sample(model):
        with torch.no_grad():
            return model.eval()(*x).sample

    model = unet(library).requires_grad_(False)
    model.add_adapter(config(target_modules=["to_q", "to_v"]))
    allocator = train(model, lambda: model(*x).sample.square().mean())
    expected = sample(model)
    assert (expected - sample(unet(library))).abs().max() > 1e-3
    # diffusers writes an AdaLoRA adapter, ours like PEFT's, and reads only LoRA.
    model.save_lora_adapter(tmp_path / "own")
    name = "pytorch_lora_weights.safetensors"
    with pytest.raises(TypeError, match="LoraConfig"):
        unet(library).load_lora_adapter(tmp_path / "own", prefix=None, weight_name=name)
    with safe_open(tmp_path / "own" / name, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    other = unet(library)
    other.add_adapter(AdaLoraConfig(**metadata))
    set_peft_model_state_dict(other, load_file(tmp_path / "own" / name))
    torch.testing.assert_close(sample(other), expected)
    assert metadata["rank_pattern"] is None
    assert sum(triplets_in(load_file(tmp_path / "own" / name)).values()) == sum(
        allocator.ranks().values()
    )
    # As LoRA it reads them.
    export_lora(model, tmp_path / "lora")
    other = unet(library)
    other.load_lora_adapter(
        tmp_path / "lora", prefix="base_model.model", weight_name="adapter_model.safetensors"
    )
    torch.testing.assert_close(sample(other), expected)
    for folder, save in (("compact", save_adapter), ("lora", export_lora)):
        save(model, tmp_path / folder)
        plain = PeftModel.from_pretrained(unet(library), tmp_path / folder)
        torch.testing.assert_close(sample(plain), expected)


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


# Configs


@pytest.mark.parametrize("save", [PeftModel.save_pretrained, save_adapter, export_lora])
def test_numbers_in_a_config_are_plain(save, tmp_path):
    """JSON knows none of NumPy's, and PEFT would read 24 / 2 back as 12.0."""
    options = {
        "init_r": np.int64(4),
        "target_r": torch.tensor(2),
        "total_step": 24 / 2,
        "tinit": np.float64(2.0),
        "lora_alpha": np.float32(8),
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
    adalora_kernels.peft.apply(model)
    save(model, tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    if save is not export_lora:
        for name, number in {"init_r": 4, "target_r": 2, "total_step": 12, "tinit": 2}.items():
            assert written[name] == number and type(written[name]) is int, name
        assert (written["beta1"], written["orth_reg_weight"]) == (0.5, 0.25)
        assert written["layers_to_transform"] == [0]
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(logits(loaded), expected)

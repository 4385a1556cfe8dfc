"""`adalora_kernels.export`: what it writes goes through plain PEFT; what it reads is checked."""

import copy
import json

import pytest
import torch
from helpers import Mlp, batch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.adalora import SVDLinear as PeftSVDLinear
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification
from transformers.pytorch_utils import Conv1D

import adalora_kernels.peft
from adalora_kernels import RankAllocator
from adalora_kernels.export import (
    STATE_NAME,
    export_lora,
    load_adapter,
    load_state,
    save_adapter,
    save_state,
)

STEPS = 30
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


class Net(nn.Module):
    def __init__(self, kind="linear"):
        super().__init__()
        torch.manual_seed(7)
        if kind == "conv2d":
            # The 16 inputs as 4 channels of 2x2 pixels.
            self.fc0, self.fc1 = nn.Conv2d(4, 6, (2, 1), padding=1), nn.Conv2d(6, 4, 3, padding=1)
            self.fc2 = nn.Linear(36, 8)
        else:
            for i, (n, m) in enumerate(((16, 24), (24, 20), (20, 8))):
                layer = Conv1D(m, n) if kind == "conv1d" else nn.Linear(n, m)
                setattr(self, f"fc{i}", layer)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        if isinstance(getattr(self.fc0, "base_layer", self.fc0), nn.Conv2d):
            x = x.reshape(-1, 4, 2, 2)
        x = torch.tanh(self.fc1(torch.tanh(self.fc0(x))))
        return self.norm(self.fc2(x.flatten(1)[:, :36]))


def config_of(kind="linear", **options):
    arguments = {
        "init_r": 6,
        "target_r": 2,
        "lora_alpha": 16,
        "total_step": STEPS,
        "tinit": 3,
        "tfinal": 5,
        "target_modules": ["fc0", "fc1", "fc2"],
        "fan_in_fan_out": kind == "conv1d",
        **options,
    }
    return AdaLoraConfig(**arguments)


def make(kind="linear", name="default", **options):
    """A plain PEFT model whose adapter does nothing yet."""
    return get_peft_model(Net(kind), config_of(kind, **options), adapter_name=name).train()


def fill(model, name="default", dead="fc1"):
    """What a pruned adapter is after training: `dead` has rank 0, the others 4 of 6."""
    torch.manual_seed(1)
    with torch.no_grad():
        for module_name, module in model.named_modules():
            if isinstance(getattr(module, "lora_E", None), nn.ParameterDict):
                e = nn.init.normal_(module.lora_E[name])
                nn.init.normal_(module.lora_A[name], std=0.3)
                nn.init.normal_(module.lora_B[name], std=0.3)
                e[1::3] = 0
                if module_name.endswith(dead):
                    e.zero_()
        for parameter_name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" not in parameter_name:
                parameter.add_(torch.randn_like(parameter))
    return model


def train(model, optimizer, allocator, steps):
    losses = []
    for step in steps:
        x, target = batch(step)
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        allocator.step(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def adamw(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def trained(upto=STEPS, **options):
    model = make(**options)
    allocator = adalora_kernels.peft.apply(model).allocator
    optimizer = adamw(model)
    train(model, optimizer, allocator, range(1, upto + 1))
    return model, allocator, optimizer


def logits(model, dtype=torch.float32):
    with torch.no_grad():
        return model.eval()(batch(0)[0].to(dtype))


def read(folder):
    return json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)


def loaded(folder, net=Net):
    """In plain PEFT."""
    return PeftModel.from_pretrained(net(), folder)


def assert_files_are_the_same_function(model, folder, other=None):
    """Both kinds of files in plain PEFT, and the first in `other` too."""
    expected = logits(model)
    save_adapter(model, folder / "a")
    export_lora(model, folder / "l")
    for name in ("a", "l"):
        torch.testing.assert_close(logits(loaded(folder / name)), expected)
    if other is not None:
        load_adapter(other, folder / "a")
        torch.testing.assert_close(logits(other), expected)


def snapshot(model, allocator=None):
    state = {} if allocator is None else allocator.state_dict()
    return copy.deepcopy((model.state_dict(), state))


def assert_same(before, after):
    for a, b in zip(before, after, strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            if key in ("names", "ranks") or not isinstance(value, torch.Tensor | list):
                assert b[key] == value, key
            else:
                torch.testing.assert_close(b[key], value, rtol=0, atol=0, equal_nan=True)


full = pytest.mark.full
VARIANTS = [
    {},
    pytest.param({"kind": "conv1d"}, marks=full),
    {"kind": "conv2d"},
    {"bias": "lora_only"},
    pytest.param({"bias": "all"}, marks=full),
    {"lora_alpha": 0},
    pytest.param({"modules_to_save": ["norm"]}, marks=full),
    {"modules_to_save": ["norm"], "bias": "all"},
    pytest.param({"target_modules": r"fc\d"}, marks=full),
]


@pytest.mark.parametrize("full_rank", [False, True], ids=["pruned", "full_rank"])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_plain_peft_reads_it(options, full_rank, tmp_path):
    model = fill(make(**options))
    save_adapter(model, tmp_path, full_rank=full_rank)
    config, tensors = read(tmp_path)
    kind = options.get("kind", "linear")
    if full_rank:
        assert config["rank_pattern"] is None
    else:
        expected = [True, False, True, True, False, True]
        assert config["rank_pattern"] == {
            "fc0.lora_E": expected,
            "fc1.lora_E": [False] * 6,
            "fc2.lora_E": expected,
        }
    prefix = "base_model.model.fc0.lora_"
    ranks = {key: tensors[prefix + key].shape[d] for key, d in (("A", 0), ("E", 0), ("B", 1))}
    assert set(ranks.values()) == {6 if full_rank else 4}
    for trainable in (False, True):
        plain = PeftModel.from_pretrained(Net(kind), tmp_path, is_trainable=trainable)
        torch.testing.assert_close(logits(plain), logits(model))
    # And the file has what PEFT's own has, but for what was pruned.
    model.save_pretrained(tmp_path / "peft")
    theirs = read(tmp_path / "peft")[1]
    double = {k for k in theirs if "modules_to_save" in k}  # the biases in it, a second time
    assert tensors.keys() == theirs.keys() - double
    # Both go into a model that is not pruned, without a change of its shapes.
    parameters = dict(model.named_parameters())
    for folder in (tmp_path, tmp_path / "peft"):
        other = make(**options)
        load_adapter(other, folder)
        torch.testing.assert_close(logits(other), logits(model))
        for name, parameter in other.named_parameters():
            assert parameter.shape == parameters[name].shape
            if "lora_E" in name or folder != tmp_path:
                assert torch.equal(parameter, parameters[name])


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_lora_export_is_the_merged_model(options, tmp_path):
    model = fill(make(**options))
    export_lora(model, tmp_path)
    config, _ = read(tmp_path)
    assert config["peft_type"] == "LORA" and config["target_modules"] == ["fc0", "fc2"]
    assert config["rank_pattern"] == config["alpha_pattern"] == {"^fc0": 4, "^fc2": 4}
    expected = logits(model)
    lora = PeftModel.from_pretrained(Net(options.get("kind", "linear")), tmp_path)
    layers = {n: m for n, m in lora.named_modules() if isinstance(m, LoraLayer)}
    assert [name.split(".")[-1] for name in layers] == ["fc0", "fc2"]
    assert all(layer.scaling == {"default": 1.0} for layer in layers.values())
    torch.testing.assert_close(logits(lora), expected)
    torch.testing.assert_close(logits(lora.merge_and_unload()), expected)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected)


@pytest.mark.parametrize("upto", [12, STEPS], ids=["budgeting", "final"])
def test_lora_export_after_training(upto, tmp_path):
    model, allocator, _ = trained(upto)
    export_lora(model, tmp_path)
    torch.testing.assert_close(logits(loaded(tmp_path)), logits(model))
    if upto == STEPS:
        kept = [r for r in allocator.ranks().values() if r > 0]
        assert sorted(read(tmp_path)[0]["rank_pattern"].values()) == sorted(kept)


def test_lora_export_in_bfloat16_is_rounded_once(tmp_path):
    model = fill(make()).to(torch.bfloat16)
    export_lora(model, tmp_path)
    layer = model.base_model.model.fc0
    tensors = read(tmp_path)[1]
    b = tensors["base_model.model.fc0.lora_B.weight"]
    e = layer.lora_E["default"].detach().squeeze(1).double()
    exact = layer.lora_B["default"].detach().double() * e * (16 / (6 + 1e-5))
    assert torch.equal(b, exact[:, e != 0].to(torch.bfloat16))
    a = tensors["base_model.model.fc0.lora_A.weight"]
    assert torch.equal(a, layer.lora_A["default"][e != 0])


class Nested(nn.Module):
    """Every name is the end of another."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.fc, self.block, self.xfc = nn.Linear(16, 8), nn.Module(), nn.Linear(16, 8)
        self.block.fc, self.block.block = nn.Linear(16, 8), nn.Module()
        self.block.block.fc = nn.Linear(16, 8)

    def forward(self, x):
        return self.fc(x) + self.block.fc(x) * self.block.block.fc(x) + self.xfc(x)


@pytest.mark.parametrize(
    "dead", [pytest.param("xfc", marks=full), "block.block.fc", "model.block.fc", "model.fc"]
)
def test_lora_export_takes_exactly_its_modules(dead, tmp_path):
    config = config_of(target_modules=["fc", "xfc"], init_r=6)
    model = fill(get_peft_model(Nested(), config), dead="nothing")
    layer = model.get_submodule(f"base_model.{'' if dead.startswith('model') else 'model.'}{dead}")
    with torch.no_grad():
        layer.lora_E["default"].zero_()
        model.base_model.model.fc.lora_E["default"][0] = 0
    export_lora(model, tmp_path)
    # A list of names would take block.fc with fc.
    listed = dead in ("xfc", "model.fc")
    assert isinstance(read(tmp_path)[0]["target_modules"], list if listed else str)
    lora = loaded(tmp_path, Nested)
    assert sum(isinstance(m, LoraLayer) for m in lora.modules()) == 3
    torch.testing.assert_close(logits(lora), logits(model))
    ranks = {n: p.shape[0] for n, p in lora.named_parameters() if "lora_A" in n}
    assert sorted(ranks.values()) == ([4, 4, 4] if dead == "model.fc" else [3, 4, 4])


@pytest.mark.parametrize("who", ["plain", "applied", "pruned", "pefts", "loaded"])
def test_lora_export_of_nothing(who, tmp_path):
    """An adapter that nobody has trained is not one of which nothing is left."""
    model, message = make(), "adapter is untrained"
    if who == "applied":
        adalora_kernels.peft.apply(model)
    elif who != "plain":
        message = "no triplet is left"
        model = make(target_r=0, lora_dropout=0.0)
        step = model.base_model.update_and_allocate
        if who != "pefts":
            step = adalora_kernels.peft.apply(model).allocator.step
        optimizer = adamw(model)
        for i in range(1, STEPS + 1):
            model(batch(i)[0]).square().mean().backward()
            optimizer.step()
            step(i)
            optimizer.zero_grad()
    if who == "loaded":
        model.save_pretrained(tmp_path / "a")
        model = loaded(tmp_path / "a")
    with pytest.raises(ValueError, match=message):
        export_lora(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("stop", [2, 12, 26, 27], ids=["initial", "budgeting", "final", "shrunk"])
def test_full_rank_checkpoint_resumes_bitwise(stop, tmp_path):
    model, allocator, optimizer = trained(stop)
    if stop == 27:
        allocator.shrink(optimizer)
    save_adapter(model, tmp_path, full_rank=True)
    config, tensors = read(tmp_path)
    assert config["rank_pattern"] is None and (tmp_path / STATE_NAME).exists()
    assert tensors["base_model.model.fc0.lora_A"].shape == (6, 16)
    torch.testing.assert_close(logits(loaded(tmp_path)), logits(model))

    resumed = make()
    other = adalora_kernels.peft.apply(resumed).allocator
    load_adapter(resumed, tmp_path)
    assert_same(snapshot(model, allocator), snapshot(resumed, other))
    other_optimizer = adamw(resumed)
    other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    rest = range(stop + 1, STEPS + 1)
    expected = train(model.train(), optimizer, allocator, rest)
    assert train(resumed.train(), other_optimizer, other, rest) == expected
    assert_same(snapshot(model, allocator), snapshot(resumed, other))


def test_triplets_that_come_back_are_kept(tmp_path):
    # In the budgeting phase the optimizer moves lora_E of pruned triplets away from 0 again.
    model, allocator, optimizer = trained(12)
    x, target = batch(13)
    (model(x) - target).square().mean().backward()
    optimizer.step()
    assert sum(allocator.ranks().values()) < 18
    save_adapter(model, tmp_path)
    assert all(all(alive) for alive in (read(tmp_path)[0]["rank_pattern"] or {}).values())
    torch.testing.assert_close(logits(loaded(tmp_path)), logits(model))


def test_triplets_that_the_layers_skip_are_not_saved(tmp_path):
    model, allocator, _ = trained()
    with torch.no_grad():
        for adapter in allocator.adapters:
            adapter.lora_E.add_(1.0)  # as weight decay or momentum may, until the next step
    assert_files_are_the_same_function(model, tmp_path)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded(tmp_path)), logits(model))


@pytest.mark.parametrize("name", ["default", "fc"])
def test_after_pefts_own_training(name, tmp_path):
    model = make(name=name)
    optimizer = adamw(model)
    for step in range(1, STEPS + 1):
        x, target = batch(step)
        (model(x) - target).square().mean().backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    save_adapter(model, tmp_path)
    assert sum(map(sum, read(tmp_path)[0]["rank_pattern"].values())) == 6
    torch.testing.assert_close(logits(loaded(tmp_path)), logits(model))


def test_applied_in_the_middle_of_pefts_training(tmp_path):
    """PEFT has assigned a rank_pattern; from the next save on, it is that of the file."""
    model = make()
    optimizer = adamw(model)
    for step in range(1, 13):
        x, target = batch(step)
        (model(x) - target).square().mean().backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    allocator = adalora_kernels.peft.apply(model).allocator
    for step in (None, 13):
        if step is not None:
            train(model.train(), optimizer, allocator, [step])
        model.save_pretrained(tmp_path)
        torch.testing.assert_close(logits(loaded(tmp_path)), logits(model))


@pytest.mark.parametrize("shrunk", [False, True], ids=["masked", "shrunk"])
def test_release_after_training_holds_the_budget(shrunk, tmp_path):
    model, allocator, optimizer = trained()
    save_adapter(model, tmp_path, full_rank=True)
    if shrunk:
        allocator.shrink(optimizer)
    save_adapter(model, tmp_path)
    pattern = read(tmp_path)[0]["rank_pattern"]
    expected = {k.removesuffix(".default"): v for k, v in allocator.rank_pattern.items()}
    assert pattern == expected and sum(map(sum, pattern.values())) == 6
    # The state of the checkpoint that was there before is not for this adapter.
    assert {p.name for p in tmp_path.iterdir()} == {WEIGHTS, CONFIG}
    torch.testing.assert_close(logits(loaded(tmp_path)), logits(model))
    other = make()
    adalora_kernels.peft.apply(other)
    load_adapter(other, tmp_path)
    torch.testing.assert_close(logits(other), logits(model))


@pytest.mark.parametrize("full_rank", [False, True], ids=["pruned", "full_rank"])
def test_adapter_that_was_loaded_pruned_and_trained_on(full_rank, tmp_path):
    save_adapter(fill(make()), tmp_path / "first")

    def trainable():
        return PeftModel.from_pretrained(Net(), tmp_path / "first", is_trainable=True)

    model = trainable()
    model.peft_config["default"].target_r = 1
    allocator = adalora_kernels.peft.apply(model).allocator
    train(model, adamw(model), allocator, range(1, STEPS + 1))
    assert sum(allocator.ranks().values()) == 3
    save_adapter(model, tmp_path / "second", full_rank=full_rank)
    config, tensors = read(tmp_path / "second")
    for name, alive in config["rank_pattern"].items():
        assert len(alive) == 6 and sum(alive) == len(tensors[f"base_model.model.{name}"])
    assert sum(map(sum, config["rank_pattern"].values())) == (8 if full_rank else 3)
    expected = logits(model)
    torch.testing.assert_close(logits(loaded(tmp_path / "second")), expected)
    for other in (make(), trainable()):
        load_adapter(other, tmp_path / "second")
        torch.testing.assert_close(logits(other), expected)


def test_scaling_of_a_layer_that_is_not_the_configs(tmp_path):
    # In a bfloat16 model PEFT's ranknum is trained, and not saved.
    model = fill(make())
    model.base_model.model.fc0.ranknum["default"].data.fill_(3.88)
    model.base_model.model.fc2.scaling["default"] = 5.0
    assert_files_are_the_same_function(model, tmp_path, copy.deepcopy(model))


@pytest.mark.parametrize(
    "name", ["fc", pytest.param("fc0", marks=full), "norm", pytest.param("lora_E", marks=full)]
)
def test_adapter_called_like_a_module(name, tmp_path):
    options = {"name": name, "bias": "all"}
    model = fill(make(**options), name)
    assert_files_are_the_same_function(model, tmp_path, make(**options))


@pytest.mark.parametrize("apply", [False, True], ids=["plain", "applied"])
def test_one_of_two_adapters(apply, tmp_path):
    model = fill(make())
    model.add_adapter("other", config_of(target_modules=["fc0"], inference_mode=True))
    if apply:
        adalora_kernels.peft.apply(model)
    expected = logits(model)
    save_adapter(model, tmp_path / "default")
    nn.init.normal_(model.base_model.model.fc0.lora_E["other"])
    save_adapter(model, tmp_path / "other", adapter_name="other")
    model.set_adapter("other")
    for name, y in (("default", expected), ("other", logits(model))):
        torch.testing.assert_close(logits(loaded(tmp_path / name)), y)
    with pytest.raises(ValueError, match=r"\['default', 'other'\], got 'none'"):
        save_adapter(model, tmp_path, adapter_name="none")


@pytest.mark.parametrize(
    "around",
    [
        nn.DataParallel,
        torch.compile,
        lambda model: model.base_model,
        lambda model: torch.compile(nn.DataParallel(model)),
    ],
    ids=["data_parallel", "compiled", "tuner", "both"],
)
def test_what_is_around_the_model(around, tmp_path):
    model = fill(make(modules_to_save=["norm"]))
    save_adapter(model, tmp_path / "expected")
    save_adapter(around(model), tmp_path / "actual")
    assert read(tmp_path / "actual")[0] == read(tmp_path / "expected")[0]
    assert_same([read(tmp_path / "actual")[1]], [read(tmp_path / "expected")[1]])
    other = make(modules_to_save=["norm"])
    load_adapter(around(other), tmp_path / "actual")
    torch.testing.assert_close(logits(other), logits(model))


def test_mixed_model(tmp_path):
    mixed = get_peft_model(Net(), LoraConfig(target_modules=["fc1"]), "lora", mixed=True)
    mixed.add_adapter("default", config_of(target_modules=["fc0", "fc2"]))
    mixed.set_adapter("default")
    assert_files_are_the_same_function(fill(mixed), tmp_path)


def bert():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertForSequenceClassification(
        BertConfig(vocab_size=50, intermediate_size=24, **sizes)
    ).eval()


BERT = {"task_type": "SEQ_CLS", "target_modules": ["query", "value", "dense"]}


def test_transformers_model_with_a_classifier(tmp_path):
    model = fill(get_peft_model(bert(), config_of(**BERT)), dead="query").eval()
    ids = torch.arange(20).reshape(2, 10)
    expected = model(ids).logits
    assert (expected - bert()(ids).logits).abs().max() > 0.1
    save_adapter(model, tmp_path / "a")
    export_lora(model, tmp_path / "l")
    for folder in ("a", "l"):
        config, tensors = read(tmp_path / folder)
        assert config["task_type"] == "SEQ_CLS" and config["auto_mapping"] is None
        assert "base_model.model.classifier.weight" in tensors
        plain = loaded(tmp_path / folder, bert)
        torch.testing.assert_close(plain(ids).logits, expected)
    other = get_peft_model(bert(), config_of(**BERT)).eval()
    load_adapter(other, tmp_path / "a")
    torch.testing.assert_close(other(ids).logits, expected)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, expected)


def test_resized_embeddings_go_with_the_adapter(tmp_path):
    bert().save_pretrained(tmp_path / "base")

    def resized():
        base = BertForSequenceClassification.from_pretrained(tmp_path / "base")
        base.resize_token_embeddings(53)
        return base

    ids = torch.arange(33, 53).reshape(2, 10)
    model = fill(get_peft_model(resized(), config_of(**BERT))).eval()
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        save_adapter(model, tmp_path / "a")
    other = get_peft_model(resized(), config_of(**BERT)).eval()
    nn.init.zeros_(other.base_model.model.bert.embeddings.word_embeddings.weight)
    load_adapter(other, tmp_path / "a")
    torch.testing.assert_close(other(ids).logits, model(ids).logits)


@pytest.mark.parametrize("apply", [False, True], ids=["plain", "applied"])
def test_injected_model(apply, tmp_path):
    def injected():
        model = inject_adapter_in_model(config_of(modules_to_save=["norm"]), Net())
        if apply:
            adalora_kernels.peft.apply(model)
        return model

    assert_files_are_the_same_function(fill(injected()), tmp_path, injected())


class PlainMlp(nn.Module):
    """Mlp over nn.Linear layers with the weights of `model`."""

    def __init__(self, model):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(layer.in_features, layer.out_features) for layer in model.layers
        )
        state = {k: v for k, v in model.state_dict().items() if k in self.state_dict()}
        self.load_state_dict(state)

    forward = Mlp.forward


@pytest.mark.parametrize("full_rank", [False, True], ids=["pruned", "full_rank"])
@pytest.mark.parametrize("shrunk", [False, True], ids=["masked", "shrunk"])
def test_our_own_layers_become_pefts(shrunk, full_rank, tmp_path):
    def own():
        torch.manual_seed(0)
        model = Mlp(lora_alpha=4)
        schedule = {"target_r": 2, "total_step": STEPS, "tinit": 3, "tfinal": 5}
        return model, RankAllocator(model, **schedule)

    model, allocator = own()
    base = PlainMlp(model)
    optimizer = adamw(model)
    train(model, optimizer, allocator, range(1, STEPS + 1))
    if shrunk:
        allocator.shrink(optimizer)
    expected = logits(model)
    save_adapter(model, tmp_path, full_rank=full_rank, allocator=allocator)
    config, _ = read(tmp_path)
    assert config["bias"] == "lora_only"  # for nobody has frozen them
    assert (config["init_r"], config["target_r"], config["total_step"]) == (6, 2, STEPS)
    assert config["target_modules"] == ["layers.0", "layers.1", "layers.2"]
    export_lora(model, tmp_path / "l")
    for folder in (tmp_path, tmp_path / "l"):
        plain = loaded(folder, lambda: copy.deepcopy(base))
        torch.testing.assert_close(logits(plain), expected)
    other, other_allocator = own()
    logits(other)  # eval() merges
    load_adapter(other, tmp_path, allocator=other_allocator)
    torch.testing.assert_close(logits(other), expected)
    torch.testing.assert_close(logits(other.train()), expected)
    if full_rank:
        assert_same(snapshot(model.train(), allocator), snapshot(other.train(), other_allocator))


def test_our_own_layers_have_one_rank_and_alpha(tmp_path):
    model = Mlp()
    model.layers[1] = Mlp(r=4).layers[1]
    with pytest.raises(ValueError, match=r"layers.0 has \(1.0, 6.0\), layers.1 has \(1.0, 4.0\)"):
        save_adapter(model, tmp_path)


def test_wrong_models(tmp_path):
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got dict"):
        save_adapter({}, tmp_path)
    with pytest.raises(ValueError, match="no AdaLoRA adapter in this Net"):
        save_adapter(Net(), tmp_path)
    lora = get_peft_model(Net(), LoraConfig(target_modules=["fc0"]))
    with pytest.raises(ValueError, match=r"one of the AdaLoRA adapters \[\], got None"):
        export_lora(lora, tmp_path)
    with pytest.raises(ValueError, match="another model"):
        save_adapter(make(), tmp_path, allocator=RankAllocator(Mlp(), target_r=2, total_step=9))
    with pytest.raises(ValueError, match="adapter_name is for PEFT's models"):
        save_adapter(Mlp(), tmp_path, adapter_name="default")
    assert list(tmp_path.iterdir()) == []


def test_a_save_that_fails_leaves_what_was_there(tmp_path):
    model = fill(make())
    save_adapter(model, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    fill(model, dead="fc0")
    model.peft_config["default"].revision = object()  # no JSON
    with pytest.raises(TypeError):
        save_adapter(model, tmp_path)
    assert before == {p.name: p.read_bytes() for p in tmp_path.iterdir()}


@pytest.mark.parametrize("apply", [False, True], ids=["plain", "applied"])
def test_a_fresh_adapter_is_saved_whole(apply, tmp_path):
    model = make()
    if apply:
        adalora_kernels.peft.apply(model)
    save_adapter(model, tmp_path)
    config, tensors = read(tmp_path)
    assert config["rank_pattern"] is None
    assert tensors["base_model.model.fc0.lora_E"].shape == (6, 1)


@pytest.mark.parametrize("save", [PeftModel.save_pretrained, save_adapter])
def test_numbers_that_peft_would_not_read_back(save, tmp_path):
    model = fill(make(lora_alpha=0))
    adalora_kernels.peft.apply(model)
    model.peft_config["default"].total_step = None
    save(model, tmp_path)
    config, _ = read(tmp_path)
    assert config["total_step"] == 9 and config["lora_alpha"] == 6
    torch.testing.assert_close(logits(loaded(tmp_path)), logits(model))


def edit_config(**changes):
    def edit(folder):
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**config, **changes}))

    return edit


def edit_pattern(name, change):
    def edit(folder):
        pattern = read(folder)[0]["rank_pattern"]
        edit_config(rank_pattern={**pattern, name: change(pattern.get(name))})(folder)

    return edit


def edit_tensors(change, file=WEIGHTS):
    def edit(folder):
        tensors = load_file(folder / file)
        change(tensors)
        save_file(tensors, folder / file)

    return edit


def put(key, tensor):
    return edit_tensors(lambda tensors: tensors.update({f"base_model.model.{key}": tensor}))


def truncate(file, size):
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:size])


def drop(key):
    return edit_tensors(lambda tensors: tensors.pop(f"base_model.model.{key}"))


PRUNED = {
    "no_config": (
        lambda f: (f / CONFIG).unlink(),
        FileNotFoundError,
        "adapter_config.json is miss",
    ),
    "no_weights": (lambda f: (f / WEIGHTS).unlink(), FileNotFoundError, "safetensors is missing"),
    "not_json": (lambda f: (f / CONFIG).write_text("{"), ValueError, "is not JSON"),
    "not_text": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe"), ValueError, "is not JSON"),
    "json_list": (lambda f: (f / CONFIG).write_text("[]"), ValueError, "ADALORA"),
    "lora": (edit_config(peft_type="LORA"), ValueError, "ADALORA adapter, is of 'LORA'"),
    "init_r_text": (edit_config(init_r="6"), ValueError, "init_r ≥ 1, has '6'"),
    "alpha_null": (edit_config(lora_alpha=None), ValueError, "lora_alpha, has None"),
    "other_alpha": (edit_config(lora_alpha=32), ValueError, r"\(32.0, 6.0\), the model has"),
    "other_rank": (edit_config(init_r=8), ValueError, r"\(16.0, 8.0\), the model has"),
    "empty": (truncate(WEIGHTS, 0), ValueError, "not a safetensors file, or not all"),
    "header_cut": (truncate(WEIGHTS, 100), ValueError, "not a safetensors file, or not all"),
    "data_cut": (truncate(WEIGHTS, -1), ValueError, "not a safetensors file, or not all"),
    "missing_tensor": (drop("fc0.lora_B"), ValueError, "lacks.*fc0.lora_B"),
    "missing_saved_module": (drop("norm.weight"), ValueError, "lacks.*norm.weight"),
    "extra_tensor": (put("fc9.lora_A", torch.ones(1)), ValueError, "has not: .*fc9.lora_A"),
    "wrong_shape": (put("fc2.lora_E", torch.ones(4)), ValueError, r"fc2.lora_E has shape \(4,\)"),
    "wrong_base": (
        put("fc2.lora_A", torch.ones(4, 21)),
        ValueError,
        r"\(4, 21\), expected \(4, 20",
    ),
    "wrong_saved_module": (put("norm.bias", torch.ones(9)), ValueError, "norm.bias has shape"),
    "integers": (put("fc2.lora_E", torch.ones(4, 1).int()), ValueError, "be floating point"),
    "pattern_list": (edit_config(rank_pattern=[True]), ValueError, "object or null"),
    "pattern_null": (edit_config(rank_pattern=None), ValueError, r"\(4, 16\), expected \(6, 16\)"),
    "pattern_short": (edit_pattern("fc0.lora_E", lambda p: p[:5]), ValueError, "5 entries, not 6"),
    "pattern_sum": (
        edit_pattern("fc0.lora_E", lambda p: [True] * 6),
        ValueError,
        "expected .6, 16",
    ),
    "pattern_ints": (edit_pattern("fc0.lora_E", lambda p: [1] * 6), ValueError, "list of bools"),
    "pattern_other": (edit_pattern("fc9.lora_E", lambda p: [True] * 6), ValueError, "fc9.lora_E"),
}


@pytest.mark.parametrize("case", PRUNED)
def test_a_broken_adapter_changes_nothing(case, tmp_path):
    damage, error, message = PRUNED[case]
    save_adapter(fill(make(modules_to_save=["norm"])), tmp_path)
    model = make(modules_to_save=["norm"])
    load_adapter(copy.deepcopy(model), tmp_path)  # whole, it loads
    damage(tmp_path)
    before = snapshot(model)
    with pytest.raises(error, match=message):
        load_adapter(model, tmp_path)
    assert_same(before, snapshot(model))


def edit_state(change):
    """`change(tensors, the JSON in the metadata)`."""

    def edit(folder):
        with safe_open(folder / STATE_NAME, "pt") as file:
            rest = json.loads(file.metadata()["adalora_state"])
        tensors = load_file(folder / STATE_NAME)
        change(tensors, rest)
        metadata = {"adalora_state": json.dumps(rest)}
        save_file(tensors, folder / STATE_NAME, metadata=metadata)

    return edit


def state_value(**values):
    return edit_state(lambda _, rest: rest["values"].update(values))


def state_tensor(name, change):
    """What `change` makes of it; None to leave it out."""

    def edit(tensors, _):
        value = change(tensors.pop(name))
        if value is not None:
            tensors[name] = value

    return edit_state(edit)


def weights_of_another_rank(folder):
    pruned = [True] * 5 + [False]
    edit_config(rank_pattern={"fc0.lora_E": pruned})(folder)
    for key, dim in (("A", 0), ("E", 0), ("B", 1)):
        tensor = load_file(folder / WEIGHTS)[f"base_model.model.fc0.lora_{key}"]
        put(f"fc0.lora_{key}", tensor.narrow(dim, 0, 5).contiguous())(folder)


STATE = {
    "cut": (truncate(STATE_NAME, -1), "not a safetensors file"),
    "no_metadata": (edit_tensors(lambda t: None, STATE_NAME), "not the state of a RankAllocator"),
    "no_averages": (
        state_tensor("exp_avg_ipt.0", lambda t: None),
        "not the state of a RankAllocator",
    ),
    "no_lists": (edit_state(lambda _, rest: rest.pop("lists")), "not the state of a RankAllocator"),
    "step_text": (state_value(global_step="12"), "has global_step = '12', expected int"),
    "step_bool": (state_value(global_step=True), "has global_step = True, expected int"),
    "shrunk": (state_value(shrunk=True), "pattern is not frozen"),
    "format": (state_value(format=2), "format 2"),
    "names": (state_value(names=["a", "b", "c"]), "other adapters"),
    "ranks": (state_value(ranks=[6, 6]), "for ranks"),
    "ranks_text": (state_value(ranks=["6", "6", "6"]), "ranks"),
    "other_rank": (weights_of_another_rank, "fc0 has 5 triplets, .* for 6"),
    "mask_float": (state_tensor("mask", torch.Tensor.float), "mask, or not as"),
    "no_skipped": (state_tensor("skipped", lambda t: None), "skipped, or not as"),
    "no_scores": (state_tensor("scores", lambda t: None), "lacks .'scores'"),
    "short_mask": (state_tensor("mask", lambda t: t[1:].clone()), "for ranks"),
    "short_scores": (state_tensor("scores", lambda t: t[1:].clone()), "scores of shape"),
}


@pytest.mark.parametrize("case", STATE)
def test_a_broken_state_changes_nothing(case, tmp_path):
    damage, message = STATE[case]
    model, _, _ = trained(12)
    save_adapter(model, tmp_path, full_rank=True)
    damage(tmp_path)
    fresh = make()
    allocator = adalora_kernels.peft.apply(fresh).allocator
    before = snapshot(fresh, allocator)
    with pytest.raises(ValueError, match=message):
        load_adapter(fresh, tmp_path)
    assert_same(before, snapshot(fresh, allocator))


def test_state_file_alone(tmp_path):
    _, allocator, _ = trained(12)
    save_state(allocator, tmp_path / "deep" / "state")
    assert_same([allocator.state_dict()], [load_state(tmp_path / "deep" / "state")])
    other = adalora_kernels.peft.apply(make()).allocator
    other.load_state_dict(load_state(tmp_path / "deep" / "state"))
    assert_same([allocator.state_dict()], [other.state_dict()])
    with pytest.raises(FileNotFoundError, match="nothing is missing"):
        load_state(tmp_path / "nothing")


def test_weights_for_an_allocator_that_is_at_work(tmp_path):
    save_adapter(fill(make()), tmp_path)
    model, allocator, _ = trained(4)
    before = snapshot(model, allocator)
    with pytest.raises(ValueError, match="allocator is at step 4"):
        load_adapter(model, tmp_path)
    assert_same(before, snapshot(model, allocator))


def test_merged_model(tmp_path):
    model = fill(make())
    save_adapter(model, tmp_path)
    expected = logits(model)
    model.merge_adapter()
    with pytest.raises(ValueError, match="fc0 is merged"):
        load_adapter(model, tmp_path)
    save_adapter(model, tmp_path)
    torch.testing.assert_close(logits(loaded(tmp_path)), expected)


def test_adapter_with_more_triplets_than_the_model_has_room_for(tmp_path):
    save_adapter(fill(make()), tmp_path / "a")
    model = loaded(tmp_path / "a")
    assert type(model.base_model.model.fc0) is PeftSVDLinear
    save_adapter(fill(make()), tmp_path / "b", full_rank=True)
    with pytest.raises(ValueError, match="fc0 has 6 triplets in the file, 4 in the model"):
        load_adapter(model, tmp_path / "b")

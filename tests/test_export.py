"""`adalora_kernels.export`: what it writes goes through plain PEFT and is read back."""

import copy

import pytest
import torch
from export_runs import (
    CONFIG,
    STEPS,
    VARIANTS,
    WEIGHTS,
    Net,
    adamw,
    assert_files_are_the_same_function,
    assert_same,
    config_of,
    fill,
    full,
    loaded,
    logits,
    make,
    read,
    snapshot,
    train,
    trained,
)
from helpers import Mlp, batch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import adalora_kernels.peft
from adalora_kernels import RankAllocator
from adalora_kernels.export import STATE_NAME, export_lora, load_adapter, save_adapter


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


def test_triplets_that_were_moved_away_from_zero_are_saved(tmp_path):
    model, allocator, _ = trained()
    with torch.no_grad():
        for adapter in allocator.adapters:
            adapter.lora_E.add_(1.0)  # as momentum may, until the next step
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

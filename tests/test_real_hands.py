"""Models, configs and weights as scripts of real users handle them.

Plain PEFT and ours run the same script side by side, wherever PEFT is right; where it is not, the
test says so. The other files of this name have optimizers and trainings, what happens in the
middle of one, and other tools.
"""

import copy
import pickle

import pytest
import torch
from hands import (
    ALL,
    FINAL,
    STEPS,
    TARGET,
    adamw,
    adapted,
    assert_one_function,
    both_sides,
    config,
    llama,
    logits,
    perturbed,
    rank,
    singular_values,
    take_over,
    tokens,
    train,
)
from helpers import trainable
from peft import AdaLoraConfig, PeftModel, get_peft_model
from torch import nn

HALF = TARGET // 2  # triplets at the end in each of the two decoder layers
PREFIX = "base_model.model."  # of PEFT's names in a PeftModel


# One allocator per model, whoever shares the config


@both_sides
@pytest.mark.parametrize("source", ["object", "model"])
def test_a_model_per_fold(side, source, tmp_path):
    """Folds one after the other, from one config object or from that of the last fold's model."""
    shared = config()
    for fold in range(3):
        model = get_peft_model(llama(), shared)
        optimizer = adamw(model)
        take_over(side, model, optimizer)
        train(side, model, optimizer, seed=100 * fold)
        assert rank(model) == TARGET
        assert_one_function(model, logits(model), tmp_path / str(fold))
        if source == "model":
            shared = model.peft_config["default"]


def initialise_again(model):
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)


def test_models_of_one_config_are_saved_after_all_are_trained_ours(tmp_path):
    """PEFT keeps the rank_pattern on the shared config, and cuts each by that of the last."""
    shared = config()
    models = [get_peft_model(llama(), shared) for _ in range(2)]
    for i, model in enumerate(models):
        if i == 1:
            initialise_again(model)
        optimizer = adamw(model)
        take_over("ours", model, optimizer)
        train("ours", model, optimizer)
    first, second = (singular_values(model).values() for model in models)
    assert any((a != 0).ne(b != 0).any() for a, b in zip(first, second, strict=True))
    for i, model in enumerate(models):
        assert_one_function(model, logits(model), tmp_path / str(i))


@both_sides
def test_the_config_stays_the_users(side):
    shared = config()
    model = get_peft_model(llama(), shared)
    take_over(side, model)
    shared.total_step = 20
    assert type(shared) is AdaLoraConfig
    assert model.peft_config["default"].total_step == 20
    model.peft_config["default"].total_step = 24
    assert shared.total_step == 24
    pickle.dumps(shared)


@both_sides
def test_a_copy_in_the_middle_of_a_training(side):
    """The copy goes on by itself, exactly as the original, and neither sees the other."""
    model = adapted()
    optimizer = adamw(model)
    take_over(side, model, optimizer)
    train(side, model, optimizer, range(1, 6))
    twin = copy.deepcopy(model)
    before = singular_values(twin)
    train(side, model, optimizer, range(6, STEPS + 1))
    assert all(torch.equal(v, before[n]) for n, v in singular_values(twin).items())
    other = adamw(twin)
    take_over(side, twin, other)
    train(side, twin, other, range(6, STEPS + 1), seed=200)
    assert rank(model) == rank(twin) == TARGET


# What is not trained is not pruned


def continued(folder):
    """A model with a trained adapter, of which the first decoder layer is frozen."""
    perturbed(adapted()).save_pretrained(folder)
    model = PeftModel.from_pretrained(llama(), folder, is_trainable=True)
    freeze(model)
    return model.train()


def freeze(model, frozen=True):
    for name, parameter in model.named_parameters():
        if "layers.0." in name and "lora_" in name and "ranknum" not in name:
            parameter.requires_grad_(not frozen)


def of_layer(model, layer):
    return {n: v for n, v in singular_values(model).items() if f"layers.{layer}." in n}


@pytest.mark.parametrize("when", ["before", "after"])
def test_frozen_adapters_keep_their_values_ours(when, tmp_path):
    """PEFT raises a TypeError here: it multiplies by gradients that are None."""
    model = continued(tmp_path)
    freeze(model, when == "before")
    allocator = take_over("ours", model)
    freeze(model)
    optimizer = adamw(model)
    allocator.attach(optimizer)
    before = of_layer(model, 0)
    train("ours", model, optimizer)
    assert all(torch.equal(v, before[n]) for n, v in of_layer(model, 0).items())
    summary = allocator.summary()
    assert sum(int(v.count_nonzero()) for v in of_layer(model, 1).values()) == HALF
    assert (summary["total_rank"], summary["init_budget"]) == (HALF, ALL // 2)
    assert sorted(PREFIX + name for name in summary["untrained"]) == sorted(before)
    assert_one_function(model, logits(model), tmp_path / "saved")


@pytest.mark.parametrize("set_to_none", [True, False])
def test_adapters_are_frozen_in_the_middle_ours(set_to_none):
    """PEFT raises a TypeError, or prunes them for their gradients of 0."""
    model = adapted()
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    allocator = take_over("ours", model, optimizer)
    train("ours", model, optimizer, range(1, 5))
    optimizer.zero_grad(set_to_none=set_to_none)
    freeze(model)
    before = of_layer(model, 0)
    for step in range(5, STEPS + 1):
        model(**tokens(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
    assert all(torch.equal(v, before[n]) for n, v in of_layer(model, 0).items())
    assert sum(int(v.count_nonzero()) for v in of_layer(model, 1).values()) == HALF
    assert len(allocator.summary()["untrained"]) == 2


# One model, one function


@both_sides
def test_average_weights_are_swapped_in_and_out(side, tmp_path):
    """An EMA over the state dict, as timm and diffusers keep it, evaluated after the freeze."""
    model = adapted()
    optimizer = adamw(model, lr=5e-2)
    take_over(side, model, optimizer)
    average = copy.deepcopy(model.state_dict())
    for step in range(1, STEPS + 1):
        train(side, model, optimizer, [step])
        for name, tensor in model.state_dict().items():
            average[name].lerp_(tensor, 0.3)
        if step == FINAL + 1:
            raw, now = copy.deepcopy(model.state_dict()), logits(model)
            model.load_state_dict(average)
            assert rank(model) > TARGET
            merged = copy.deepcopy(model).merge_and_unload()
            torch.testing.assert_close(logits(merged), logits(model))
            if side == "ours":  # PEFT saves the average cut by the raw pattern.
                assert_one_function(model, logits(model), tmp_path)
            model.load_state_dict(raw)
            assert torch.equal(logits(model), now)
    # A training that goes on is pruned as before.
    assert rank(model) == TARGET


@both_sides
def test_training_goes_on_after_other_weights_in_the_final_phase(side):
    """A triplet that was pruned stays so, whatever was loaded in between."""
    model = adapted()
    optimizer = adamw(model)
    take_over(side, model, optimizer)
    train(side, model, optimizer, range(1, 4))
    early = copy.deepcopy(model.state_dict())
    train(side, model, optimizer, range(4, FINAL + 2))
    pattern = {name: values != 0 for name, values in singular_values(model).items()}
    model.load_state_dict(early)
    train(side, model, optimizer, range(FINAL + 2, STEPS + 1))
    assert all(torch.equal(v != 0, pattern[n]) for n, v in singular_values(model).items())

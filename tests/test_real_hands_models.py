"""Real use: models whose parts and whose classes scripts change, PEFT beside ours."""

import copy

import pytest
import torch
from hands import (
    FINAL,
    STEPS,
    TARGET,
    adamw,
    adapted,
    both_sides,
    config,
    end_step,
    llama,
    logits,
    perturbed,
    rank,
    ranks,
    singular_values,
    take_over,
    tokens,
    train,
)
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from adalora_kernels import export


def pefts_own(config):
    """A model of plain PEFT, trained; its ranks are in `config` as well."""
    torch.manual_seed(5)
    model = perturbed(get_peft_model(llama(), config).train())
    train("peft", model, adamw(model), range(1, STEPS + 1), seed=50)
    return model


def test_pefts_own_model_from_the_config_of_ours():
    """PEFT writes its pattern into the config that it has, and prunes by that at the end."""
    ours = adapted()
    optimizer = adamw(ours)
    take_over("ours", ours, optimizer)
    train("ours", ours, optimizer)
    theirs = pefts_own(ours.peft_config["default"])
    expected = singular_values(pefts_own(config()))
    assert all(torch.equal(E, expected[name]) for name, E in singular_values(theirs).items())
    pattern = ours.peft_config["default"].rank_pattern
    assert list(pattern.values()) == [(E != 0).flatten().tolist() for E in expected.values()]


def test_a_pattern_that_is_assigned_is_read_until_the_next_step_ours(tmp_path):
    model = adapted()
    optimizer = adamw(model)
    take_over("ours", model, optimizer)
    train("ours", model, optimizer, range(1, FINAL + 1))
    own = model.peft_config["default"]
    before = own.rank_pattern
    model.save_pretrained(tmp_path)  # PEFT assigns it with shorter names.
    assert own.rank_pattern == before
    own.rank_pattern = None
    assert own.rank_pattern is None
    train("ours", model, optimizer, range(FINAL + 1, STEPS + 1))
    assert own.rank_pattern == before


@both_sides
def test_the_models_config_equals_the_users(side):
    users = config()
    model = get_peft_model(llama(), users)
    take_over(side, model)
    own = model.peft_config["default"]
    assert own == users and users == own and own == copy.deepcopy(own)
    assert own != config(target_r=2) and own != "another thing"


def replaced(model):
    """Without the layer of one adapter, which is gone with it."""
    attention = model.base_model.model.model.layers[0].self_attn
    attention.q_proj = nn.Linear(32, 32, bias=False)


def dropped(model):
    layers = model.base_model.model.model.layers
    model.base_model.model.model.layers = layers[1:]
    model.base_model.model.model.layers[0].self_attn.layer_idx = 0
    model.config.num_hidden_layers = 1


@pytest.mark.parametrize("after", [0, 5])
@pytest.mark.parametrize("change", [replaced, dropped])
@both_sides
def test_layers_are_taken_out_of_the_model(side, change, after, tmp_path):
    model = adapted()
    optimizer = adamw(model)
    allocator = take_over(side, model)
    for step in range(1, STEPS + 1):
        if step == after + 1:
            change(model)
        if step == 8:
            model = copy.deepcopy(model)
            optimizer = adamw(model)
        model(**tokens(step)).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        end_step("ours", model, step, optimizer)
    assert rank(model) < TARGET
    model.save_pretrained(tmp_path)
    if side == "ours":
        allocator = model.base_model.rankallocator
        left = len(ranks(model))
        # Three each are left, where PEFT goes on to drop as many as if all layers were there.
        assert rank(model) == 3 * left == allocator.summary()["total_rank"]
        assert len(allocator.summary()["untrained"]) == 4 - left
        assert len(model.peft_config["default"].rank_pattern) == left
        allocator.shrink()
        assert rank(model) == 3 * left


@both_sides
def test_the_regulariser_is_of_the_layers_that_are_left(side):
    model = adapted()
    allocator = take_over(side, model)
    replaced(model)
    optimizer = adamw(model)  # It has nothing of the layer that is gone.
    products = [A @ A.T for name, A in model.named_parameters() if "lora_A" in name]
    products += [B.T @ B for name, B in model.named_parameters() if "lora_B" in name]
    expected = 0.5 * torch.stack([(p - torch.eye(6)).norm() for p in products]).mean()
    task = model.base_model.model(**tokens(1)).loss
    assert torch.allclose(model(**tokens(1)).loss - task, expected)
    if side == "ours":
        allocator.attach(optimizer)
        task.backward()
        optimizer.step()
        assert torch.allclose(allocator.orth_reg, expected)


@both_sides
def test_hooks_on_all_modules_see_the_base_layers(side):
    model = perturbed(adapted())
    take_over(side, model)
    expected, seen = logits(model), []
    base = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    handle = register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        seen_by_hooks = logits(model)
    finally:
        handle.remove()
    assert sum(module is base for module in seen) == 1
    assert (seen_by_hooks - expected).abs().max() < 1e-6


@pytest.mark.parametrize("kind", [nn.Linear, nn.Dropout])
@both_sides
def test_a_forward_that_is_patched_in_the_class_is_used(side, kind, monkeypatch):
    """As tools do that count or scale, and for dropout that stays on in evaluation."""
    model = perturbed(adapted(lora_dropout=0.5))
    take_over(side, model)
    original, calls = kind.forward, []
    monkeypatch.setattr(
        kind, "forward", lambda module, x: calls.append(module) or original(module, x)
    )
    logits(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    part = layer.base_layer if kind is nn.Linear else layer.lora_dropout["default"]
    assert sum(module is part for module in calls) == 1


@pytest.fixture
def other_default_device():
    """As `torch.set_default_device("cuda")` is, for a file that is made on the CPU."""
    yield lambda: torch.set_default_device("meta")
    torch.set_default_device(None)


@both_sides
def test_files_under_another_default_device(side, other_default_device, tmp_path):
    model = adapted(lora_dropout=0.1)
    optimizer = adamw(model)
    take_over(side, model, optimizer)
    train(side, model, optimizer)
    expected = logits(model)
    other_default_device()
    model.save_pretrained(tmp_path)
    assert model.peft_config["default"].rank_pattern is not None
    torch.set_default_device(None)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.allclose(logits(loaded), expected, atol=1e-6)


def test_exports_under_another_default_device_ours(other_default_device, tmp_path):
    model, fresh = adapted(), adapted()
    optimizer = adamw(model)
    allocator = take_over("ours", model, optimizer)
    take_over("ours", fresh)
    train("ours", model, optimizer)
    other_default_device()
    export.export_lora(model, tmp_path / "lora")
    export.save_adapter(model, tmp_path / "compact")
    export.save_adapter(model, tmp_path / "whole", full_rank=True)
    export.load_adapter(fresh, tmp_path / "whole")
    torch.set_default_device(None)
    assert torch.equal(logits(fresh), logits(model))
    plain = get_peft_model(llama(), config())
    other_default_device()
    export.load_adapter(plain, tmp_path / "compact")
    allocator.shrink()
    torch.set_default_device(None)
    assert torch.allclose(logits(plain), logits(model), atol=1e-6)

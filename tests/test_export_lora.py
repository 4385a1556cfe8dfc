"""`export_lora`: the same function as plain LoRA."""

import pytest
import torch
from export_runs import (
    STEPS,
    VARIANTS,
    Net,
    adamw,
    config_of,
    fill,
    full,
    loaded,
    logits,
    make,
    read,
    trained,
)
from helpers import batch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

import adalora_kernels.peft
from adalora_kernels.export import export_lora


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

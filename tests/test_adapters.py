"""Finding adapters in ours, loralib's and wrapped models (PEFT's: test_peft.py)."""

import pytest
import torch
from helpers import Mlp
from loralib_twin import TwinLinear
from torch import nn

from adalora_kernels.adapters import find_adapters, refuse_flattened


def test_ours_and_loralibs():
    model = nn.Sequential(Mlp(), TwinLinear(5, 4, r=2), nn.Linear(4, 4), TwinLinear(5, 4))
    adapters = find_adapters(model)
    assert [a.name for a in adapters] == [
        *(f"0.layers.{i}.lora_E" for i in range(3)),
        "1.lora_E",
    ]
    assert adapters[3].parameters == (model[1].lora_A, model[1].lora_E, model[1].lora_B)


def test_the_model_may_be_the_layer():
    assert [a.name for a in find_adapters(TwinLinear(5, 4, r=2))] == ["lora_E"]


def test_wrappers_do_not_change_names():
    model = nn.Module()
    model.module = torch.compile(Mlp())
    assert [a.name for a in find_adapters(model)] == [f"layers.{i}.lora_E" for i in range(3)]


def test_parameters_may_be_replaced():
    model = Mlp()
    adapter = find_adapters(model)[1]
    layer = model.layers[1]
    layer.lora_E = nn.Parameter(torch.ones(6, 1))
    assert adapter.lora_E is layer.lora_E
    # By a view that is no parameter, as FSDP does while a layer runs.
    view = layer.lora_A.detach()
    del layer.lora_A
    layer.lora_A = view
    assert adapter.parameters == (view, layer.lora_E, layer.lora_B)


def test_a_module_in_two_places_is_one_adapter():
    layer = TwinLinear(5, 5, r=2)
    assert [a.name for a in find_adapters(nn.Sequential(layer, nn.Tanh(), layer))] == ["0.lora_E"]


def test_plain_lora_is_not_an_adapter():
    layer = nn.Linear(3, 3)
    layer.lora_A, layer.lora_B = nn.Linear(3, 2), nn.Linear(2, 3)
    assert find_adapters(layer) == []


def test_refusal():
    with pytest.raises(TypeError, match="dict"):
        find_adapters({})


@pytest.mark.parametrize(
    ("factor", "value"),
    [
        ("lora_A", torch.ones(18)),
        ("lora_A", torch.ones(2, 16)),
        ("lora_E", torch.ones(6)),
        ("lora_E", torch.ones(0)),
        ("lora_E", torch.ones(6, 2)),
        ("lora_B", torch.ones(0)),
        ("lora_B", torch.ones(24, 5)),
    ],
)
def test_what_is_no_whole_parameter_is_refused(factor, value):
    model = Mlp()
    refuse_flattened(find_adapters(model))
    adapters = find_adapters(model)
    setattr(model.layers[0], factor, nn.Parameter(value))
    with pytest.raises(ValueError, match=r"layers\.0\.lora_E .*FullyShardedDataParallel \(FSDP1"):
        refuse_flattened(adapters)


def test_views_and_nothing_in_the_place_of_parameters_are_refused():
    model = Mlp()
    adapters, layer = find_adapters(model), model.layers[1]
    view = layer.lora_A.detach()
    del layer.lora_A
    with pytest.raises(ValueError, match=r"layers\.1\.lora_E has been deleted, or .*FSDP"):
        refuse_flattened(adapters)
    layer.lora_A = view
    with pytest.raises(ValueError, match="sharded"):
        refuse_flattened(adapters)

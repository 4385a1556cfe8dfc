"""An allocator reads its parameters where they stand: whoever replaces them has them replaced."""

import copy
import pickle

import pytest
import torch
from helpers import Mlp, trainable
from peft import AdaLoraConfig, get_peft_model
from torch import nn

from adalora_kernels import RankAllocator, orth_reg_grad_
from adalora_kernels.adapters import find_adapters, parameters_of
from adalora_kernels.peft import apply

OPTIONS = {"target_r": 3, "total_step": 20, "tinit": 1, "tfinal": 5}
FACTORS = ("lora_A", "lora_E", "lora_B")


def ours():
    torch.manual_seed(0)
    model = Mlp(lora_alpha=16)
    for layer in model.layers:
        nn.init.normal_(layer.lora_E)
    return model, RankAllocator(model, **OPTIONS)


def pefts():
    torch.manual_seed(0)
    targets = [f"layers.{i}" for i in range(3)]
    config = AdaLoraConfig(init_r=6, target_modules=targets, init_lora_weights=False, **OPTIONS)
    model = get_peft_model(Mlp(r=0), config)
    return model, apply(model).allocator


def tables(model):
    """Where each parameter stands: a module, and a name in its table."""
    for module in model.modules():
        for name in FACTORS:
            part = getattr(module, name, None)
            if isinstance(part, nn.ParameterDict):
                yield part, "default"
            elif isinstance(part, nn.Parameter):
                yield module, name


def new(module, name):
    return nn.Parameter(module._parameters[name].detach().clone())


def by_attribute(model):
    for module, name in tables(model):
        setattr(module, name, new(module, name))


def in_the_table(model):
    for module, name in tables(model):
        module._parameters[name] = new(module, name)


def with_the_table(model):
    for module in {id(m): m for m, _ in tables(model)}.values():
        own = {name for m, name in tables(model) if m is module}
        module._parameters = {
            name: new(module, name) if name in own else p for name, p in module._parameters.items()
        }


def deleted_and_registered(model):
    for module, name in list(tables(model)):
        parameter = new(module, name)
        delattr(module, name)
        module.register_parameter(name, parameter)


def by_assigned_state(model):
    state = {name: t.clone() for name, t in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def by_conversion(model):
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.double().float()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def swapped(model):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double().float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def by_data(model):
    for p in model.parameters():
        p.data = p.data.clone()


WAYS = {f.__name__: f for f in (by_attribute, in_the_table, with_the_table, by_assigned_state)}
WAYS |= {f.__name__: f for f in (deleted_and_registered, by_conversion, swapped, by_data)}


def step(model, allocator, number):
    """Move the weights, and step, with gradients that are the same for everybody."""
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for p in trainable(model):
            p.grad = torch.randn(p.shape, generator=generator)
            p.sub_(p.grad, alpha=0.01)
    orth_reg_grad_(allocator.adapters, 0.1)
    allocator.step(number)


def everything(model, allocator):
    state = allocator.state_dict()
    averages = (*state["exp_avg_ipt"], *state["exp_avg_unc"])
    grads = [p.grad for p in trainable(model)]
    return [*trainable(model), *grads, *averages, state["scores"], state["mask"]]


@pytest.mark.parametrize("make", [ours, pefts], ids=["ours", "peft"])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_parameters_that_are_replaced(make, way):
    results = []
    for replaces in (False, True):
        model, allocator = make()
        for number in range(1, 19):
            if replaces and number in (4, 9, 17):
                way(model)
            step(model, allocator, number)
        assert allocator.frozen
        results.append(everything(model, allocator))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_reads_its_own_parameters(how):
    model, allocator = ours()
    for number in range(1, 5):
        step(model, allocator, number)
    allocator.state_dict()
    both = (model, allocator)
    other, copied = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
    # Its averages are one tensor, whatever views there were of them.
    for a, b in zip(allocator._state._averages(), copied._state._averages(), strict=True):
        assert all(map(torch.equal, a, b))
    own = {id(p) for p in other.parameters()}
    assert {id(p) for p in copied._parameters()} <= own
    for number in range(5, 12):
        step(other, copied, number)
    before = [p.clone() for p in model.parameters()]
    for number in range(5, 12):
        step(model, allocator, number)
    assert any(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    for a, b in zip(everything(model, allocator), everything(other, copied), strict=True):
        assert torch.equal(a, b)


def test_views_for_a_while_are_seen_and_parameters_again():
    model, allocator = ours()
    layer = model.layers[1]
    parameter, view = layer.lora_E, layer.lora_E.detach()
    del layer.lora_E
    layer.lora_E = view
    assert allocator._parameters()[4] is view
    with pytest.raises(ValueError, match="sharded by FullyShardedDataParallel"):
        allocator.advance(1)
    del layer.lora_E
    with pytest.raises(ValueError, match=r"layers\.1\.lora_E has been deleted, or"):
        allocator.advance(1)
    layer.lora_E = parameter
    step(model, allocator, 1)
    assert allocator._parameters()[4] is parameter


def test_shrunk_parameters_are_read_where_they_were():
    model, allocator = ours()
    for number in range(1, 16):
        step(model, allocator, number)
    allocator.shrink()
    step(model, allocator, 16)
    assert sum(E.numel() for E in allocator._parameters()[1::3]) == 9


def test_a_layer_that_goes_is_noticed_at_the_next_step():
    model, allocator = pefts()
    step(model, allocator, 1)
    assert allocator.adapters_left is allocator.adapters
    layers = model.base_model.model.layers
    layers[1] = nn.Linear(24, 20)
    assert [a.name for a in allocator.adapters_left] == [
        f"layers.{i}.lora_E.default" for i in (0, 2)
    ]
    step(model, allocator, 2)
    assert allocator.summary()["untrained"] == ["layers.1.lora_E.default"]
    _model, copied = copy.deepcopy((model, allocator))
    assert len(copied.adapters_left) == 2


def test_places_give_what_the_adapters_have():
    for model in (Mlp(), pefts()[0]):
        adapters = find_adapters(model)
        places = [place for adapter in adapters for place in adapter.places]
        expected = [p for adapter in adapters for p in adapter.parameters]
        assert all(a is b for a, b in zip(parameters_of(adapters, places), expected, strict=True))

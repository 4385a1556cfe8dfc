"""What changes on a layer between two calls counts in the second, as it does in PEFT's layer.

Our forwards read the modules' own tables, so what stands in for a parameter is tried, too.
"""

import copy
import threading

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from torch import nn
from torch.nn.modules import module as modules
from torch.nn.utils import parametrizations

import adalora_kernels.peft
from adalora_kernels import SVDLinear


def config(**options):
    return AdaLoraConfig(
        init_r=6, target_r=3, total_step=30, target_modules=["fc"], lora_dropout=0.0, **options
    )


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, 24)

    def forward(self, x):
        return self.fc(x)


def both():
    """PEFT's model with two adapters, of which one is active, and a copy that is ours."""
    torch.manual_seed(7)
    theirs = get_peft_model(Net(), config()).train()
    theirs.add_adapter("other", config(inference_mode=True))
    for name, parameter in theirs.named_parameters():
        if "lora_E" in name:
            nn.init.normal_(parameter)
    ours = copy.deepcopy(theirs)
    adalora_kernels.peft.apply(ours)
    return theirs, ours


def layer_of(model):
    return model.base_model.model.fc


def results(model):
    """y, and the gradients of x and of all that is trained."""
    model.zero_grad()
    dtype = layer_of(model).base_layer.weight.dtype
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    y = model(x)
    y.square().sum().backward()
    named = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **named}


def halved(module):
    return module.register_forward_hook(lambda module, args, y: 0.5 * y)


def hook_on(name):
    def change(model):
        handle = halved(layer_of(model).get_submodule(name))
        return handle.remove

    return change


def global_hook(model):
    base = layer_of(model).base_layer
    hook = lambda module, args, y: 0.5 * y if module is base else None  # noqa: E731
    return modules.register_module_forward_hook(hook).remove


def backward_hook(model):
    # One on the base layer PEFT's forward can't have, because that adds to y in place.
    return layer_of(model).register_full_backward_hook(lambda module, g, _: (2 * g[0],)).remove


def patched(model):
    base = layer_of(model).base_layer
    base.forward = lambda x: 2 * nn.functional.linear(x, base.weight, base.bias)
    return lambda: base.__dict__.pop("forward")


def another_adapter(model):
    model.set_adapter("other")
    return lambda: model.set_adapter("default")


def two_adapters(model):
    model.base_model.set_adapter(["default", "other"])
    return lambda: model.set_adapter("default")


def update_layer(model):
    torch.manual_seed(2)
    layer_of(model).update_layer("default", 4, lora_alpha=8, config=config())
    nn.init.normal_(layer_of(model).lora_E["default"])


def delete_adapter(model):
    model.set_adapter("other")
    model.delete_adapter("default")


def disabled(model):
    model.base_model.disable_adapter_layers()
    return model.base_model.enable_adapter_layers


def merged(model):
    model.merge_adapter()
    return model.unmerge_adapter


def cast(model):
    model.to(torch.float64)
    return lambda: model.to(torch.float32)


def load_state(model):
    state = {name: 0.5 * value for name, value in model.state_dict().items()}
    for name in state:
        if "ranknum" in name:
            state[name] = torch.full((1,), 3.0)
    model.load_state_dict(state)


def another_weight(model):
    base = layer_of(model).base_layer
    base.weight = nn.Parameter(2 * base.weight.detach(), requires_grad=False)


def another_dropout(model):
    layer_of(model).lora_dropout["default"] = nn.Threshold(0.0, 0.0)


def another_parameter(model):
    layer = layer_of(model)
    layer.lora_A["default"] = nn.Parameter(2 * layer.lora_A["default"].detach())


def thawed(model):
    layer_of(model).base_layer.requires_grad_(True)
    return lambda: layer_of(model).base_layer.requires_grad_(False)


def frozen(model):
    layer_of(model).lora_A["default"].requires_grad_(False)
    return lambda: layer_of(model).lora_A["default"].requires_grad_(True)


def shrunk(model):
    layer = layer_of(model)
    for name, rows in (("lora_A", slice(2)), ("lora_E", slice(2))):
        parameter = getattr(layer, name)["default"]
        parameter.data = parameter.data[rows].clone()
    layer.lora_B["default"].data = layer.lora_B["default"].data[:, :2].clone()


def scaling(model):
    layer_of(model).scaling["default"] *= 3


def weight_norm(model):
    parametrizations.weight_norm(layer_of(model).base_layer)


def evaluation(model):
    model.eval()
    return model.train


def base_without_bias(model):
    layer_of(model).base_layer.bias = None


def weight_of_the_instance(model):
    """Python takes it for the parameter of that name, which is still there."""
    base = layer_of(model).base_layer
    base.__dict__["weight"] = 2 * base.weight.detach()
    return lambda: base.__dict__.pop("weight")


def adapter_taken_out_by_hand(model):
    del layer_of(model).lora_A["default"]


CHANGES = [
    *(hook_on(""), hook_on("base_layer"), hook_on("lora_dropout.default"), global_hook),
    *(backward_hook, patched, another_adapter, two_adapters, update_layer, delete_adapter),
    *(disabled, merged, cast, load_state, another_weight, another_dropout, another_parameter),
    *(thawed, frozen, shrunk, scaling, weight_norm, evaluation, base_without_bias),
    *(weight_of_the_instance, adapter_taken_out_by_hand),
]
HOOKED = ["hook_on_layer", "hook_on_base", "hook_on_dropout"]
IDS = HOOKED + [change.__name__ for change in CHANGES[len(HOOKED) :]]


@pytest.mark.parametrize("change", CHANGES, ids=IDS)
def test_a_change_between_two_calls_counts(change):
    models = both()
    before = [results(model) for model in models]
    torch.testing.assert_close(*before)
    undo = [change(model) for model in models]
    after = [results(model) for model in models]
    for each in undo:
        if each is not None:
            each()
    torch.testing.assert_close(*after)
    was, now = before[0], after[0]
    same = was.keys() == now.keys() and all(torch.equal(was[n], now[n].to(was[n])) for n in was)
    assert not same or change in (evaluation, weight_norm, cast), "the test changes nothing"
    torch.testing.assert_close(*(results(model) for model in models))


def replica_of(module):
    """What DataParallel makes of a module: no parameters, but tensors as attributes."""
    replica = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        replica._modules[name] = None if child is None else replica_of(child)
    for name, parameter in module._parameters.items():
        setattr(replica, name, None if parameter is None else parameter * 1)
    return replica


@pytest.mark.parametrize("kind", ["peft", "SVDLinear"])
def test_replicas_of_data_parallel_in_threads(kind):
    model = both()[1] if kind == "peft" else SVDLinear(16, 24, r=6)
    if kind == "SVDLinear":
        nn.init.normal_(model.lora_E)
    x = torch.randn(8, 5, 16)
    expected = model(x)
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(expected.square().sum(), trained)
    found = {}

    def work(i, replica):
        found[i] = replica(x[i])

    threads = [threading.Thread(target=work, args=(i, replica_of(model))) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    y = torch.stack([found[i] for i in range(8)])
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), trained), gradients)


@pytest.mark.parametrize("kind", ["peft", "SVDLinear"])
def test_attributes_in_the_place_of_parameters(kind):
    """As FSDP's views are: no parameter is registered while a module runs."""
    model = both()[1] if kind == "peft" else SVDLinear(16, 24, r=6)
    x = torch.randn(5, 16)
    expected = model(x)
    for module in list(model.modules()):
        for name in list(module._parameters):
            parameter = module._parameters.pop(name)
            object.__setattr__(module, name, None if parameter is None else 1 * parameter)
    torch.testing.assert_close(model(x), expected)


def test_functional_call_with_other_parameters():
    _, model = both()
    x = torch.randn(5, 16)
    doubled = {name: 2 * p.detach() for name, p in model.named_parameters() if "lora_" in name}
    y = torch.func.functional_call(model, doubled, (x,))
    base = layer_of(model).base_layer(x)
    torch.testing.assert_close(y - base, 8 * (model(x) - base))

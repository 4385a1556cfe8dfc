"""A merged layer: what is in lora_A, lora_E and lora_B is what it computes, whoever wrote it."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from adalora_kernels import SVDLinear


def layer(r=3, **options):
    module = SVDLinear(5, 4, r=r, lora_alpha=16, **options)
    nn.init.normal_(module.lora_E)
    return module


def takes_merged_weight(module):
    return module._takes_merged_weight(module._merge)


def function_of(module, x):
    """What the parameters say, computed without merging."""
    apart = SVDLinear(5, 4, r=module.r, lora_alpha=16, merge_weights=False)
    apart.load_state_dict({k: v.float() for k, v in module.state_dict().items()})
    return apart(x.float())


def in_place(module):
    for p in (module.lora_A, module.lora_E, module.lora_B):
        p.mul_(2.0)


def through_data(module):
    module.lora_E.data.mul_(2.0)


def new_data(module):
    module.lora_B.data = module.lora_B.data * 2.0


def foreach(module):
    torch._foreach_mul_([module.lora_A, module.lora_B], 2.0)


def new_parameter(module):
    module.lora_E = nn.Parameter(module.lora_E * 2.0)


def load(module):
    module.load_state_dict(layer().state_dict())


def pruned(module):
    module.lora_E[1] = 0.0


def step(make):
    def write(module):
        parameters = [p for p in module.parameters() if p.requires_grad]
        for p in parameters:
            p.grad = torch.ones_like(p)
        make(parameters).step()

    return write


def average(module):
    averaged = AveragedModel(layer())
    averaged.update_parameters(layer())
    for mine, theirs in zip(module.parameters(), averaged.module.parameters(), strict=True):
        mine.copy_(theirs)


WRITES = {
    **{f.__name__: f for f in (in_place, through_data, new_data, foreach, new_parameter)},
    **{f.__name__: f for f in (load, pruned, average)},
    "sgd": step(lambda p: torch.optim.SGD(p, lr=0.5)),
    "adamw_foreach": step(lambda p: torch.optim.AdamW(p, lr=0.5, foreach=True)),
    "adamw_fused": step(lambda p: torch.optim.AdamW(p, lr=0.5, fused=True)),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_a_write_into_an_evaluated_layer_is_seen(write):
    module, x = layer().eval(), torch.randn(7, 5)
    before = module(x)
    with torch.no_grad():
        write(module)
    expected = function_of(module, x)
    assert not torch.allclose(before, expected)
    torch.testing.assert_close(module(x), expected)
    original = module.state_dict()["weight"].clone()
    module.eval()
    torch.testing.assert_close(module.weight, original + module.delta_weight())
    torch.testing.assert_close(module(x), expected)
    module.train()
    assert torch.equal(module.weight, original)
    torch.testing.assert_close(module(x), expected)


def test_weights_that_are_swapped_in_and_out_leave_both_models_as_they_were():
    # With `.data` of all parameters, as Lightning's WeightAveraging does for a validation.
    module, averaged, x = layer(), layer(), torch.randn(7, 5)
    averaged.weight.data.copy_(module.weight.data)
    averaged.bias.data.copy_(module.bias.data)
    mine, theirs = module(x), averaged(x)

    def swapped():
        for a, b in zip(module.parameters(), averaged.parameters(), strict=True):
            kept = b.data.clone()
            b.data.copy_(a.data)
            a.data.copy_(kept)

    module.eval()
    swapped()
    torch.testing.assert_close(module(x), theirs)
    swapped()
    torch.testing.assert_close(module(x), mine)
    assert torch.equal(averaged(x), theirs)
    assert torch.equal(module.train()(x), mine)


def test_versions_tell_where_values_cannot_be_compared():
    module = layer().to("meta").eval()
    x = torch.empty(7, 5, device="meta")
    assert module(x).shape == (7, 4) and takes_merged_weight(module)
    with torch.no_grad():
        module.lora_E.add_(1.0)
    assert not takes_merged_weight(module) and module(x).shape == (7, 4)
    assert takes_merged_weight(module.eval())


def test_an_unchanged_layer_is_not_merged_again():
    module = layer().eval()
    address = module.weight.data_ptr()
    module(torch.randn(7, 5))
    module.eval().merge()
    assert module.weight.data_ptr() == address, "a captured CUDA graph reads from there"


def test_no_buffer_comes_or_goes():
    module = nn.Sequential(layer(), nn.BatchNorm1d(4))
    names = [name for name, _ in module.named_buffers()]
    assert all(name.startswith("1.") for name in names)
    averaged = AveragedModel(module.eval(), use_buffers=True)  # Its weight gets averages, too.
    for mode in (True, False, True):
        module.train(mode)(torch.randn(7, 5))
        assert [name for name, _ in module.named_buffers()] == names
        averaged.update_parameters(module)
    x, mine = torch.randn(7, 5), averaged.module.eval()[0]
    torch.testing.assert_close(mine(x), module.eval()[0](x))


COPIES = {
    "double": lambda m: m.double(),
    "half": lambda m: m.half(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "share_memory": lambda m: m.share_memory(),
}


@pytest.mark.parametrize("change", COPIES.values(), ids=COPIES.keys())
def test_a_merged_layer_moves_and_copies(change):
    module, x = layer(), torch.randn(7, 5)
    original, y = module.weight.detach().clone(), module(x)
    moved = change(module.eval())
    dtype = moved.weight.dtype
    tolerance = 0.02 if dtype == torch.float16 else 1e-5
    assert moved.merged and takes_merged_weight(moved)
    torch.testing.assert_close(moved(x.to(dtype)).float(), y, rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        moved.lora_E.mul_(2.0)
    expected = function_of(moved, x)
    torch.testing.assert_close(moved(x.to(dtype)).float(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(moved.train().weight, original.to(dtype))
    if moved is not module:
        torch.testing.assert_close(module(x), y)
        assert torch.equal(module.train().weight, original)


def test_training_goes_on_after_an_evaluation_in_inference_mode():
    module, x = layer(), torch.randn(7, 5)
    y = module(x)
    with torch.inference_mode():
        module.eval()
        torch.testing.assert_close(module(x), y)
        module.lora_E.mul_(2.0)
        torch.testing.assert_close(module(x), function_of(module, x))
        module.eval()
    assert takes_merged_weight(module)
    module(x.requires_grad_()).sum().backward()
    module.train()(x).sum().backward()
    assert module.lora_E.grad is not None


def test_compiled_layers_see_writes():
    module, x = layer().eval(), torch.randn(7, 5)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), module(x))
    with torch.no_grad():
        module.lora_E.mul_(2.0)
    torch.testing.assert_close(compiled(x), function_of(module, x))


def test_functional_call_of_a_merged_layer():
    module, x = layer().eval(), torch.randn(7, 5)
    call = torch.func.functional_call
    torch.testing.assert_close(call(module, dict(module.named_parameters()), x), module(x))
    doubled = {"lora_E": 2 * module.lora_E}
    expected = call(copy.deepcopy(module).train(), doubled, x)
    torch.testing.assert_close(call(module, doubled, x), expected)
    apart = {"lora_E": module.lora_E.detach()}

    def loss(parameters):
        return call(module, parameters, x).square().sum()

    actual = torch.func.grad(loss)(apart)["lora_E"]
    module.train()
    torch.testing.assert_close(actual, torch.func.grad(loss)(apart)["lora_E"])

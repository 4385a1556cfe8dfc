"""SVDLinear: merging, state_dict, construction, training under torch.compile."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import CountOps, Mlp, batch, trainable
from torch import nn
from torch.nn.utils import prune

from adalora_kernels import SVDLinear, lora_state_dict, reference


def layer(r=3, dtype=torch.float32, **options):
    module = SVDLinear(5, 4, r=r, lora_alpha=16, dtype=dtype, **options)
    if r > 0:
        nn.init.normal_(module.lora_E)
    return module


def definition(module, x):
    weight = module.weight.T if module.fan_in_fan_out else module.weight
    factors = (module.lora_A, module.lora_E, module.lora_B)
    rest = (None, 16 / (3 + 1e-5), 0.0, None)
    return reference.svd_linear(x, weight, module.bias, *factors, *rest)[0]


@pytest.mark.parametrize("fan_in_fan_out", [False, True], ids=["out_in", "in_out"])
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
def test_forward(fan_in_fan_out, bias):
    module = layer(fan_in_fan_out=fan_in_fan_out, bias=bias)
    assert module.weight.shape == ((5, 4) if fan_in_fan_out else (4, 5))
    x = torch.randn(2, 7, 5)
    torch.testing.assert_close(module(x), definition(module, x))
    torch.testing.assert_close(module.eval()(x), definition(module.train(), x))


def test_initialisation():
    module = SVDLinear(500, 400, r=12)
    assert not module.lora_E.any()
    assert 0.018 < module.lora_A.std() < 0.022 and 0.018 < module.lora_B.std() < 0.022
    assert module.ranknum.item() == 12 and not module.ranknum.requires_grad
    assert not module.weight.requires_grad
    assert module.scaling == 1 / (12 + 1e-5)
    assert SVDLinear(5, 4, r=12, lora_alpha=0).scaling == 12 / (12 + 1e-5)
    assert SVDLinear(5, 4).weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_merge_is_exactly_undone(dtype):
    module = layer(dtype=dtype)
    x = torch.randn(7, 5, dtype=dtype)
    weight, y = module.weight.detach().clone(), module(x)
    for _ in range(5):
        module.merge()
        module.merge()
        assert module.merged and not torch.equal(module.weight, weight)
        torch.testing.assert_close(module(x), y, rtol=0.05, atol=0.05)
        module.unmerge()
        module.unmerge()
        assert torch.equal(module.weight, weight)
    assert torch.equal(module(x), y)


def test_merging_follows_the_mode_of_a_parent():
    parent = nn.Sequential(layer(), nn.ReLU())
    weight = parent[0].weight.detach().clone()
    parent.eval()
    assert parent[0].merged
    parent.eval()
    parent.train()
    assert not parent[0].merged and torch.equal(parent[0].weight, weight)
    apart = nn.Sequential(layer(merge_weights=False)).eval()
    assert not apart[0].merged


def test_state_dict_holds_the_unmerged_weight():
    module, other = layer(), layer()
    weight = module.weight.detach().clone()
    state = module.eval().state_dict()
    assert torch.equal(state["weight"], weight) and not torch.equal(module.weight, weight)
    assert set(state) == {"weight", "bias", "lora_A", "lora_E", "lora_B", "ranknum"}
    x = torch.randn(7, 5)
    # Into a merged layer: it is merged again, with what was loaded.
    other.eval().load_state_dict(state)
    assert other.merged
    torch.testing.assert_close(other(x), module(x))
    assert torch.equal(other.train().weight, weight)


def test_merged_weight_moves_with_the_module():
    module = layer().eval().to(torch.float64)
    weight = module.train().weight
    assert weight.dtype == torch.float64


def test_dropout_is_for_training_only():
    module = layer(lora_dropout=0.5, merge_weights=False)
    x = torch.randn(7, 5)
    assert not torch.equal(module(x), module(x))
    module.eval()
    torch.testing.assert_close(module(x), definition(module, x))


def test_rank_zero_is_a_linear_layer():
    module = SVDLinear(5, 4)
    x = torch.randn(7, 5)
    expected = F.linear(x, module.weight, module.bias)
    assert torch.equal(module(x), expected)
    assert torch.equal(module.eval()(x), expected)
    assert set(module.state_dict()) == {"weight", "bias"}
    module.train()(x).sum().backward()
    assert module.weight.grad is not None


def test_from_linear_shares_the_weight():
    linear = nn.Linear(5, 4, dtype=torch.bfloat16).eval()
    module = SVDLinear.from_linear(linear, 3, lora_alpha=16, adapter_dtype=torch.float32)
    assert module.weight is linear.weight and module.bias is linear.bias
    assert module.lora_A.dtype == torch.float32 and not module.training
    x = torch.randn(7, 5, dtype=torch.bfloat16)
    assert torch.equal(module(x), linear(x)), "lora_E starts at zero"
    no_bias = SVDLinear.from_linear(nn.Linear(5, 4, bias=False), 3)
    assert no_bias.bias is None and no_bias.training
    assert 0.005 < no_bias.lora_A.std() < 0.05


def test_refusals():
    with pytest.raises(ValueError, match=r"r .*-1"):
        SVDLinear(5, 4, r=-1)
    with pytest.raises(ValueError, match=r"r .*1\.5"):
        SVDLinear(5, 4, r=1.5)
    with pytest.raises(TypeError, match=r"r .*bool"):
        SVDLinear(5, 4, r=True)
    with pytest.raises(TypeError, match=r"lora_alpha .*NoneType"):
        SVDLinear(5, 4, r=1, lora_alpha=None)
    with pytest.raises(ValueError, match=r"lora_dropout .*1\.0"):
        SVDLinear(5, 4, r=1, lora_dropout=1.0)
    with pytest.raises(TypeError, match="Conv1d"):
        SVDLinear.from_linear(nn.Conv1d(2, 2, 1), 3)
    with pytest.raises(TypeError, match="SVDLinear"):
        SVDLinear.from_linear(layer(), 3)
    quantised = nn.Linear(5, 4)
    quantised.weight = nn.Parameter(torch.ones(4, 5, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match="int8"):
        SVDLinear.from_linear(quantised, 3)


def test_numbers_as_scripts_have_them():
    module = SVDLinear(5, 4, np.int64(6), np.float32(12), torch.tensor(0.25))
    assert type(module.r) is int and module.lora_A.shape == (6, 5)
    assert type(module.scaling) is float and module.scaling == 12 / (6 + 1e-5)
    assert type(module.lora_dropout.p) is float
    assert SVDLinear.from_linear(nn.Linear(5, 4), 12 / 2).r == 6
    module.scaling = np.float32(0.5)
    x = torch.randn(7, 5)
    assert torch.isfinite(module(x)).all()


def test_extra_repr():
    text = repr(layer(fan_in_fan_out=True))
    assert "r=3" in text and "lora_alpha=16" in text and "fan_in_fan_out=True" in text


def test_deepcopy_and_assign_from_meta():
    module = layer()
    x = torch.randn(7, 5)
    assert torch.equal(copy.deepcopy(module)(x), module(x))
    with torch.device("meta"):
        empty = SVDLinear(5, 4, r=3, lora_alpha=16)
    empty.load_state_dict(module.state_dict(), assign=True)
    assert torch.equal(empty(x), module(x))


def test_meta_layer_gives_the_shape():
    module = SVDLinear(5, 4, r=3, device="meta", lora_dropout=0.1)
    assert module(torch.empty(7, 5, device="meta")).shape == (7, 4)


def test_ranknum_is_kept_for_a_shrunk_layer():
    module = layer()
    assert set(lora_state_dict(module)) == {"lora_A", "lora_E", "lora_B"}
    module.lora_E.data = module.lora_E.data[:2]
    assert "ranknum" in lora_state_dict(module)


@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.25}], ids=["", "dropout"])
def test_training_step_compiles_as_one_graph(options):
    eager, compiled = Mlp(**options), Mlp(**options)
    compiled.load_state_dict(eager.state_dict())
    step = torch.compile(compiled.loss, fullgraph=True, backend="aot_eager_decomp_partition")
    optimizers = [torch.optim.SGD(trainable(m), lr=0.5) for m in (eager, compiled)]
    for i in range(3):
        losses = []
        for loss_of, optimizer in zip((eager.loss, step), optimizers, strict=True):
            torch.manual_seed(i)
            loss = loss_of(*batch(i))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        torch.testing.assert_close(*losses)
    for a, b in zip(trainable(eager), trainable(compiled), strict=True):
        torch.testing.assert_close(a, b)


class Doubling(nn.Dropout):
    """A dropout of one's own."""

    def forward(self, x):
        return 2 * x


def hooked():
    module = nn.Dropout(0.5)
    module.register_forward_hook(lambda module, args, output: 2 * args[0])
    return module


def patched():
    module = nn.Dropout(0.5)
    module.forward = lambda x: 2 * x
    return module


@pytest.mark.parametrize("make", [Doubling, hooked, patched], ids=lambda f: f.__name__)
def test_a_dropout_that_is_not_torchs_is_called(make):
    module = layer(lora_dropout=0.25)
    module.lora_dropout = make()
    x = torch.randn(7, 5)
    base = F.linear(x, module.weight, module.bias)
    doubled = base + 2 * (definition(module, x) - base)
    torch.testing.assert_close(module(x), doubled)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), doubled)


def test_opaque_weights():
    ao = pytest.importorskip("torchao.quantization")
    linear = nn.Linear(64, 32)
    ao.quantize_(linear, ao.Int8WeightOnlyConfig())
    x = torch.randn(7, 64, requires_grad=True)
    module = SVDLinear.from_linear(linear, 3, lora_dropout=0.5)
    assert module.weight is linear.weight and not module.weight.requires_grad
    torch.testing.assert_close(module(x), linear(x)), "lora_E starts at zero"
    nn.init.normal_(module.lora_E)
    module.eval()
    assert not module.merged and module.weight is linear.weight
    with CountOps() as counted:
        y = module(x)
    assert counted.counts["adalora::svd_delta"] == 1
    torch.testing.assert_close(y, linear(x) + F.linear(x, module.delta_weight()))
    y.square().sum().backward()
    assert all(t.grad.isfinite().all() for t in (x, module.lora_A, module.lora_E, module.lora_B))
    with pytest.raises(TypeError, match=r"only a layer .*Int8"):
        module.merge()
    again = SVDLinear.from_linear(linear, 3)
    again.load_state_dict(module.state_dict())
    torch.testing.assert_close(again.eval()(x), y)


def test_a_weight_that_is_quantised_after_merging():
    ao = pytest.importorskip("torchao.quantization")
    module = SVDLinear(64, 32, r=3)
    nn.init.normal_(module.lora_E)
    x = torch.randn(7, 64)
    y = module.eval()(x)
    ao.quantize_(module, ao.Int8WeightOnlyConfig())
    torch.testing.assert_close(module(x), y, rtol=0.1, atol=0.1)
    with pytest.raises(TypeError, match="only a layer"):
        module.train()


@pytest.mark.parametrize(
    "wrap",
    [nn.utils.parametrizations.weight_norm, lambda m: prune.l1_unstructured(m, "weight", 0.5)],
    ids=["weight_norm", "pruned"],
)
def test_a_weight_that_is_computed_from_others_is_not_merged(wrap):
    module, x = wrap(layer()), torch.randn(7, 5)
    y = module(x)
    torch.testing.assert_close(module.eval()(x), y)
    with pytest.raises(TypeError, match="parameter of its own"):
        module.merge()

"""Base layers whose weight is a tensor subclass: torchao's, a user's, DTensor. PEFT beside ours."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from helpers import batch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.experimental import implicit_replication
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import adalora_kernels.peft

STEPS = 12
full = pytest.mark.full


class Net(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(7)
        self.fc0, self.fc1 = nn.Linear(16, 32), nn.Linear(32, 32, bias=False)
        self.head = nn.Linear(32, 8)
        self.to(dtype).requires_grad_(False)

    def forward(self, x):
        return self.head(torch.tanh(self.fc1(torch.tanh(self.fc0(x)))))


def adapt(net):
    config = AdaLoraConfig(
        init_r=6, target_r=3, tinit=2, tfinal=3, total_step=STEPS, target_modules=["fc0", "fc1"]
    )
    return get_peft_model(net, config)


def fill(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_E" in name:
                nn.init.normal_(parameter)
    return model


def forward_and_backward(model):
    """The output, and the gradients of x and of the adapter."""
    model.zero_grad()
    x, target = batch(1, model.base_model.model.head.weight.dtype)
    x.requires_grad_()
    y = model(x)
    (y - target).square().mean().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if "lora_" in n}
    return {"y": y.detach(), "x": x.grad, **gradients}


def assert_as_peft(model, around=contextlib.nullcontext):
    """Of one model, before and after `apply`: forward and backward are the same."""
    with around():
        expected = forward_and_backward(model)
    report = adalora_kernels.peft.apply(model)
    assert report.swapped == ["fc0", "fc1"]
    with around(), torch.profiler.profile() as profile:
        actual = forward_and_backward(model)
    torch.testing.assert_close(actual, expected)
    # The base layer is called, and only what is added to it is ours.
    seen = {event.key for event in profile.key_averages()}
    assert "SvdDeltaFunction" in seen and "SvdLinearFunction" not in seen
    return report.allocator


def train(model, allocator):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    allocator.attach(optimizer)
    for step in range(1, STEPS + 1):
        x, target = batch(step, model.base_model.model.head.weight.dtype)
        (model(x) - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sum(allocator.ranks().values()) == 6


def quantise(model, kind):
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")
    configs = {
        "int8": lambda: quantization.Int8WeightOnlyConfig(),
        # Of the int4 forms the only one that runs on a CPU without another package.
        "int4": lambda: quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4),
    }
    quantization.quantize_(
        model,
        configs[kind](),
        filter_fn=lambda module, name: isinstance(module, nn.Linear) and "fc" in name,
    )


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("int8", torch.float32),
        pytest.param("int8", torch.bfloat16, marks=full),
        ("int4", torch.float32),
        pytest.param("int4", torch.bfloat16, marks=full),
    ],
    ids=str,
)
def test_torchao(kind, dtype, when, tmp_path):
    """Quantised before PEFT's layers are made, or after: PEFT has no layer class of its own."""

    def make():
        net = Net(dtype)
        if when == "before":
            quantise(net, kind)
            return fill(adapt(net))
        model = fill(adapt(net))
        quantise(model, kind)
        return model

    model = make()
    base = model.base_model.model.fc0.base_layer
    assert type(base) is nn.Linear and type(base.weight) is not nn.Parameter
    allocator = assert_as_peft(model)
    train(model, allocator)
    model.save_pretrained(tmp_path)
    net = Net(dtype)
    quantise(net, kind)
    loaded = PeftModel.from_pretrained(net, tmp_path).eval()
    x, _ = batch(0, dtype)
    torch.testing.assert_close(loaded(x), model.eval()(x))


class ByFunction(torch.Tensor):
    """A weight in 8 bits that says in `__torch_function__` what `F.linear` is."""

    @staticmethod
    def __new__(cls, number, scale):
        return torch.Tensor._make_wrapper_subclass(cls, number.shape, dtype=scale.dtype)

    def __init__(self, number, scale):
        self.number, self.scale = number, scale

    def plain(self):
        return self.number.to(self.scale.dtype) * self.scale

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is nn.functional.linear:
            return func(args[0], args[1].plain(), *args[2:], **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].number, args[0].scale)
        raise NotImplementedError(f"{cls.__name__} has no {func}")


class ByDispatch(ByFunction):
    """The same, below autograd: every op gets the plain weight."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].number, args[0].scale)
        if func.namespace == "adalora":
            raise NotImplementedError(f"{cls.__name__} has no {func}")
        return func(
            *(arg.plain() if isinstance(arg, ByFunction) else arg for arg in args), **(kwargs or {})
        )


@pytest.mark.parametrize("subclass", [ByFunction, ByDispatch])
def test_a_users_subclass(subclass):
    net = Net()
    for layer in (net.fc0, net.fc1):
        scale = layer.weight.abs().amax(1, keepdim=True) / 127
        number = (layer.weight / scale).round().to(torch.int8)
        layer.weight = nn.Parameter(subclass(number, scale), requires_grad=False)
    model = fill(adapt(net))
    train(model, assert_as_peft(model))


def test_a_bias_that_is_a_subclass():
    class Bias(torch.Tensor):
        pass

    net = Net()
    net.fc0.bias = nn.Parameter(net.fc0.bias.detach().as_subclass(Bias), requires_grad=False)
    model = fill(adapt(net))
    expected = forward_and_backward(model)
    adalora_kernels.peft.apply(model)
    torch.testing.assert_close(forward_and_backward(model), expected)


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:Found a non-scalar tensor:UserWarning")  # of DTensor
def test_dtensor(mesh):
    net = Net()
    for layer in (net.fc0, net.fc1):
        layer.weight = nn.Parameter(distribute_tensor(layer.weight, mesh, [Shard(0)]), False)
    model = fill(adapt(net))

    def plain(results):
        return {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in results.items()}

    with implicit_replication():
        expected = plain(forward_and_backward(model))
        adalora_kernels.peft.apply(model)
        torch.testing.assert_close(plain(forward_and_backward(model)), expected)


def test_tensor_parallel_layers(mesh):
    """PEFT adds in place to what such a layer returns, which autograd refuses."""
    dense, net = fill(adapt(Net())), Net()
    parallelize_module(net, mesh, {"fc0": ColwiseParallel(), "fc1": RowwiseParallel()})
    model = fill(adapt(net))
    with pytest.raises(RuntimeError, match="modified inplace"):
        forward_and_backward(model)
    adalora_kernels.peft.apply(model)
    torch.testing.assert_close(forward_and_backward(model), forward_and_backward(dense))

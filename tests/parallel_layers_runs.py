"""Layers under tensor parallelism, in processes of test_distributed_tensor_parallel.py."""

import contextlib
import itertools

import torch
import torch.distributed as dist
from peft import AdaLoraConfig, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    RowwiseParallel,
    parallelize_module,
)
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import adalora_kernels.peft
from adalora_kernels import SVDLinear, functional
from adalora_kernels.distributed import (
    ColwiseAdaLora,
    ReplicatedAdaLora,
    RowwiseAdaLora,
)

FACTORS = ("lora_A", "lora_E", "lora_B")


def whole(t):
    return t.full_tensor() if isinstance(t, DTensor) else t


def relative(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def a_layer(in_features=10, out_features=12, dtype=torch.float64, **options):
    """A layer whose adapter does something; the same on every process that has the same seed."""
    torch.manual_seed(0)
    layer = SVDLinear(in_features, out_features, r=6, dtype=dtype, **options)
    with torch.no_grad():
        for factor in FACTORS:
            getattr(layer, factor).normal_()
        layer.lora_E[2] = 0.0
    return layer


def results(layer, x, weights):
    """y, and the gradients of x, of the adapter and of a bias that learns."""
    x = x.clone().requires_grad_()
    y = layer(x)
    (y * weights).sum().backward()
    with torch.no_grad():
        without_graph, in_evaluation = layer(x), layer.eval()(x)
    found = {"y": y.detach(), "x": x.grad, "no_grad": without_graph, "eval": in_evaluation}
    grads = {n: p.grad for n, p in layer.named_parameters() if p.requires_grad}
    return found | grads


def style_of(name, **options):
    kinds = {"column": ColwiseAdaLora, "row": RowwiseAdaLora, "replicated": ReplicatedAdaLora}
    return kinds[name](**options)


def layers(cases):
    """By case, the relative errors of a layer on all processes from one process's, and placements.

    A case is (style, options of a_layer, options of the style, parameters that learn or are
    frozen other than usual, or "hooked" for a hook on the dropout, which the op leaves alone).
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh("cpu", (world,))
    report = {}
    for name, (style, options, layouts, learns) in cases.items():
        single = a_layer(**options)
        # From other values: those of the first process are what counts.
        parallel = a_layer(**options)
        if rank:
            with torch.no_grad():
                for p in parallel.parameters():
                    p.add_(1.0)
        for layer in (single, parallel):
            if learns == "hooked":
                layer.lora_dropout.register_forward_hook(lambda *_: None)
            elif learns:
                for changed in learns:
                    parameter = getattr(layer, changed)
                    parameter.requires_grad_(not parameter.requires_grad)
        x = torch.randn(2, 4 * world, single.in_features, dtype=single.weight.dtype)
        weights = torch.randn(2, 4 * world, single.out_features, dtype=x.dtype)
        expected = results(single, x, weights)
        parallel = parallelize_module(parallel, mesh, style_of(style, **layouts))
        here_x, here_weights = x, weights
        if (given := layouts.get("input_layouts")) or style == "row":
            dim = -1 if given is None else getattr(given, "dim", None)
            if dim is not None:
                here_x = x.tensor_split(_cuts(x.shape[dim], world), dim)[rank]
        default = Shard(-1) if style == "column" else Replicate()
        out = layouts.get("output_layouts", default)
        if isinstance(out, Shard) and layouts.get("use_local_output", True):
            here_weights = weights.tensor_split(_cuts(weights.shape[out.dim], world), out.dim)[rank]
        elif not layouts.get("use_local_output", True):
            here_weights = DTensor.from_local(weights, mesh, [Replicate()], run_check=False)
        found = results(parallel, here_x, here_weights)
        trained = {n: p for n, p in parallel.named_parameters() if p.requires_grad}
        placements = {n: str(p.placements) for n, p in trained.items()}
        grads = {n: str(p.grad.placements) for n, p in trained.items()}
        errors = {}
        for key, value in found.items():
            wanted = expected[key]
            if not isinstance(value, DTensor) and value.shape != wanted.shape:
                dim = next(d for d in range(value.dim()) if value.shape[d] != wanted.shape[d])
                wanted = wanted.tensor_split(_cuts(wanted.shape[dim], world), dim)[rank]
            value = whole(value)
            errors[key] = relative(value, wanted) if wanted.numel() else 0.0
        report[name] = {"errors": errors, "placements": placements, "grads": grads}
    return report


def _cuts(size, world):
    """Where torch cuts a dimension: into parts of equal size, and a smaller one."""
    part = -(-size // world)
    return [min(part * i, size) for i in range(1, world)]


class Sent(CommDebugMode):
    """Which collectives are called, and with how many numbers."""

    def __enter__(self):
        self.collectives = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        kind = name.removeprefix("_c10d_functional::")
        if kind != name and not kind.startswith(("wait", "_wrap")):
            self.collectives.append((kind, args[0].numel()))
        return super().__torch_dispatch__(func, types, args, kwargs)


def sent(dropout=0.0):
    """The collectives of a layer's forward and backward, by style."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    report = {}
    for style in ("column", "row", "replicated"):
        layer = parallelize_module(a_layer(lora_dropout=dropout), mesh, style_of(style))
        features = 10 // dist.get_world_size() if style == "row" else 10
        x = torch.randn(3, features, dtype=torch.float64, requires_grad=True)
        with Sent() as forward:
            y = layer(x)
        with Sent() as backward:
            y.sum().backward()
        report[style] = forward.collectives, backward.collectives
    return report


def x_under_way():
    """What the op of a column-wise layer gets where torch's style is still summing up x."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    layers = nn.Sequential(nn.Linear(10, 10, dtype=torch.float64), a_layer())
    parallelize_module(layers, mesh, {"0": RowwiseParallel(), "1": ColwiseAdaLora()})
    seen = []

    def svd_linear(x, *tensors, **options):
        seen.append(type(x).__name__)
        return own(x, *tensors, **options)

    own, functional.svd_linear = functional.svd_linear, svd_linear
    layers(torch.randn(3, 5, dtype=torch.float64)).sum().backward()
    functional.svd_linear = own
    return seen, layers[0].weight.grad is not None


def compiled():
    """The relative errors of layers compiled as one graph from what they compute otherwise."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    report = {}
    for style, dropout in itertools.product(("column", "row", "replicated"), (0.0, 0.5)):
        layer = parallelize_module(a_layer(lora_dropout=dropout), mesh, style_of(style))
        features = 10 // dist.get_world_size() if style == "row" else 10
        x = torch.randn(3, features, dtype=torch.float64)
        found = []
        for run in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
            torch.manual_seed(dist.get_rank())
            layer.zero_grad()
            y = run(x)
            y.sum().backward()
            found.append([y.detach(), *(whole(getattr(layer, f).grad) for f in FACTORS)])
        eager, graph = found
        report[style, dropout] = [relative(g, e) for g, e in zip(graph, eager, strict=True)]
    return report


def narrow():
    """By dtypes, the relative errors of y and the gradients, and the dtypes of these."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    report = {}
    for style in ("column", "row"):
        for autocast in (False, True):
            layer = a_layer(dtype=torch.float32)
            if not autocast:
                for name in ("weight", "bias"):
                    parameter = getattr(layer, name)
                    parameter.data = parameter.data.bfloat16()
            x = torch.randn(64, 10, dtype=layer.weight.dtype)
            found = []
            for is_parallel in (False, True):
                if is_parallel:
                    layer.zero_grad()
                    layouts = {"output_layouts": Replicate(), "input_layouts": Replicate()}
                    layer = parallelize_module(layer, mesh, style_of(style, **layouts))
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    y = layer(x)
                y.float().square().sum().backward()
                grads = [whole(getattr(layer, factor).grad) for factor in FACTORS]
                found.append([y.detach(), *grads])
            errors = [relative(p.float(), s.float()) for s, p in zip(*found, strict=True)]
            alike = all(p.dtype == s.dtype for s, p in zip(*found, strict=True))
            report[style, autocast] = errors, alike, str(y.dtype)
    return report


def dropout():
    """What is dropped: whether it is the same everywhere, and what of x lies in parts."""
    world, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh("cpu", (world,))
    size, found = 8, {}
    x = torch.randn(64, size, dtype=torch.float64)
    for style in ("column", "row"):
        layer = SVDLinear(size, size, r=size, lora_dropout=0.5, bias=False, dtype=x.dtype)
        layer.scaling = 1.0
        with torch.no_grad():
            layer.weight.zero_()
            layer.lora_E.fill_(1.0)
            layer.lora_A.copy_(torch.eye(size))
            # All columns of y are sums of what is left of x; or they are what is left of it.
            layer.lora_B.copy_(torch.ones(size, size) if style == "column" else torch.eye(size))
        layer = parallelize_module(layer, mesh, style_of(style))
        # The worst for each: generators that differ, and generators that are in one state.
        torch.manual_seed(rank if style == "column" else 0)
        here = x if style == "column" else torch.ones_like(x).chunk(world, 1)[rank]
        here = here.clone().requires_grad_()

        def call(t, layer=layer):
            return layer(t)

        state = torch.get_rng_state()
        y = call(here)
        y.sum().backward()
        torch.set_rng_state(state)
        again = here.detach().clone().requires_grad_()
        checkpoint(call, again, use_reentrant=False).sum().backward()
        found[style] = {"y": y.detach(), "x": here.grad, "again": again.grad}
    return found


class Pair(nn.Module):
    """A column-wise and a row-wise layer, and two of GPT-2's kind."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(10, 14), nn.Linear(14, 10)
        self.up_t, self.down_t = Conv1D(12, 10), Conv1D(10, 12)

    def forward(self, x):
        x = x + self.down(torch.tanh(self.up(x)))
        return x + self.down_t(torch.tanh(self.up_t(x)))


def a_pair():
    torch.manual_seed(0)
    names = ["up", "down", "up_t", "down_t"]
    options = {"init_r": 6, "target_r": 3, "total_step": 30, "target_modules": names}
    model = get_peft_model(Pair(), AdaLoraConfig(**options))
    model.add_adapter("other", AdaLoraConfig(**options | {"inference_mode": True, "init_r": 2}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "bias" in name:
                parameter.normal_()
    adalora_kernels.peft.apply(model)
    return model.double()


def peft_layers():
    """The relative errors of PEFT's layers from those of one process, in several states."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plan = {"up*": ColwiseAdaLora(), "down*": RowwiseAdaLora()}
    x = torch.randn(3, 5, 10, dtype=torch.float64)

    def plain(model):
        return contextlib.nullcontext()

    def disabled(model):
        return model.disable_adapter()

    def hooked(model):
        for layer in model.get_base_model().children():
            layer.base_layer.register_forward_hook(lambda *_: None)
        return contextlib.nullcontext()

    def both(model):
        model.base_model.set_adapter(["default", "other"])
        return contextlib.nullcontext()

    report = {}
    for state in (plain, disabled, hooked, both):
        found = []
        for is_parallel in (False, True):
            model = a_pair()
            if is_parallel:
                parallelize_module(model.get_base_model(), mesh, plan)
            model.requires_grad_(False)
            here = x.clone().requires_grad_()
            with state(model):
                for name, parameter in model.named_parameters():
                    parameter.requires_grad_("lora_" in name)
                y = model(here)
                y.square().sum().backward()
            grads = {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
            found.append({"y": y.detach(), "x": here.grad, **grads})
        single, parallel = found
        assert single.keys() == parallel.keys()
        report[state.__name__] = {n: relative(parallel[n], single[n]) for n in single}
    return report


def refusals():
    """By case, the error of sharding a layer that can't be."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    twice = parallelize_module(a_layer(), mesh, ColwiseAdaLora())
    untaken = get_peft_model(
        nn.Sequential(nn.Linear(4, 4)),
        AdaLoraConfig(target_modules=["0"], init_r=2, target_r=1, total_step=9),
    )
    convolution = get_peft_model(
        nn.Sequential(nn.Conv2d(4, 4, 1)),
        AdaLoraConfig(target_modules=["0"], init_r=2, target_r=1, total_step=9),
    )
    adalora_kernels.peft.apply(convolution)
    cases = {
        "merged": a_layer().eval(),
        "twice": twice,
        "of PEFT": untaken.get_base_model()[0],
        "convolution": convolution.get_base_model()[0],
    }
    report = {}
    for name, layer in cases.items():
        before = [(n, type(p)) for n, p in layer.named_parameters()]
        try:
            parallelize_module(layer, mesh, RowwiseAdaLora())
        except (TypeError, ValueError) as error:
            report[name] = f"{type(error).__name__}: {error}"
        assert before == [(n, type(p)) for n, p in layer.named_parameters()]
    return report

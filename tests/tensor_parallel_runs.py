"""What test_distributed_tensor_parallel.py runs in several processes."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module

from adalora_kernels import SVDLinear
from adalora_kernels.distributed import ColwiseAdaLora, RowwiseAdaLora

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
    found = {"y": y.detach(), "x": x.grad}
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            found[name] = parameter.grad
    return found


def style_of(name, **options):
    return {"column": ColwiseAdaLora, "row": RowwiseAdaLora}[name](**options)


def layers(cases):
    """By case, the relative errors of a layer on all processes from one process's, and placements.

    A case is (style, options of a_layer, options of the style, whether the bias learns).
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
            if learns:
                layer.bias.requires_grad_(True)
        x = torch.randn(2, 4 * world, single.in_features, dtype=single.weight.dtype)
        weights = torch.randn(2, 4 * world, single.out_features, dtype=x.dtype)
        expected = results(single, x, weights)
        parallel = parallelize_module(parallel, mesh, style_of(style, **layouts))
        here_x, here_weights = x, weights
        if (given := layouts.get("input_layouts")) or style == "row":
            dim = -1 if given is None else getattr(given, "dim", None)
            if dim is not None:
                here_x = x.tensor_split(_cuts(x.shape[dim], world), dim)[rank]
        out = layouts.get("output_layouts", Shard(-1) if style == "column" else Replicate())
        if isinstance(out, Shard) and layouts.get("use_local_output", True):
            here_weights = weights.tensor_split(_cuts(weights.shape[out.dim], world), out.dim)[rank]
        elif not layouts.get("use_local_output", True):
            here_weights = DTensor.from_local(weights, mesh, [Replicate()], run_check=False)
        found = results(parallel, here_x, here_weights)
        placements = {n: str(p.placements) for n, p in parallel.named_parameters() if n in FACTORS}
        grads = {n: str(p.grad.placements) for n, p in parallel.named_parameters() if n in FACTORS}
        errors = {}
        for key, value in found.items():
            wanted = expected[key]
            if not isinstance(value, DTensor) and value.shape != wanted.shape:
                dim = next(
                    d for d in range(value.dim()) if value.shape[d] != wanted.shape[d]
                )
                wanted = wanted.tensor_split(_cuts(wanted.shape[dim], world), dim)[rank]
            value = whole(value)
            errors[key] = relative(value, wanted) if wanted.numel() else 0.0
        report[name] = {"errors": errors, "placements": placements, "grads": grads}
    return report


def _cuts(size, world):
    """Where torch cuts a dimension: into parts of equal size, and a smaller one."""
    part = -(-size // world)
    return [min(part * i, size) for i in range(1, world)]

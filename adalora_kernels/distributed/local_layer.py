"""What a layer computes whose parameters are DTensors: one call of the op on the local shards.

Three ways to lay out a layer are known, those of tensor parallelism, on a mesh of one dimension:

    column-wise: x whole, weight and lora_B in parts of out, so y comes in parts of out;
    row-wise: x, weight and lora_A in parts of in, so y comes in partial sums;
    replicated: all whole, so all processes compute the same, and nothing is sent.

The low-rank term is linear in h = x·lora_Aᵀ, so the partial h of a row-wise layer makes its part of
the sum. What each process finds as the gradient of a parameter that it has whole is one summand of
the gradient: of lora_A and lora_E of a column-wise layer, because u = g·lora_B is a partial sum
there; of lora_E and lora_B of a row-wise one, because h is. They are added up in the backward, in
one all-reduce for both, so that all processes have the same gradient (placement Replicate). The
gradient of x of a column-wise layer is left as a partial sum, for whoever has made a DTensor of x.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

# Two seeds may not be the same on two processes; see `_agree`.
_ODD = 0x9E3779B97F4A7C15 >> 1


class _Summed(Function):
    """The local tensors of replicated DTensors, whose gradients are summed up over the mesh."""

    @staticmethod
    def forward(ctx: Any, mesh: DeviceMesh, *tensors: DTensor) -> tuple[Tensor, ...]:
        ctx.mesh = mesh
        # Views: autograd would write what it knows of an output into the parameter's own tensor.
        return tuple(local.view_as(local) for local in (t.to_local() for t in tensors))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        needed = [g for g, needs in zip(grads, ctx.needs_input_grad[1:], strict=True) if needs]
        flat = torch.cat([g.flatten() for g in needed]) if len(needed) > 1 else needed[0].flatten()
        flat = DTensor.from_local(flat, ctx.mesh, [Partial()], run_check=False).full_tensor()
        parts = iter(flat.split_with_sizes([g.numel() for g in needed]))
        return None, *(
            _replicated(next(parts).view_as(g).to(g.dtype), ctx.mesh) if needs else None
            for g, needs in zip(grads, ctx.needs_input_grad[1:], strict=True)
        )


class _Local(Function):
    """The local tensor of x, whose gradient has another placement.

    As `to_local(grad_placements=...)`, but it waits for a collective that is under way (torch's
    styles leave such a tensor in x), because no op knows the class of tensors that stand for one.
    """

    @staticmethod
    def forward(ctx: Any, x: DTensor, of_dx: Placement) -> Tensor:
        ctx.mesh, ctx.of_dx, ctx.shape, ctx.stride = x.device_mesh, of_dx, x.shape, x.stride()
        local = x.to_local()
        wait = getattr(local, "wait", None)
        local = local if wait is None else wait()
        return local.view_as(local)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        placed = DTensor.from_local(
            grad, ctx.mesh, [ctx.of_dx], run_check=False, shape=ctx.shape, stride=ctx.stride
        )
        return placed, None


def _replicated(local: Tensor, mesh: DeviceMesh) -> DTensor:
    return DTensor.from_local(local, mesh, [Replicate()], run_check=False)


def on_shards(
    layer: Callable[..., Tensor],
    draw_seed: Callable[[Tensor], Tensor],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
    A: Tensor,
    E: Tensor,
    B: Tensor,
    mask: Tensor | None,
    scaling: float,
    dropout_p: float,
) -> Tensor | None:
    """Return y of `functional.svd_linear`, or, given the output of a base layer, of `svd_delta`.

    Args:
        layer: computes y on plain tensors. It takes all of the following arguments and a seed for
            the dropout, an int64 (1,), or None where nothing is dropped.
        draw_seed: `ops.dropout_seed`.
        x, weight, bias, base, A, E, B, mask, scaling, dropout_p: as in `short.layer`.

    Returns:
        y as a DTensor: Shard(-1) of a column-wise layer, Partial of a row-wise one, Replicate of a
        replicated one. None if it is none of them, which is then for DTensor's own rules.
    """
    mesh = _mesh_of(x, weight, bias, base, A, E, B)
    if mesh is None:
        return None
    kind = _kind_of(A, E, B)
    if kind is None:
        return None
    whole, last = Replicate(), Shard(x.dim() - 1)
    # Of x, the gradient of x, weight, bias and y.
    of_x, of_dx, *expected = {
        "column": (whole, Partial(), Shard(0), Shard(0), last),
        "row": (last, last, Shard(1), whole, Partial()),
        "replicated": (whole,) * 5,
    }[kind]
    *_, of_y = expected
    for t, placement in zip((weight, bias, base), expected, strict=True):
        if t is not None and t.placements[0] != placement:  # type: ignore[attr-defined]
            return None
    if mask is not None and isinstance(mask, DTensor):
        mask = mask.full_tensor()
    whole_x: Any = x
    if whole_x.placements[0] != of_x:
        whole_x = whole_x.redistribute(placements=[of_x])
    local_x = _Local.apply(whole_x, of_dx)  # type: ignore[no-untyped-call]
    seed = None
    if dropout_p > 0.0:
        seed = _agree(draw_seed(local_x), mesh, alike=kind != "row")
    local_bias, *factors = _parameters(kind, mesh, bias, A, E, B)
    y = layer(
        local_x, _part(weight), local_bias, _part(base), *factors, mask, scaling, dropout_p, seed
    )
    shape = torch.Size((*x.shape[:-1], B.shape[0]))
    # Said, and not concluded from the local shape: the parts may differ in size.
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(y, mesh, [of_y], run_check=False, shape=shape, stride=stride)


def _mesh_of(*tensors: Tensor | None) -> DeviceMesh | None:
    """The mesh of one dimension of all the tensors; None if there is no such mesh."""
    there = [t for t in tensors if t is not None]
    if not all(isinstance(t, DTensor) for t in there):
        return None
    meshes = [t.device_mesh for t in there]  # type: ignore[attr-defined]
    alike = all(mesh == meshes[0] for mesh in meshes[1:])
    return meshes[0] if alike and meshes[0].ndim == 1 else None


def _kind_of(A: Any, E: Any, B: Any) -> str | None:
    """How a layer with these factors, on a mesh of one dimension, is laid out."""
    if E.placements[0] != Replicate():
        return None
    placements = A.placements[0], B.placements[0]
    kinds = {
        (Replicate(), Shard(0)): "column",
        (Shard(1), Replicate()): "row",
        (Replicate(), Replicate()): "replicated",
    }
    return kinds.get(placements)


def _parameters(kind: str, mesh: DeviceMesh, bias: Any, A: Any, E: Any, B: Any) -> list[Any]:
    """What of bias, lora_A, lora_E and lora_B the layer takes here."""
    if kind == "column":
        return [_part(bias), *_summed(mesh, A, E), _part(B)]
    if kind == "replicated":
        return [_part(t) for t in (bias, A, E, B)]
    bias, E, B = _summed(mesh, bias, E, B)
    if bias is not None and mesh.get_local_rank() != 0:
        # y is a sum over the processes. Where the bias learns, all of them have to take part.
        bias = bias * 0.0 if bias.requires_grad else None
    return [bias, _part(A), E, B]


def _part(t: Any) -> Any:
    """The local shard; its gradient is the local shard of the gradient."""
    return None if t is None else t.to_local()


def _summed(mesh: DeviceMesh, *tensors: Any) -> list[Any]:
    """The local tensors of what every process has, None of None; see `_Summed`."""
    there = [t for t in tensors if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in there):
        local = iter(_Summed.apply(mesh, *there))  # type: ignore[no-untyped-call]
    else:
        local = iter([t.to_local() for t in there])
    return [None if t is None else next(local) for t in tensors]


def _agree(seed: Tensor, mesh: DeviceMesh, alike: bool) -> Tensor:
    """The seed of this call's dropout, made of one that this process has drawn, an int64 (1,).

    Where all processes have the same x (`alike`), they drop the same entries: the seed is that of
    the first one, which sends it. Otherwise each has its own entries and drops its own. The seeds
    then differ also where the generators are in the same state.
    """
    if not alike:
        return (seed + mesh.get_local_rank() * _ODD % 2**63) & (2**63 - 1)
    return DTensor.from_local(seed, mesh, [Shard(0)], run_check=False).full_tensor()[:1]

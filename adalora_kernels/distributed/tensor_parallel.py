"""Tensor parallelism of adapted layers: styles for `parallelize_module`, and plans of them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from ..fusing import is_plain_tensor


class ColwiseAdaLora(ColwiseParallel):
    """`ColwiseParallel` for a layer with an AdaLoRA adapter: its outputs are shared out.

    The weight (out, in) and lora_B (out, r) lie in parts of `out` on the processes of the mesh,
    a bias too; lora_A (r, in) and lora_E (r, 1) are everywhere. All become DTensors. The layer
    computes on its local shards, by the same op as one without tensor parallelism. In the backward
    the gradients of lora_A and lora_E are summed up in one all-reduce of r·(in + 1) numbers, so
    that they are whole and equal everywhere; that of x is summed up as with `ColwiseParallel`.

    lora_dropout drops the same entries of x on all processes: the seed, 8 bytes, comes from the
    first one in each forward. Without dropout nothing is sent for it.

    Args:
        input_layouts, output_layouts, use_local_output: as in `ColwiseParallel`: by default x is
            replicated, and y is a plain tensor, the local part of `out`.

    What `parallelize_module` raises for a layer:
        TypeError: its adapter is not one of ours (call `peft.apply` first), or its weight is not
            that of an nn.Linear or Conv1D (quantised, Conv2d).
        ValueError: it is merged, or sharded already.

    A layer without an adapter is left to `ColwiseParallel`. The parameters are new objects, so make
    the optimizer afterwards.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        # What `parallelize_module` calls, of a style of one's own, too.
        if not _has_adapter(module):
            return super()._apply(module, device_mesh)
        _shard_(module, device_mesh, Shard(0), self.src_data_rank)
        return _hook(module, device_mesh, self, Replicate())


class RowwiseAdaLora(RowwiseParallel):
    """`RowwiseParallel` for a layer with an AdaLoRA adapter: its inputs are shared out.

    The weight (out, in) and lora_A (r, in) lie in parts of `in` on the processes of the mesh;
    lora_E (r, 1), lora_B (out, r) and a bias are everywhere. All become DTensors. The layer
    computes a partial sum of y by the same op as one without tensor parallelism. The low-rank term
    is part of it, so nothing more is sent for it in the forward. In the backward the gradients of
    lora_E and lora_B are summed up in one all-reduce of r·(out + 1) numbers, so that they are whole
    and equal everywhere.

    lora_dropout drops entries on each process from its own part of x, independently of the others.

    Args:
        input_layouts, output_layouts, use_local_output: as in `RowwiseParallel`: by default x is
            the local part of `in`, and y is whole, a plain tensor.

    What is raised, and what is done with other layers: see `ColwiseAdaLora`.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not _has_adapter(module):
            return super()._apply(module, device_mesh)
        _shard_(module, device_mesh, Shard(1), self.src_data_rank)
        return _hook(module, device_mesh, self, Shard(-1))


class ReplicatedAdaLora(ParallelStyle):
    """For a layer with an AdaLoRA adapter that is not shared out, beside layers that are.

    Its weight, bias and adapter become DTensors that all processes have whole, so that a model's
    adapters are all of one kind, for the optimizer and the allocator. All processes compute the
    same. Nothing is sent but 8 bytes for the seed of a lora_dropout.

    Args:
        input_layouts, output_layouts: of x and y; both are replicated by default.
        use_local_output: whether y is a plain tensor.

    What is raised: see `ColwiseAdaLora`. A layer without an adapter is left as it is.
    """

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        super().__init__()
        self.input_layouts = (input_layouts or Replicate(),)
        self.output_layouts = (output_layouts or Replicate(),)
        self.use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not _has_adapter(module):
            return module
        _shard_(module, device_mesh, None, self.src_data_rank)
        return _hook(module, device_mesh, self, Replicate())


_NAMED: dict[str, tuple[type[ColwiseAdaLora | RowwiseAdaLora], dict[str, Any]]] = {
    "colwise": (ColwiseAdaLora, {}),
    "colwise_rep": (ColwiseAdaLora, {"output_layouts": Replicate()}),
    "colwise_gather_output": (ColwiseAdaLora, {"output_layouts": Replicate()}),
    "rowwise": (RowwiseAdaLora, {}),
    "rowwise_rep": (RowwiseAdaLora, {"input_layouts": Replicate()}),
    "rowwise_split_input": (RowwiseAdaLora, {"input_layouts": Replicate()}),
}


def adalora_plan(plan: Mapping[str, ParallelStyle | str]) -> dict[str, ParallelStyle]:
    """Make a plan for an adapted model from one for the model without adapters.

    `parallelize_module(model.model, mesh, adalora_plan(model.config.base_model_tp_plan))`

    Args:
        plan: by the names of modules, either styles of `torch.distributed.tensor.parallel` or the
            names that plans of transformers have for them: "colwise", "rowwise",
            "colwise_gather_output" (or "colwise_rep"), "rowwise_split_input" (or "rowwise_rep").
            The names of modules are those of before: an adapted layer stands in the place of the
            one that it adapts.

    Returns:
        The same with `ColwiseAdaLora` and `RowwiseAdaLora` in place of `ColwiseParallel` and
        `RowwiseParallel`, which do the same to modules without an adapter. Other styles, also those
        derived from the two, are left as they are.

    Raises:
        TypeError: plan is no mapping, or one of its values is no style and no string.
        ValueError: another name of a style.
    """
    if not isinstance(plan, Mapping):
        raise TypeError(f"plan must be a dict of parallel styles, got {type(plan).__name__}")
    return {name: _style_of(name, style) for name, style in plan.items()}


def _style_of(name: str, style: Any) -> ParallelStyle:
    if isinstance(style, str):
        if style not in _NAMED:
            raise ValueError(
                f"plan has {style!r} for {name!r}, which has no style here: give one of "
                f"torch.distributed.tensor.parallel, or one of {', '.join(map(repr, _NAMED))}"
            )
        kind, layouts = _NAMED[style]
        return kind(**layouts)
    if not isinstance(style, ParallelStyle):
        raise TypeError(f"plan has a {type(style).__name__} for {name!r}, expected a ParallelStyle")
    ours = {ColwiseParallel: ColwiseAdaLora, RowwiseParallel: RowwiseAdaLora}.get(type(style))
    if ours is None:
        return style
    like = cast("ColwiseParallel | RowwiseParallel", style)
    return ours(
        input_layouts=like.input_layouts[0],
        output_layouts=like.output_layouts[0],
        use_local_output=like.use_local_output,
    )


def _has_adapter(module: nn.Module) -> bool:
    """Whether a layer has lora_A, as a parameter or, by names of adapters, as a module."""
    return "lora_A" in module._parameters or "lora_A" in module._modules


def _shard_(module: Any, mesh: DeviceMesh, shard: Shard | None, src_data_rank: int | None) -> None:
    """Make DTensors of a layer's weight, bias and adapters.

    Of PEFT's layers all adapters become DTensors, also those that are not active.

    Args:
        shard: that of a weight (out, in); None for a replicated layer.
    """
    base = module._modules.get("base_layer", module)
    is_transposed = _check(module, base)
    whole = Replicate()
    of_out: Placement = Shard(0) if shard == Shard(0) else whole
    of_in: Placement = Shard(1) if shard == Shard(1) else whole
    of_weight: Placement = shard or whole
    if is_transposed and shard is not None:
        of_weight = Shard(1 - shard.dim)
    placed: list[tuple[nn.Module, str, Placement]] = [(base, "weight", of_weight)]
    if base._parameters.get("bias") is not None:
        placed.append((base, "bias", of_out))
    of_factors = {"lora_A": of_in, "lora_E": whole, "lora_B": of_out}
    for factor, placement in of_factors.items():
        if factor in module._parameters:
            placed.append((module, factor, placement))
        else:
            adapters = module._modules[factor]
            placed += [(adapters, name, placement) for name in adapters._parameters]
    for owner, name, placement in placed:
        parameter: Any = owner._parameters[name]
        part = distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=src_data_rank)
        owner.register_parameter(name, nn.Parameter(part, parameter.requires_grad))


def _check(module: Any, base: Any) -> bool:
    """Raise an error if a layer can't be sharded; return whether its weight is (in, out)."""
    kind = type(module).__name__
    if not getattr(module, "takes_dtensors", False):
        raise TypeError(
            f"a {kind} of another package computes without this one: call "
            "adalora_kernels.peft.apply(model), or use adalora_kernels.SVDLinear, before "
            "parallelize_module"
        )
    weight = base._parameters.get("weight")
    if isinstance(weight, DTensor):
        raise ValueError(
            f"the weight of this {kind} is a DTensor already: give its tensor-parallel style once, "
            "to the adapted layer, and before fully_shard"
        )
    is_conv1d = type(base).__name__ == "Conv1D"  # Without importing transformers.
    if not (
        (isinstance(base, nn.Linear) or is_conv1d)
        and weight is not None
        and is_plain_tensor(weight)
        and weight.is_floating_point()
    ):
        what = type(base).__name__ if weight is None else type(weight).__name__
        raise TypeError(
            f"tensor parallelism needs the floating point weight of an nn.Linear, and this {kind} "
            f"has a {type(base).__name__} with a {what}"
        )
    if module.merged:
        raise ValueError(f"this {kind} is merged: call train(), or unmerge it, and shard it then")
    return is_conv1d or bool(getattr(module, "fan_in_fan_out", False))


def _hook(
    module: nn.Module,
    mesh: DeviceMesh,
    style: ColwiseAdaLora | RowwiseAdaLora | ReplicatedAdaLora,
    of_x: Placement,
) -> nn.Module:
    """Have x made a DTensor before the layer's forward, and y what the style wants after it."""
    module.register_forward_pre_hook(partial(_input, mesh, style.input_layouts, (of_x,)))
    module.register_forward_hook(partial(_output, style.output_layouts, style.use_local_output))
    return module


def _input(
    mesh: DeviceMesh,
    given: tuple[Placement, ...],
    wanted: tuple[Placement, ...],
    module: Any,
    inputs: tuple[Any, ...],
) -> tuple[Any, ...]:
    x, *others = inputs
    if not isinstance(x, DTensor):
        shape = stride = None
        if given[0] in (Shard(-1), Shard(x.dim() - 1)):
            # Said, and not concluded from the local shape: the parts may differ in size.
            shape = torch.Size((*x.shape[:-1], module.in_features))
            stride = torch.empty(shape, device="meta").stride()
        x = DTensor.from_local(x, mesh, given, run_check=False, shape=shape, stride=stride)
    if given != wanted:
        x = x.redistribute(placements=wanted)
    return x, *others


def _output(
    wanted: tuple[Placement, ...], use_local: bool, module: Any, inputs: Any, y: Tensor
) -> Tensor:
    whole = cast(DTensor, y)
    if whole.placements != wanted:
        whole = whole.redistribute(placements=wanted)
    return whole.to_local() if use_local else whole

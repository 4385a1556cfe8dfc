"""Adapters under DeepSpeed's ZeRO: whole copies of what each process has a part of.

Stages 1 and 2 keep the parameters of the model whole, and cut their float32 masters, gradients and
optimizer state; stage 3 cuts all of them. They are read and written through DeepSpeed's public
functions (`deepspeed.utils.safe_get_full_grad` and the like). Where there is none for what is
needed, a comment says so.

What is sent in an optimizer step, with P = Σ r·(in + out + 1) entries in all trained adapters,
n = Σ r triplets, and W processes, is sent by each of them in float32:

- before the final phase, the gradients, P; and after the step the new masters, P
- with the regulariser also the masters of lora_A and lora_B before the step, P - n
- in steps that prune, and all of the final phase, lora_E's masters, n

In stage 3, each is one all-gather of P / W entries a process. In stages 1 and 2 it is DeepSpeed's
all-reduce of each parameter; masters of float32 parameters are read from the parameters, and
nothing is sent. What is written is written by each process to its own part.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..adapters import Adapter


def optimizer_of(engine: Any) -> Any:
    """What takes the steps of a DeepSpeed engine; anything else is returned as it is.

    Raises:
        ValueError: an engine of a pipeline, or one without an optimizer.
    """
    if "deepspeed" not in sys.modules:
        return engine
    from deepspeed import DeepSpeedEngine
    from deepspeed.runtime.pipe.engine import PipelineEngine

    if isinstance(engine, PipelineEngine):
        raise ValueError("optimizer is a PipelineEngine of DeepSpeed, which is not supported")
    if not isinstance(engine, DeepSpeedEngine):
        return engine
    optimizer = engine.optimizer
    if optimizer is None or not hasattr(optimizer, "step"):
        raise ValueError(
            "optimizer is a DeepSpeedEngine that has no optimizer: give one to "
            "deepspeed.initialize, or a section 'optimizer' in its config"
        )
    return optimizer


def zero_optimizer_of(optimizer: Any) -> Any | None:
    """The ZeRO optimizer that `optimizer` is or stands for; None if it is another one.

    Args:
        optimizer: what `optimizer_of` returns, or Accelerate's wrapper around that, which is the
            optimizer of a Trainer.

    Raises:
        ValueError: DeepSpeed is set up so that the adapters can't be allocated; the message names
            the setting.
    """
    if "deepspeed" not in sys.modules:
        return None
    from deepspeed.runtime.base_optimizer import DeepSpeedOptimizer

    if isinstance(optimizer, torch.optim.Optimizer):
        optimizer = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(optimizer, DeepSpeedOptimizer):
        return None
    _refuse_unsupported(optimizer)
    return optimizer


def _refuse_unsupported(optimizer: Any) -> None:
    """Raise ValueError if this optimizer of DeepSpeed's can't be followed."""
    kind = type(optimizer).__name__
    if kind not in ("DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3"):
        fixes = {
            "BF16_Optimizer": "ZeRO stage 1 in bf16 with data_types.grad_accum_dtype fp32: use "
            "stage 2 or 3, or leave grad_accum_dtype out",
            "FP16_Optimizer": "ZeRO stage 0 in half precision: use stage 1, 2 or 3",
            "FP16_UnfusedOptimizer": "ZeRO stage 0 in half precision: use stage 1, 2 or 3",
        }
        fix = fixes.get(kind, "use ZeRO stage 1, 2 or 3 without zenflow and super_offload")
        raise ValueError(f"DeepSpeed's {kind} is not supported, which is {fix}")
    if getattr(optimizer, "swap_optimizer", False):
        raise ValueError(
            "DeepSpeed's offload_optimizer to device 'nvme' is not supported: use 'cpu' or none"
        )
    if getattr(optimizer, "round_robin_gradients", False):
        raise ValueError(
            "DeepSpeed's round_robin_gradients is not supported: its functions that read gradients "
            "take those of other parameters then. Leave it out of zero_optimization"
        )
    if getattr(optimizer, "torch_autocast_gradscaler", None) is not None:
        raise ValueError(
            "DeepSpeed's torch_autocast with dtype float16 is not supported: use bfloat16, or the "
            "fp16 section of its config"
        )
    if "muon" in type(optimizer.optimizer).__name__.lower():
        raise ValueError("DeepSpeed's Muon optimizer is not supported: it changes the gradients")
    if getattr(optimizer, "has_moe_layers", False):
        raise ValueError("DeepSpeed's MoE layers are not supported: each process has other experts")
    group = getattr(optimizer, "model_parallel_group", None)
    if group is not None and dist.get_world_size(group) > 1:
        raise ValueError("DeepSpeed with tensor or model parallelism is not supported")


class ZeroStep:
    """Calls functions in every step of a ZeRO optimizer, until `remove`.

    DeepSpeed's engine, and so Accelerate and the Trainer, call `optimizer.step()` only at the end
    of a gradient accumulation. It has no hooks, so the method is replaced on the object. The torch
    optimizer in it, which has hooks, steps once for each of DeepSpeed's flat tensors, when their
    gradients have been clipped.

    Args:
        optimizer: the ZeRO optimizer.
        before: gets it before the step.
        within: gets each flat tensor of masters before torch's step. It has its gradient.
        after: gets the optimizer after the step, and the loss scale that the step has begun with.
    """

    def __init__(
        self,
        optimizer: Any,
        before: Callable[[Any], Any],
        within: Callable[[Tensor], Any],
        after: Callable[[Any, float], Any],
    ) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._is_removed = False
        inner = optimizer.step

        def step(*args: Any, **kwargs: Any) -> Any:
            if self._is_removed:
                return inner(*args, **kwargs)
            before(optimizer)
            loss_scale = float(optimizer.loss_scale)
            result = inner(*args, **kwargs)
            after(optimizer, loss_scale)
            return result

        def hook(stepping: torch.optim.Optimizer, *_: Any) -> None:
            for group in stepping.param_groups:
                for flat in group["params"]:
                    within(flat)

        # Weak: the function holds the optimizer.
        self._step = weakref.ref(step)
        optimizer.step = step
        # The second is for what offload_optimizer.ratio leaves on the accelerator.
        inside = (optimizer.optimizer, getattr(optimizer, "backup_optimizer", None))
        self._handles = [
            each.register_step_pre_hook(hook)
            for each in inside
            if isinstance(each, torch.optim.Optimizer)
        ]

    def remove(self) -> None:
        """Put the method back, or let it pass where somebody else has replaced it since."""
        self._is_removed = True
        for handle in self._handles:
            handle.remove()
        optimizer = self._optimizer()
        if optimizer is not None and vars(optimizer).get("step") is self._step():
            del optimizer.step


def gradient_scale(optimizer: Any, loss_scale: float, device: torch.device) -> Tensor:
    """What DeepSpeed's last step has multiplied the gradients by, from `read_gradients` on.

    That undoes the loss scale, and clips by the norm. One float32 on `device`; nothing is read.
    """
    clip = torch.ones(1, dtype=torch.float32, device=device)
    if optimizer.clip_grad > 0.0:
        # What the engine's get_global_grad_norm() returns, which an optimizer does not have.
        clip = (clip * optimizer._global_grad_norm + 1e-6) / optimizer.clip_grad
    return 1.0 / (loss_scale * clip.clamp(min=1.0))


class WholeCopies:
    """Whole float32 copies of the adapters' parameters, the same on all processes.

    The allocator works on them as on the parameters of one process. Something is sent only in
    `read_values` and `read_gradients`, which all processes have to call together.

    Args:
        adapters: whose parameters they are copies of.
        optimizer: the ZeRO optimizer that trains all of them but frozen ones.

    Attributes:
        parameters: lora_A, lora_E and lora_B of each adapter in turn. They have gradients between
            `set_gradients` and `drop_gradients`.

    Raises:
        ValueError: a trainable one is not trained by DeepSpeed, or has float64 values, for which
            DeepSpeed has no masters.
    """

    def __init__(self, adapters: Sequence[Adapter], optimizer: Any) -> None:
        import deepspeed

        # What stages 1 and 2, and stage 3, call the groups of the model's parameters.
        groups = getattr(optimizer, "bit16_groups", None) or optimizer.fp16_groups
        trained = {id(p) for group in groups for p in group}
        self._of = [p for adapter in adapters for p in adapter.parameters]
        for adapter in adapters:
            for p in adapter.parameters:
                if p.dtype == torch.float64:
                    raise ValueError(f"{adapter.name} is float64, and DeepSpeed's masters float32")
                if p.requires_grad and id(p) not in trained:
                    raise ValueError(
                        f"optimizer must have all trainable adapter parameters, and DeepSpeed does "
                        f"not train one of those beside {adapter.name}: give model_parameters to "
                        "deepspeed.initialize, after the adapters have been made"
                    )
        self.parameters: list[nn.Parameter] = []
        # By the number of the parameter: as they were read, and what comes to them.
        self._gradients: dict[int, Tensor] = {}
        self._additions: dict[int, Tensor] = {}
        self._fragments: dict[int, list[tuple[int, Tensor]]] = {}
        with deepspeed.zero.GatheredParameters(self._of), torch.no_grad():
            for p in self._of:
                copy = p.detach().to(torch.float32, copy=True)
                self.parameters.append(nn.Parameter(copy, p.requires_grad))
        self.read_values()

    @property
    def device(self) -> torch.device:
        """Where the copies lie: on this process's accelerator."""
        return self.parameters[0].device

    def follow(self) -> None:
        """See which parameters need a gradient now."""
        for p, copy in zip(self._of, self.parameters, strict=True):
            copy.requires_grad_(p.requires_grad)

    def read_values(self, factors: Sequence[int] = (0, 1, 2)) -> None:
        """Read the float32 masters. Frozen parameters, which have none, stay as they are.

        Args:
            factors: of which factors: 0 for lora_A, 1 for lora_E, 2 for lora_B.
        """
        chosen = [i for i in self._trained() if i % 3 in factors]
        values = _whole_values([self._of[i] for i in chosen])
        for i, value in zip(chosen, values, strict=True):
            self.parameters[i].data.copy_(value)

    def read_gradients(self, had_gradient: Sequence[bool]) -> None:
        """Read what the engine has accumulated, averaged over processes and times the loss scale.

        DeepSpeed does not tell a gradient of 0 from none. An adapter that has had no gradient yet
        has none while all of its entries are 0; this reads the device while there is such an
        adapter.

        Args:
            had_gradient: whether each adapter has had a gradient.
        """
        chosen = self._trained()
        gradients = list(_whole_gradients([self._of[i] for i in chosen]))
        new = [n for n, i in enumerate(chosen) if not had_gradient[i // 3]]
        if new:
            flags = torch.stack([(gradients[n] != 0).any() for n in new]).tolist()
            used = {chosen[n] // 3 for n, flag in zip(new, flags, strict=True) if flag}
            unused = {i for i in chosen if not had_gradient[i // 3] and i // 3 not in used}
        else:
            unused = set()
        self._gradients = {i: g for i, g in zip(chosen, gradients, strict=True) if i not in unused}

    @property
    def have_gradients(self) -> bool:
        """Whether `read_gradients` has found any."""
        return len(self._gradients) > 0

    def take_additions(self, optimizer: Any) -> None:
        """Let `add_to` add the copies' gradients, which are none then."""
        for i, copy in enumerate(self.parameters):
            if copy.grad is not None:
                self._additions[i] = copy.grad
                copy.grad = None
        self._fragments = _fragments(
            optimizer, [(self._of[i], addition) for i, addition in self._additions.items()]
        )

    @torch.no_grad()
    def add_to(self, flat: Tensor) -> None:
        """Add to the gradient of a flat tensor of masters what belongs there."""
        gradient = flat.grad
        for start, addition in self._fragments.pop(id(flat), ()):
            if gradient is not None:
                gradient.view(-1)[start : start + addition.numel()].add_(addition)

    @torch.no_grad()
    def set_gradients(self, scale: Tensor) -> None:
        """Give the copies the gradients that DeepSpeed's step has used.

        Args:
            scale: what that has multiplied the gradients by, one float32.
        """
        for i, addition in self._additions.items():
            self.parameters[i].grad = addition
        for i, gradient in self._gradients.items():
            copy = self.parameters[i]
            gradient = gradient * scale
            copy.grad = gradient if copy.grad is None else gradient.add_(copy.grad)

    def drop_gradients(self) -> None:
        """Free everything about gradients."""
        self._gradients, self._additions, self._fragments = {}, {}, {}
        for copy in self.parameters:
            copy.grad = None

    @torch.no_grad()
    def write_lora_E(self) -> None:
        """Let each lora_E have the values of its copy. Sends nothing."""
        for i in self._trained():
            if i % 3 == 1:
                _write_value(self._of[i], self.parameters[i].detach())

    def _trained(self) -> list[int]:
        """Which parameters DeepSpeed trains now. Those of rank 0 have nothing to read or write."""
        pairs = enumerate(zip(self._of, self.parameters, strict=True))
        return [i for i, (p, copy) in pairs if p.requires_grad and copy.numel() > 0]


def _is_cut(parameter: Tensor) -> bool:
    """Whether the parameter itself is cut into parts (stage 3), by the mark DeepSpeed looks for."""
    return hasattr(parameter, "ds_id")


def _whole_values(parameters: Sequence[Tensor]) -> Iterator[Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_local_fp32_param

    if parameters and _is_cut(parameters[0]):
        yield from _gathered(parameters, safe_get_local_fp32_param)
        return
    for p in parameters:
        # Stages 1 and 2 write the masters into the parameters after each step.
        yield p.detach() if p.dtype == torch.float32 else safe_get_full_fp32_param(p)


def _whole_gradients(parameters: Sequence[Tensor]) -> Iterator[Tensor]:
    from deepspeed.utils import safe_get_full_grad, safe_get_local_grad

    if parameters and _is_cut(parameters[0]):
        yield from _gathered(parameters, safe_get_local_grad)
        return
    for p in parameters:
        yield safe_get_full_grad(p)


@torch.no_grad()
def _gathered(parameters: Sequence[Tensor], part_of: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """The whole of what each process has a part of, in one all-gather for all parameters.

    DeepSpeed's own functions for the whole take one for each. A part is the rank's share of the
    flattened parameter, whose length is rounded up to a multiple of the number of ranks.
    """
    from deepspeed import comm

    # The group has no public name; deepspeed.zero.GatheredParameters sends within it.
    group: Any = getattr(parameters[0], "ds_process_group")  # noqa: B009
    parts = [part_of(p).reshape(-1) for p in parameters]
    mine = torch.cat(parts)
    world = comm.get_world_size(group=group)
    everyone = mine.new_empty(world * mine.numel())
    comm.all_gather_into_tensor(everyone, mine, group=group)
    columns = everyone.view(world, -1).split_with_sizes([part.numel() for part in parts], dim=1)
    wholes = []
    for p, column in zip(parameters, columns, strict=True):
        shape = _shape_of(p)
        wholes.append(column.reshape(-1)[: shape.numel()].view(shape))
    return wholes


def _shape_of(parameter: Any) -> torch.Size:
    """The shape of the whole parameter; a cut one has no entries of its own."""
    return torch.Size(parameter.ds_shape) if _is_cut(parameter) else parameter.shape


def _part(parameter: Any, whole: Tensor) -> Tensor:
    """This process's part of `whole`, as `_gathered` has put it together."""
    from deepspeed import comm

    length = parameter.ds_tensor.numel()
    rank = comm.get_rank(group=parameter.ds_process_group)
    part = whole.reshape(-1)[rank * length : (rank + 1) * length]
    return nn.functional.pad(part, (0, length - part.numel()))


def _fragments(
    optimizer: Any, additions: Sequence[tuple[Any, Tensor]]
) -> dict[int, list[tuple[int, Tensor]]]:
    """Where this process's part of each addition belongs, by the id of the flat tensor of masters.

    No public function reaches the gradients after clipping, so this reads where DeepSpeed has put
    them: the table of stage 3 and, for stages 1 and 2, the mark that its public functions read.
    """
    result: dict[int, list[tuple[int, Tensor]]] = {}
    for p, addition in additions:
        if _is_cut(p):
            group, start, _ = optimizer.grad_position[optimizer.get_param_id(p)]
            flat, part = optimizer.fp32_partitioned_groups_flat[group], _part(p, addition)
        else:
            mapping = p._hp_mapping
            if mapping is None:  # All of it belongs to other processes.
                continue
            own, start = mapping.lp_fragment_address, mapping.hp_fragment_address.start
            flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
            part = addition.reshape(-1)[own.start : own.start + own.numel]
        result.setdefault(id(flat), []).append((start, part.to(flat.device, flat.dtype)))
    return result


def _write_value(parameter: Any, value: Tensor) -> None:
    """Write the master, and the parameter that the next forward sees."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    if not _is_cut(parameter):
        safe_set_full_fp32_param(parameter, value)
        parameter.data.copy_(value)
        return
    part = _part(parameter, value)
    safe_set_local_fp32_param(parameter, part)
    # deepspeed.zero.GatheredParameters, which is public, would gather and broadcast for each
    # parameter what all processes have already. Small parameters are kept whole beside their part.
    parameter.ds_tensor.data.copy_(part)
    if parameter.numel() == value.numel():
        parameter.data.copy_(value)

"""What an allocator needs to know of the optimizers whose steps it follows."""

from __future__ import annotations

import contextlib
import functools
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..adapters import Adapter, refuse_flattened
from ..distributed.deepspeed import ZeroStep, optimizer_of
from ..distributed.engines import Triples, why_lacking
from ..distributed.groups import Group
from ..distributed.replicas import GradientSync, average
from ..orthogonality import orth_reg_grad_
from .devices import Devices, regularise_
from .engine import FollowsEngines
from .processes import AmongProcesses
from .steps import Steps

Closure: TypeAlias = Callable[[], Any]
# What a step hook of torch gets beside the optimizer; the first of the tuple is the optimizer too.
Arguments: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]


class FollowsOptimizers(FollowsEngines):
    """The part of a `RankAllocator` that lets optimizers step it.

    Attributes:
        was_attached: whether it has ever been attached, and not been detached.
    """

    orth_reg_weight: float
    # A copy has no optimizer that would step it.
    _NOT_COPIED = (
        *("_hooks", "_steps", "_loses_gradients", "was_attached", "_copies"),
        *("_places", "_gone", "_layers"),
        *AmongProcesses._NOT_AMONG_COPIES,
    )
    # Whether the model keeps the allocator alive. Otherwise an optimizer does that follows it.
    _is_kept_by_model = False

    def _start_following(self) -> None:
        # Weak: an allocator that waits for an optimizer that is gone is not attached.
        self._hooks: weakref.WeakKeyDictionary[Any, list[RemovableHandle | ZeroStep]]
        self._hooks = weakref.WeakKeyDictionary()
        self._steps = Steps()
        self._copies = None
        self._loses_gradients = False  # what the step in progress would be warned of
        self.was_attached = False
        self._start_among_processes()

    @property
    def attached(self) -> bool:
        """Whether there is an optimizer that steps this; see `attach`."""
        return len(self._hooks) > 0

    @property
    def followed(self) -> list[torch.optim.Optimizer]:
        """The optimizers that this is attached to, and what wraps them."""
        return list(self._hooks)

    def follows(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether this is attached to that very optimizer, or to one that it wraps."""
        return optimizer in self._hooks

    def attach(
        self,
        optimizer: torch.optim.Optimizer | torch.nn.Module,
        sync_gradients: bool | Group = False,
    ) -> None:
        """Take part in every `optimizer.step()` from now on, so that no call can be forgotten.

        Before the optimizer's own work the gradient of the orthogonality regulariser, weighted by
        `orth_reg_weight`, is added to the adapters' gradients; after it comes our `step`, with
        the number of the last one plus 1. So the regulariser counts once per optimizer step,
        whatever the model returns, however many micro-batches there are, and not in any loss. It
        comes after gradient clipping, which no longer sees it. Where `optimizer.step(closure)`
        makes the gradients, it is added after the closure, and its value to what that returns.
        Steps that a GradScaler skips do not count, unless the optimizer is a fused one: those
        can't know, and count, but leave the averages as they are. An optimizer step for which no
        adapter has a gradient is ignored.

        A training with one optimizer after the other, or two in turn, attaches to each: every step
        of any is a step. An optimizer that is gone needs no `detach`.

        Before the first step this counts the triplets that are there, which reads the device.

        Uses the optimizer's public step hooks, which are not saved or copied with it: attach
        again after loading or copying. A step captured in a CUDA graph needs `advance` and
        `update` instead.

        Several processes: with `sync_gradients` each has a whole copy of what the optimizer trains,
        and no engine needs to know of it. The parameters are broadcast now, and from then on the
        gradients are averaged once per optimizer step, before the regulariser comes: when
        `optimizer.step()` begins, or earlier in `sync_gradients()`, which is to be called where
        something looks at the gradients before (clipping, a GradScaler). Parameters that are
        DTensors are left to who has sharded them. All processes have to call this, and to step
        the same number of times.

        Under DeepSpeed's ZeRO all processes call this, after `deepspeed.initialize`; the steps are
        those of its engine. Each process then keeps whole float32 copies of the adapters, until
        `detach`. What is sent in each step stands in `distributed/deepspeed.py`: it is 4 bytes for
        each entry of the adapters two or three times, and for each lora_E in the final phase.

        Args:
            optimizer: over all trainable adapter parameters; or a wrapper that has it in an
                attribute, such as Accelerate's, Lightning's, or SAM; or a DeepSpeedEngine.
            sync_gradients: whether to keep what the optimizer trains equal in all processes of
                torch.distributed; or a process group, for those in it.

        Raises:
            TypeError: not a torch optimizer, or sync_gradients is neither a bool nor a group.
            ValueError: the optimizer lacks a trainable parameter of an adapter; the adapters are
                flattened (FSDP1), trained by DeepSpeed and not by this optimizer, or whole beside
                parameters that are sharded; the processes to be kept equal train different
                parameters; or DeepSpeed has a setting that is not supported, which the message
                names.
            RuntimeError: already attached to this one, or there are no processes to sync.

        What comes after this call (an engine that shards or takes over the model, another process
        with other adapters) raises the same in the first step of the optimizer. A RuntimeError is
        raised in the third, if no adapter has had a gradient until then.
        """
        taking_steps = optimizer_of(optimizer)
        zero = self.look_through(taking_steps)
        if zero is not None:
            self._attach_engine(zero, sync_gradients)
            return
        adapters = self.adapters_left
        *wrappers, inner = unwrapped(taking_steps, adapters)
        if self.follows(inner):
            raise RuntimeError("attached to this optimizer already: call detach() first")
        group = self._check_sync(sync_gradients)
        self._refuse_engines(is_synced=group is not None)
        sync = None if group is None else GradientSync(inner, adapters, group)
        self.count_triplets()
        self._warn_if_over()
        allocator = self._reference()
        for wrapper in wrappers:
            # Not all of them have torch's hooks; that which computes has. Some make the table of
            # hooks themselves, as a plain dict, which has no handles.
            with contextlib.suppress(AttributeError):
                if type(wrapper._optimizer_step_post_hooks) is dict:
                    hooks = OrderedDict(wrapper._optimizer_step_post_hooks)
                    wrapper._optimizer_step_post_hooks = hooks
                self._hooks[wrapper] = [
                    wrapper.register_step_post_hook(_hook(allocator, "_after_wrapper_step"))
                ]
        self._hooks[inner] = [
            inner.register_step_pre_hook(_hook(allocator, "_before_optimizer_step")),
            inner.register_step_post_hook(_hook(allocator, "_after_optimizer_step")),
        ]
        if sync is not None:
            self._syncs[inner] = sync
            self._hooks[inner] += sync.handles
        self._begin_to_watch(inner)
        self.was_attached = True

    def _attach_engine(self, zero: Any, sync_gradients: bool | Group) -> None:
        if sync_gradients is not False:
            raise ValueError(
                "sync_gradients is for processes that nobody else keeps equal, and DeepSpeed does: "
                "leave it out of attach(engine)"
            )
        if self.follows(zero):
            raise RuntimeError("attached to this engine already: call detach() first")
        self.count_triplets()
        self._warn_if_over()
        self._hooks[zero] = [self._hook_engine(zero, self._reference())]
        self.was_attached = True

    def _reference(self) -> Callable[[], FollowsOptimizers | None]:
        """What hooks have of this: weak where the model keeps it alive."""
        return weakref.ref(self) if self._is_kept_by_model else _strong_ref(self)

    def detach(self) -> None:
        """End what `attach` began, for all optimizers. Without effect if there is nothing."""
        for hook in [hook for hooks in self._hooks.values() for hook in hooks]:
            hook.remove()
        self._start_following()

    def _before_optimizer_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Arguments | None:
        refuse_capture(self._device)
        if not self._steps.begins(optimizer):
            return None
        try:
            return self._prepare_step(optimizer, args, kwargs)
        except BaseException:
            self._steps.ends(optimizer)  # Else the next one would be taken for one inside.
            raise

    def _prepare_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Arguments | None:
        if optimizer in self._unseen:
            check_has_all(optimizer, self._adapters_with_parameters())
            self._look_at_engine(optimizer)
        closure = closure_in(args, kwargs)
        sync = self._syncs.get(optimizer)
        if closure is not None and sync is not None:
            closure = with_sync(closure, optimizer, sync)
            args, kwargs = with_closure(args, kwargs, closure)
        elif sync is not None:
            sync.before_step(optimizer)
        self._loses_gradients = closure is None and self._has_gradients()
        if self.orth_reg_weight != 0.0 and closure is not None:
            add = functools.partial(self._add_regulariser, optimizer)
            args, kwargs = with_closure(args, kwargs, then_add(closure, add))
        elif self.orth_reg_weight != 0.0:
            self._add_regulariser(optimizer)
        return None if closure is None else (args, kwargs)

    def _add_regulariser(self, optimizer: torch.optim.Optimizer) -> Tensor | None:
        """Add the regulariser's gradient to those that are there; returns its value."""
        if not self._has_gradients() and self._state.stages is None:
            return None
        weight = self.orth_reg_weight
        if self._state.stages is not None:
            weight = self._weight_here(weight)
        scale = grad_scale_of(optimizer)
        if isinstance(self._state.shards, Devices):
            self.orth_reg = regularise_(self.adapters_left, weight, scale)
        else:
            self.orth_reg = orth_reg_grad_(self.adapters_left, weight, grad_scale=scale)
        return self.orth_reg

    def _after_optimizer_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if not self._steps.ends(optimizer):
            self._after_wrapper_step()
        elif self._has_gradients() or self._state.stages is not None:
            self._without_gradients = None
            self._step(self.global_step + 1, overflow_as_scale(optimizer, self._device))
        elif self._loses_gradients:
            warnings.warn(
                "AdaLoRA is training as plain LoRA: the adapters' gradients are gone when "
                "optimizer.step() ends. Call zero_grad() after it, not within it or in its hooks",
                stacklevel=3,
            )
        else:
            self._stepped_without_gradients()

    @torch.no_grad()
    def _after_wrapper_step(self, *_: Any) -> None:
        """Write the zeros again: what wraps the step may have moved the weights (Lookahead)."""
        if self.shrunk or not self._has_gradients():
            return
        if self.frozen or self.schedule.masks_at(self.global_step):
            self._state.prune(self._parameters()[1::3], again=True)

    def _warn_if_over(self) -> None:
        total_step = self.schedule.total_step
        is_over = total_step is not None and self.global_step >= total_step
        if self.frozen and is_over and not self.shrunk:
            warnings.warn(
                f"AdaLoRA's schedule has come to its end at step {self.global_step}, and its "
                "pattern is final: call restart() if a new run is to begin",
                stacklevel=3,
            )


def _strong_ref(allocator: FollowsOptimizers) -> Callable[[], FollowsOptimizers]:
    return lambda: allocator


def _hook(allocator: Callable[[], FollowsOptimizers | None], method: str) -> Callable[..., Any]:
    """A hook that calls a method of the allocator while there is one."""

    def hook(*args: Any) -> Any:
        alive = allocator()
        return None if alive is None else getattr(alive, method)(*args)

    return hook


def unwrapped(optimizer: Any, adapters: Sequence[Adapter]) -> list[Any]:
    """Return the wrappers around an optimizer, outermost first, and then the optimizer itself.

    Accelerate's, Lightning's and many other wrappers hold it in an attribute, and so does SAM,
    whose own `step` is called or not.

    Raises:
        TypeError: there is none.
        ValueError: it lacks a trainable parameter of an adapter, or the adapters are flattened.
    """
    refuse_flattened(adapters)
    found = chain(optimizer)
    while len(found) > 1 and _missing(found[-1], adapters) is not None:
        del found[-1]
    check_is_optimizer(found[-1])
    missing = _missing(found[-1], adapters)
    if missing is not None:
        raise ValueError(
            f"optimizer must have all trainable adapter parameters, lacks one of those beside "
            f"{missing.name}: where several optimizers share them, call step() after the last one. "
            + why_lacking(missing.parameters)
        )
    return found


def check_has_all(optimizer: torch.optim.Optimizer, adapters: Triples) -> None:
    """Raise ValueError if an optimizer has lost trainable adapter parameters since `attach`."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for adapter, parameters in adapters:
        if any(p.requires_grad and id(p) not in held for p in parameters):
            raise ValueError(
                "the optimizer no longer has all trainable adapter parameters, as it had in "
                f"attach(), but lacks one of those beside {adapter.name}. {why_lacking(parameters)}"
            )


def chain(optimizer: Any) -> list[Any]:
    """An optimizer, or what stands for one; then the one that it wraps, and so on."""
    found = [optimizer]
    while (inner := _wrapped_by(found[-1])) is not None and inner not in found:
        found.append(inner)
    return found


def _wrapped_by(optimizer: Any) -> torch.optim.Optimizer | None:
    """The one optimizer among the attributes of another one, or of what stands for one."""
    if isinstance(optimizer, torch.nn.Module):
        return None
    attributes = getattr(optimizer, "__dict__", {}).values()
    inner = {id(v): v for v in attributes if isinstance(v, torch.optim.Optimizer)}
    inner.pop(id(optimizer), None)
    return next(iter(inner.values())) if len(inner) == 1 else None


def _missing(optimizer: torch.optim.Optimizer, adapters: Sequence[Adapter]) -> Adapter | None:
    """The first adapter that has a trainable parameter which the optimizer lacks."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for adapter in adapters:
        if any(p.requires_grad and id(p) not in held for p in adapter.parameters):
            return adapter
    return None


def check_is_optimizer(optimizer: object) -> None:
    """Raise TypeError if it is not a torch optimizer."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
        )


def refuse_capture(device: torch.device) -> None:
    """Raise RuntimeError while a CUDA graph is captured, which would keep one step's budget."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "an attached allocator can't be captured in a CUDA graph, for its budget changes: "
            "detach() it, and capture update() (see RankAllocator)"
        )


def closure_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Closure | None:
    """The closure among the arguments of `optimizer.step`, the optimizer first."""
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    return closure if callable(closure) else None


def with_closure(args: tuple[Any, ...], kwargs: dict[str, Any], closure: Closure) -> Arguments:
    """The same arguments with another closure."""
    if len(args) > 1:
        return (args[0], closure, *args[2:]), kwargs
    return args, {**kwargs, "closure": closure}


def then_add(closure: Closure, add_gradient: Callable[[], Tensor | None]) -> Closure:
    """Return a closure that also calls `add_gradient`, and adds its value to the loss.

    An optimizer that searches along a line has to see the function whose gradient it gets.
    """

    def with_addition() -> Any:
        loss = closure()
        value = add_gradient()
        if loss is None or value is None:
            return loss
        return loss + (value.to(loss.dtype) if isinstance(loss, Tensor) else value)

    return with_addition


def with_sync(closure: Closure, optimizer: torch.optim.Optimizer, sync: GradientSync) -> Closure:
    """Return a closure whose gradients and loss are the mean over the processes.

    An optimizer decides by the loss whether to go on: it has to be the same in each process.
    """

    def synced() -> Any:
        loss = closure()
        sync.before_step(optimizer)
        return average(loss, sync.group) if isinstance(loss, Tensor) else loss

    return synced


def grad_scale_of(optimizer: torch.optim.Optimizer) -> Tensor | None:
    """What ∂L/∂w is of the gradients where a fused optimizer undoes a GradScaler's scale itself."""
    scale: Tensor | None = getattr(optimizer, "grad_scale", None)
    return None if scale is None else 1.0 / scale


def overflow_as_scale(optimizer: torch.optim.Optimizer, device: torch.device) -> Tensor | None:
    """A scale of inf where a fused optimizer under a GradScaler is to skip its step, else 1.

    Other optimizers are not called at all then. The verdict is on the device and is not to be read
    here; a scale of inf makes the importance update skip itself there.
    """
    overflow: Tensor | None = getattr(optimizer, "found_inf", None)
    if overflow is None:
        return None
    skips = torch.full((1,), torch.inf, device=device)
    return skips.where(overflow.to(device) > 0, 1.0)

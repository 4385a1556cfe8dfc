"""Finds the (lora_A, lora_E, lora_B) triples in any module tree: ours, loralib's and PEFT's."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

_FACTORS = ("lora_A", "lora_E", "lora_B")
_FLATTENED = (
    "the adapters are sharded by FullyShardedDataParallel (FSDP1), which makes flat parts of them "
    "and is not supported: use fully_shard (FSDP2, in Accelerate fsdp_version=2) or DDP"
)
# What DataParallel/DDP, torch.compile, FSDP and activation checkpointing put into parameter names.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


class Adapter:
    """Knows where the three parameters of one AdaLoRA adapter live.

    They are looked up at every access, so that a layer may replace them. An adapter of PEFT's does
    not keep its layer alive, which holds the base model's weight: whoever keeps an allocator keeps
    no more than an optimizer does.

    Args:
        name: the name of its lora_E among the model's parameters, without wrapper prefixes.
        module: the layer that owns the parameters.
        key: None where lora_A is a Parameter of the layer (ours, loralib); else the adapter name
            under which the layer's ParameterDicts hold it (PEFT).
        owners: those ParameterDicts, where a copy is made of an adapter whose layer is gone.

    Attributes:
        places: where its lora_A, lora_E and lora_B stand: a module, and the name in its table.
    """

    places: tuple[tuple[Any, str], ...]

    def __init__(
        self,
        name: str,
        module: nn.Module | None,
        key: str | None,
        owners: Sequence[nn.ParameterDict] = (),
    ) -> None:
        self.name = name
        self.key = key
        self._module: Callable[[], nn.Module | None] = lambda: module
        if key is not None and module is not None:
            owners = [getattr(module, factor) for factor in _FACTORS]
            self._module = weakref.ref(module)
        if key is None:
            self.places = tuple((module, factor) for factor in _FACTORS)
        else:  # PEFT's ParameterDicts, which stay the same.
            self.places = tuple((owner, key) for owner in owners)

    def __reduce__(self) -> tuple[Any, ...]:
        # A weak reference can be neither copied nor pickled.
        owners = [owner for owner, _ in self.places]
        return type(self), (self.name, self._module(), self.key, owners)

    @property
    def is_deleted(self) -> bool:
        """Whether the layer is gone: with its model, or because that has another in its place."""
        return self._module() is None

    def watch(self, when_gone: Callable[[Any], Any]) -> Any:
        """Have `when_gone` called when the layer is gone, while what this returns is kept."""
        module = self._module()
        return None if module is None else weakref.ref(module, when_gone)

    @property
    def module(self) -> nn.Module:
        """The layer that owns the parameters.

        Raises:
            ValueError: it is gone, with its model.
        """
        module = self._module()
        if module is None:
            raise ValueError(f"the model of {self.name} has been deleted")
        return module

    @property
    def parameters(self) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
        """The triple (lora_A, lora_E, lora_B)."""
        # This runs in every step: the modules' own tables take a tenth of the time of getattr.
        (of_A, A), (of_E, E), (of_B, B) = self.places
        try:
            return of_A._parameters[A], of_E._parameters[E], of_B._parameters[B]
        except KeyError:  # FSDP, for instance, puts views into their place for a while.
            return self._views()

    def _views(self) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
        try:
            if self.key is None:
                a, e, b = (getattr(self.module, factor) for factor in _FACTORS)
            else:
                a, e, b = (owner[self.key] for owner, _ in self.places)
        except (AttributeError, KeyError):
            raise ValueError(f"{self.name} has been deleted, or {_FLATTENED}") from None
        return a, e, b

    @property
    def lora_A(self) -> nn.Parameter:
        """The right singular vectors, (r, in)."""
        return self.parameters[0]

    @property
    def lora_E(self) -> nn.Parameter:
        """The singular values, (r, 1)."""
        return self.parameters[1]

    @property
    def lora_B(self) -> nn.Parameter:
        """The left singular vectors, (out, r)."""
        return self.parameters[2]

    @property
    def rank(self) -> int:
        """The number of triplets, also where DeepSpeed's ZeRO has left no entry of them here."""
        lora_E = self.lora_E
        # transformers and accelerate read ds_shape, too.
        shape: torch.Size = getattr(lora_E, "ds_shape", lora_E.shape)
        return shape[0]

    def set_rank(self, rank: int) -> None:
        """Tell the layer the number of triplets that its parameters now hold."""
        module: Any = self._module()
        if self.key is None:
            module.r = rank
        elif module is not None:
            module.r[self.key] = rank


def find_adapters(model: nn.Module, adapter_name: str | None = None) -> list[Adapter]:
    """Find every AdaLoRA adapter in `model`, in the order of its modules.

    Args:
        model: any module tree. A layer has an adapter if it has lora_A, lora_E and lora_B, either
            as parameters (ours, loralib) or as ParameterDicts by adapter name (PEFT).
        adapter_name: which of PEFT's named adapters; by default those whose lora_A is trainable.

    Returns:
        The adapters. A module that stands in several places is listed once.

    Raises:
        TypeError: `model` is not an nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return [
        adapter
        for module_name, module in _modules_with_adapters(model)
        for adapter in _adapters_of(_unwrapped(module_name), module, adapter_name)
    ]


def parameters_of(
    adapters: Sequence[Adapter], places: Sequence[tuple[Any, str]]
) -> list[nn.Parameter]:
    """Return lora_A, lora_E and lora_B of each adapter in turn, as they are now.

    `places` are those of all the adapters in turn, which whoever does this in every step keeps.
    """
    try:
        return [owner._parameters[name] for owner, name in places]
    except KeyError:
        return [p for adapter in adapters for p in adapter.parameters]


def triplets_there(lora_A: Tensor, lora_E: Tensor, lora_B: Tensor) -> Tensor:
    """Which triplets have any value that is not 0: all others can't learn, and so are none.

    Args:
        lora_A, lora_E, lora_B: (r, in), (r, 1) and (out, r) of one adapter.

    Returns:
        (r,) bool on their device.
    """
    return (lora_A != 0).any(1) | (lora_E != 0).any(1) | (lora_B != 0).any(0)


def taking_part(
    trained: Sequence[bool], had_gradient: Sequence[bool], ranks: Sequence[int], any_had: bool
) -> list[bool]:
    """Which adapters take part in the allocation.

    Those that need a gradient and, once any has had one, have had one, too. Without a triplet there
    may be no gradient either.

    Args:
        trained: which need a gradient.
        had_gradient: which have had one since the run began.
        ranks: the number of triplets of each.
        any_had: whether one of all that share the budget has had one.
    """
    if not any_had:
        return list(trained)
    return [
        needs and (had or rank == 0)
        for needs, had, rank in zip(trained, had_gradient, ranks, strict=True)
    ]


def refuse_flattened(adapters: Sequence[Adapter]) -> None:
    """Raise ValueError if lora_A is not (r, in), lora_E not (r, 1) or lora_B not (out, r).

    FSDP1 makes flat parts of them, or views that are no parameters. The DTensors of FSDP2 have the
    shapes of the whole.
    """
    for adapter in adapters:
        lora_A, lora_E, lora_B = adapter.parameters
        if hasattr(lora_A, "ds_id"):
            raise ValueError(
                f"the parameters of {adapter.name} are cut into parts by DeepSpeed's ZeRO stage 3: "
                "make the allocator before deepspeed.initialize and outside deepspeed.zero.Init, "
                "and call allocator.attach(engine) after deepspeed.initialize, before anything else"
            )
        rank = lora_A.shape[0] if lora_A.dim() == 2 else -1
        if (
            lora_E.shape != (rank, 1)
            or lora_B.dim() != 2
            or lora_B.shape[1] != rank
            or not all(isinstance(p, nn.Parameter) for p in adapter.parameters)
        ):
            shapes = ", ".join(str(tuple(p.shape)) for p in adapter.parameters)
            raise ValueError(f"the parameters of {adapter.name} are {shapes}: {_FLATTENED}")


def describe(model: nn.Module) -> str:
    """Name the class of a model without adapters, and say so if FSDP may have hidden them."""
    flattened = any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules())
    return type(model).__name__ + (f": {_FLATTENED}" if flattened else "")


def _modules_with_adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield those of `model.named_modules()` that have a lora_A, in less time."""
    seen = set()
    stack: list[tuple[str, nn.Module | None]] = [("", model)]
    while stack:
        name, module = stack.pop()
        if module is None or id(module) in seen:
            continue
        seen.add(id(module))
        children = module._modules
        # Not hasattr: where there is nothing, it costs an exception for every module.
        if "lora_A" in module._parameters or "lora_A" in children:
            yield name, module
        if children:
            prefix = f"{name}." if name else ""
            stack += [(prefix + n, child) for n, child in reversed(children.items())]


def _unwrapped(name: str) -> str:
    """Drop what wrappers have put into a module's name."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    return ".".join(parts[1:] if parts[0] == "module" else parts)


def _adapters_of(name: str, module: nn.Module, adapter_name: str | None) -> Iterator[Adapter]:
    prefix = f"{name}.lora_E" if name else "lora_E"
    factors = [getattr(module, factor, None) for factor in _FACTORS]
    if all(isinstance(factor, nn.Parameter) for factor in factors):
        yield Adapter(prefix, module, None)
    elif all(isinstance(factor, nn.ParameterDict) for factor in factors):
        for key, parameter in cast(nn.ParameterDict, factors[0]).items():
            if key == adapter_name or (adapter_name is None and parameter.requires_grad):
                yield Adapter(f"{prefix}.{key}", module, key)

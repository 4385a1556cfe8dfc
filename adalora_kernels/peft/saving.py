"""Decides which triplets of an adapter go to a file, and what its config says about them.

PEFT's `save_pretrained`, the Trainer's checkpoints and `adalora_kernels.export` all ask here. There
are two forms of a file. The one that PEFT's own functions write has all init_r rows, with zeros for
the triplets that are not there: every loader reads it. The compact one of `export.save_adapter`
has only those that are there, and a rank_pattern that says which they are, as in PEFT.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from peft import AdaLoraConfig
from torch import Tensor

from ..adapters import Adapter, triplets_there
from ..allocator import RankAllocator
from ..distributed.shards import is_dtensor, whole_tensor

# The three parameters of an adapter, and the dimension in which each counts its triplets.
FACTORS = (("lora_A", 0), ("lora_E", 0), ("lora_B", 1))

# The numbers in an AdaLoraConfig that are integers, however a script has computed them.
_INTEGERS = ("r", "lora_alpha", "init_r", "target_r", "tinit", "tfinal", "deltaT", "total_step")


@dataclass(frozen=True)
class AdaptedLayer:
    """One layer of an adapter, and what is known about its init_r triplets.

    Attributes:
        adapter: where its parameters are.
        first: (init_r,) bool on the CPU: those that its run has begun with. They are all init_r,
            unless it has begun with a pruned adapter.
        alive: (init_r,) bool on the CPU: those that are not pruned.
        stored: (n,) int64 on the CPU, ascending: those that the parameters still hold.
    """

    adapter: Adapter
    first: Tensor
    alive: Tensor
    stored: Tensor

    @property
    def name(self) -> str:
        """The name of the layer in the base model."""
        return module_name(self.adapter.name, self.adapter.key)

    @property
    def module(self) -> Any:
        """The layer itself: of PEFT, or ours."""
        return self.adapter.module

    def chosen(self, lora_E: Tensor, *, checkpoint: bool) -> Tensor:
        """(init_r,) bool on the CPU: the triplets that a file gets. Reads the device.

        A checkpoint, from which the training goes on, gets all that the run has begun with. An
        adapter for use gets those that are alive, and those that were pruned but add something all
        the same: between two prunings the optimizer moves some of them away from 0 again, and
        earlier or averaged weights may have been loaded.

        Args:
            lora_E: what is to be written, (n, 1).
            checkpoint: which of the two it is.
        """
        if checkpoint:
            return self.first
        chosen = self.alive.clone()
        chosen[self._rows_of(lora_E, 0)] |= lora_E.detach().cpu().squeeze(1) != 0
        return chosen

    def whole(self, part: Tensor, dim: int, chosen: Tensor) -> Tensor:
        """Spread one of the adapter's three parameters over all init_r rows.

        Args:
            part: the parameter, or a copy of it: n entries along `dim`, on any device.
            dim: the dimension that counts the triplets.
            chosen: (init_r,) bool on the CPU. All others are 0 in the result.
        """
        rows = self._rows_of(part, dim)
        if len(rows) == len(chosen) and bool(chosen.all()):
            return part
        kept = chosen[rows]
        shape = list(part.shape)
        shape[dim] = len(chosen)
        values = part.detach().index_select(dim, kept.nonzero().squeeze(1).to(part.device))
        return part.new_zeros(shape).index_copy_(dim, rows[kept].to(part.device), values)

    def compact(self, part: Tensor, dim: int, chosen: Tensor) -> Tensor:
        """Cut one of the three parameters to the chosen triplets; the arguments are `whole`'s."""
        numbers = chosen.nonzero().squeeze(1)
        if torch.equal(numbers, self._rows_of(part, dim)):
            return part
        return self.whole(part, dim, chosen).index_select(dim, numbers.to(part.device))

    def _rows_of(self, part: Tensor, dim: int) -> Tensor:
        """Which of the init_r triplets the entries of `part` are, (n,) int64 on the CPU."""
        for rows in (self.stored, self.first.nonzero().squeeze(1), _numbers_to(len(self.first))):
            if len(rows) == part.shape[dim]:
                return rows
        raise ValueError(
            f"{self.name} holds {len(self.stored)} triplets, got a state with {part.shape[dim]}"
        )


def adapted_layers(
    adapters: list[Adapter],
    allocator: RankAllocator | None,
    init_r: int,
    rank_pattern: dict[str, Any] | None,
) -> list[AdaptedLayer]:
    """The layer of each adapter. Reads the device.

    Without an allocator, triplets with lora_E = 0 count as pruned; but if that is all of them, the
    adapter is new and nothing is.

    Args:
        adapters: adapters of one model, with one name.
        allocator: the allocator of some or all of them. All triplets of the others count as
            pruned, so that a file gets those that add something.
        init_r: how many triplets an adapter has before anything is pruned.
        rank_pattern: that of the config. Where an adapter has fewer than init_r triplets, it says
            which they are; without one they are the first.

    Raises:
        ValueError: the allocator is for none of the adapters, or for other ranks; or an adapter
            has more than init_r triplets.
    """
    key = adapters[0].key if adapters else None
    known = by_module(rank_pattern, key)
    if allocator is None:
        alive_rows = _alive_without_allocator(adapters, known)
    else:
        alive_rows = _alive_by_allocator(adapters, allocator)
    layers = []
    for adapter, alive in zip(adapters, alive_rows, strict=True):
        name, rows, length = module_name(adapter.name, key), adapter.rank, len(alive)
        if length > init_r:
            raise ValueError(f"{name} has {length} triplets, its init_r is {init_r}")
        # After shrink() the parameters hold only what is alive.
        stored = _numbers_to(rows) if length == rows else alive.nonzero().squeeze(1)
        if len(stored) != rows:
            raise ValueError(f"allocator is for {len(stored)} triplets of {name}, it has {rows}")
        numbers = _numbers_of_first(known.get(name), length, init_r)
        first, whole = (_flags([False] * init_r) for _ in range(2))
        first[numbers] = True
        whole[numbers] = alive
        layers.append(AdaptedLayer(adapter, first, whole, numbers[stored]))
    return layers


def _alive_without_allocator(adapters: list[Adapter], known: dict[str, list[bool]]) -> list[Tensor]:
    nonzero = [whole_tensor(a.lora_E.detach()).cpu().squeeze(1) != 0 for a in adapters]
    is_new = not any(bool(part.any()) for part in nonzero)
    if not is_new:
        return nonzero
    result = []
    for adapter in adapters:
        alive = triplets_there(*map(whole_tensor, adapter.parameters)).cpu()
        pattern = known.get(module_name(adapter.name, adapter.key), [])
        result.append(alive & _flags(pattern) if len(pattern) == len(alive) else alive)
    return result


def _alive_by_allocator(adapters: list[Adapter], allocator: RankAllocator) -> list[Tensor]:
    patterns = {
        (id(adapter.module), adapter.key): _flags(pattern)
        for adapter, pattern in zip(
            allocator.adapters, allocator.rank_pattern.values(), strict=True
        )
        if not adapter.is_deleted
    }
    keys = [(id(adapter.module), adapter.key) for adapter in adapters]
    if patterns.keys().isdisjoint(keys):
        raise ValueError("allocator is for another model or adapter")
    return [
        patterns.get(key, _flags([False] * adapter.rank))
        for adapter, key in zip(adapters, keys, strict=True)
    ]


def _numbers_of_first(pattern: list[bool] | None, length: int, init_r: int) -> Tensor:
    """Which of the init_r triplets a run of `length` triplets has begun with: (length,) int64."""
    if pattern is not None and len(pattern) == init_r and sum(pattern) == length < init_r:
        return _flags(pattern).nonzero().squeeze(1)
    return _numbers_to(length)


def _flags(flags: list[bool]) -> Tensor:
    """On the CPU, whatever PyTorch's default device is."""
    return torch.tensor(flags, dtype=torch.bool, device="cpu")


def _numbers_to(length: int) -> Tensor:
    return torch.arange(length, device="cpu")


def fit_rows_(state_dict: dict[str, Any], prefix: str, adapter_name: str, rows: int) -> None:
    """Cut an adapter in `state_dict` to `rows` triplets, if all others in it are 0.

    A layer that was shrunk, or loaded from a compact file, so takes a file that has zeros for the
    triplets that the layer does not hold. Anything else is left to PyTorch's check of shapes.

    Args:
        state_dict: its entries are replaced.
        prefix: what stands before the layer's names in it, with the dot.
        adapter_name: PEFT's name of the adapter.
        rows: the triplets that the layer holds.
    """
    keys = [f"{prefix}{factor}.{adapter_name}" for factor, _ in FACTORS]
    parts: list[Tensor] = [state_dict[key] for key in keys if key in state_dict]
    if len(parts) < len(keys) or any(part.dim() != 2 for part in parts):
        return
    lora_A, lora_E, lora_B = parts
    if not len(lora_A) == len(lora_E) == lora_B.shape[1] or len(lora_E) <= rows:
        return
    there = triplets_there(lora_A, lora_E, lora_B).cpu()
    if int(there.sum()) > rows:
        return
    for number in (~there).nonzero().squeeze(1)[: rows - int(there.sum())].tolist():
        there[number] = True
    numbers = there.nonzero().squeeze(1)
    for key, part, (_, dim) in zip(keys, parts, FACTORS, strict=True):
        state_dict[key] = part.index_select(dim, numbers.to(part.device))


def state_for_file(
    layers: list[AdaptedLayer], state_dict: dict[str, Tensor], *, checkpoint: bool
) -> dict[str, Tensor]:
    """What PEFT's own functions write of an adapter: all init_r rows, with zeros where pruned.

    A checkpoint has what the run has begun with, and nothing in it is set to 0.

    Args:
        layers: the layers of the adapter.
        state_dict: parameters by PEFT's names, of the model itself or of another moment of it: it
            is these values that decide.
        checkpoint: whether the training goes on from it.

    Raises:
        ValueError: not a checkpoint, and the parameters are sharded: to gather them here would
            wait for ever where only one process saves.
    """
    result = dict(state_dict)
    for layer in layers:
        keys = [f"{layer.name}.{factor}.{layer.adapter.key}" for factor, _ in FACTORS]
        keys = [key if key in result else f"base_model.model.{key}" for key in keys]
        if _is_elsewhere(layer, result[keys[1]]):
            continue
        if not checkpoint and is_dtensor(result[keys[1]]):
            raise ValueError(
                f"state_dict has {keys[1]} as a DTensor: gather it first, in all processes "
                "(torch's get_model_state_dict with full_state_dict=True), and hand it to "
                "save_pretrained(state_dict=...) or get_peft_model_state_dict(state_dict=...)"
            )
        chosen = layer.chosen(result[keys[1]], checkpoint=checkpoint)
        for key, (_, dim) in zip(keys, FACTORS, strict=True):
            form = layer.compact if checkpoint else layer.whole
            result[key] = form(result[key], dim, chosen)
    return result


def _is_elsewhere(layer: AdaptedLayer, lora_E: Tensor) -> bool:
    """Whether DeepSpeed's ZeRO has left no entry of a layer here, which another process writes.

    Raises:
        ValueError: it is this process that writes.
    """
    if lora_E.numel() > 0 or len(layer.stored) == 0:
        return False
    if not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0:
        raise ValueError(
            f"the parameters of {layer.name} are cut into parts by DeepSpeed's ZeRO stage 3: save "
            "by Trainer.save_model or, on all processes, give save_pretrained a state_dict from "
            "accelerator.get_state_dict(engine)"
        )
    return True


def module_name(name: str, adapter_name: str | None) -> str:
    """The name of the layer whose lora_E is called `name`, with the adapter's name or without."""
    name = name.removesuffix(f".{adapter_name}")
    return "" if name == "lora_E" else name.removesuffix(".lora_E")


def by_module(
    rank_pattern: dict[str, Any] | None, adapter_name: str | None
) -> dict[str, list[bool]]:
    """PEFT's rank_pattern by the names of the layers, not by those of their lora_E."""
    return {
        module_name(name, adapter_name): torch.as_tensor(pattern, device="cpu")
        .bool()
        .view(-1)
        .tolist()
        for name, pattern in (rank_pattern or {}).items()
    }


def rank_pattern_for_file(chosen: dict[str, Tensor]) -> dict[str, list[bool]] | None:
    """The rank_pattern of a compact file; None where nothing is left out.

    Args:
        chosen: for each layer, by its name, what `AdaptedLayer.chosen` says.
    """
    pattern = {f"{name}.lora_E": part.tolist() for name, part in chosen.items()}
    return None if all(map(all, pattern.values())) else pattern


def positive_alpha(lora_alpha: float, rank: float) -> float:
    """The scaling that PEFT and loralib mean: the initial rank, where lora_alpha is not positive.

    In a file it has to be written out: PEFT would take the rank that is left.
    """
    return lora_alpha if lora_alpha > 0 else rank


def known_total_step(total_step: int | None, tinit: int, tfinal: int) -> int:
    """The least number of steps that PEFT accepts, where it is not known: it reads no None."""
    return tinit + tfinal + 1 if total_step is None else total_step


def config_for_file(config: AdaLoraConfig, total_step: int | None = None) -> AdaLoraConfig:
    """A copy of `config` without what PEFT, or JSON, could not read back, or would misread.

    Numbers are plain ones. The rank_pattern is that which the config was made with.

    Args:
        config: it is not changed.
        total_step: the steps of the schedule, if the config does not know them.
    """
    written = AdaLoraConfig.__new__(AdaLoraConfig)
    for name, field in vars(config).items():
        # Read like this, rank_pattern would be what has been pruned by now.
        value = field if name == "rank_pattern" else getattr(config, name)
        setattr(written, name, _plain(value))
    for name in _INTEGERS:
        value = getattr(written, name)
        if isinstance(value, float) and value.is_integer():
            setattr(written, name, int(value))
    written.lora_alpha = positive_alpha(written.lora_alpha, written.init_r)
    known = total_step if written.total_step is None else written.total_step
    written.total_step = known_total_step(known, written.tinit, written.tfinal)
    return written


def _plain(value: Any) -> Any:
    """Replace the numbers of NumPy and in 0-d tensors, also in containers, by Python's."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item()
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if type(value) in (list, tuple, set):
        return type(value)(_plain(item) for item in value)
    return value

"""Loads an adapter from a file, after everything about it has been checked."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn

from ..adapters import triplets_there
from ..allocator import RankAllocator
from ..distributed.shards import copy_whole_
from ..peft.saving import FACTORS, AdaptedLayer, positive_alpha
from .adapter import PREFIX, OpenedAdapter, lora_E_factor, open_adapter
from .files import read_config, read_tensors
from .state import STATE_NAME, load_state


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    adapter_name: str | None = None,
    allocator: RankAllocator | None = None,
) -> None:
    """Load what `save_adapter` or PEFT wrote into a model that has its AdaLoRA adapter.

    A checkpoint with full_rank restores the weights and, if the model has an allocator, its state:
    training goes on bitwise. A pruned adapter is put into the rows that its rank_pattern names,
    with zeros in all others, as in a file that has those zeros: the function is the saved one, no
    shape changes, and a further training has the budget of the triplets that are there. Everything
    is checked first: where an error is raised, model and allocator are as they were.

    Args:
        model, adapter_name, allocator: as in `save_adapter`.
        path: the folder.

    Where the adapters are sharded (DTensors), all processes have to call this.

    Raises:
        FileNotFoundError: a file is missing.
        TypeError: as `save_adapter`.
        ValueError: a file is malformed, or for another model; the layers are merged; or
            the allocator is already at work, and the folder has no state for it.
    """
    folder = Path(path)
    config = read_config(folder / CONFIG_NAME)
    tensors, _ = read_tensors(folder / SAFETENSORS_WEIGHTS_NAME)
    opened = open_adapter(model, adapter_name, allocator)
    state = _read_state(folder, opened.allocator)
    if opened.key is None:
        biased = any(key.endswith(".base_layer.bias") for key in tensors)
        opened.config["bias"] = "lora_only" if biased else "none"
    init_r = config["init_r"]
    saved = float(positive_alpha(config["lora_alpha"], init_r)), float(init_r)
    if saved != opened.scaling_and_ranknum:
        raise ValueError(
            f"{folder} is for (lora_alpha, init_r) {saved}, "
            f"the model has {opened.scaling_and_ranknum}"
        )
    other_tensors = _check_names(folder, tensors, opened)
    numbers = _read_rank_pattern(config, opened)
    masks = _masks_in_state(state, opened.allocator)
    writes = [
        _rows_to_write(layer, tensors, numbers[layer.name], masks, opened.scaling_and_ranknum)
        for layer in opened.layers
    ]
    merged = [layer for layer in opened.layers if layer.module.merged]
    if merged and opened.key is not None:
        raise ValueError(f"{merged[0].name} is merged: call unmerge_adapter() before loading")
    if state is not None and opened.allocator is not None:
        opened.allocator.load_state_dict(state)
    with torch.no_grad():
        for layer, (rows, *parts) in zip(opened.layers, writes, strict=True):
            for parameter, part, (_, dim) in zip(
                layer.adapter.parameters, parts, FACTORS, strict=True
            ):
                whole = part.new_zeros(parameter.shape).index_copy_(dim, rows, part)
                copy_whole_(parameter, whole)
        for key, tensor in other_tensors.items():
            copy_whole_(tensor, tensors[key])
    if opened.allocator is not None:
        opened.allocator.count_triplets()
    for layer in merged:
        layer.module.unmerge()
        layer.module.merge()


def _read_state(folder: Path, allocator: RankAllocator | None) -> dict[str, Any] | None:
    """The state for the allocator, if there are both."""
    if allocator is None:
        return None
    if (folder / STATE_NAME).exists():
        return load_state(folder / STATE_NAME)
    if allocator.global_step > 0:
        raise ValueError(
            f"the model's allocator is at step {allocator.global_step}, and {folder} has no state "
            "for it: load into a model that has not been trained, and apply() after that"
        )
    return None


def _check_names(
    folder: Path, tensors: dict[str, Tensor], opened: OpenedAdapter
) -> dict[str, Tensor]:
    """Returns the model's tensors, beside the triplets, that the file has values for."""
    triplets = {
        f"{PREFIX}{layer.name}.{factor}" for layer in opened.layers for factor, _ in FACTORS
    }
    other_tensors, known = opened.other_tensors(embeddings=False)
    if opened.key is not None and tensors.keys() - triplets - known:
        # PEFT writes the embeddings of a resized vocabulary too.
        has_embeddings = hasattr(opened.model, "get_input_embeddings")
        more, more_known = opened.other_tensors(embeddings=has_embeddings)
        other_tensors |= {key: tensor for key, tensor in more.items() if key in tensors}
        known |= more_known
    if unexpected := sorted(tensors.keys() - triplets - known):
        raise ValueError(f"{folder} has tensors that the model has not: {_some(unexpected)}")
    if missing := sorted((triplets | other_tensors.keys()) - tensors.keys()):
        raise ValueError(f"{folder} lacks tensors that the model has: {_some(missing)}")
    for key, tensor in other_tensors.items():
        if tensors[key].shape != tensor.shape:
            raise ValueError(
                f"{key} has shape {tuple(tensors[key].shape)}, the model's {tuple(tensor.shape)}"
            )
    return other_tensors


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _read_rank_pattern(config: dict[str, Any], opened: OpenedAdapter) -> dict[str, Tensor]:
    """For each layer, by its name, which of the init_r triplets the file has: (k,) int64."""
    init_r, names = config["init_r"], {layer.name for layer in opened.layers}
    patterns = dict.fromkeys(names, [True] * init_r)
    for key, pattern in (config.get("rank_pattern") or {}).items():
        name = key.rpartition(".lora_E")[0]
        if name not in names:
            raise ValueError(f"rank_pattern has {key!r}, which is no AdaLoRA layer of the model")
        if not isinstance(pattern, list) or not all(isinstance(alive, bool) for alive in pattern):
            raise ValueError(f"rank_pattern of {key!r} must be a list of bools, got {pattern!r}")
        if len(pattern) != init_r:
            raise ValueError(f"rank_pattern of {key!r} has {len(pattern)} entries, not {init_r}")
        patterns[name] = pattern
    return {
        name: torch.tensor(p, device="cpu").nonzero().squeeze(1) for name, p in patterns.items()
    }


def _masks_in_state(
    state: dict[str, Any] | None, allocator: RankAllocator | None
) -> dict[int, Tensor]:
    """For each layer, by its id, the triplets that it has once `state` is loaded: (r,) bool."""
    if state is None or allocator is None:
        return {}
    ranks = state["ranks"]
    if len(ranks) != len(allocator.adapters) or sum(ranks) != len(state["mask"]):
        raise ValueError(
            f"{STATE_NAME} is for ranks {ranks}, the model has {len(allocator.adapters)} adapters"
        )
    parts = state["mask"].split_with_sizes(ranks)
    if not state["shrunk"]:
        parts = [torch.ones_like(part) for part in parts]
    pairs = zip(allocator.adapters, parts, strict=True)
    return {id(a.module): part for a, part in pairs if not a.is_deleted}


def _rows_to_write(
    layer: AdaptedLayer,
    tensors: dict[str, Tensor],
    numbers: Tensor,
    masks: dict[int, Tensor],
    scaling_and_ranknum: tuple[float, float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns (rows, lora_A, lora_E, lora_B): the file's triplets, and the rows that take them.

    `numbers` (k,) int64 says which of the init_r triplets the file has of this layer, and
    `scaling_and_ranknum` for which two numbers its lora_E is; `masks` come from `_masks_in_state`.
    """
    k = len(numbers)
    loaded = []
    for (name, dim), parameter in zip(FACTORS, layer.adapter.parameters, strict=True):
        key = f"{PREFIX}{layer.name}.{name}"
        tensor, shape = tensors[key], list(parameter.shape)
        shape[dim] = k
        if list(tensor.shape) != shape:
            raise ValueError(f"{key} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{key} must be floating point, is {tensor.dtype}")
        loaded.append(tensor)
    a, e, b = loaded
    mask = masks.get(id(layer.module))
    places = layer.stored
    if mask is not None:
        if len(mask) != k:
            raise ValueError(f"{layer.name} has {k} triplets, {STATE_NAME} is for {len(mask)}")
        if not bool(mask.all()):
            # The allocator cuts the layer to these before the weights come.
            a, e, b, numbers = a[mask], e[mask], b[:, mask], numbers[mask]
            places = numbers
    if not bool(torch.isin(numbers, places).all()):
        there = triplets_there(a, e, b)
        a, e, b, numbers = a[there], e[there], b[:, there], numbers[there]
    if len(numbers) > len(places):
        raise ValueError(
            f"{layer.name} has {len(numbers)} triplets in the file, {len(places)} in the model"
        )
    # A model whose adapter was itself loaded pruned may have other rows than the file.
    fits = bool(torch.isin(numbers, places).all())
    taken = (
        torch.searchsorted(places, numbers) if fits else torch.arange(len(numbers), device="cpu")
    )
    return taken, a, e / lora_E_factor(layer, *scaling_and_ranknum), b

"""Writes an adapter as AdaLoRA or as plain LoRA."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from peft import LoraConfig
from torch import Tensor, nn

from ..allocator import RankAllocator
from ..distributed.shards import whole_tensor
from ..peft.saving import FACTORS, AdaptedLayer, rank_pattern_for_file
from .adapter import (
    PREFIX,
    OpenedAdapter,
    lora_E_factor,
    open_adapter,
    scaling_and_ranknum,
)
from .files import replacing, write_adapter
from .state import STATE_NAME, whole_state, write_state, writes_here

# What a plain LoRA adapter has in common with the AdaLoRA adapter that it was.
_CARRIED = (
    "task_type",
    "base_model_name_or_path",
    "revision",
    "auto_mapping",
    "bias",
    "fan_in_fan_out",
    "lora_dropout",
    "modules_to_save",
    "trainable_token_indices",
)


def save_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    full_rank: bool = False,
    adapter_name: str | None = None,
    allocator: RankAllocator | None = None,
) -> None:
    """Write an AdaLoRA adapter as PEFT does: adapter_config.json and adapter_model.safetensors.

    `PeftModel` reads both kinds, also in plain PEFT. The one for release is compact, and the same
    function: a triplet is left out only if it is pruned *and* adds nothing now (its lora_E is 0).
    The rank_pattern says which of the init_r triplets there are, and of all loaders only
    `PeftModel` asks for it: for transformers' `load_adapter` and `AutoModel.from_pretrained`, or
    sentence-transformers, write with `save_pretrained`, which keeps all rows. Without an
    allocator, pruned is what has lora_E = 0, unless all of it is. Files are written beside and
    then renamed, so a file is never half written.

    Args:
        model: a PEFT model (ours or plain, or with injected layers), or one of `SVDLinear` layers,
            which is written for the same model of `nn.Linear` layers: with the biases beside an
            adapter if they are trainable, and without whatever else was trained. DDP's and
            torch.compile's wrappers may be around it, or any module in which it is the only one
            with AdaLoRA (a SentenceTransformer). Where the adapters are sharded (FSDP2: DTensors),
            all processes have to call this, and the first one writes; those of ZeRO-3 have to be
            gathered first.
        path: a folder; it is created.
        full_rank: a checkpoint to train on from: all triplets, and with an allocator its state in
            adalora_state.safetensors.
        adapter_name: which of PEFT's adapters; by default the only one, or the trainable one.
        allocator: by default the one that `peft.apply` gave the model, if any.

    Raises:
        TypeError: `model` is not a module, or a layer is neither PEFT's nor ours.
        ValueError: no such adapter in the model, or several adapted models; an allocator of
            another model; SVDLinear layers with different r or lora_alpha.
    """
    opened = open_adapter(model, adapter_name, allocator)
    if opened.key is None:
        names = [layer.name for layer in opened.layers]
        opened.config["target_modules"] = _exact_targets(names, opened.root)
    tensors = _whole(opened.other_tensors()[0])
    chosen = {}
    for layer in opened.layers:
        lora_A, lora_E, lora_B = _whole_parameters(layer)
        chosen[layer.name] = layer.chosen(lora_E, checkpoint=full_rank)
        factor = lora_E_factor(layer, *opened.scaling_and_ranknum)
        if factor != 1.0:
            lora_E = (lora_E.double() * factor).to(lora_E.dtype)
        for (name, dim), part in zip(FACTORS, (lora_A, lora_E, lora_B), strict=True):
            selected = layer.compact(part, dim, chosen[layer.name])
            tensors[f"{PREFIX}{layer.name}.{name}"] = selected
    opened.config["rank_pattern"] = rank_pattern_for_file(chosen)
    state = None
    if full_rank and opened.allocator is not None:
        state = whole_state(opened.allocator)
    if not writes_here(opened.layers[0].adapter.lora_E):
        return
    with replacing(Path(path)) as folder:
        write_adapter(folder, opened.config, tensors)
        if state is not None:
            write_state(state, folder / STATE_NAME)
        else:
            Path(path, STATE_NAME).unlink(missing_ok=True)


def export_lora(
    model: nn.Module, path: str | os.PathLike[str], *, adapter_name: str | None = None
) -> None:
    """Write an AdaLoRA adapter as a plain LoRA adapter in PEFT's format.

    It is exact, that is the same function up to rounding: lora_A' = lora_A and
    lora_B' = lora_B · diag(lora_E) · scaling of the triplets whose lora_E is not 0, multiplied in
    float64 and rounded once to the adapter's dtype. Each module has its own rank, and lora_alpha
    equal to it, so that LoRA's scaling is 1. Modules without a triplet are no longer targets.
    Biases and modules_to_save are in it unchanged.

    Args:
        model, path, adapter_name: as in `save_adapter`.

    Raises:
        TypeError, ValueError: as `save_adapter`.
        ValueError: no triplet is left in any module, or none has been trained yet: their lora_E
            are all 0.
    """
    opened = open_adapter(model, adapter_name, None)
    tensors, ranks = {}, {}
    for layer in opened.layers:
        lora_A, lora_E, lora_B = _whole_parameters(layer)
        nonzero = lora_E.squeeze(1) != 0
        rank = int(nonzero.sum())
        if rank == 0:
            continue
        scaling, ranknum = scaling_and_ranknum(layer.adapter)
        weights = lora_E[nonzero].double() * (scaling / (ranknum + 1e-5))
        a = lora_A[nonzero]
        b = (lora_B[:, nonzero].double() * weights.T).to(lora_B.dtype)
        base = getattr(layer.module, "base_layer", None)
        if isinstance(base, nn.Conv2d):
            a = a.reshape(rank, -1, *base.kernel_size)
            b = b.reshape(-1, rank, 1, 1)
        ranks[layer.name] = rank
        tensors[f"{PREFIX}{layer.name}.lora_A.weight"] = a
        tensors[f"{PREFIX}{layer.name}.lora_B.weight"] = b
    if not ranks and any(bool(layer.alive.any()) for layer in opened.layers):
        raise ValueError(
            "the adapter is untrained: lora_E is 0 in all its triplets, so it adds nothing yet and "
            "there is no LoRA adapter to write"
        )
    if not ranks:
        raise ValueError("no triplet is left in any module: there is no LoRA adapter to write")
    tensors |= _whole(_other_tensors_of_lora(opened, ranks))
    if not writes_here(opened.layers[0].adapter.lora_E):
        return
    with replacing(Path(path)) as folder:
        write_adapter(folder, _lora_config(opened, ranks), tensors)


def _whole_parameters(layer: AdaptedLayer) -> list[Tensor]:
    """lora_A, lora_E and lora_B of a layer, on the CPU."""
    return [whole_tensor(p.detach()).cpu() for p in layer.adapter.parameters]


def _whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: whole_tensor(tensor.detach()) for key, tensor in tensors.items()}


def _other_tensors_of_lora(opened: OpenedAdapter, ranks: dict[str, int]) -> dict[str, Tensor]:
    """Biases and modules_to_save, by their names beside a LoRA with these targets."""
    untargeted = tuple(
        f"{PREFIX}{layer.name}.base_layer." for layer in opened.layers if layer.name not in ranks
    )
    return {
        # A bias beside a module that is no target any more: its layer has no wrapper.
        key.replace(".base_layer.", ".") if key.startswith(untargeted) else key: tensor
        for key, tensor in opened.other_tensors()[0].items()
    }


def _lora_config(opened: OpenedAdapter, ranks: dict[str, int]) -> dict[str, Any]:
    pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items()}
    config = LoraConfig(
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),
        rank_pattern=pattern,
        alpha_pattern=pattern,
        target_modules=_exact_targets(list(ranks), opened.root),
        inference_mode=True,
        **{name: opened.config[name] for name in _CARRIED if name in opened.config},
    )
    return dict(config.to_dict())


def _exact_targets(names: list[str], root: nn.Module) -> list[str] | str:
    """PEFT's target_modules for exactly these layers.

    A list; or a regex, where PEFT's matching by the end of a name would take other layers too.
    """
    wanted = set(names)
    for module_name, _ in root.named_modules():
        if module_name not in wanted and any(module_name.endswith(f".{n}") for n in wanted):
            return "|".join(map(re.escape, sorted(wanted)))
    return sorted(wanted)

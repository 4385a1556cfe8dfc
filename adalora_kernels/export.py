"""Saves and loads adapters in PEFT's format, and exports them as plain LoRA.

Written and read are safetensors and JSON: nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, PeftMixedModel, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .adapters import Adapter, find_adapters
from .allocator import RankAllocator
from .modules import SVDLinear
from .peft import allocator_of, spread

STATE_NAME = "adalora_state.safetensors"

_PREFIX = "base_model.model."
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
_STATE_TYPES = {
    "format": int,
    "names": list,
    "ranks": list,
    "global_step": int,
    "frozen": bool,
    "shrunk": bool,
}


@dataclasses.dataclass
class _Layer:
    """One adapter, and where its stored rows stand among the `length` triplets it started with."""

    name: str
    adapter: Adapter
    length: int
    slots: Tensor  # [R] int64, ascending
    alive: Tensor  # [R] bool: not pruned, as far as an allocator says so

    @property
    def numbers(self) -> tuple[float, float]:
        """(scaling, ranknum): lora_E is multiplied by scaling / (ranknum + 1e-5)."""
        module: Any = self.adapter.module
        if self.adapter.key is not None:
            key = self.adapter.key
            return float(module.scaling[key]), float(module.ranknum[key])
        ranknum = float(module.ranknum)
        return float(module.lora_alpha) if module.lora_alpha > 0 else ranknum, ranknum

    def factor(self, scaling: float, ranknum: float) -> float:
        """What lora_E has to be multiplied by for a layer with these numbers."""
        # PEFT forgets the ranknum of a layer without triplets.
        if len(self.slots) == 0 or self.numbers == (scaling, ranknum):
            return 1.0
        mine = self.numbers[0] / (self.numbers[1] + 1e-5)
        return mine * (ranknum + 1e-5) / scaling

    def triplets(self) -> tuple[Tensor, Tensor, Tensor]:
        """lora_A [R, in], lora_E [R, 1] as the layer uses it, lora_B [out, R], on the CPU."""
        a, e, b = (p.detach().cpu() for p in self.adapter.parameters)
        key = self.adapter.key
        mask = getattr(self.adapter.module, "_mask" if key is None else f"_mask_{key}", None)
        return a, e if mask is None else e.masked_fill(~mask.cpu().unsqueeze(1), 0.0), b


@dataclasses.dataclass
class _Source:
    """A model with one AdaLoRA adapter, whoever made its layers."""

    model: Any
    root: nn.Module  # the base model
    key: str | None
    config: dict[str, Any]  # of an AdaLoraConfig
    layers: list[_Layer]
    allocator: RankAllocator | None

    @property
    def numbers(self) -> tuple[float, float]:
        return float(self.config["lora_alpha"]), float(self.config["init_r"])

    def others(self, embeddings: bool | str = "auto") -> tuple[dict[str, Tensor], set[str]]:
        """The rest of the adapter (biases, modules_to_save): tensors that share the model's
        storage, by their names in the file; and the names that PEFT has for them."""
        if self.key is None:
            modules: dict[str, Any] = {layer.name: layer.adapter.module for layer in self.layers}
            found = {
                f"{_PREFIX}{name}.base_layer.bias": module.bias.detach()
                for name, module in modules.items()
                if self.config["bias"] != "none" and module.bias is not None
            }
            return found, set(found)
        model, prefix = self.model, _prefix(self.model)
        state: dict[str, Tensor] = model.state_dict()
        configs = model.peft_config
        config = configs[self.key]
        # PEFT cuts by its rank_pattern as it collects, and fails where that is not the model's.
        configs[self.key] = copy.copy(config)
        configs[self.key].rank_pattern = None
        try:
            selected = get_peft_model_state_dict(
                model, state, adapter_name=self.key, save_embedding_layers=embeddings
            )
        finally:
            configs[self.key] = config
        names = {
            f"{name}.{ours}": f"{name}.{saved}"
            for name, module in model.named_modules()
            if isinstance(module, AuxiliaryTrainingWrapper)
            for saved, ours in module.adapter_state_dict_load_map(self.key).items()
        }
        mine = tuple(f"{prefix}{layer.name}.lora_" for layer in self.layers)
        keys = {id(tensor): key for key, tensor in state.items()}
        found, known = {}, set()
        for saved, tensor in selected.items():
            # PEFT's own name may lack a module that is called as the adapter is.
            key = keys[id(tensor)]
            if not key.startswith(mine):
                found[_PREFIX + names.get(key, key).removeprefix(prefix)] = tensor
                known.add(_PREFIX + saved.removeprefix(prefix))
        return found, known | found.keys()


def _prefix(model: nn.Module) -> str:
    """Of the base model's names among the model's."""
    if isinstance(model, PeftModel | PeftMixedModel):
        return _PREFIX
    return "model." if isinstance(model, BaseTuner) else ""


def _unwrapped(model: nn.Module) -> nn.Module:
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:  # torch.compile's
            model = model.get_submodule("_orig_mod")
        else:
            return model


def _open(model: nn.Module, key: str | None, allocator: RankAllocator | None) -> _Source:
    """Raises TypeError, ValueError as the public functions."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    model = _unwrapped(model)
    root = model.get_submodule(_prefix(model).removesuffix("."))
    configs: Any = getattr(model, "peft_config", None)
    if configs:
        key = _adapter_name(configs, key)
    elif key is not None:
        raise ValueError(f"adapter_name is for PEFT's models, got {key!r}")
    adapters = [adapter for adapter in find_adapters(root, key) if adapter.key == key]
    if not adapters:
        raise ValueError(f"no AdaLoRA adapter in this {type(model).__name__}")
    if allocator is None:
        allocator = allocator_of(model)
        if allocator is not None and allocator.adapters[0].key != key:
            allocator = None  # It is another adapter's.
    layers = _layers(adapters, allocator)
    config: dict[str, Any]
    config = configs[key].to_dict() if configs else _own_config(layers, allocator)
    if config["lora_alpha"] <= 0:
        # The same number; as it is, PEFT would take the rank that is left.
        config["lora_alpha"] = config["init_r"]
    if config["total_step"] is None:
        known = None if allocator is None else allocator.schedule.total_step
        config["total_step"] = known or config["tinit"] + config["tfinal"] + 1
    if not config["base_model_name_or_path"]:
        config["base_model_name_or_path"] = getattr(root, "name_or_path", None) or None
    if config["task_type"] is None:
        base = type(root)
        config["auto_mapping"] = {
            "base_model_class": base.__name__,
            "parent_library": base.__module__,
        }
    config["inference_mode"] = True
    for layer in layers:
        if layer.length > config["init_r"]:
            raise ValueError(
                f"{layer.name} has {layer.length} triplets, its init_r is {config['init_r']}"
            )
    return _Source(model, root, key, config, layers, allocator)


def _adapter_name(configs: dict[str, Any], name: str | None) -> str:
    names = [n for n, config in configs.items() if isinstance(config, AdaLoraConfig)]
    if name is None and len(names) > 1:
        trainable = [n for n in names if not configs[n].inference_mode]
        name = trainable[0] if len(trainable) == 1 else None
    elif name is None and names:
        name = names[0]
    if name not in names:
        raise ValueError(f"adapter_name must be one of the AdaLoRA adapters {names}, got {name!r}")
    return name


def _layers(adapters: list[Adapter], allocator: RankAllocator | None) -> list[_Layer]:
    patterns = {}
    if allocator is not None:
        found = zip(allocator.adapters, allocator.rank_pattern.values(), strict=True)
        patterns = {
            (id(a.module), a.key): torch.tensor(alive, dtype=torch.bool) for a, alive in found
        }
        if not any((id(a.module), a.key) in patterns for a in adapters):
            raise ValueError("allocator is for another model or adapter")
    layers = []
    for adapter in adapters:
        name = adapter.name.removesuffix(f".{adapter.key}").removesuffix("lora_E").rstrip(".")
        rows = adapter.lora_E.shape[0]
        nobody = torch.zeros(rows, dtype=torch.bool)
        alive = patterns.get((id(adapter.module), adapter.key), nobody)
        length, slots = len(alive), torch.arange(rows)
        if length != rows:  # shrink() has left the living ones.
            slots = alive.nonzero().squeeze(1)
            alive = alive[slots]
        if len(slots) != rows:
            raise ValueError(f"allocator is for {len(slots)} triplets of {name}, it has {rows}")
        layers.append(_Layer(name, adapter, length, slots, alive))
    return layers


def _own_config(layers: list[_Layer], allocator: RankAllocator | None) -> dict[str, Any]:
    """The AdaLoraConfig for a model of SVDLinear layers."""
    first = layers[0]
    for layer in layers:
        module = layer.adapter.module
        if not isinstance(module, SVDLinear):
            raise TypeError(f"{layer.name} must be an SVDLinear, is a {type(module).__name__}")
        if layer.numbers != first.numbers:
            raise ValueError(
                "PEFT's config has one lora_alpha and one init_r: "
                f"{first.name} has {first.numbers}, {layer.name} has {layer.numbers}"
            )
    modules: list[Any] = [layer.adapter.module for layer in layers]
    scaling, ranknum = first.numbers
    options: dict[str, Any] = {"total_step": 1}
    if allocator is not None:
        schedule = allocator.schedule
        options = {name: getattr(schedule, name) for name in ("tinit", "tfinal", "deltaT")}
        options["total_step"] = schedule.total_step or schedule.tinit + schedule.tfinal + 1
        options["target_r"] = schedule.target_budget // len(allocator.adapters)
        options |= {"beta1": allocator.beta1, "beta2": allocator.beta2}
    trained = any(m.bias is not None and m.bias.requires_grad for m in modules)
    config = AdaLoraConfig(
        init_r=int(ranknum),
        lora_alpha=scaling,
        lora_dropout=getattr(modules[0].lora_dropout, "p", 0.0),
        fan_in_fan_out=any(m.fan_in_fan_out for m in modules),
        bias="lora_only" if trained else "none",
        **options,
    )
    return dict(config.to_dict())


def save_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    full_rank: bool = False,
    adapter_name: str | None = None,
    allocator: RankAllocator | None = None,
) -> None:
    """Write an AdaLoRA adapter as PEFT does: adapter_config.json and adapter_model.safetensors.

    Plain PEFT reads both kinds. The one for release is pruned, and the same function: a triplet is
    left out only if it is pruned *and* adds nothing now (its lora_E is 0). The rank_pattern
    says which of the init_r triplets there are. Without an allocator, pruned is what has
    lora_E = 0, unless all of it is. Files are written beside and then renamed, so a file is never
    half written.

    Args:
        model: a PEFT model (ours or plain, or with injected layers), or one of `SVDLinear` layers,
            which is written for the same model of `nn.Linear` layers: with the biases beside an
            adapter if they are trainable, and without whatever else was trained. DDP's and
            torch.compile's wrappers may be around it; sharded parameters (FSDP, ZeRO-3) have to
            be gathered first.
        path: a folder; it is created.
        full_rank: a checkpoint to train on from: all triplets, and with an allocator its state in
            adalora_state.safetensors.
        adapter_name: which of PEFT's adapters; by default the only one, or the trainable one.
        allocator: by default the one that `peft.apply` gave the model, if any.

    Raises:
        TypeError: `model` is not a module, or a layer is neither PEFT's nor ours.
        ValueError: no such adapter in the model; an allocator of another model; SVDLinear layers
            with different r or lora_alpha.
    """
    source = _open(model, adapter_name, allocator)
    if source.key is None:
        names = [layer.name for layer in source.layers]
        source.config["target_modules"] = _exact_targets(names, source.root)
    others, _ = source.others()
    triplets = [layer.triplets() for layer in source.layers]
    fresh = source.allocator is None and not any(bool(e.any()) for _, e, _ in triplets)
    tensors, patterns = others, {}
    for layer, (a, e, b) in zip(source.layers, triplets, strict=True):
        factor = layer.factor(*source.numbers)
        e = e if factor == 1.0 else (e.double() * factor).to(e.dtype)
        pattern = torch.zeros(source.config["init_r"], dtype=torch.bool)
        if full_rank:
            pattern[: layer.length] = True
            slots, length = layer.slots, layer.length
            a, e, b = (spread(t, d, slots, length) for t, d in ((a, 0), (e, 0), (b, 1)))
        else:
            keep = layer.alive | (e.squeeze(1) != 0) | fresh
            pattern[layer.slots[keep]] = True
            a, e, b = a[keep], e[keep], b[:, keep]
        patterns[f"{layer.name}.lora_E"] = pattern.tolist()
        for factor_name, tensor in (("lora_A", a), ("lora_E", e), ("lora_B", b)):
            tensors[f"{_PREFIX}{layer.name}.{factor_name}"] = tensor
    whole = all(all(pattern) for pattern in patterns.values())
    source.config["rank_pattern"] = None if whole else patterns
    with _replacing(Path(path)) as folder:
        _write(folder, source.config, tensors)
        if full_rank and source.allocator is not None:
            save_state(source.allocator, folder / STATE_NAME)
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
        ValueError: no triplet is left in any module.
    """
    source = _open(model, adapter_name, None)
    tensors, ranks = {}, {}
    for layer in source.layers:
        a, e, b = layer.triplets()
        keep = e.squeeze(1) != 0
        rank = int(keep.sum())
        if rank == 0:
            continue
        scaling, ranknum = layer.numbers
        weights = e[keep].double() * (scaling / (ranknum + 1e-5))
        a, b = a[keep], (b[:, keep].double() * weights.T).to(b.dtype)
        base = getattr(layer.adapter.module, "base_layer", None)
        if isinstance(base, nn.Conv2d):
            a = a.reshape(rank, -1, *base.kernel_size)
            b = b.reshape(-1, rank, 1, 1)
        ranks[layer.name] = rank
        tensors[f"{_PREFIX}{layer.name}.lora_A.weight"] = a
        tensors[f"{_PREFIX}{layer.name}.lora_B.weight"] = b
    if not ranks:
        raise ValueError("no triplet is left in any module: there is no LoRA adapter to write")
    unwrapped = tuple(
        f"{_PREFIX}{layer.name}.base_layer." for layer in source.layers if layer.name not in ranks
    )
    for key, tensor in source.others()[0].items():
        # A bias beside a module that is no target any more: its layer has no wrapper.
        name = key.replace(".base_layer.", ".") if key.startswith(unwrapped) else key
        tensors[name] = tensor
    pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items()}
    config = LoraConfig(
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),
        rank_pattern=pattern,
        alpha_pattern=pattern,
        target_modules=_exact_targets(list(ranks), source.root),
        inference_mode=True,
        **{name: source.config[name] for name in _CARRIED if name in source.config},
    )
    with _replacing(Path(path)) as folder:
        _write(folder, config.to_dict(), tensors)


def _exact_targets(names: list[str], root: nn.Module) -> list[str] | str:
    """target_modules for exactly these: a list, or a regex where PEFT's match by the end of a
    name would take others too."""
    wanted = set(names)
    for module_name, _ in root.named_modules():
        if module_name not in wanted and any(module_name.endswith(f".{n}") for n in wanted):
            return "|".join(map(re.escape, sorted(wanted)))
    return sorted(wanted)


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
    with lora_E = 0 in all others: the function is the saved one, and no shape changes. Everything
    is checked first: where an error is raised, model and allocator are as they were.

    Args:
        model, adapter_name, allocator: as in `save_adapter`.
        path: the folder.

    Raises:
        FileNotFoundError: a file is missing.
        TypeError: as `save_adapter`.
        ValueError: a file is malformed, or for another model; the layers are merged; or
            the allocator is already at work, and the folder has no state for it.
    """
    folder = Path(path)
    config = _read_config(folder / CONFIG_NAME)
    tensors, _ = _read_tensors(folder / SAFETENSORS_WEIGHTS_NAME)
    source = _open(model, adapter_name, allocator)
    allocator = source.allocator
    state = None
    if allocator is not None and (folder / STATE_NAME).exists():
        state = load_state(folder / STATE_NAME)
    elif allocator is not None and allocator.global_step > 0:
        raise ValueError(
            f"the model's allocator is at step {allocator.global_step}, and {folder} has no state "
            "for it: load into a model that has not been trained, and apply() after that"
        )
    if source.key is None:
        biased = any(key.endswith(".base_layer.bias") for key in tensors)
        source.config["bias"] = "lora_only" if biased else "none"
    numbers = float(config["lora_alpha"]), float(config["init_r"])
    numbers = (numbers[0] if numbers[0] > 0 else numbers[1]), numbers[1]
    if numbers != source.numbers:
        raise ValueError(
            f"{folder} is for (lora_alpha, init_r) {numbers}, the model has {source.numbers}"
        )
    others = _check_keys(folder, tensors, source)
    slots = _read_slots(config, source)
    kept = {} if state is None or allocator is None else _masks(state, allocator)
    writes = [
        _rows_to_write(layer, tensors, slots[layer.name], kept, source.numbers)
        for layer in source.layers
    ]
    merged = [layer for layer in source.layers if layer.adapter.module.merged]
    if merged and source.key is not None:
        raise ValueError(f"{merged[0].name} is merged: call unmerge_adapter() before loading")
    if state is not None and allocator is not None:
        allocator.load_state_dict(state)
    with torch.no_grad():
        for layer, (rows, *triplets) in zip(source.layers, writes, strict=True):
            a, e, b = layer.adapter.parameters
            e.zero_()
            for parameter, tensor, dim in zip((a, e, b), triplets, (0, 0, 1), strict=True):
                parameter.index_copy_(dim, rows.to(parameter.device), tensor.to(parameter))
        for key, tensor in others.items():
            tensor.copy_(tensors[key])
    for layer in merged:
        svd_linear: Any = layer.adapter.module
        svd_linear.unmerge()
        svd_linear.merge()


def _check_keys(folder: Path, tensors: dict[str, Tensor], source: _Source) -> dict[str, Tensor]:
    """Returns the model's other tensors that the file has values for."""
    mine = {
        f"{_PREFIX}{layer.name}.{factor}"
        for layer in source.layers
        for factor in ("lora_A", "lora_E", "lora_B")
    }
    others, known = source.others(embeddings=False)
    if source.key is not None and tensors.keys() - mine - known:
        # PEFT writes the embeddings of a resized vocabulary too.
        more, more_known = source.others(embeddings=hasattr(source.model, "get_input_embeddings"))
        others |= {key: tensor for key, tensor in more.items() if key in tensors}
        known |= more_known
    if unexpected := sorted(tensors.keys() - mine - known):
        raise ValueError(f"{folder} has tensors that the model has not: {_some(unexpected)}")
    if missing := sorted((mine | others.keys()) - tensors.keys()):
        raise ValueError(f"{folder} lacks tensors that the model has: {_some(missing)}")
    for key, tensor in others.items():
        if tensors[key].shape != tensor.shape:
            raise ValueError(
                f"{key} has shape {tuple(tensors[key].shape)}, the model's {tuple(tensor.shape)}"
            )
    return others


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _read_slots(config: dict[str, Any], source: _Source) -> dict[str, Tensor]:
    """Which of the init_r triplets the file has of each module."""
    init_r, names = config["init_r"], {layer.name for layer in source.layers}
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
    return {name: torch.tensor(p).nonzero().squeeze(1) for name, p in patterns.items()}


def _masks(state: dict[str, Any], allocator: RankAllocator) -> dict[int, Tensor]:
    """The allocator's pattern in `state`, by the id of the layer."""
    ranks = state["ranks"]
    if len(ranks) != len(allocator.adapters) or sum(ranks) != len(state["mask"]):
        raise ValueError(
            f"{STATE_NAME} is for ranks {ranks}, the model has {len(allocator.adapters)} adapters"
        )
    parts = state["mask"].split_with_sizes(ranks)
    if not state["shrunk"]:
        parts = [torch.ones_like(part) for part in parts]
    return {id(a.module): part for a, part in zip(allocator.adapters, parts, strict=True)}


def _rows_to_write(
    layer: _Layer,
    tensors: dict[str, Tensor],
    slots: Tensor,
    kept: dict[int, Tensor],
    numbers: tuple[float, float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(rows, lora_A, lora_E, lora_B): the file's triplets, and the layer's rows that take them."""
    k = len(slots)
    loaded = []
    for name, parameter, dim in zip(
        ("lora_A", "lora_E", "lora_B"), layer.adapter.parameters, (0, 0, 1), strict=True
    ):
        key = f"{_PREFIX}{layer.name}.{name}"
        tensor, shape = tensors[key], list(parameter.shape)
        shape[dim] = k
        if list(tensor.shape) != shape:
            raise ValueError(f"{key} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{key} must be floating point, is {tensor.dtype}")
        loaded.append(tensor)
    a, e, b = loaded
    rows = layer.adapter.lora_E.shape[0]
    mask = kept.get(id(layer.adapter.module))
    if mask is not None:
        if len(mask) != k:
            raise ValueError(f"{layer.name} has {k} triplets, {STATE_NAME} is for {len(mask)}")
        if not bool(mask.all()):
            # The allocator cuts the layer to these before the weights come.
            a, e, b, slots, rows = a[mask], e[mask], b[:, mask], slots[mask], int(mask.sum())
    if len(slots) > rows:
        raise ValueError(f"{layer.name} has {len(slots)} triplets in the file, {rows} in the model")
    # In a model whose adapter was itself loaded pruned the rows have no numbers of their own.
    fits = len(slots) == 0 or int(slots[-1]) < rows
    return (slots if fits else torch.arange(len(slots))), a, e / layer.factor(*numbers), b


def save_state(
    allocator: RankAllocator,
    file: str | os.PathLike[str],
    *,
    extra: dict[str, Any] | None = None,
) -> None:
    """Write `allocator.state_dict()` as one safetensors file: the tensors, and JSON for the rest.

    Args:
        allocator: the allocator.
        file: the file; it is written beside and then renamed.
        extra: more values that JSON knows, which `load_state` returns beside the state.
    """
    tensors: dict[str, Tensor] = {}
    lists: dict[str, int] = {}
    values: dict[str, Any] = {}
    for key, value in (allocator.state_dict() | (extra or {})).items():
        if isinstance(value, Tensor):
            tensors[key] = value.contiguous()
        elif isinstance(value, list) and all(isinstance(item, Tensor) for item in value):
            lists[key] = len(value)
            tensors |= {f"{key}.{i}": item.contiguous() for i, item in enumerate(value)}
        else:
            values[key] = value
    metadata = {"format": "pt", "adalora_state": json.dumps({"values": values, "lists": lists})}
    file = Path(file)
    with _replacing(file.parent) as folder:
        save_file(tensors, folder / file.name, metadata=metadata)


def load_state(file: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what `save_state` wrote, for `allocator.load_state_dict`. Tensors are on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is malformed.
    """
    file = Path(file)
    tensors, metadata = _read_tensors(file)
    state: dict[str, Any] = dict(tensors)
    try:
        rest = json.loads(metadata["adalora_state"])
        values, lists = dict(rest["values"]), dict(rest["lists"])
        for key, count in lists.items():
            state[key] = [state.pop(f"{key}.{i}") for i in range(count)]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is not the state of a RankAllocator: {error!r}") from error
    state |= values
    for key, kind in _STATE_TYPES.items():
        if type(state.get(key)) is not kind:
            raise ValueError(f"{file} has {key} = {state.get(key)!r}, expected {kind.__name__}")
    if not all(type(rank) is int and rank >= 0 for rank in state["ranks"]):
        raise ValueError(f"{file} has ranks {state['ranks']!r}, expected numbers")
    if state["shrunk"] and not state["frozen"]:
        raise ValueError(f"{file} is of a shrunk model whose pattern is not frozen")
    for key, dtype in (("mask", torch.bool), ("skipped", torch.int64)):
        if getattr(state.get(key), "dtype", None) is not dtype:
            raise ValueError(f"{file} has no {key}, or not as {dtype}")
    return state


def _write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    # Copies: safetensors takes no two views of one storage.
    copies = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    save_file(copies, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    text = json.dumps(config, indent=2, sort_keys=True, default=sorted)
    (folder / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")


@contextlib.contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A folder to write files into, that are moved to `folder` when all of them are whole."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as name:
        yield Path(name)
        for file in sorted(Path(name).iterdir()):
            os.replace(file, folder / file.name)


def _read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata)."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing")
    try:
        with safe_open(file, framework="pt") as opened:
            names, metadata = opened.keys(), opened.metadata() or {}
            return {name: opened.get_tensor(name) for name in names}, metadata
    except SafetensorError as error:
        raise ValueError(f"{file} is not a safetensors file, or not all of it: {error}") from error


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing")
    try:
        config = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "ADALORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{file} must be the config of an ADALORA adapter, is of {kind!r}")
    if type(config.get("init_r")) is not int or config["init_r"] < 1:
        raise ValueError(f"{file} must have init_r ≥ 1, has {config.get('init_r')!r}")
    if type(config.get("lora_alpha")) not in (int, float):
        raise ValueError(f"{file} must have a lora_alpha, has {config.get('lora_alpha')!r}")
    if not isinstance(config.get("rank_pattern"), dict | None):
        raise ValueError(f"{file} must have an object or null as rank_pattern")
    return config

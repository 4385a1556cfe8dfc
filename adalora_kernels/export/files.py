"""Reads and writes safetensors and JSON; no file is ever half written."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A folder to write files into, that are moved to `folder` when all of them are whole."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as name:
        yield Path(name)
        for file in sorted(Path(name).iterdir()):
            os.replace(file, folder / file.name)


def write_adapter(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write adapter_config.json and adapter_model.safetensors."""
    # Copies: safetensors takes no two views of one storage.
    copies = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    save_file(copies, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    text = json.dumps(config, indent=2, sort_keys=True, default=sorted)
    (folder / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns (tensors, metadata); raises FileNotFoundError, or ValueError for a damaged file."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing")
    try:
        with safe_open(file, framework="pt") as opened:
            names, metadata = opened.keys(), opened.metadata() or {}
            return {name: opened.get_tensor(name) for name in names}, metadata
    except SafetensorError as error:
        raise ValueError(f"{file} is not a safetensors file, or not all of it: {error}") from error


def read_config(file: Path) -> dict[str, Any]:
    """Returns the config of an AdaLoRA adapter; raises FileNotFoundError, or ValueError if what
    we read of it is malformed."""
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

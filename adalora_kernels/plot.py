"""Draws where the ranks of a run went, and how its budget and loss went down."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

from .allocator import LOG_PREFIX, RankAllocator

__all__ = ["RankSource", "budget_curve", "rank_heatmap"]

RankSource: TypeAlias = RankAllocator | Mapping[str, int] | str | PathLike[str]
"""Where ranks come from: an allocator, ranks by name, or the folder of a saved adapter."""

_SUFFIX = re.compile(r"\.?lora_E(\.[^.]+)?$")
_LAYER = re.compile(r"^(?P<stack>.*?)\.(?P<layer>\d+)\.(?P<matrix>.+)$")


def _figure(width: float, height: float) -> Any:
    # Figure instead of pyplot: no window system is touched and no global state is left behind.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _cells(ranks: Mapping[str, int]) -> dict[tuple[int, str], int]:
    """Sort the ranks by (layer, kind of matrix); a name without a number goes to layer 0."""
    modules = {_SUFFIX.sub("", name): rank for name, rank in ranks.items()}
    matches = {module: _LAYER.match(module) for module in modules}
    # An encoder and a decoder have the same layers: then the kind is named with its stack.
    several = len({match["stack"] for match in matches.values() if match}) > 1
    cells = {}
    for module, rank in modules.items():
        match = matches[module]
        if match is None:
            cells[0, module] = rank
        else:
            kind = f"{match['stack']}: {match['matrix']}" if several else match["matrix"]
            cells[int(match["layer"]), kind] = rank
    return cells


def _saved_ranks(directory: str | PathLike[str]) -> dict[str, int]:
    """Read the rank of every matrix from an adapter that PEFT or `export` has saved."""
    file = Path(directory) / "adapter_config.json"
    if not file.is_file():
        raise ValueError(f"allocator_or_adapter: {directory} has no adapter_config.json")
    pattern = json.loads(file.read_text()).get("rank_pattern")
    if not isinstance(pattern, dict) or not all(isinstance(v, list) for v in pattern.values()):
        raise ValueError(f"allocator_or_adapter: {file} has no AdaLoRA rank_pattern")
    return {name: sum(map(bool, alive)) for name, alive in pattern.items()}


def _ranks_of(allocator_or_adapter: RankSource) -> Mapping[str, int]:
    if isinstance(allocator_or_adapter, RankAllocator):
        ranks: Mapping[str, int] = allocator_or_adapter.ranks()
    elif isinstance(allocator_or_adapter, Mapping):
        ranks = allocator_or_adapter
    elif isinstance(allocator_or_adapter, str | PathLike):
        ranks = _saved_ranks(allocator_or_adapter)
    else:
        raise TypeError(
            "allocator_or_adapter must be a RankAllocator, a mapping or a directory, "
            f"got {type(allocator_or_adapter).__name__}"
        )
    if not ranks:
        raise ValueError("allocator_or_adapter has no matrix in it")
    return ranks


def rank_heatmap(allocator_or_adapter: RankSource, path: str | PathLike[str]) -> None:
    """Draw the rank of every matrix, layer by kind of matrix (paper, figure 3), to a PNG.

    Args:
        allocator_or_adapter: a `RankAllocator` (whose device is read), what its `ranks()` returns,
            or the directory of an adapter saved in PEFT's format.
        path: the file to write.

    Raises:
        TypeError: allocator_or_adapter is none of the three.
        ValueError: there are no ranks in it.
        ImportError: matplotlib is missing (extra "plot").
    """
    cells = _cells(_ranks_of(allocator_or_adapter))
    layers = sorted({layer for layer, _ in cells})
    matrices = list(dict.fromkeys(matrix for _, matrix in cells))
    grid = [[cells.get((layer, m), float("nan")) for layer in layers] for m in matrices]

    figure = _figure(2.5 + 0.45 * len(layers), 1.4 + 0.4 * len(matrices))
    axes = figure.subplots()
    image = axes.imshow(grid, cmap="Blues", vmin=0, aspect="auto")
    middle = max(cells.values()) / 2
    for (layer, matrix), rank in cells.items():
        at = layers.index(layer), matrices.index(matrix)
        color = "white" if rank > middle else "black"
        axes.text(*at, str(rank), ha="center", va="center", color=color, fontsize=8)
    axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    axes.set_yticks(range(len(matrices)), matrices)
    axes.set_xlabel("layer")
    axes.set_title(f"Rank of each matrix (total {sum(cells.values())})", fontsize=10)
    figure.colorbar(image, ax=axes, label="rank")
    figure.savefig(path, dpi=150, format="png")


def _records(history: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Check the records; those of a Trainer lose the prefix of their keys."""
    records = list(history)
    if any(LOG_PREFIX + "budget" in record for record in records):
        # A Trainer's history also holds evaluations and a summary of the run.
        records = [
            {key.removeprefix(LOG_PREFIX): value for key, value in record.items()}
            for record in records
            if LOG_PREFIX + "budget" in record
        ]
    if not records:
        raise ValueError("history is empty")
    for i, record in enumerate(records):
        missing = {"step", "loss", "budget", "total_rank"} - record.keys()
        if missing:
            raise ValueError(f"history[{i}] lacks {sorted(missing)}")
    return records


def budget_curve(history: Iterable[Mapping[str, Any]], path: str | PathLike[str]) -> None:
    """Draw loss, budget and total rank over the steps of a run, to a PNG.

    Args:
        history: records with the keys step, loss, budget and total_rank, of which a value may be
            None; or the `state.log_history` of a Trainer with an `AdaLoraCallback`.
        path: the file to write.

    Raises:
        ValueError: there is no record, or one without one of the keys.
        ImportError: matplotlib is missing (extra "plot").
    """
    records = _records(history)

    def series(key: str) -> tuple[Sequence[int], Sequence[float]]:
        points = [(r["step"], r[key]) for r in records if r[key] is not None]
        return [step for step, _ in points], [value for _, value in points]

    figure = _figure(6.4, 4.8)
    loss_axes, rank_axes = figure.subplots(2, 1, sharex=True)
    loss_axes.plot(*series("loss"), color="tab:red", linewidth=1)
    loss_axes.set_ylabel("loss")
    rank_axes.step(*series("budget"), where="post", color="tab:gray", label="budget b(t)")
    rank_axes.step(
        *series("total_rank"), where="post", color="tab:blue", linewidth=1, label="total rank"
    )
    rank_axes.set_ylabel("triplets")
    rank_axes.set_ylim(bottom=0)
    rank_axes.set_xlabel("step")
    rank_axes.legend()
    figure.savefig(path, dpi=150, format="png")

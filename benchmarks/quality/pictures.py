"""The pictures of docs/quality.md: loss curves, losses over budgets and rates, maps of ranks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from benchmarks.quality.figures import Cell, budget_of, mean_and_error

_LAYER = re.compile(r"\.(\d+)\.(.+)$")
_COLUMNS = 2
_SHOWN = ("lora", "ada-paper", "ada-lora")
ByTask = dict[str, list[Cell]]


def _figure(panels: int, height: float = 3.2) -> tuple[Figure, list[Any]]:
    # Not by pyplot: no window system is touched and no global state is left behind.
    lines, columns = -(-panels // _COLUMNS), min(max(1, panels), _COLUMNS)
    figure = Figure(figsize=(5.2 * columns, height * max(1, lines)), layout="constrained")
    axes = list(figure.subplots(max(1, lines), columns, squeeze=False).flat)
    for one in axes:
        one.tick_params(which="both", labelsize=7)
    for unused in axes[panels:]:
        unused.set_axis_off()
    return figure, axes


def _save(figure: Figure, folder: Path, name: str) -> None:
    # Without the version that matplotlib would write into it.
    figure.savefig(folder / f"quality_{name}.png", dpi=100, metadata={"Software": None})


def _draw_curves(by_task: ByTask, titles: dict[str, str], folder: Path) -> None:
    """Draw the loss of LoRA and of both starts over the steps, a panel per task and budget."""
    panels: dict[tuple[str, int], list[Cell]] = {}
    for task, found in by_task.items():
        for cell in found:
            if cell.runs and cell.spec["method"] in _SHOWN:
                panels.setdefault((task, cell.spec["rank"]), []).append(cell)
    figure, axes = _figure(len(panels))
    for one, ((task, rank), found) in zip(axes, panels.items(), strict=False):
        for cell in found:
            steps, losses = cell.curve()
            budget = f", {budget_of(cell.spec)}" if cell.spec["init_r"] else ""
            label = f"{titles[cell.spec['method']]}{budget} ({len(losses)})"
            line = one.plot(steps, losses.mean(0), label=label)[0]
            one.fill_between(steps, losses.min(0), losses.max(0), color=line.get_color(), alpha=0.2)
        one.set_title(f"{task}, r = {rank}: training loss, least to most (seeds)", fontsize=8)
        one.set_xlabel("step", fontsize=7)
        one.legend(fontsize=7, frameon=False)
    _save(figure, folder, "curves")


def _kind_of(cell: Cell) -> tuple[str, float]:
    """The method, and how many times its final rank it begins with: a line over the budgets."""
    return cell.spec["method"], cell.spec["init_r"] / cell.spec["rank"]


def _draw_budgets(by_task: ByTask, titles: dict[str, str], folder: Path) -> None:
    """Draw the test loss with standard errors over the budget, and over the rates on dev."""
    shown = {task: [c for c in found if c.spec["rank"]] for task, found in by_task.items()}
    figure, axes = _figure(2 * len(shown), 3.6)
    for i, (task, found) in enumerate(shown.items()):
        budgets, rates = axes[2 * i : 2 * i + 2]
        for method, share in dict.fromkeys(map(_kind_of, found)):
            own = [cell for cell in found if _kind_of(cell) == (method, share)]
            points = [
                (c.spec["rank"], *mean_and_error([*c.metric("loss").values()]))
                for c in own
                if c.metric("loss")
            ]
            if points:
                x, y, error = np.array(sorted(points)).T
                label = titles[method] + (f", init_r = {share:g} r" if share else "")
                budgets.errorbar(x, y, np.nan_to_num(error), marker="o", capsize=3, label=label)
            for cell in own:
                known = {
                    r: run["dev"]["loss"] for r, run in sorted(cell.tuned.items()) if run["dev"]
                }
                if method in _SHOWN and known:
                    label = f"{titles[method]}, r = {budget_of(cell.spec)}"
                    rates.plot([*known], [*known.values()], marker="o", label=label)
        budgets.set_title(f"{task}: test loss over r", fontsize=8)
        rates.set_title(f"{task}: dev loss over the learning rate", fontsize=8)
        rates.loglog()
        rates.xaxis.set_minor_formatter("")
        rates.yaxis.set_minor_formatter("{x:g}")
        for one in (budgets, rates):
            one.legend(fontsize=6, frameon=False)
    _save(figure, folder, "budgets")


def _draw_ranks(by_task: ByTask, titles: dict[str, str], folder: Path) -> None:
    """Draw the final ranks, mean over seeds, layer by kind of matrix, planted ones framed."""
    shown = [
        cell
        for found in by_task.values()
        for cell in found
        if cell.spec["method"] in ("ada-paper", "ada-lora")
        and any(run.get("ranks") for run in cell.runs.values())
    ]
    figure, axes = _figure(len(shown), 2.8)
    for one, cell in zip(axes, shown, strict=False):
        runs = [run for run in cell.runs.values() if run.get("ranks")]
        places = {name: _LAYER.search(name).groups() for name in runs[0]["ranks"]}
        kinds = list(dict.fromkeys(kind for _, kind in places.values()))
        grid = np.zeros((len(kinds), 1 + max(int(layer) for layer, _ in places.values())))
        for name, (layer, kind) in places.items():
            grid[kinds.index(kind), int(layer)] = np.mean([run["ranks"][name] for run in runs])
            if name in runs[0].get("planted", []):
                place = (int(layer) - 0.5, kinds.index(kind) - 0.5)
                one.add_patch(Rectangle(place, 1, 1, fill=False, edgecolor="red", linewidth=2))
        figure.colorbar(one.imshow(grid, cmap="Blues", vmin=0, aspect="auto"), ax=one)
        one.set_yticks(range(len(kinds)), kinds)
        spec = cell.spec
        title = f"{spec['task']}, {titles[spec['method']]}, {budget_of(spec)}"
        one.set_title(title, fontsize=8)
    _save(figure, folder, "ranks")


def draw(by_task: ByTask, titles: dict[str, str], folder: Path) -> None:
    """Draw all of them into a folder, as quality_*.png; equal figures give equal bytes."""
    for picture in (_draw_curves, _draw_budgets, _draw_ranks):
        picture(by_task, titles, folder)

"""The pictures of a run. Equal figures give equal bytes."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

# Okabe and Ito's palette, and Tol's indigo: told apart with any kind of colour vision.
_SHADES = {
    "floor": ("#000000", "#555555"),
    "theirs": ("#D55E00", "#E69F00", "#CC79A7", "#882255"),
    "plain": ("#777777", "#AAAAAA"),
    "ours": ("#0072B2", "#009E73", "#56B4E9", "#332288", "#117733"),
}
_STYLES = {"floor": ":_", "theirs": "--s", "plain": ":x", "ours": "-o"}
_COLUMNS = 3


def names(frame: pd.DataFrame) -> list[str]:
    """Tell which pictures there are of a run."""
    found = ["goals"] if len(_with_goals(frame)) else []
    return [*found, "ratios", "growth"] if len(_on_curves(frame)) else found


def draw(frame: pd.DataFrame, folder: Path, name: str) -> None:
    """Draw them into a folder, as NAME_goals.png, NAME_ratios.png and NAME_growth.png."""
    folder.mkdir(parents=True, exist_ok=True)
    for chart in names(frame):
        figure = _goals(frame) if chart == "goals" else _curves(frame, chart == "growth")
        # Without the version that matplotlib would write into it.
        figure.savefig(folder / f"{name}_{chart}.png", dpi=100, metadata={"Software": None})


def _timed(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[frame.seconds.notna()]


def _with_goals(frame: pd.DataFrame) -> pd.DataFrame:
    """All ratios of the cases and measures in which one has a goal."""
    key, timed = ["work", "case", "measure"], _timed(frame[frame.curve.isna()])
    return timed.merge(timed[timed.goal.notna()][key].drop_duplicates(), on=key)


def _on_curves(frame: pd.DataFrame) -> pd.DataFrame:
    """Each curve's ratios to one baseline."""
    timed = _timed(frame[frame.curve.notna()])
    first = timed.groupby(["work", "curve", "case"]).measure.transform("first")
    return timed[timed.measure == first]


def _panels(count: int, height: float) -> tuple[Figure, list[Any]]:
    lines = -(-count // _COLUMNS)
    # Not pyplot: no window system is touched and no global state is left behind.
    figure = Figure(figsize=(5 * _COLUMNS, height * lines), layout="constrained")
    axes = list(figure.subplots(lines, _COLUMNS, squeeze=False).flat)
    for unused in axes[count:]:
        unused.set_axis_off()
    return figure, axes


def _title(axes: Any, *texts: str) -> None:
    axes.set_title("\n".join(textwrap.fill(text, 60) for text in texts), fontsize=8, loc="left")
    axes.tick_params(which="both", labelsize=7)
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)


def _goals(frame: pd.DataFrame) -> Figure:
    groups = list(_with_goals(frame).groupby(["work", "case", "measure"], sort=False))
    figure, panels = _panels(len(groups), 2.6)
    for axes, ((work, case, measure), part) in zip(panels, groups, strict=False):
        errors = [part.value - part.p25, part.p75 - part.value]
        colors = [_SHADES[kind][0] for kind in part.kind]
        axes.barh(part.provider, part.value, xerr=errors, color=colors, ecolor="#888888")
        for limit in part.goal.dropna().str.split().str[1].astype(float).unique():
            axes.axvline(limit, color="black", linewidth=1.5, linestyle="--")
        axes.invert_yaxis()
        axes.set_xlabel(f"{measure} (dashed: the goal)", fontsize=7)
        _title(axes, work, case)
    return figure


def _curves(frame: pd.DataFrame, growth: bool) -> Figure:
    """Draw the ratios to the baseline, or each one's time to its own at the first point."""
    groups = list(_on_curves(frame).groupby(["work", "curve", "case"], sort=False))
    figure, panels = _panels(len(groups), 3.6)
    for axes, ((work, key, case), part) in zip(panels, groups, strict=False):
        numeric = all(isinstance(point, int | float) for point in part.point)
        seen: dict[str, int] = {}
        for (provider, kind), line in part.groupby(["provider", "kind"], sort=False):
            shades = _SHADES[kind]
            color = shades[seen.setdefault(kind, 0) % len(shades)]
            seen[kind] += 1
            y = line.seconds / line.seconds.iloc[0] if growth else line.value
            x = line.point if numeric else line.point.astype(str)
            axes.plot(x.tolist(), y, _STYLES[kind], color=color, label=provider, markersize=4)
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
        if numeric:
            axes.set_xscale("log")
        axes.set_xlabel(key, fontsize=7)
        y_label = "time / that at the first point" if growth else part.measure.iloc[0]
        axes.set_ylabel(y_label, fontsize=7)
        axes.legend(fontsize=6, frameon=False)
        _title(axes, work, case)
    return figure

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
_KEY, _COLUMNS = ["work", "case", "measure"], 3


def panels(frame: pd.DataFrame) -> dict[str, list[Any]]:
    """Group the ratios by picture and panel: cases in which one has a goal, and curves."""
    timed = frame[frame.seconds.notna()]
    asked = timed[timed.goal.notna() & timed.curve.isna()][_KEY].drop_duplicates()
    along = timed[timed.curve.notna()].copy()
    along = along[
        along.measure == along.groupby(["work", "curve", "case"]).measure.transform("first")
    ]
    found = {
        "goals": list(timed[timed.curve.isna()].merge(asked, on=_KEY).groupby(_KEY, sort=False))
    }
    found["ratios"] = found["growth"] = list(along.groupby([*_KEY, "curve"], sort=False))
    return {name: groups for name, groups in found.items() if groups}


def draw(frame: pd.DataFrame, folder: Path, name: str) -> None:
    """Draw them into a folder, as NAME_goals.png, NAME_ratios.png and NAME_growth.png."""
    folder.mkdir(parents=True, exist_ok=True)
    for chart, groups in panels(frame).items():
        lines = -(-len(groups) // _COLUMNS)
        # Not pyplot: no window system is touched and no global state is left behind.
        figure = Figure(figsize=(5 * _COLUMNS, 3.2 * lines), layout="constrained")
        axes = list(figure.subplots(lines, _COLUMNS, squeeze=False).flat)
        for one, (key, part) in zip(axes, groups, strict=False):
            one.set_title("\n".join(textwrap.fill(k, 60) for k in key[:2]), fontsize=8, loc="left")
            _bars(one, part) if chart == "goals" else _lines(one, part, chart == "growth")
            one.tick_params(which="both", labelsize=7)
            one.grid(color="#DDDDDD", linewidth=0.6)
            one.set_axisbelow(True)
        for unused in axes[len(groups) :]:
            unused.set_axis_off()
        # Without the version that matplotlib would write into it.
        figure.savefig(folder / f"{name}_{chart}.png", dpi=100, metadata={"Software": None})


def _bars(axes: Any, part: pd.DataFrame) -> None:
    errors, colors = [part.value - part.p25, part.p75 - part.value], part.kind.map(_SHADES).str[0]
    axes.barh(part.provider, part.value, xerr=errors, color=colors, ecolor="#888888")
    for limit in part.goal.dropna().str.split().str[1].astype(float).unique():
        axes.axvline(limit, color="black", linewidth=1.5, linestyle="--")
    axes.invert_yaxis()
    axes.set_xlabel(f"{part.measure.iloc[0]} (dashed: the goal)", fontsize=7)


def _lines(axes: Any, part: pd.DataFrame, growth: bool) -> None:
    """Draw the ratios to the baseline, or each one's time to its own at the first point."""
    numeric, seen = all(isinstance(point, int | float) for point in part.point), dict[str, int]()
    for (provider, kind), line in part.groupby(["provider", "kind"], sort=False):
        seen[kind] = seen.get(kind, -1) + 1
        color = _SHADES[kind][seen[kind] % len(_SHADES[kind])]
        x = line.point.tolist() if numeric else line.point.astype(str).tolist()
        y = line.seconds / line.seconds.iloc[0] if growth else line.value
        axes.plot(x, y, _STYLES[kind], color=color, label=provider, markersize=4)
    axes.set_yscale("log")
    axes.set_xscale("log" if numeric else "linear")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(part.curve.iloc[0], fontsize=7)
    label = "time / that at the first point" if growth else part.measure.iloc[0]
    axes.set_ylabel(label, fontsize=7)
    axes.legend(fontsize=6, frameon=False)

"""The pictures of a run. Equal figures give equal bytes."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks.reading import (
    Curve,
    common,
    cost,
    curves,
    describe,
    first_of,
    kind_of,
    number,
    words,
)
from benchmarks.results import Row, Run, Spread, groups

Draw: TypeAlias = Callable[[Path], None]
Placed: TypeAlias = tuple[float, float, Row]

# Okabe and Ito's palette, and Tol's indigo: told apart with any kind of colour vision.
_BY_KIND = {"floor": "#555555", "theirs": "#D55E00", "plain": "#AAAAAA", "ours": "#0072B2"}
_SHADES = {
    "floor": ("#000000", "#555555"),
    "theirs": ("#D55E00", "#E69F00", "#CC79A7", "#882255"),
    "plain": ("#777777", "#AAAAAA", "#999933"),
    "ours": ("#0072B2", "#009E73", "#56B4E9", "#332288", "#117733", "#88CCEE"),
}
_DASHES = {"floor": (0, (1, 1)), "theirs": (0, (4, 2)), "plain": (0, (1, 2)), "ours": "solid"}
_MARKERS = {"floor": "_", "theirs": "s", "plain": "x", "ours": "o"}
_LEGEND = {"floor": "the floor", "theirs": "PEFT, loralib", "plain": "plain torch", "ours": "ours"}
_INK, _GRID = "#222222", "#DDDDDD"
_COLUMNS = 3


def charts(run: Run) -> dict[str, tuple[str, Draw]]:
    """What there is to draw: by name, what is to be seen there, and what draws it to a file."""
    found: dict[str, tuple[str, Draw]] = {}
    panels = list(_goal_panels(run))
    if panels:
        found["goals"] = "Ratios and their goals", lambda path: _draw_goals(panels, path)
    along = curves(run)
    if along:
        title = "Ratios along the curves"
        found["ratios"] = title, lambda path: _draw_curves(along, _ratio_lines, path)
    growing = [curve for curve in along if curve.numeric]
    if growing:
        title = "Time along the curves"
        found["growth"] = title, lambda path: _draw_curves(growing, _growth_lines, path)
    placed = list(place(run))
    if placed:
        found["roofline"] = "Against the ceilings", lambda path: _draw_roofline(run, placed, path)
    return found


def _figure(width: float, height: float) -> Any:
    # Figure instead of pyplot: no window system is touched and no global state is left behind.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _save(figure: Any, path: Path) -> None:
    # Without the version that matplotlib would write into it.
    figure.savefig(path, dpi=110, format="png", metadata={"Software": None})


def _plain(axes: Any, grid: str) -> None:
    axes.set_axisbelow(True)
    axes.grid(axis=grid, color=_GRID, linewidth=0.6)
    axes.tick_params(labelsize=8, colors=_INK, length=2)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#999999")


def _goal_panels(run: Run) -> Iterator[list[Row]]:
    """Of each case with a goal for a ratio, all its ratios of that kind."""
    for group in groups(run.rows):
        timed = [row for row in group if first_of(row.measure) and isinstance(row.value, Spread)]
        for sign in ("<=", ">="):
            measures = {row.measure for row in timed if row.goal and row.goal[0] == sign}
            if measures:
                yield [row for row in timed if row.measure in measures]


def _draw_goals(panels: Sequence[Sequence[Row]], path: Path) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    columns = min(_COLUMNS, len(panels))
    lines = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    heights = [1.1 + 0.22 * max(map(len, line)) for line in lines]
    figure = _figure(max(9, 4.4 * columns), sum(heights) + 0.4)
    grid = figure.subplots(len(lines), columns, squeeze=False, height_ratios=heights)
    for axes, panel in zip(grid.flat, panels, strict=False):
        _goal_panel(axes, panel)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    kinds = dict.fromkeys(kind_of(row.rival) for panel in panels for row in panel)
    handles: list[Any] = [Patch(color=_BY_KIND[kind], label=_LEGEND[kind]) for kind in kinds]
    handles += [
        Line2D([], [], color="black", linewidth=1, label="quartiles"),
        Line2D([], [], color="black", marker="|", markersize=11, linewidth=0, label="goal"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=6, frameon=False, fontsize=9)
    _save(figure, path)


def _goal_panel(axes: Any, panel: Sequence[Row]) -> None:
    several = len({row.measure for row in panel}) > 1
    for i, row in enumerate(panel):
        value = row.value
        if not isinstance(value, Spread):
            continue
        axes.barh(i, value.median, 0.68, color=_BY_KIND[kind_of(row.rival)])
        axes.plot([value.p25, value.p75], [i, i], color="black", linewidth=1)
        end = max(value.p75, row.goal[1] if row.goal else 0.0)
        axes.annotate(
            number(value.median),
            (end, i),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=7.5,
            color=_INK,
        )
        if row.goal:
            axes.plot([row.goal[1]] * 2, [i - 0.48, i + 0.48], color="black", linewidth=2)
    names = [f"{first_of(row.measure)} / {row.rival}" if several else row.rival for row in panel]
    axes.set_yticks(range(len(panel)), names)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    _plain(axes, "x")
    axes.set_xlabel("their time / time" if several else panel[0].measure, fontsize=8, color=_INK)
    _title(axes, panel[0].case, panel[0].settings)


def _styles(rivals: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Of each rival its colour, dashes and marker; kinds differ in all three."""
    seen: dict[str, int] = dict.fromkeys(_SHADES, 0)
    styles = {}
    for rival in rivals:
        kind = kind_of(rival)
        shades = _SHADES[kind]
        styles[rival] = {
            "color": shades[seen[kind] % len(shades)],
            "linestyle": _DASHES[kind],
            "marker": _MARKERS[kind],
            "markersize": 4,
            "linewidth": 1.4,
        }
        seen[kind] += 1
    return styles


_Lines: TypeAlias = Callable[[Curve], Iterator[tuple[str, list[tuple[Any, float]]]]]


def _ratio_lines(curve: Curve) -> Iterator[tuple[str, list[tuple[Any, float]]]]:
    """Time as a multiple of the first rival's."""
    for rival in curve.rivals:
        yield rival, [(point, cost(row).median) for point, row in curve.along(rival)]


def _growth_lines(curve: Curve) -> Iterator[tuple[str, list[tuple[Any, float]]]]:
    """Time as a multiple of its own at the first point."""
    for rival in curve.rivals:
        points = curve.seconds(rival)
        if points:
            yield rival, [(point, seconds / points[0][1]) for point, seconds in points]


def _draw_curves(all_curves: Sequence[Curve], lines_of: _Lines, path: Path) -> None:
    """A row of panels for every case, whose rivals are the same; their legend comes after them."""
    by_case: dict[str, list[Curve]] = {}
    for curve in all_curves:
        by_case.setdefault(curve.case, []).append(curve)
    columns = max(map(len, by_case.values()))
    figure = _figure(3.6 * columns + 2.4, 3.0 * len(by_case))
    widths = [3.6] * columns + [2.2]
    grid = figure.subplots(len(by_case), columns + 1, squeeze=False, width_ratios=widths)
    for line, of_case in zip(grid, by_case.values(), strict=True):
        styles = _styles(list(dict.fromkeys(r for curve in of_case for r in curve.rivals)))
        for axes, curve in zip(line, of_case, strict=False):
            _curve_panel(axes, curve, lines_of, styles)
        for axes in line[len(of_case) :]:
            axes.set_axis_off()
        first = first_of(of_case[0].measure)
        to = f"{first}'s" if lines_of is _ratio_lines else "that at the first point"
        line[0].set_ylabel(f"time / {to}", fontsize=8.5, color=_INK)
        place_of_legend = line[len(of_case)]
        place_of_legend.legend(
            handles=_handles(styles), loc="center left", frameon=False, fontsize=8
        )
    _save(figure, path)


def _curve_panel(
    axes: Any, curve: Curve, lines_of: _Lines, styles: Mapping[str, Mapping[str, Any]]
) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

    positions = {point: point if curve.numeric else i for i, point in enumerate(curve.points)}
    for rival, points in lines_of(curve):
        x, y = [positions[point] for point, _ in points], [value for _, value in points]
        axes.plot(x, y, **styles[rival])
    if curve.numeric:
        axes.set_xscale("log")
    axes.set_xticks(list(positions.values()), [_short(point) for point in curve.points])
    axes.set_xticks([], minor=True)
    axes.margins(x=0.05 if curve.numeric else 0.2)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    # Powers of ten would be too few.
    if high / low < 4:
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    elif high / low < 40:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    if high / low < 40:
        axes.set_yticks([], minor=True)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    _plain(axes, "both")
    axes.set_xlabel(curve.key, fontsize=8.5, color=_INK)
    _title(axes, curve.case, curve.settings)


def _title(axes: Any, case: str, settings: Mapping[str, Any]) -> None:
    text = textwrap.fill(describe(settings), 52)
    axes.set_title(f"{words(case)}\n{text}", fontsize=8.5, loc="left", color=_INK)


def _short(point: Any) -> str:
    return f"{point // 1024}k" if isinstance(point, int) and point >= 4096 else str(point)


def _handles(styles: Mapping[str, Mapping[str, Any]]) -> list[Any]:
    from matplotlib.lines import Line2D

    return [Line2D([], [], label=rival, **style) for rival, style in styles.items()]


def place(run: Run) -> Iterator[Placed]:
    """Rows against the ceilings: (operations per byte, time at the ceilings / time, row).

    Only of products in the dtype that the ceiling was measured in.
    """
    ceilings = run.environment.get("ceilings")
    for row in run.rows if ceilings else ():
        details, seconds = row.details, row.seconds
        if seconds is None or not {"bytes", "operations"} <= details.keys():
            continue
        if row.settings.get("dtype") == ceilings["dtype"]:
            at_the_roof = max(
                details["operations"] / ceilings["product op/s"],
                details["bytes"] / ceilings["copy B/s"],
            )
            intensity = details["operations"] / details["bytes"]
            yield intensity, at_the_roof / seconds.median, row


def _draw_roofline(run: Run, placed: Sequence[Placed], path: Path) -> None:
    """A panel for every case, and the legend."""
    from matplotlib.ticker import FuncFormatter

    by_case: dict[str, list[Placed]] = {}
    for each in placed:
        by_case.setdefault(each[2].case, []).append(each)
    figure = _figure(5.2 * len(by_case) + 1.8, 4.2)
    widths = [5.2] * len(by_case) + [1.6]
    *panels, last = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
    rivals = list(dict.fromkeys(row.rival for _, _, row in placed))
    styles = {name: {**style, "linestyle": "none"} for name, style in _styles(rivals).items()}
    ceilings = run.environment["ceilings"]
    ridge = ceilings["product op/s"] / ceilings["copy B/s"]
    highest = max(y for _, y, _ in placed)
    for axes, (case, those) in zip(panels, by_case.items(), strict=True):
        for rival, style in styles.items():
            points = [(x, y) for x, y, row in those if row.rival == rival]
            if points:
                axes.plot(*zip(*points, strict=True), **style, alpha=0.8)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
        axes.axhline(1, color=_INK, linewidth=1)
        axes.axvline(ridge, color="#999999", linewidth=1, linestyle=(0, (2, 2)))
        axes.set_xlim(left=min(ridge, *(x for x, _, _ in those)) / 2)
        axes.set_ylim(0, max(1.12, 1.05 * highest))
        axes.text(ridge, 1.01, "bytes | operations", ha="center", va="bottom", fontsize=7.5)
        _plain(axes, "both")
        axes.set_xlabel("operations per byte", fontsize=8.5, color=_INK)
        _title(axes, case, common([row.settings for _, _, row in those]))
    panels[0].set_ylabel("time at the ceilings / time", fontsize=8.5, color=_INK)
    last.set_axis_off()
    last.legend(handles=_handles(styles), loc="center left", frameon=False, fontsize=8)
    _save(figure, path)

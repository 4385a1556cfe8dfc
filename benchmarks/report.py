"""The pages that people read, from the files that the benches wrote.

    python -m benchmarks.report           # RESULTS.md, its charts, the table in the README
    python -m benchmarks.report --check   # writes nothing; 1 if a page is not what the files give

Both print how the goals stand. That one is missed is no error. No time stands in a page, only
ratios of times of one run, and counts.
"""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from benchmarks.results import FOLDER, HERE, Run

_PAGE, _README = HERE / "RESULTS.md", HERE.parent / "README.md"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
# From the one to be looked at first.
VERDICTS = ("MISSED", "MISSED, within the spread", "met, within the spread", "met")
_PEFT, _KEY = ("PEFT", "AdaLoRA in PEFT", "PEFT AdaLoRA"), ["work", "measure", "goal"]
# Okabe and Ito's palette, and Tol's indigo: told apart with any kind of colour vision.
_SHADES = {
    "floor": ("#000000", "#555555"),
    "theirs": ("#D55E00", "#E69F00", "#CC79A7", "#882255"),
    "plain": ("#777777", "#AAAAAA"),
    "ours": ("#0072B2", "#009E73", "#56B4E9", "#332288", "#117733"),
}
_STYLES = {"floor": ":_", "theirs": "--s", "plain": ":x", "ours": "-o"}
_PANEL, _COLUMNS = ["work", "case", "measure"], 3
_INTRO = """\
Written by `python -m benchmarks.report` from the files in [results]({results}); what was expected,
and why it came out like this, is in [NOTES.md]({notes}). All providers of a case run in one
process, in turn, after their results were checked; a ratio is taken within a round. There are
medians with quartiles (p25-p75) of those ratios, and counts; no times, which say more of the
machine than of the code. A verdict is *within the spread* where the goal lies between the
quartiles. Along a curve one setting varies; *grows as* is the power of it that the time grows with,
by least squares over the upper half of the points.
"""


def number(value: float) -> str:
    """Write a count or a ratio for people."""
    if value == round(value):
        return f"{value:,.0f}"
    digits = 3 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:.1g}" if abs(value) < 1e-3 else f"{value:,.{digits}f}"


def _cell(row: Any) -> str:
    if pd.isna(row.p25) or row.p25 == row.p75:  # A count, or what the others are compared with.
        return number(row.value)
    return f"{row.value:.3f} ({row.p25:.3f}-{row.p75:.3f})"


def prepared(run: Run) -> pd.DataFrame:
    """Make the rows of a run ready for people, with PEFT's figure of the same beside each."""
    frame, key = run.frame, ["work", "on", "measure"]
    point = [f", {c} {p}" if c else "" for c, p in frame[["curve", "point"]].fillna("").values]
    frame = frame.assign(on=frame.case + point, cell=[_cell(row) for row in frame.itertuples()])
    theirs = frame[frame.provider.isin(_PEFT)].drop_duplicates(key).set_index(key).cell
    frame = frame.join(theirs.rename("PEFT"), on=key).fillna({"PEFT": "–"})
    goal = frame.goal.str.replace("<=", "≤").str.replace(">=", "≥")
    return frame.assign(who="`" + frame.provider + "`", goal=goal)


def _markdown(table: pd.DataFrame, **options: Any) -> str:
    return table.to_markdown(index=False, disable_numparse=True, **options) + "\n"


def goals(frame: pd.DataFrame) -> pd.DataFrame:
    """List the goals, those missed first; counts with the same goal and verdict are one line."""
    asked = frame[frame.goal.notna()]
    lines = [asked[asked.p25.notna()]]
    counts = asked[asked.p25.isna()]
    for _, part in counts.groupby(["verdict", *_KEY], sort=False):
        ends = dict.fromkeys(map(number, (part.value.min(), part.value.max())))
        line = part.iloc[:1].assign(cell="–".join(ends), who=", ".join(part.who.unique()))
        if part.on.nunique() > 1:
            line = line.assign(on=f"{part.on.nunique()} cases", PEFT="–")
        lines.append(line)
    table = pd.concat(lines).rename(columns={"cell": "measured (p25-p75)"})
    table = table[["verdict", "work", "on", "who", "measure", "goal", "measured (p25-p75)", "PEFT"]]
    return table.sort_values("verdict", key=lambda v: v.map(VERDICTS.index), kind="stable")


def _end(row: Any) -> str:
    # Of a ratio to PEFT's time PEFT's own says nothing.
    theirs = "" if row.PEFT in ("–", "1") else f"; PEFT {row.PEFT}"
    return f"{row.cell}, {row.who}, {row.on}{theirs}"


def summary(runs: dict[str, Run]) -> str:
    """Tabulate the worst and the best ratio for each goal, and how many meet it."""
    rows = []
    for name, run in runs.items():
        ratios = prepared(run).dropna(subset=["goal", "p25"])
        for (work, measure, goal), part in ratios.groupby(_KEY, sort=False):
            part = part.sort_values("value", ascending=goal.startswith("≥"))
            ends = [_end(row) for row in part.itertuples()]
            row = {"ratio": f"{work}, {measure}", "on": name, "goal": goal}
            row |= {"here, worst": ends[0], "here, best": ends[-1] if len(ends) > 1 else ""}
            met = part.verdict.str.startswith("met")
            rows.append({**row, "met": f"{met.sum()} of {len(part)}"})
    return _markdown(pd.DataFrame(rows))


def _pivot(frame: pd.DataFrame, index: list[str], columns: str) -> str:
    order = list(dict.fromkeys(frame[columns]))
    table = frame.pivot_table("cell", index, columns, aggfunc="first", sort=False)[order]
    return _markdown(table.fillna("").reset_index())


def figures(frame: pd.DataFrame) -> Iterator[str]:
    """Tabulate every kind of work, and each curve with how the time grows along it."""
    for work, part in frame[frame.curve.isna()].groupby("work", sort=False):
        yield f"<details><summary>{work}: all figures</summary>\n"
        yield _pivot(part, ["case", "who"], "measure") + "\n</details>\n"
    on_curves = frame[frame.curve.notna()].astype({"point": object})
    for (work, key, case), part in on_curves.groupby(["work", "curve", "case"], sort=False):
        fits = part[part.seconds.notna()].drop_duplicates("provider")
        fits = fits.assign(cell=fits.provider.map(slopes(part)), point="grows as")
        yield f"### {work}, over {key}: {case}\n"
        yield _pivot(pd.concat([part, fits.dropna(subset="cell")]), ["measure", "who"], "point")


def slopes(curve: pd.DataFrame) -> dict[str, str]:
    """Fit p of seconds ~ x^p for each provider; none where the points are no numbers."""
    timed = curve[curve.seconds.notna()].drop_duplicates(["provider", "point"])
    found = {}
    for name, part in timed.groupby("provider", sort=False):
        if len(part) > 1 and all(isinstance(point, int | float) for point in part.point):
            upper = part.sort_values("point").tail(max(2, -(-len(part) // 2)))
            x, y = (np.log(upper[key].astype(float)) for key in ("point", "seconds"))
            power = round(float(np.polyfit(x, y, 1)[0]), 2) + 0.0
            found[str(name)] = f"{curve.curve.iloc[0]}^{power:.2f}"
    return found


def _device(run: Run) -> str:
    device = str(run.environment.get("device", "unknown device"))
    return f"CPU ({run.environment.get('processor', 'unknown')})" if device == "cpu" else device


_wrapped = partial(textwrap.fill, width=110, break_on_hyphens=False)


def _link(path: Path, page: Path) -> str:
    return Path(os.path.relpath(path, page.parent)).as_posix()


def results_page(runs: dict[str, Run], folder: Path, out: Path) -> str:
    """Write RESULTS.md."""
    files = _link(folder, out)
    intro = _INTRO.format(results=files, notes=_link(HERE / "NOTES.md", out))
    parts = ["# Benchmarks: what came out\n", intro]
    for name, run in runs.items():
        frame = prepared(run)
        said = {k: v for k, v in run.environment.items() if isinstance(v, str | int)}
        said |= run.environment.get("packages", {})
        words = "; ".join(f"{key} {value}" for key, value in said.items())
        parts.append(f"## {name}: {_device(run)}\n")
        parts.append(_wrapped(f"Figures: [{name}.json]({files}/{name}.json); {words}.") + "\n")
        if frame.goal.notna().any():
            parts += ["### Goals\n", _markdown(goals(frame))]
        parts += [f"![{n} of {name}](charts/{name}_{n}.png)\n" for n in panels(run.frame)]
        parts += ["### All figures\n", *figures(frame)]
        left_out = [f"- {text}" for text in run.left_out] or ["- nothing"]
        parts += ["### Wrong or not reached\n", *left_out, ""]
    return "\n".join(parts).rstrip("\n") + "\n"


def readme_page(runs: dict[str, Run], folder: Path, out: Path, readme: Path) -> str:
    """Write the README with another block; a ValueError says that it has no markers for one."""
    before, begin, rest = readme.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the README has no {BEGIN} … {END}")
    page, files = _link(out, readme), _link(folder, readme)
    devices: dict[str, list[str]] = {}
    for name, run in runs.items():
        devices.setdefault(_device(run), []).append(f"[{name}]({files}/{name}.json)")
    places = "; ".join(f"{device}: {', '.join(names)}" for device, names in devices.items())
    intro = (
        "Medians of ratios of interleaved calls, with quartiles, against the goals of the design, "
        f"and PEFT's figures beside ours ({places}). Figures, curves, charts: [{page}]({page})."
    )
    if all(run.environment.get("device") == "cpu" for run in runs.values()):
        intro += " On a GPU: nothing yet."
    return before + "\n".join([begin, _wrapped(intro), "", summary(runs), end]) + after


def panels(frame: pd.DataFrame) -> dict[str, list[Any]]:
    """Group the ratios by picture and panel: cases in which one has a goal, and curves."""
    timed = frame[frame.seconds.notna()]
    asked = timed[timed.goal.notna() & timed.curve.isna()][_PANEL].drop_duplicates()
    along = timed[timed.curve.notna()]
    first = along.groupby(["work", "curve", "case"]).measure.transform("first")
    points = timed[timed.curve.isna()].merge(asked, on=_PANEL).groupby(_PANEL, sort=False)
    along = along[along.measure == first].groupby([*_PANEL, "curve"], sort=False)
    return {name: list(groups) for name, groups in (("goals", points), ("curves", along)) if groups}


def draw(frame: pd.DataFrame, folder: Path, name: str) -> None:
    """Draw them into a folder, as NAME_goals.png, …; equal figures give equal bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for chart, groups in panels(frame).items():
        lines = -(-len(groups) // _COLUMNS)
        # Not by pyplot: no window system is touched and no global state is left behind.
        figure = Figure(figsize=(5 * _COLUMNS, 3.2 * lines), layout="constrained")
        axes = list(figure.subplots(lines, _COLUMNS, squeeze=False).flat)
        for one, (key, part) in zip(axes, groups, strict=False):
            one.set_title("\n".join(textwrap.fill(k, 60) for k in key[:2]), fontsize=8, loc="left")
            _bars(one, part) if chart == "goals" else _lines(one, part)
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


def _lines(axes: Any, part: pd.DataFrame) -> None:
    numeric = all(isinstance(point, int | float) for point in part.point)
    shades = {kind: iter(colors * 3) for kind, colors in _SHADES.items()}
    for (provider, kind), line in part.groupby(["provider", "kind"], sort=False):
        x = line.point.tolist() if numeric else line.point.astype(str).tolist()
        color = next(shades[kind])
        axes.plot(x, line.value, _STYLES[kind], color=color, label=provider, markersize=4)
    axes.set_yscale("log")
    axes.set_xscale("log" if numeric else "linear")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(part.curve.iloc[0], fontsize=7)
    axes.set_ylabel(part.measure.iloc[0], fontsize=7)
    axes.legend(fontsize=6, frameon=False)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=FOLDER, metavar="FOLDER")
    parser.add_argument("--out", type=Path, default=_PAGE, metavar="FILE")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="default: ours, without --out")
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args(argv)
    folder, out = args.results.resolve(), args.out.resolve()
    readme = args.readme or (_README if out == _PAGE else None)
    try:
        runs = {path.stem: Run.read(path) for path in sorted(folder.glob("*.json"))}
        if not runs:
            raise ValueError(f"{folder} has no files of results")
        pages = {out: results_page(runs, folder, out)}
        if readme is not None:
            pages[readme] = readme_page(runs, folder, out, readme.resolve())
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    differ = [path for path, text in pages.items() if not path.exists() or path.read_text() != text]
    for path in differ:
        if args.check:
            print(f"{path} is not what the results give: run python -m benchmarks.report")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(pages[path])
    widths = [None, 20, 44, 32, 24, None, None, None]
    for name, run in runs.items():
        if not args.check:
            draw(run.frame, out.parent / "charts", name)
        frame = prepared(run)
        table = "no goals\n"
        if frame.goal.notna().any():
            table = _markdown(goals(frame), tablefmt="simple", maxcolwidths=widths)
        print(f"{name}\n{table}", *(f"{name}: {text}" for text in run.left_out), sep="\n")
    return int(args.check and bool(differ))


if __name__ == "__main__":
    sys.exit(main())

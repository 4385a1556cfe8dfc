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

from benchmarks import charts
from benchmarks.results import FOLDER, HERE, Run

_PAGE, _README = HERE / "RESULTS.md", HERE.parent / "README.md"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
# From the one to be looked at first.
VERDICTS = ("MISSED", "MISSED, within the spread", "met, within the spread", "met")
_PEFT, _KEY = ("PEFT", "AdaLoRA in PEFT"), ["work", "measure", "goal"]
_INTRO = """\
Written by `python -m benchmarks.report` from the files in [results]({results}); what was expected,
and why it came out like this, is in [NOTES.md]({notes}). All providers of a case run in one
process, in turn, after their results were checked; a ratio is taken within a round. There are
medians with quartiles (p25-p75) of those ratios, and counts; no times, which say more of the
machine than of the code. A verdict is *within the spread* where the goal lies between the
quartiles. Along a curve one setting varies; *grows as* is the power of it that the time grows with,
by least squares over the upper half of the points.
"""


def read(folder: Path) -> dict[str, Run]:
    """Read all files of results in a folder, by name; a ValueError says which is none."""
    found = {path.stem: Run.read(path) for path in sorted(folder.glob("*.json"))}
    if not found:
        raise ValueError(f"{folder} has no files of results")
    return found


def number(value: float) -> str:
    """Write a count or a ratio for people."""
    if value == round(value):
        return f"{value:,.0f}"
    if abs(value) < 1e-3:
        return f"{value:.1g}"
    return f"{value:,.{3 if abs(value) < 10 else 1 if abs(value) < 100 else 0}f}"


def _cell(row: Any) -> str:
    if pd.isna(row.p25) or row.p25 == row.p75:  # A count, or what the others are compared with.
        return number(row.value)
    return f"{row.value:.3f} ({row.p25:.3f}-{row.p75:.3f})"


def prepared(run: Run) -> pd.DataFrame:
    """Make the rows of a run ready for people, with PEFT's figure of the same beside each."""
    frame, key = run.frame, ["work", "on", "measure"]
    point = [
        f", {c} {p}" if isinstance(c, str) else "" for c, p in frame[["curve", "point"]].values
    ]
    frame = frame.assign(on=frame.case + point, cell=[_cell(row) for row in frame.itertuples()])
    frame = frame.assign(who="`" + frame.provider + "`")
    theirs = frame[frame.provider.isin(_PEFT)].drop_duplicates(key)[[*key, "cell"]]
    frame = frame.merge(theirs.rename(columns={"cell": "PEFT"}), how="left", on=key)
    goal = frame.goal.str.replace("<=", "≤").str.replace(">=", "≥")
    return frame.assign(PEFT=frame.PEFT.fillna("–"), goal=goal)


def _markdown(table: pd.DataFrame, **options: Any) -> str:
    return table.to_markdown(index=False, disable_numparse=True, **options) + "\n"


def _extent(values: pd.Series) -> str:
    return "–".join(dict.fromkeys(number(value) for value in (values.min(), values.max())))


def goals(frame: pd.DataFrame) -> pd.DataFrame:
    """List the goals, those missed first; counts with the same goal and verdict are one line."""
    asked = frame[frame.goal.notna()]
    lines = [asked[asked.p25.notna()]]
    counts = asked[asked.p25.isna()]
    for _, part in counts.groupby(["verdict", "work", "measure", "goal"], sort=False):
        line = part.iloc[:1].assign(cell=_extent(part.value))
        line["who"] = ", ".join(dict.fromkeys(part.who))
        if part.on.nunique() > 1:
            line = line.assign(on=f"{part.on.nunique()} cases", PEFT="–")
        lines.append(line)
    columns = ["verdict", "work", "on", "who", "measure", "goal", "cell", "PEFT"]
    table = pd.concat(lines)[columns].rename(columns={"cell": "measured (p25-p75)"})
    return table.sort_values("verdict", key=lambda v: v.map(VERDICTS.index), kind="stable")


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
        grows = {name: f"{key}^{power:.2f}" for name, power in slopes(part).items()}
        fits = part[part.seconds.notna()].drop_duplicates("provider")
        fits = fits.assign(cell=fits.provider.map(grows), point="grows as").dropna(subset="cell")
        yield f"### {work}, over {key}: {case}\n"
        yield _pivot(pd.concat([part, fits]), ["measure", "who"], "point")


def slopes(curve: pd.DataFrame) -> dict[str, float]:
    """Fit p of seconds ~ x^p for each provider; none where the points are no numbers."""
    timed = curve[curve.seconds.notna()].drop_duplicates(["provider", "point"])
    found = {}
    for name, part in timed.groupby("provider", sort=False):
        if len(part) > 1 and all(isinstance(point, int | float) for point in part.point):
            upper = part.sort_values("point").iloc[-max(2, -(-len(part) // 2)) :]
            x, y = (np.log(upper[key].astype(float)) for key in ("point", "seconds"))
            found[str(name)] = round(float(np.polyfit(x, y, 1)[0]), 2) + 0.0
    return found


def left_out(run: Run) -> Iterator[str]:
    """Say whose results were wrong, and what was not reached."""
    for entry in run.wrong:
        yield "WRONG {provider}, {case}: {why}".format(**entry)
    for case in run.not_reached:
        yield f"not reached: {case}"


def _device(run: Run) -> str:
    device = str(run.environment.get("device", "unknown device"))
    return f"CPU ({run.environment.get('processor', 'unknown')})" if device == "cpu" else device


_wrapped = partial(textwrap.fill, width=110, break_on_hyphens=False)


def results_page(runs: dict[str, Run], folder: Path, out: Path) -> str:
    """Write RESULTS.md."""
    links = [Path(os.path.relpath(p, out.parent)).as_posix() for p in (folder, HERE / "NOTES.md")]
    parts = ["# Benchmarks: what came out\n", _INTRO.format(results=links[0], notes=links[1])]
    for name, run in runs.items():
        frame = prepared(run)
        said = {k: v for k, v in run.environment.items() if isinstance(v, str | int)}
        said |= run.environment.get("packages", {})
        words = "; ".join(f"{key} {value}" for key, value in said.items())
        parts.append(f"## {name}: {_device(run)}\n")
        parts.append(_wrapped(f"Figures: [{name}.json]({links[0]}/{name}.json); {words}.") + "\n")
        parts += ["### Goals\n", _markdown(goals(frame))]
        parts += [f"![{n} of {name}](charts/{name}_{n}.png)\n" for n in charts.panels(run.frame)]
        parts += ["### All figures\n", *figures(frame)]
        parts += ["### Wrong or not reached\n", *(f"- {text}" for text in left_out(run)), ""]
    return "\n".join(parts).rstrip("\n") + "\n"


def readme_block(runs: dict[str, Run], folder: Path, out: Path, readme: Path) -> str:
    """Write what stands between the markers: goals for ratios as a table, for counts as text."""
    page, files = (Path(os.path.relpath(p, readme.parent)).as_posix() for p in (out, folder))
    places = "; ".join(f"[{n}]({files}/{n}.json): {_device(run)}" for n, run in runs.items())
    intro = (
        "Medians of ratios of interleaved calls, with quartiles, against the goals of the design, "
        f"and PEFT's figures beside ours ({places}). Figures, curves, charts: [{page}]({page})."
    )
    rows, counts = [], []
    for name, run in runs.items():
        for (work, measure, goal), part in prepared(run).groupby(_KEY, sort=False):
            is_met = part.verdict.str.startswith("met")
            met = f"{is_met.sum()} of {len(part)}"
            if part.p25.isna().all():
                counts.append(f"{work}, {measure} {_extent(part.value)} (goal {goal}, {met} met)")
                continue
            best = part.sort_values("value", ascending=goal.startswith("≤"))
            row = [f"{work}, {measure}", name, goal]
            for end in (best.iloc[-1], best.iloc[0]):
                row.append(f"{end.cell}, {end.who}, {end.on}; PEFT {end.PEFT}")
            rows.append([*row, met if is_met.all() else f"**{met}**"])
    head = ["ratio", "on", "goal", "here, worst", "here, best", "goals met"]
    text = f"Counts: {'; '.join(counts)}." if counts else ""
    if all(run.environment.get("device") == "cpu" for run in runs.values()):
        text += " On a GPU: nothing yet."
    table = _markdown(pd.DataFrame(rows, columns=head))
    return "\n".join([BEGIN, _wrapped(intro), "", table, _wrapped(text.strip()), END])


def with_block(readme: str, block: str) -> str:
    """Put another block into the README; a ValueError says that it has no markers."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the README has no {BEGIN} … {END}")
    return before + block + after


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=FOLDER, metavar="FOLDER")
    parser.add_argument("--out", type=Path, default=_PAGE, metavar="FILE")
    which = "that of the repository, unless --out is given"
    parser.add_argument("--readme", type=Path, metavar="FILE", help=which)
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args(argv)
    folder, out = args.results.resolve(), args.out.resolve()
    readme = args.readme or (_README if out == _PAGE else None)
    try:
        runs = read(folder)
        pages = {out: results_page(runs, folder, out)}
        if readme is not None:
            block = readme_block(runs, folder, out, readme.resolve())
            pages[readme] = with_block(readme.read_text(), block)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    differ = [path for path, text in pages.items() if not path.exists() or path.read_text() != text]
    for path in differ if args.check else ():
        print(f"{path} is not what the results give: run python -m benchmarks.report")
    for path, text in pages.items() if not args.check else ():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    widths = [None, 20, 44, 32, 24, None, None, None]
    for name, run in runs.items():
        if not args.check:
            charts.draw(run.frame, out.parent / "charts", name)
        table = _markdown(goals(prepared(run)), tablefmt="simple", maxcolwidths=widths)
        print(f"{name}\n{table}", *(f"{name}: {text}" for text in left_out(run)), sep="\n")
    return int(bool(args.check and differ))


if __name__ == "__main__":
    sys.exit(main())

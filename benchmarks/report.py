"""The pages that people read, from the files that the benches wrote.

    python -m benchmarks.report           # RESULTS.md, its charts, the table in the README
    python -m benchmarks.report --check   # writes nothing; 1 if a page is not what the files give

Both print how the goals stand. That one is missed is no error. No time stands in a page, only
ratios of times of one run, and counts.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.charts import charts
from benchmarks.goals import VERDICTS, met, standings
from benchmarks.reading import (
    Curve,
    common,
    curves,
    describe,
    kind_of,
    line,
    number,
    slope,
    stretches,
    with_quartiles,
    without,
    words,
)
from benchmarks.results import FOLDER, HERE, Row, Run, Spread

_PAGE, _README = HERE / "RESULTS.md", HERE.parent / "README.md"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
_WIDTH = 110
# What one more of a setting is called.
_UNITS = {"M": "rows", "r": "ranks"}
# Points further than that from a straight line are on none.
_NO_LINE = 0.25

_INTRO = """\
Written by `python -m benchmarks.report` from the files in [results]({results}); what was expected,
and why it came out like this, is in [NOTES.md]({notes}). All rivals of a case run in one process,
in turn, after their results were checked; a ratio is taken within a round. There are medians with
quartiles (p25-p75) of those ratios, and counts; no times, which say more of the machine than of the
code. A verdict is *within the spread* where the goal lies between the quartiles."""

_GROWTH = """\
Along a curve one setting varies and all others stay. *Grows as* is the power of it that the time
grows with, by least squares over the upper half of the points. *Fixed cost* is a/b of time =
a + b·x over all points (least squares of the relative deviations; a, b ≥ 0): what a call costs
before it does anything, in units of the setting, with the largest deviation of a point from that
line. Who is *faster* is by the ratio of both times: where that was not taken within a round, it is
the quotient of the medians of their ratios to the first rival, with quartiles as far apart as
theirs allow. It is *undecided* where 1 lies between the quartiles."""


@dataclass(frozen=True)
class Results:
    """A file of results."""

    path: Path
    run: Run

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def device(self) -> str:
        """For people."""
        found = self.run.environment
        device = found.get("device", "unknown device")
        return f"CPU ({found.get('processor', 'unknown')})" if device == "cpu" else str(device)

    @property
    def on_gpu(self) -> bool:
        return bool(self.run.environment.get("device") != "cpu")


def read(folder: Path) -> list[Results]:
    """All files of results in a folder.

    Raises:
        ValueError: there are none, or one is no such file.
    """
    found = [Results(path, Run.read(path)) for path in sorted(folder.glob("*.json"))]
    if not found:
        raise ValueError(f"{folder} has no files of results")
    return found


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """In Markdown, and an empty line after it."""
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""


def _bold_if_missed(verdict: str) -> str:
    return verdict.replace("MISSED", "**MISSED**")


def goals_table(run: Run) -> Iterator[str]:
    """A line for every goal, those missed first."""
    head = ("what", "on", "who", "measure", "goal", "measured (p25-p75)", "PEFT", "verdict")
    yield from table(
        head,
        (
            (
                entry.case,
                entry.on,
                ", ".join(f"`{rival}`" for rival in entry.rivals),
                entry.measure,
                entry.goal,
                entry.figures,
                entry.of_peft,
                _bold_if_missed(entry.verdict),
            )
            for entry in standings(run, together=False)
        ),
    )


def heading(results: Results, link: str) -> Iterator[str]:
    """Where and with what it was measured."""
    found = results.run.environment
    yield f"## {results.name}: {results.device}"
    yield ""
    said = {
        key: value
        for key, value in found.items()
        if key not in ("packages", "ceilings", "device", "processor") and value is not None
    }
    said |= found.get("packages", {})
    lines = [f"Figures in [{results.path.name}]({link})", *(f"{k} {v}" for k, v in said.items())]
    yield from textwrap.wrap("; ".join(lines) + ".", _WIDTH, break_on_hyphens=False)
    yield ""


def _shown(measures: Iterable[str], ceilings: Mapping[str, Any]) -> list[str]:
    """No speed, unless it can be said of the ceiling."""
    return [m for m in dict.fromkeys(measures) if "copy B/s" in ceilings or not _is_rate(m)]


def _is_rate(measure: str) -> bool:
    return measure.startswith("GB/s")


def _head(measure: str) -> str:
    return f"{measure} / a copy's" if _is_rate(measure) else measure


def _cell(row: Row | None, ceilings: Mapping[str, Any]) -> str:
    if row is None:
        return ""
    if not _is_rate(row.measure):
        return with_quartiles(row)
    return number(row.number * 1e9 / ceilings["copy B/s"])


def all_figures(run: Run) -> Iterator[str]:
    """A table for every case: a row per settings and rival, a column per measure."""
    by_case: dict[str, list[Row]] = {}
    for row in run.rows:
        if "curve" not in row.settings:
            by_case.setdefault(row.case, []).append(row)
    for case, rows in by_case.items():
        shared = common([row.settings for row in rows])
        yield f"<details><summary>{words(case)}: all figures</summary>"
        yield ""
        if describe(shared):
            yield f"All with {describe(shared)}."
            yield ""
        yield from _figures_table(rows, shared, run.environment.get("ceilings", {}))
        yield "</details>"
        yield ""


def _figures_table(
    rows: Sequence[Row], shared: Mapping[str, Any], ceilings: Mapping[str, Any]
) -> Iterator[str]:
    measures = _shown((row.measure for row in rows), ceilings)
    cells: dict[str, dict[str, dict[str, Row]]] = {}
    for row in rows:
        of_settings = cells.setdefault(describe(without(row.settings, shared)), {})
        of_settings.setdefault(row.rival, {})[row.measure] = row
    apart = [] if list(cells) == [""] else ["on"]
    yield from table(
        [*apart, "who", *map(_head, measures)],
        (
            [
                *([settings] if apart else []),
                f"`{rival}`",
                *(_cell(found.get(measure), ceilings) for measure in measures),
            ]
            for settings, of_settings in cells.items()
            for rival, found in of_settings.items()
            if not found.keys().isdisjoint(measures)
        ),
    )


def growth(curve: Curve) -> Iterator[str]:
    """One curve: the ratios, what was fitted, the counts, who is ahead."""
    yield f"#### {words(curve.case)}, over {curve.key}: {describe(curve.settings)}"
    yield ""
    points = [f"{curve.key} = {_point(point)}" for point in curve.points]
    fits = ["time grows as", "fixed cost"] if curve.numeric else []
    rows = (
        [
            f"`{rival}`",
            *(_cell(curve.at(rival, point), {}) for point in curve.points),
            *(_fits(curve, rival) if fits else ()),
        ]
        for rival in curve.rivals
    )
    yield from table([curve.measure, *points, *fits], rows)
    yield from _counts(curve)
    yield from _who_is_ahead(curve)


def _point(point: Any) -> str:
    return number(point) if isinstance(point, int | float) else str(point)


def _fits(curve: Curve, rival: str) -> tuple[str, str]:
    seconds = curve.seconds(rival)
    power, straight = slope(seconds), line(seconds)
    # Not "-0.00".
    grows = "" if power is None else f"{curve.key}^{round(power, 2) + 0.0:.2f}"
    if straight is None:
        return grows, ""
    percent = f"{max(1, math.ceil(100 * straight.off))} %"
    if straight.off > _NO_LINE:
        return grows, f"no line: {percent} off"
    return grows, f"{_fixed(curve, straight.fixed)} (within {percent})"


def _fixed(curve: Curve, fixed: float) -> str:
    if math.isinf(fixed):
        return "all of it"
    if fixed < 0.01 * min(curve.points):
        return "none"
    digits = 2 if fixed < 1 else 1 if fixed < 10 else 0
    return f"{fixed:,.{digits}f} {_UNITS.get(curve.key, curve.key)}"


def _counts(curve: Curve) -> Iterator[str]:
    counted = [row for row in curve.rows if not isinstance(row.value, Spread)]
    who = list(dict.fromkeys((row.measure, row.rival) for row in counted))
    if who:
        head = ["count", "who", *(f"{curve.key} = {_point(point)}" for point in curve.points)]
        rows = (
            [m, f"`{rival}`", *(_cell(curve.at(rival, p, m), {}) for p in curve.points)]
            for m, rival in sorted(who, key=lambda pair: pair[0])
        )
        yield from table(head, rows)


def _who_is_ahead(curve: Curve) -> Iterator[str]:
    fastest = "; ".join(
        f"`{name}` at {_from_to(*ends)}" for name, *ends in stretches(curve.points, curve.fastest)
    )
    yield f"Fastest by the median, floors aside, {curve.key}: {fastest}."
    yield ""
    ours = [rival for rival in curve.rivals if kind_of(rival) == "ours"]
    theirs = [rival for rival in curve.rivals if kind_of(rival) == "theirs"]
    if ours and theirs:
        rows = ([f"`{o}`", *(_ahead(curve, o, t) for t in theirs)] for o in ours)
        yield from table([f"{curve.key}, against", *theirs], rows)


def _ahead(curve: Curve, ours: str, theirs: str) -> str:
    found = stretches(curve.points, lambda point: curve.verdict(ours, theirs, point))
    return "; ".join(f"{verdict} {_from_to(first, last)}" for verdict, first, last in found)


def _from_to(first: Any, last: Any) -> str:
    return _point(first) if first == last else f"{_point(first)}–{_point(last)}"


def left_out(run: Run) -> Iterator[str]:
    """Who was refused, and what was not reached."""
    for entry in run.refused:
        yield "REFUSED {rival}, {case}: {why}".format(**entry)
    for case in run.not_reached:
        yield f"not reached: {case}"


def results_page(found: Sequence[Results], out: Path) -> str:
    """RESULTS.md."""

    def link(path: Path) -> str:
        return Path(os.path.relpath(path, out.parent)).as_posix()

    lines = ["# Benchmarks: what came out", ""]
    folder = found[0].path.parent
    lines += [_INTRO.format(results=link(folder), notes=link(folder.parent / "NOTES.md")), ""]
    for results in found:
        lines += heading(results, link(results.path))
        drawn = {
            name: f"![{title}, {results.name}]({link(_chart(out, results, name))})"
            for name, (title, _) in charts(results.run).items()
        }
        lines += ["### Goals", "", *goals_table(results.run)]
        lines += _picture(drawn, "goals")
        lines += ["### All figures", "", *all_figures(results.run)]
        lines += _picture(drawn, "roofline")
        along = curves(results.run)
        if along:
            lines += ["### How cost grows, and where who is ahead", "", _GROWTH, ""]
            lines += [*_picture(drawn, "ratios"), *_picture(drawn, "growth")]
            lines += [text for curve in along for text in growth(curve)]
        missing = [f"- {text}" for text in left_out(results.run)]
        lines += ["### Refused or not reached", "", *missing, ""] if missing else []
    return "\n".join(lines).rstrip("\n") + "\n"


def _picture(drawn: Mapping[str, str], name: str) -> list[str]:
    return [drawn[name], ""] if name in drawn else []


def _chart(out: Path, results: Results, name: str) -> Path:
    return out.parent / "charts" / f"{results.name}_{name}.png"


def readme_block(found: Sequence[Results], out: Path, readme: Path) -> str:
    """What stands between the markers: the goals for times as a table, those for counts as text."""

    def link(path: Path) -> str:
        return Path(os.path.relpath(path, readme.parent)).as_posix()

    head = ("ratio", "on", "goal", "here, worst", "PEFT", "here, best", "PEFT", "goals met")
    places = "; ".join(f"*{each.name}*: {each.device}" for each in found)
    intro = (
        "Medians of ratios of interleaved calls, with quartiles, against the goals of the design, "
        f"and PEFT's figures beside ours ({places}). All figures, how they grow with the size of "
        f"the problem, and charts: [{link(out)}]({link(out)})."
    )
    lines = textwrap.wrap(intro, _WIDTH, break_on_hyphens=False)
    rows = [row for results in found for row in _readme_rows(results, link(results.path))]
    counts = " ".join(filter(None, map(_readme_counts, found)))
    if not any(results.on_gpu for results in found):
        counts += " On a GPU: nothing yet."
    lines += ["", *table(head, rows)]
    lines += textwrap.wrap(counts.strip(), _WIDTH, break_on_hyphens=False)
    return "\n".join([BEGIN, *lines, END])


def _readme_rows(results: Results, link: str) -> Iterator[Sequence[str]]:
    for entry in standings(results.run, together=True):
        if entry.timed:
            worst, *others = entry.from_worst
            best = [entry.one(others[-1]), entry.beside(others[-1])] if others else ["", ""]
            yield (
                entry.what,
                f"[{results.name}]({link})",
                entry.goal,
                entry.one(worst),
                entry.beside(worst),
                *best,
                met(entry.rows),
            )


def _readme_counts(results: Results) -> str:
    found = standings(results.run, together=True)
    counted = [entry for entry in found if not entry.timed]
    if not counted:
        return ""
    said = (
        f"{entry.case}, {entry.measure} {entry.extent} (goal {entry.goal}, PEFT {entry.of_peft})"
        for entry in counted
    )
    rows = [row for entry in counted for row in entry.rows]
    return f"Goals for counts on *{results.name}*, {met(rows)} met: {'; '.join(said)}."


def with_block(readme: str, block: str) -> str:
    """The README with another block.

    Raises:
        ValueError: it has no markers.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the README has no {BEGIN} … {END}")
    return before + block + after


def summary(found: Sequence[Results]) -> Iterator[str]:
    """How the goals stand, those missed first, as lines for a terminal."""
    entries = [(each, entry) for each in found for entry in standings(each.run, together=False)]
    entries.sort(key=lambda pair: VERDICTS.index(pair[1].verdict))
    cells = [
        (
            entry.verdict,
            entry.goal,
            entry.figures,
            entry.measure,
            f"{entry.case}, {entry.on}",
            ", ".join(entry.rivals),
            results.name,
        )
        for results, entry in entries
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        yield "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
    for results in found:
        yield from (f"{results.name}: {text}" for text in left_out(results.run))


def differing(pages: Mapping[Path, str]) -> list[Path]:
    """Those files that do not hold that text."""
    return [path for path, text in pages.items() if not path.exists() or path.read_text() != text]


def pages_of(found: Sequence[Results], out: Path, readme: Path | None) -> dict[Path, str]:
    """What the pages have to be; without a README, only the other.

    Raises:
        ValueError: the README has no place for it.
        OSError: there is no README.
    """
    pages = {out: results_page(found, out)}
    if readme is not None:
        pages[readme] = with_block(readme.read_text(), readme_block(found, out, readme))
    return pages


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=FOLDER, metavar="FOLDER")
    parser.add_argument("--out", type=Path, default=_PAGE, metavar="FILE")
    parser.add_argument(
        "--readme", type=Path, metavar="FILE", help="that of the repository, unless --out is given"
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args(argv)
    out = args.out.resolve()
    readme = args.readme or (_README if out == _PAGE else None)
    try:
        found = read(args.results.resolve())
        pages = pages_of(found, out, readme and readme.resolve())
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    wrong = differing(pages) if args.check else []
    for path in wrong:
        print(f"{path} is not what the results give: run python -m benchmarks.report")
    if not args.check:
        draw(found, out)
        for path, text in pages.items():
            path.write_text(text)
    print("\n".join(summary(found)))
    return int(bool(wrong))


def draw(found: Sequence[Results], out: Path) -> None:
    """All charts, into a folder beside the page that shows them."""
    for results in found:
        for name, (_, to_file) in charts(results.run).items():
            path = _chart(out, results, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            to_file(path)


if __name__ == "__main__":
    sys.exit(main())

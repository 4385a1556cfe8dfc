"""docs/quality.md: the tables between its markers, and the pictures, from the files of the runs."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.quality import pictures
from benchmarks.quality.figures import (
    Cell,
    all_cells,
    budget_of,
    correlation,
    left_plateau,
    mean_and_error,
    paired,
    settled_at,
)
from benchmarks.quality.plan import Results, cells, file_of

REPO = Path(__file__).resolve().parents[2]
PAGE, CHARTS = REPO / "docs" / "quality.md", REPO / "benchmarks" / "charts"
BEGIN, END = "<!-- quality: begin -->", "<!-- quality: end -->"


def _markdown(rows: Iterable[dict[str, Any]]) -> str:
    return pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True) + "\n"


def _of(values: Iterable[float], digits: int) -> str:
    values = [value for value in values if np.isfinite(value)]
    if not values:
        return "–"
    mean, error = mean_and_error(values)
    return f"{mean:.{digits}f}" + (f" ± {error:.{digits}f}" if np.isfinite(error) else "")


def _beside(ours: Cell, theirs: Cell | None, metric: str, unit: float, digits: int) -> str:
    if theirs is None or theirs is ours:
        return "–"
    count, mean, error, p = paired(ours.metric(metric), theirs.metric(metric))
    if count == 0:
        return "–"
    difference = f"{mean / unit:+.{digits}f}"
    if np.isfinite(error):
        difference += f" ± {error / unit:.{digits}f}"
    return difference + (f", p = {p:.2g}" if np.isfinite(p) else "")


def outcomes(found: list[Cell], titles: dict[str, str]) -> str:
    """Tabulate the test metrics of a task, and both beside LoRA's of the same budget."""
    has_accuracy = any(cell.metric("accuracy") for cell in found)
    rows = []
    for cell in found:
        rank = cell.spec["rank"]
        lora = (c for c in found if c.spec["method"] == "lora" and c.spec["rank"] == rank)
        same = next(lora, None)
        row = {
            "method": titles[cell.spec["method"]],
            "r": budget_of(cell.spec),
            "rate": "–" if cell.rate is None else f"{cell.rate:g}",
            "seeds": f"{len(cell.runs)} of {cell.seeds}",
        }
        if has_accuracy:
            row["accuracy, %"] = _of((100 * v for v in cell.metric("accuracy").values()), 2)
            row["accuracy - LoRA's"] = _beside(cell, same, "accuracy", 0.01, 2)
        row["loss"] = _of(cell.metric("loss").values(), 4)
        row["loss - LoRA's"] = _beside(cell, same, "loss", 1, 4)
        if any(cell.runs.values()):
            rows.append(row)
    return _markdown(rows) if rows else "Nothing yet.\n"


def sensitivity(found: list[Cell], titles: dict[str, str]) -> str:
    """Tabulate the dev loss of seed 0 over the rates, with the chosen one marked."""
    rows = []
    for cell in found:
        if not (cell.tuned and cell.has_own_rate):
            continue
        row = {"method": titles[cell.spec["method"]], "r": budget_of(cell.spec)}
        for i, rate in enumerate(cell.rates):
            run = cell.tuned.get(rate)
            loss = "–" if run is None else f"{run['dev']['loss']:.4f}" if run["dev"] else "diverged"
            text = f"{rate:g}: {loss}"
            row[f"rate {i + 1}"] = f"**{text}**" if rate == cell.rate else text
        rows.append(row)
    return _markdown(rows) if rows else "Nothing yet.\n"


def patterns(found: list[Cell], titles: dict[str, str]) -> str:
    """Tabulate what patterns AdaLoRA found, how alike they are, and how early they were there."""
    rows = []
    for cell in found:
        runs = [run for run in cell.runs.values() if run.get("ranks")]
        if not runs:
            continue
        ranks = [list(run["ranks"].values()) for run in runs]
        row = {
            "method": titles[cell.spec["method"]],
            "r": budget_of(cell.spec),
            "seeds": len(runs),
            "ranks": f"{min(map(min, ranks))} to {max(map(max, ranks))}",
            "matrices without": _of((r.count(0) for r in ranks), 1),
            "correlation between seeds": _of([correlation([run["ranks"] for run in runs])], 2),
            "nine tenths of it ahead from step": _of((settled_at(r["settled"]) for r in runs), 0),
            "last look at step": _of((float(r["settled"][-1][0]) for r in runs), 0),
            "most triplets in": _extremes(runs),
        }
        if "planted" in runs[0]:
            shares = (
                sum(run["ranks"][name] for name in run["planted"]) / sum(run["ranks"].values())
                for run in runs
            )
            row["share in the planted matrices"] = _of(shares, 2)
        rows.append(row)
    return _markdown(rows) if rows else "Nothing yet.\n"


def _extremes(runs: list[dict[str, Any]]) -> str:
    """The kind of matrix with the most triplets and that with the fewest, per matrix."""
    pairs = ((name, rank) for run in runs for name, rank in run["ranks"].items())
    ranks = pd.DataFrame(pairs, columns=["name", "rank"])
    kinds = ranks.name.str.replace(r"^.*\.\d+\.", "", regex=True)
    means = ranks["rank"].groupby(kinds).mean().sort_values()
    return f"{means.index[-1]} ({means.iloc[-1]:.1f}), least {means.index[0]} ({means.iloc[0]:.1f})"


def plateaus(found: list[Cell], titles: dict[str, str]) -> str:
    """Tabulate at which step the training loss had come a quarter of its way down."""
    rows = [
        {
            "method": titles[cell.spec["method"]],
            "r": budget_of(cell.spec),
            "rate": f"{cell.rate:g}",
            "step": _of((left_plateau(run["curve"]) for run in cell.runs.values()), 0),
        }
        for cell in found
        if cell.runs
    ]
    return _markdown(rows) if rows else "Nothing yet.\n"


def costs(study: dict[str, Any], results: Results, titles: dict[str, str]) -> Iterator[str]:
    """Tabulate seconds and memory of a step, each the median over processes."""
    for entry in study["costs"]:
        rows, first = [], None
        for spec, *_ in cells(entry, study):
            spec |= {"rate": 1e-4, "phase": "cost"}
            names = (file_of({**spec, "seed": i}) for i in range(entry["rounds"]))
            runs = [results[name] for name in names if name in results]
            if not runs:
                continue
            time, memory = (
                np.array([run[key] for run in runs]) for key in ("seconds_per_step", "grown_bytes")
            )
            first = np.median(time) if first is None else first
            rows.append(
                {
                    "method": titles[spec["method"]],
                    "r": budget_of(spec),
                    "processes": len(runs),
                    "seconds per step": f"{np.median(time):.4f} ({min(time):.4f}-{max(time):.4f})",
                    "of LoRA's": f"{np.median(time) / first:.3f}",
                    "memory, MB": f"{np.median(memory) / 1e6:.0f}",
                    "trained": f"{runs[0]['trainable_parameters']:,}",
                }
            )
        yield f"{entry['task']}:\n\n" + (_markdown(rows) if rows else "Nothing yet.\n")


def unfinished(study: dict[str, Any], results: Results) -> str:
    """Tabulate which runs of the plan are not done."""
    rows = []
    for entry in study["plan"]:
        for spec, tuned, rates in cells(entry, study):
            cell = Cell(spec, tuned, rates, entry["seeds"], results)
            if len(cell.tuned) < len(rates) or len(cell.runs) < entry["seeds"]:
                rows.append(
                    {
                        "task": entry["task"],
                        "method": study["methods"][spec["method"]]["title"],
                        "r": budget_of(spec),
                        "rates tried": f"{len(cell.tuned)} of {len(rates)}",
                        "fresh seeds": f"{len(cell.runs)} of {entry['seeds']}",
                    }
                )
    return _markdown(rows) if rows else "Nothing: all runs of the plan are done.\n"


def begun_cells(study: dict[str, Any], results: Results) -> dict[str, list[Cell]]:
    """The cells of the tasks of which there is a run."""
    by_task = all_cells(study, results)
    return {task: found for task, found in by_task.items() if any(cell.tuned for cell in found)}


def titles_of(study: dict[str, Any]) -> dict[str, str]:
    """What the methods are called on the page."""
    return {name: method["title"] for name, method in study["methods"].items()}


def tables(study: dict[str, Any], results: Results) -> str:
    """Everything between the markers of the page."""
    titles, begun, parts = titles_of(study), begun_cells(study, results), []
    for task, found in begun.items():
        parts += [f"### {task}\n", outcomes(found, titles)]
    for heading, make in (
        ("Learning rates", sensitivity),
        ("Patterns", patterns),
        ("Plateaus", plateaus),
    ):
        parts.append(f"### {heading}\n")
        parts += [f"{task}:\n\n{make(found, titles)}" for task, found in begun.items()]
    parts += ["### Cost of a step\n", *costs(study, results, titles)]
    parts += ["### Not finished\n", unfinished(study, results)]
    return "\n".join(parts)


def write(study: dict[str, Any], results: Results, page: Path | None, check: bool = False) -> int:
    """Write the page and its pictures; with `check` nothing, and 1 if the page would change."""
    page = page or PAGE
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        print(f"{page} has no {BEGIN} … {END}", file=sys.stderr)
        return 2
    text = f"{before}{BEGIN}\n{tables(study, results)}{END}{after}"
    if check:
        if text != page.read_text():
            print(f"{page} is not what the results give: run python -m benchmarks.quality --report")
        return int(text != page.read_text())
    page.write_text(text)
    folder = CHARTS if page == PAGE else page.parent
    pictures.draw(begun_cells(study, results), titles_of(study), folder)
    return 0

"""What the study consists of, and what is kept of it: no torch in here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Spec = dict[str, Any]
Results = dict[str, dict[str, Any]]


def file_of(spec: Spec) -> str:
    """Where a run is kept, below the folder of results; all that it depends on by itself."""
    first = f"{spec['init_r']}-" if spec["init_r"] else ""
    rank = f"_r{first}{spec['rank']}" if spec["rank"] else ""
    name = f"{spec['method']}{rank}_{spec['rate']:g}_{spec['phase']}{spec['seed']}"
    return f"{spec['task']}/{name}.json"


def cells(entry: dict[str, Any], study: dict[str, Any]) -> Iterator[tuple[Spec, Spec, list[float]]]:
    """Each method of an entry of the plan, whose rate it takes, and the rates to choose from.

    Whose is its own, or that of the method in its `rate_of`.
    """
    for name in entry["methods"]:
        tuned = study["methods"][name].get("rate_of", name)
        rates = study["tasks"][entry["task"]]["rates"][study["methods"][tuned]["rates"]]
        yield _spec(entry, name, study), _spec(entry, tuned, study), rates


def _spec(entry: dict[str, Any], name: str, study: dict[str, Any]) -> Spec:
    kind = study["methods"][name]["kind"]
    return {
        "task": entry["task"],
        "method": name,
        "rank": entry["rank"] if kind in ("lora", "adalora") else 0,
        "init_r": entry["init_r"] if kind == "adalora" else 0,
    }


def best_rate(spec: Spec, rates: list[float], results: Results) -> float | None:
    """The rate with the least loss on the dev split, or None while there are some to try."""
    losses = {}
    for rate in rates:
        done = results.get(file_of({**spec, "rate": rate, "seed": 0, "phase": "tune"}))
        if done is None:
            return None
        if done["dev"] is not None:
            losses[rate] = done["dev"]["loss"]
    return min(losses, key=losses.__getitem__) if losses else None


def jobs(study: dict[str, Any], results: Results) -> Iterator[Spec]:
    """All runs of the plan that can be told by now, in its order, done or not.

    Of each entry first all rates of all methods with seed 0, then the fresh seeds, one after the
    other over all methods, so that complete comparisons come early.
    """
    for entry in study["plan"]:
        found = list(cells(entry, study))
        for _, tuned, rates in found:
            yield from ({**tuned, "rate": rate, "seed": 0, "phase": "tune"} for rate in rates)
        chosen = [(spec, best_rate(tuned, rates, results)) for spec, tuned, rates in found]
        for seed in range(1, entry["seeds"] + 1):
            for spec, rate in chosen:
                if rate is not None:
                    yield {**spec, "rate": rate, "seed": seed, "phase": "test"}


def config_of(spec: Spec, study: dict[str, Any]) -> dict[str, Any]:
    """The task and the method of a run, without the rates to choose from."""
    parts = {"task": study["tasks"][spec["task"]], "method": study["methods"][spec["method"]]}
    left_out = ("rates", "rate_of", "title")
    return {k: {n: v for n, v in part.items() if n not in left_out} for k, part in parts.items()}


def read(folder: Path, study: dict[str, Any]) -> Results:
    """Every run that is kept below a folder and is of this study as it now stands, by its file."""
    found = {}
    for path in sorted(folder.glob("*/*.json")):
        result = json.loads(path.read_text())
        spec, name = result["spec"], path.relative_to(folder).as_posix()
        known = spec["task"] in study["tasks"] and spec["method"] in study["methods"]
        if known and result["config"] == config_of(spec, study) and file_of(spec) == name:
            found[name] = result
    return found


def keep(folder: Path, name: str, result: dict[str, Any]) -> None:
    """Write a run; a file is there as a whole or not at all."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result) + "\n")
    partial.replace(path)


def quick(study: dict[str, Any]) -> dict[str, Any]:
    """The same study in seconds, for the tests: a few steps over a few texts, two rates, a seed."""
    small = {"steps": 10, "batch": 4, "train": 64, "dev": 12, "test": 12, "longest": 16}
    tasks = {
        name: {**task, **small, "rates": {k: v[:2] for k, v in task["rates"].items()}}
        for name, task in study["tasks"].items()
    }
    plan = [{**entry, "seeds": 1} for entry in study["plan"]]
    return {**study, "tasks": tasks, "plan": plan}

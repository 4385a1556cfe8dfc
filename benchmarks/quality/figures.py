"""What is said of several seeds: means with standard errors, paired differences, patterns."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.quality.plan import Results, Spec, best_rate, cells, file_of

Ranks = Mapping[str, int]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error, which is NaN for less than two values."""
    array = np.asarray(values, dtype=float)
    error = array.std(ddof=1) / np.sqrt(len(array)) if len(array) > 1 else float("nan")
    return float(array.mean()), float(error)


def paired(
    ours: Mapping[int, float], theirs: Mapping[int, float]
) -> tuple[int, float, float, float]:
    """Compare two methods over the seeds that both have.

    Returns:
        How many seeds these are; the mean of ours - theirs and its standard error; and p of a
        two-sided paired t-test. NaN where there are too few seeds.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return 0, float("nan"), float("nan"), float("nan")
    mean, error = mean_and_error([ours[seed] - theirs[seed] for seed in seeds])
    if not error > 0:
        return len(seeds), mean, error, float("nan")
    return len(seeds), mean, error, float(2 * stats.t.sf(abs(mean / error), len(seeds) - 1))


def correlation(patterns: Sequence[Ranks]) -> float:
    """The mean of Spearman's rank correlation over all pairs of seeds; NaN for none."""
    pairs = itertools.combinations(
        [[ranks[name] for name in sorted(ranks)] for ranks in patterns], 2
    )
    # Ranks that are all equal have no order that could be correlated.
    found = [stats.spearmanr(a, b).statistic for a, b in pairs if min(map(np.ptp, (a, b))) > 0]
    return float(np.mean(found)) if found else float("nan")


def settled_at(settled: Sequence[tuple[int, float]], share: float = 0.9) -> float:
    """The first step from which on `share` of the final pattern was always ahead; NaN if never."""
    step = float("nan")
    for at, part in reversed(settled):
        if part < share:
            break
        step = at
    return step


def left_plateau(curve: Sequence[tuple[int, float]], share: float = 0.25) -> float:
    """The first step at which the loss has come `share` of its way down; NaN if it never fell."""
    first, lowest = curve[0][1], min(loss for _, loss in curve)
    below = (step for step, loss in curve if loss <= first - share * (first - lowest))
    return next(below) if lowest < first else float("nan")


def budget_of(spec: Spec) -> str:
    """What the tables say of the ranks: init_r → target_r, or those of LoRA."""
    return f"{spec['init_r']} → {spec['rank']}" if spec["init_r"] else f"{spec['rank'] or '–'}"


class Cell:
    """One method on one task with one budget: its spec, the rate that was chosen, its runs.

    Its rate is chosen by the runs of `tuned`: its own spec, or that of another method.
    """

    def __init__(
        self, spec: Spec, tuned: Spec, rates: list[float], seeds: int, results: Results
    ) -> None:
        self.spec, self.rates, self.seeds, self.has_own_rate = spec, rates, seeds, tuned == spec
        tries = ({**tuned, "rate": rate, "seed": 0, "phase": "tune"} for rate in rates)
        self.tuned = {s["rate"]: results[file_of(s)] for s in tries if file_of(s) in results}
        self.rate = best_rate(tuned, rates, results)
        fresh = (
            {**spec, "rate": self.rate, "seed": i, "phase": "test"} for i in range(1, seeds + 1)
        )
        done = [s for s in fresh if self.rate is not None and file_of(s) in results]
        self.runs = {s["seed"]: results[file_of(s)] for s in done}

    def metric(self, name: str) -> dict[int, float]:
        """A metric of the test split by seed; a run that diverged has none."""
        tests = {seed: run["test"] for seed, run in self.runs.items()}
        return {seed: test[name] for seed, test in tests.items() if test and name in test}

    def curve(self) -> tuple[Any, Any]:
        """The steps and losses of the loss curves, a row per seed."""
        curves = [run["curve"] for run in self.runs.values() if run["test"]]
        return [step for step, _ in curves[0]] if curves else [], np.array(curves)[..., 1:].squeeze(
            -1
        )


def all_cells(study: dict[str, Any], results: Results) -> dict[str, list[Cell]]:
    """The cells of the plan, by task."""
    found: dict[str, list[Cell]] = {}
    for entry in study["plan"]:
        for cell in cells(entry, study):
            found.setdefault(entry["task"], []).append(Cell(*cell, entry["seeds"], results))
    return found

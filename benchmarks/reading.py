"""What the rows of a run say: who is who, how cost grows along a curve, who is ahead where."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from benchmarks.results import Row, Run, Spread

FLOORS = ("F.linear", "memory traffic alone", "copy of as many bytes", "no adapter")
PLAIN = ("reference.py", "torch._foreach, no gate", "batched by shape")
# A fixed cost worth more than so many times the last point of a curve: nothing was seen to grow.
_NO_GROWTH = 100
# Settings that say nothing new beside the others.
_BESIDE = ("curve", "adapters", "bias", "layers", "entries", "LoRA r", "AdaLoRA r")
_OF_A_MODEL = ("matrices", "r", "dtype")


def kind_of(rival: str) -> str:
    """Whose it is: a "floor", "theirs", "plain" torch (no rival, a yardstick) or "ours"."""
    if rival in FLOORS:
        return "floor"
    if rival.startswith(("PEFT", "loralib")) or rival.endswith(" in PEFT"):
        return "theirs"
    return "plain" if rival in PLAIN else "ours"


def first_of(measure: str) -> str | None:
    """Whose time a measure compares with; None if it is no ratio of times."""
    if measure.startswith("time / "):
        return measure.removeprefix("time / ")
    if measure.endswith("'s time / time"):
        return measure.removesuffix("'s time / time")
    return None


def words(case: str) -> str:
    """What is done, for people."""
    return case.replace("svd_linear ", "one layer, ")


def number(value: float) -> str:
    """A count or a ratio, for people."""
    if value == round(value):
        return f"{value:,.0f}"
    if abs(value) < 1e-3:
        return f"{value:.1g}"
    return f"{value:,.{3 if abs(value) < 10 else 1 if abs(value) < 100 else 0}f}"


def quartiles(value: float | Spread) -> str:
    """As "1.010-1.050"; empty for a count."""
    return f"{value.p25:.3f}-{value.p75:.3f}" if isinstance(value, Spread) else ""


def with_quartiles(row: Row) -> str:
    """Its figure, for people; the one that the others are compared with has no quartiles."""
    if not isinstance(row.value, Spread) or row.value.p25 == row.value.p75:
        return number(row.number)
    return f"{row.value.median:.3f} ({quartiles(row.value)})"


def describe(settings: Mapping[str, Any]) -> str:
    """The settings in words, without those that follow from the others."""
    left_out = {*_BESIDE}
    if not settings.keys().isdisjoint(("M", "K", "N")):
        left_out.add("model")
    elif "model" in settings and "sequence" not in settings:
        left_out |= {*_OF_A_MODEL}
    return ", ".join(
        _setting(key, value)
        for key, value in settings.items()
        if key not in left_out and not isinstance(value, Mapping)
    )


def _setting(key: str, value: Any) -> str:
    if key in ("model", "dtype"):
        return str(value)
    if key in ("dropout", "checkpointing") and not value:
        return f"no {key}"
    return key if value is True else f"{key} {value}"


def common(many: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The settings that are the same everywhere."""
    first, *others = many
    return {k: v for k, v in first.items() if all(k in s and s[k] == v for s in others)}


def without(settings: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are not those."""
    return {key: value for key, value in settings.items() if key not in known}


def cost(row: Row) -> Spread:
    """Of a ratio of times: its time as a multiple of the first rival's."""
    if not isinstance(row.value, Spread):
        raise TypeError(f"{row.measure} of {row.rival} is no ratio of times")
    return row.value if row.measure.startswith("time / ") else _inverse(row.value)


def _inverse(ratio: Spread) -> Spread:
    return Spread(1 / ratio.median, 1 / ratio.p75, 1 / ratio.p25)


@dataclass(frozen=True)
class Curve:
    """Rows of one case that differ in one setting.

    Attributes:
        key: the setting.
        settings: the others.
        measure: the ratio to the first rival whose rows hold the seconds.
    """

    case: str
    key: str
    settings: Mapping[str, Any]
    measure: str
    rows: Sequence[Row]

    @cached_property
    def _found(self) -> dict[tuple[str, str, Any], Row]:
        return {(row.rival, row.measure, row.settings[self.key]): row for row in self.rows}

    def at(self, rival: str, point: Any, measure: str | None = None) -> Row | None:
        """One figure of it, of the ratio if no other measure is named."""
        return self._found.get((rival, measure or self.measure, point))

    @property
    def numeric(self) -> bool:
        return all(isinstance(point, int | float) for point in self.points)

    @cached_property
    def points(self) -> list[Any]:
        """Upwards; in the order of the rows if they are no numbers."""
        points = list(dict.fromkeys(row.settings[self.key] for row in self.rows))
        return sorted(points) if all(isinstance(p, int | float) for p in points) else points

    @property
    def rivals(self) -> list[str]:
        """Those that were timed."""
        return list(dict.fromkeys(row.rival for row in self.rows if row.measure == self.measure))

    def along(self, rival: str) -> list[tuple[Any, Row]]:
        """The points that this one has a ratio at."""
        rows = ((point, self.at(rival, point)) for point in self.points)
        return [(point, row) for point, row in rows if row is not None]

    def seconds(self, rival: str) -> list[tuple[Any, float]]:
        """Its medians by point."""
        along = self.along(rival)
        return [(point, row.seconds.median) for point, row in along if row.seconds is not None]

    def fastest(self, point: Any) -> str | None:
        """By the median, the floors aside."""
        found = [(name, self.at(name, point)) for name in self.rivals if kind_of(name) != "floor"]
        costs = {name: cost(row).median for name, row in found if row is not None}
        return min(costs, key=costs.__getitem__) if costs else None

    def ahead(self, ours: str, theirs: str, point: Any) -> Spread | None:
        """Their time / ours.

        Where that was not taken within a round, it is the quotient of both ratios to the first
        rival, with quartiles as far apart as theirs allow.
        """
        paired = self.at(ours, point, f"{theirs}'s time / time")
        if paired is not None:
            return _inverse(cost(paired))
        rows = self.at(ours, point), self.at(theirs, point)
        if rows[0] is None or rows[1] is None:
            return None
        a, b = map(cost, (rows[0], rows[1]))
        return Spread(b.median / a.median, b.p25 / a.p75, b.p75 / a.p25)

    def verdict(self, ours: str, theirs: str, point: Any) -> str | None:
        """Whether ours is faster or slower there; undecided if the quartiles lie around 1."""
        ratio = self.ahead(ours, theirs, point)
        if ratio is None:
            return None
        if ratio.p25 <= 1 <= ratio.p75:
            return "undecided"
        return "faster" if ratio.median > 1 else "slower"


def curves(run: Run) -> list[Curve]:
    """Those of a run that were timed and have more than one point."""
    found: dict[str, list[Row]] = {}
    for row in run.rows:
        key = row.settings.get("curve")
        if key is not None:
            rest = without(row.settings, {key: None})
            found.setdefault(json.dumps([row.case, rest]), []).append(row)
    return [curve for rows in found.values() for curve in _curve(rows) if len(curve.points) > 1]


def _curve(rows: Sequence[Row]) -> Iterator[Curve]:
    timed = (row.measure for row in rows if row.seconds is not None and first_of(row.measure))
    measure = next(timed, None)
    if measure is not None:
        key = rows[0].settings["curve"]
        yield Curve(rows[0].case, key, without(rows[0].settings, {key: 0}), measure, rows)


def stretches(
    points: Sequence[Any], value: Callable[[Any], str | None]
) -> Iterator[tuple[str, Any, Any]]:
    """Where the same holds from one point to another: (value, first point, last point)."""
    for held, those in itertools.groupby(points, value):
        first, *others = those
        if held is not None:
            yield held, first, others[-1] if others else first


def slope(points: Sequence[tuple[float, float]]) -> float | None:
    """p of seconds ~ x^p by least squares over the upper half; None of less than two points."""
    upper = sorted(points)[-max(2, math.ceil(len(points) / 2)) :]
    if len(upper) < 2:
        return None
    x, y = ([math.log(point[i]) for point in upper] for i in (0, 1))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


@dataclass(frozen=True)
class Line:
    """seconds = a + b·x. `fixed` is a / b; `off` the largest deviation of a point from it."""

    fixed: float
    off: float


def line(points: Sequence[tuple[float, float]]) -> Line | None:
    """By least squares of the relative deviations, a, b >= 0; None of less than three points."""
    if len(points) < 3:
        return None
    u, v = [1 / t for _, t in points], [x / t for x, t in points]
    uu, uv, vv = (_dot(*pair) for pair in ((u, u), (u, v), (v, v)))
    determinant = uu * vv - uv * uv
    a = (sum(u) * vv - sum(v) * uv) / determinant
    b = (sum(v) * uu - sum(u) * uv) / determinant
    if a < 0:
        a, b = 0.0, sum(v) / vv
    elif b < 0:
        a, b = sum(u) / uu, 0.0
    off = max(abs(a * p + b * q - 1) for p, q in zip(u, v, strict=True))
    largest = max(x for x, _ in points)
    grows = a < b * largest * _NO_GROWTH
    return Line(a / b if grows else math.inf, off)


def _dot(p: Sequence[float], q: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(p, q, strict=True))

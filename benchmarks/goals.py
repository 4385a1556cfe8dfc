"""How a run stands to its goals."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.reading import common, describe, first_of, number, with_quartiles, without, words
from benchmarks.results import Row, Run, Spread

# From the one to be looked at first.
VERDICTS = ("MISSED", "MISSED, within the spread", "met, within the spread", "met")


@dataclass(frozen=True)
class Standing:
    """Rows with the same goal, and PEFT's in the same cases."""

    rows: Sequence[Row]
    peft: Sequence[Row]

    @property
    def what(self) -> str:
        """Case and measure, with the settings that all have in common."""
        return f"{self.case}, {self.measure}: {describe(self.shared)}".removesuffix(": ")

    @property
    def case(self) -> str:
        """What is done."""
        return words(self.rows[0].case)

    @property
    def on(self) -> str:
        """The settings; of several, how many there are."""
        cases = {_group(row) for row in self.rows}
        return describe(self.rows[0].settings) if len(cases) == 1 else f"{len(cases)} cases"

    @property
    def rivals(self) -> list[str]:
        return list(dict.fromkeys(row.rival for row in self.rows))

    @property
    def measure(self) -> str:
        return self.rows[0].measure

    @property
    def timed(self) -> bool:
        return isinstance(self.rows[0].value, Spread)

    @property
    def shared(self) -> dict[str, Any]:
        return common([row.settings for row in self.rows])

    @property
    def goal(self) -> str:
        sign, limit = self.rows[0].goal or ("", math.nan)
        return f"{sign.replace('<=', '≤').replace('>=', '≥')} {limit:g}"

    @property
    def figures(self) -> str:
        """One with its quartiles, of several counts the least and the most."""
        return with_quartiles(self.rows[0]) if len(self.rows) == 1 else self.extent

    @property
    def extent(self) -> str:
        """From the least figure to the most."""
        return _range(self.rows)

    @property
    def of_peft(self) -> str:
        """PEFT's figures of that measure; 1 where it is what the others are compared with."""
        return _range(self.peft) if self.peft else self._without_peft

    def beside(self, row: Row) -> str:
        """PEFT's figure in the case of one of the rows."""
        found = [with_quartiles(each) for each in self.peft if _group(each) == _group(row)]
        return found[0] if found and self._without_peft != "1" else self._without_peft

    @property
    def _without_peft(self) -> str:
        return "1" if (first_of(self.measure) or "").startswith("PEFT") else "–"

    @property
    def verdict(self) -> str:
        """Of the first row."""
        return _verdict(self.rows[0])

    @property
    def from_worst(self) -> list[Row]:
        """The rows, the furthest from the goal first."""
        upwards = (self.rows[0].goal or ("",))[0] == ">="
        return sorted(self.rows, key=lambda row: row.number if upwards else -row.number)

    def one(self, row: Row) -> str:
        """A row among the others: its figure, and what it is of."""
        apart = describe(without(row.settings, self.shared))
        return ", ".join(filter(None, (with_quartiles(row), f"`{row.rival}`", apart)))


def _verdict(row: Row) -> str:
    return row.verdict.partition(": ")[2]


def _range(rows: Sequence[Row]) -> str:
    values = [row.number for row in rows]
    ends = list(dict.fromkeys(map(number, (min(values), max(values)))))
    return "–".join(ends)


def _is_peft(rival: str) -> bool:
    return rival.startswith("PEFT") or rival == "AdaLoRA in PEFT"


def _group(row: Row) -> str:
    return json.dumps([row.case, row.settings, row.measure])


def standings(run: Run, together: bool) -> list[Standing]:
    """How a run stands to its goals, those missed first.

    Counts with the same goal and verdict are one entry; with `together`, all that is held to the
    same goal for the same measure is one, in the order of the rows.
    """
    peft: dict[str, Row] = {}
    for row in run.rows:
        if _is_peft(row.rival):
            peft.setdefault(_group(row), row)
    found: dict[str, list[Row]] = {}
    for row in run.rows:
        if row.goal is not None:
            key = [row.case, row.measure, row.goal]
            if not together:
                timed = isinstance(row.value, Spread)
                key += [row.rival, row.settings] if timed else [_verdict(row)]
            found.setdefault(json.dumps(key), []).append(row)
    entries = [
        Standing(rows, [peft[key] for key in dict.fromkeys(map(_group, rows)) if key in peft])
        for rows in found.values()
    ]
    if together:
        return entries
    return sorted(entries, key=lambda entry: VERDICTS.index(entry.verdict))


def met(rows: Sequence[Row]) -> str:
    """How many, and how many of all are too close to say."""
    count = sum(_verdict(row).startswith("met") for row in rows)
    close = sum("within" in _verdict(row) for row in rows)
    text = f"{count} of {len(rows)}"
    text = text if count == len(rows) else f"**{text}**"
    return f"{text}, {close} within the spread" if close else text

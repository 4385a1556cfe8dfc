"""One group of a benchmark: rivals that do the same work, checked first, then timed in turn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.counting import Call
from benchmarks.results import Row, Run, Spread, first_line
from benchmarks.timing import Ceilings, Sample, interleaved, measure_ceilings


@dataclass(frozen=True)
class Context:
    """Where the benches run, and how.

    Attributes:
        device: of all tensors.
        smoke: take the cases that are meant for a GPU, but tiny, on a CPU: only to try the code.
        timed: without, rivals are checked and counted only.
    """

    device: torch.device
    smoke: bool = False
    timed: bool = True

    @property
    def for_gpu(self) -> bool:
        """Whether the cases, and the rivals, are those for a GPU."""
        return self.smoke or self.device.type == "cuda"

    @cached_property
    def ceilings(self) -> Ceilings:
        """Of the device; measured when they are first asked for."""
        return measure_ceilings(self.device)


class Case(Protocol):
    """What a bench is asked for; `str(case)` is its name, unique in the bench."""

    @property
    def rivals(self) -> Sequence[str]:
        """Who takes part, the first one being who the ratios are to."""


@dataclass(frozen=True)
class Refusal:
    """Why a rival has no time. That one of ours was refused fails the bench."""

    why: str
    ours: bool


@dataclass
class Outcome:
    """What a case gave: for each rival its rows and its seconds, or why there are none."""

    rows: list[Row] = field(default_factory=list)
    samples: dict[str, Sample] = field(default_factory=dict)
    refused: dict[str, Refusal] = field(default_factory=dict)

    def drop_wrong(
        self, rivals: dict[str, object], wrong: Mapping[str, BaseException], ours: Sequence[str]
    ) -> None:
        """Take rivals out whose results are wrong, or that failed."""
        for name, error in wrong.items():
            self.refused[name] = Refusal(first_line(error), name in ours)
            del rivals[name]

    def time(
        self,
        context: Context,
        calls: Mapping[str, Sequence[Call]],
        *,
        seconds: float,
        call_seconds: float = 0.0,
        rounds: tuple[int, int] = (7, 100),
        by_host: bool = False,
    ) -> dict[str, Sample]:
        """As `timing.interleaved`; nothing where nothing is timed.

        Called more than once, pytest-benchmark is shown the last: of a layer, forward + backward.
        """
        if not context.timed:
            return {}
        if context.smoke:
            seconds, rounds = 0.0, (2, 2)
        options = {"seconds": seconds, "call_seconds": call_seconds, "rounds": rounds}
        self.samples = interleaved(calls, context.device, by_host=by_host, **options)
        return self.samples

    def report(self, rival: str, benchmark: BenchmarkFixture, run: Run) -> None:
        """Hand over what one rival gave; fail or skip if it was refused."""
        refusal = self.refused.get(rival)
        if refusal is not None:
            if refusal.ours:
                pytest.fail(f"REFUSED: {refusal.why}", pytrace=False)
            pytest.skip(f"REFUSED: {refusal.why}")
        rows = [row for row in self.rows if row.rival == rival]
        run.rows += rows
        benchmark.extra_info.update({row.measure: row.number for row in rows})
        sample = self.samples.get(rival)
        if sample is not None:
            replay.into(benchmark, sample.seconds)


class _Replay:
    """A clock that shows pytest-benchmark the seconds that were taken.

    By itself it would time all rounds of one rival and then all of the next. So its tables, its
    JSON and its comparisons are of the samples that the ratios were taken from.
    """

    def __init__(self) -> None:
        self._now = 0.0

    def interleaved_rounds(self) -> float:
        """The timer."""
        return self._now

    def into(self, benchmark: BenchmarkFixture, seconds: Sequence[float]) -> None:
        """One round for each of the seconds."""
        left = iter(seconds)

        def one_round() -> None:
            self._now += next(left)

        benchmark.pedantic(one_round, rounds=len(seconds))


replay = _Replay()


def lines(rows: Sequence[Row]) -> Iterator[str]:
    """Rows of one group as a table, for people."""
    rival = max(len(row.rival) for row in rows)
    measure = max(len(row.measure) for row in rows)
    for row in rows:
        spread = ""
        if isinstance(row.value, Spread):
            spread = f"({row.value.p25:.3f}-{row.value.p75:.3f})"
        number = f"{row.number:.3f}" if spread else f"{row.number:g}"
        yield (
            f"  {row.rival:{rival}}  {row.measure:{measure}}  {number:>9} {spread:15}"
            f"  {row.verdict}"
        ).rstrip()

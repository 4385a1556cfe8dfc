"""What every bench needs: interleaved timing, op counts, the numerics check, and result rows."""

from __future__ import annotations

import contextlib
import operator
import shutil
import subprocess
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a sample."""

    median: float
    p25: float
    p75: float

    @classmethod
    def of(cls, sample: Sequence[float]) -> Spread:
        """Of the values of `sample`, at least one."""
        quartiles = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
        p25, median, p75 = torch.tensor(sample, dtype=torch.float64).quantile(quartiles).tolist()
        return cls(median, p25, p75)


@dataclass(frozen=True)
class Timing:
    """One rival: its seconds, and its ratios to the first rival in the same round."""

    seconds: Spread
    slower: Spread  # its time / the first one's
    faster: Spread  # the first one's time / its

    @classmethod
    def of(cls, seconds: Sequence[float], first: Sequence[float]) -> Timing:
        """From the seconds of a rival and of the first one in the same rounds."""
        slower = [t / t0 for t, t0 in zip(seconds, first, strict=True)]
        faster = [t0 / t for t, t0 in zip(seconds, first, strict=True)]
        return cls(Spread.of(seconds), Spread.of(slower), Spread.of(faster))


def interleaved(
    benchmark: BenchmarkFixture,
    rivals: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int,
) -> dict[str, list[float]]:
    """The seconds of every rival in every round, A B C A B C ….

    Whatever else the machine is doing then hits all rivals alike. The time is that of this process
    on the CPU, in all its threads: what an idle machine would take. pytest-benchmark drives the
    rounds, with the garbage collector off; its own figures are of whole rounds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in rivals}

    def one_round() -> None:
        for name, rival in rivals.items():
            start = time.process_time()
            rival()
            seconds[name].append(time.process_time() - start)

    benchmark.pedantic(one_round, rounds=rounds, warmup_rounds=warmup)
    return {name: sample[-rounds:] for name, sample in seconds.items()}


def against(first: str, seconds: Mapping[str, Sequence[float]]) -> dict[str, Timing]:
    """Ratios to the rival `first`, each taken within a round, their median over the rounds."""
    return {name: Timing.of(sample, seconds[first]) for name, sample in seconds.items()}


def speed(amount: float, seconds: Spread) -> Spread:
    """Amounts per second, from the quartiles of the seconds."""
    return Spread(amount / seconds.median, amount / seconds.p75, amount / seconds.p25)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` gives NaN, so that what nobody wrote shows."""
    with warnings.catch_warnings():
        # Of ops without a deterministic implementation, which is not what this is for.
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


class CountOps(TorchDispatchMode):
    """Counts dispatched ops by name: `calls` from outside, `inner` those inside ops of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.inner: Counter[str] = Counter()
        self._inside = False

    @property
    def host_syncs(self) -> int:
        """How often a value was read from the device, wherever that was."""
        return sum(c["aten::_local_scalar_dense"] for c in (self.calls, self.inner))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "adalora":
            self.calls[func._schema.name] += 1
            return self._look_inside(func, args, kwargs)
        if self._inside:
            # Below autograd nobody has split up the composite ops (matmul, to, …) yet.
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        (self.inner if self._inside else self.calls)[func._schema.name] += 1
        return func(*args, **kwargs)

    def _look_inside(self, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        """Run an op's kernel with the mode on, which sees nothing but the call otherwise."""
        first = args[0] if isinstance(args[0], Tensor) else args[0][0]
        key = getattr(torch._C.DispatchKey, first.device.type.upper())
        self._inside = True
        try:
            with self:
                return func.redispatch(torch._C.DispatchKeySet(key), *args, **kwargs)
        finally:
            self._inside = False


def check(name: str, actual: Tensor, exact: Tensor, eager: Tensor | None = None) -> None:
    """Refuse a wrong result, of which no time must be reported.

    Ours, given the result of plain eager: design, section 7, at most twice its error plus one
    rounding step. A rival, without: the same but for rounding, so that the comparison is fair.

    Raises:
        ArithmeticError: the result is wrong.
    """
    actual_, exact_ = actual.detach().double(), exact.detach().double()
    error = float((actual_ - exact_).norm())
    if eager is None:
        allowed = 1e-5 * float(exact_.norm())
    else:
        rounding = torch.finfo(eager.dtype).eps * float(exact_.norm())
        allowed = 2 * float((eager.detach().double() - exact_).norm()) + rounding
    # Not `error > allowed`: NaN is wrong too.
    if not error <= allowed:
        raise ArithmeticError(f"{name}: error {error:.2e}, allowed {allowed:.2e}")


_MEETS = {"<=": operator.le, ">=": operator.ge}


@dataclass(frozen=True)
class Row:
    """One figure of one rival. Missing a goal, written as ("<=", 1.12), is no error."""

    case: str
    settings: dict[str, Any]
    rival: str
    measure: str
    value: float | Spread
    goal: tuple[str, float] | None = None
    seconds: Spread | None = None

    @property
    def number(self) -> float:
        """The figure itself: a count, or the median."""
        return self.value.median if isinstance(self.value, Spread) else self.value

    @property
    def verdict(self) -> str:
        """How it stands to its goal, for people; empty where the design names none."""
        if self.goal is None:
            return ""
        sign, limit = self.goal
        met = "met" if _MEETS[sign](self.number, limit) else "MISSED"
        undecided = isinstance(self.value, Spread) and self.value.p25 <= limit <= self.value.p75
        return f"goal {sign} {limit:g}: {met}{', within the spread' if undecided else ''}"

    def as_json(self) -> dict[str, Any]:
        """Its fields, without those that are not set, and the verdict if there is a goal."""
        fields = {key: value for key, value in asdict(self).items() if value is not None}
        return {**fields, "verdict": self.verdict} if self.goal else fields


def output_of(*command: str) -> str | None:
    """What a command prints when it is run in this folder; None if there is none, or nothing."""
    if shutil.which(command[0]) is None:
        return None
    folder = Path(__file__).parent
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def commit() -> str | None:
    """None outside a repository, or before its first commit; "-dirty" if files differ from it."""
    return output_of("git", "describe", "--always", "--dirty", "--exclude=*")

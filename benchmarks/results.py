"""What a benchmark says: figures with their spread, in rows, and where they come from."""

from __future__ import annotations

import datetime
import json
import operator
import platform
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import adalora_kernels
from adalora_kernels import ops

HERE = Path(__file__).parent.resolve()
FOLDER = HERE / "results"


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


def speed(amount: float, seconds: Spread) -> Spread:
    """Amounts per second, from the quartiles of the seconds."""
    return Spread(amount / seconds.median, amount / seconds.p75, amount / seconds.p25)


MEETS = {"<": operator.lt, "<=": operator.le, ">=": operator.ge}


@dataclass(frozen=True)
class Row:
    """One figure of one rival. Missing a goal, written as ("<=", 1.12), is no error.

    Attributes:
        case: what is done.
        settings: on what: shapes, dtypes, the model; `curve` names the one that a curve is over.
        rival: who does it.
        measure: what was measured, such as "time / F.linear" or "dispatched ops".
        value: a median with quartiles if it was timed, else a count.
        goal: of design.md, section 6.
        seconds: that a ratio was taken from.
        details: what else belongs to it: the clock, the bytes, the plan.
    """

    case: str
    settings: Mapping[str, Any]
    rival: str
    measure: str
    value: float | Spread
    goal: tuple[str, float] | None = None
    seconds: Spread | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

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
        met = "met" if MEETS[sign](self.number, limit) else "MISSED"
        undecided = isinstance(self.value, Spread) and self.value.p25 <= limit <= self.value.p75
        return f"goal {sign} {limit:g}: {met}{', within the spread' if undecided else ''}"

    def as_json(self) -> dict[str, Any]:
        """Its fields, without those that are not set, and the verdict if there is a goal."""
        fields = {key: value for key, value in asdict(self).items() if value not in (None, {})}
        return {**fields, "verdict": self.verdict} if self.goal else fields

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Row:
        """The row that `as_json` was called on."""
        known: dict[str, Any] = {key: fields[key] for key in fields if key != "verdict"}
        for key in ("value", "seconds"):
            if isinstance(known.get(key), Mapping):
                known[key] = Spread(**known[key])
        if "goal" in known:
            known["goal"] = tuple(known["goal"])
        return cls(**known)


@dataclass
class Run:
    """All that came out of one run of benchmarks.

    Attributes:
        environment: the machine, the versions and the commit.
        rows: the figures.
        refused: rivals that gave a wrong result, or none, and so have no time: case, rival, why.
        not_reached: cases for which there was no time left.
    """

    environment: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    refused: list[dict[str, str]] = field(default_factory=list)
    not_reached: list[str] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """As JSON, a line per row; an old file stays whole until the new one is."""
        contents = {
            "environment": self.environment,
            "refused": self.refused,
            "not_reached": self.not_reached,
        }
        rows = ",\n".join(f"  {json.dumps(row.as_json(), ensure_ascii=False)}" for row in self.rows)
        head = json.dumps(contents, indent=1, ensure_ascii=False).removesuffix("\n}")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(f'{head},\n "rows": [\n{rows}\n ]\n}}\n')
        partial.replace(path)

    @classmethod
    def read(cls, path: Path) -> Run:
        """The run that wrote this file.

        Raises:
            ValueError: it is no such file.
        """
        try:
            contents = json.loads(path.read_text())
            rows = [Row.from_json(row) for row in contents["rows"]]
            lists = (contents.get("refused", []), contents.get("not_reached", []))
            return cls(contents["environment"], rows, *lists)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no file of benchmark results: {error!r}") from error


def first_line(error: BaseException) -> str:
    """The error as one line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def groups(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """The rows by case and settings, in the order of their first rows."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(json.dumps([row.case, row.settings]), []).append(row)
    yield from found.values()


def output_of(*command: str) -> str | None:
    """What a command prints when it is run in this folder; None if there is none, or nothing."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def commit() -> str | None:
    """None outside a repository, or before its first commit; "-dirty" if files differ from it."""
    return output_of("git", "describe", "--always", "--dirty", "--exclude=*")


def _processor() -> str:
    """As the kernel calls it; on some systems only the architecture is known."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, names), platform.processor() or platform.machine())


def environment(device: torch.device) -> dict[str, Any]:
    """The machine and the versions; None for what can't be found out."""
    packages = {
        module.__name__: str(module.__version__)
        for module in (adalora_kernels, torch, peft, transformers)
    }
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": "cpu",
        "processor": _processor(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        import triton

        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found |= {
            "device": torch.cuda.get_device_name(device),
            "driver": output_of(*query),
            "cuda": torch.version.cuda,
            "float32 products": torch.get_float32_matmul_precision(),
        }
        packages["triton"] = str(triton.__version__)
    return found | {
        "compiled library": ops.library.built_for or f"none: {ops.library.why_not}",
        "python": platform.python_version(),
        "packages": packages,
    }

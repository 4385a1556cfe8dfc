"""What a GPU benchmark reports: rows with what belongs to them, and where they were measured."""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
import triton

import adalora_kernels
from adalora_kernels.kernels.launch import INTERPRETED
from benchmarks.harness import Row, Spread, commit, output_of


@dataclass(frozen=True)
class Result:
    """A row of a case, which is named for people, and what only the file says of it."""

    case: str
    row: Row
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def spread(self) -> str:
        """Median and quartiles, for people."""
        value = self.row.value
        if not isinstance(value, Spread):
            return f"{value:.3f}"
        return f"{value.median:.3f} ({value.p25:.3f}-{value.p75:.3f})"

    def as_json(self) -> dict[str, Any]:
        return {**self.row.as_json(), **self.details}


@dataclass
class Report:
    """All that came out of a benchmark. That one of ours was refused makes it fail."""

    environment: dict[str, Any]
    ceilings: dict[str, float]
    formulas: Mapping[str, str]
    results: list[Result] = field(default_factory=list)
    refused: list[dict[str, str]] = field(default_factory=list)
    not_reached: list[str] = field(default_factory=list)
    ours_refused: bool = False

    def refuse(self, case: str, rival: str, why: str, ours: bool) -> None:
        """Note that a rival gave a wrong result or none, and so has no time."""
        self.refused.append({"case": case, "rival": rival, "why": why})
        self.ours_refused |= ours

    def refusals(self) -> Iterator[str]:
        """A line for each, for people."""
        yield from (f"REFUSED {e['rival']}, {e['case']}: {e['why']}" for e in self.refused)

    def write(self, path: Path) -> None:
        """As JSON, a line per row."""
        contents = {
            "environment": self.environment,
            "ceilings": self.ceilings,
            "formulas": self.formulas,
            "refused": self.refused,
            "not_reached": self.not_reached,
        }
        rows = ",\n".join(
            f"  {json.dumps(result.as_json(), ensure_ascii=False)}" for result in self.results
        )
        head = json.dumps(contents, indent=1, ensure_ascii=False).removesuffix("\n}")
        partial = path.with_suffix(".partial")
        partial.write_text(f'{head},\n "rows": [\n{rows}\n ]\n}}\n')
        partial.replace(path)

    def header(self) -> Iterator[str]:
        """Where it was measured, and the formulas."""
        versions = self.environment["packages"]
        places = (self.environment["device"], f"commit {self.environment['commit']}")
        packages = (f"{name} {versions[name]}" for name in ("torch", "triton", "peft"))
        yield ", ".join([*places, f"driver {self.environment['driver']}", *packages])
        yield ", ".join(f"{name} {value:.0f}" for name, value in self.ceilings.items())
        yield from (f"{name}: {formula}" for name, formula in self.formulas.items())


def at_most(most: int, lines: Sequence[str]) -> Iterator[str]:
    """The first `most` of the lines, and how many are left out."""
    yield from lines[:most]
    if len(lines) > most:
        yield f"  and {len(lines) - most} more such lines"


def first_line(error: Exception) -> str:
    """The error as one line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def environment(device: torch.device) -> dict[str, Any]:
    """The machine and the versions; None for what can't be found out."""
    packages = (adalora_kernels, torch, triton, peft, transformers)
    on_gpu = device.type == "cuda"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.machine(),
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "float32 products": torch.get_float32_matmul_precision(),
        "python": platform.python_version(),
        "packages": {package.__name__: str(package.__version__) for package in packages},
        "interpreted": INTERPRETED,
    }

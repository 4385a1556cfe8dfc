"""The environment of a run, and what becomes of its rows: one table and one JSON file."""

from __future__ import annotations

import datetime
import itertools
import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import adalora_kernels
from adalora_kernels import ops
from benchmarks.harness import Row, Spread, commit

HERE = Path(__file__).parent.resolve()
RESULTS = HERE / "results"
_ROWS = pytest.StashKey[list[Row]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_ROWS] = []
    # pytest-benchmark makes its storage directory even if it stores nothing: let it be ours.
    config.option.benchmark_storage = RESULTS.as_uri()


@pytest.fixture(scope="session")
def record(pytestconfig: pytest.Config) -> list[Row]:
    """Where a bench appends its rows, after its numerics have been checked."""
    return pytestconfig.stash[_ROWS]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """With more, small ops stall at OpenMP's barrier whenever the machine is not idle."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    rows = config.stash[_ROWS]
    if not rows or config.option.benchmark_disable:
        return
    for line in _table(rows):
        terminalreporter.write_line(line)
    whole = [Path(arg).resolve() for arg in config.args] == [HERE]
    if exitstatus or not whole or terminalreporter.stats.get("deselected"):
        terminalreporter.write_line("not the whole suite, or not all of it passed: no file written")
        return
    path = RESULTS / "cpu.json"
    path.parent.mkdir(exist_ok=True)
    report = {"environment": _environment(), "rows": [row.as_json() for row in rows]}
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    terminalreporter.write_line(f"written to {path.relative_to(HERE.parent)}")


def _table(rows: list[Row]) -> Iterator[str]:
    rival = max(len(row.rival) for row in rows)
    measure = max(len(row.measure) for row in rows)
    for (case, settings), group in itertools.groupby(rows, key=lambda r: (r.case, r.settings)):
        yield ""
        yield f"{case}: {', '.join(f'{k} {v}' for k, v in settings.items() if k != 'matrices')}"
        for row in group:
            spread = ""
            if isinstance(row.value, Spread):
                spread = f"({row.value.p25:.3f}-{row.value.p75:.3f})"
            number = f"{row.number:.3f}" if spread else f"{row.number:.0f}"
            yield (
                f"  {row.rival:{rival}}  {row.measure:{measure}}  {number:>7} {spread:15}"
                f"  {row.verdict}"
            ).rstrip()


def _environment() -> dict[str, Any]:
    packages = (adalora_kernels, torch, peft, transformers)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": "cpu",
        "processor": platform.processor() or platform.machine(),
        "threads": 1,
        "compiled library": ops.library.built_for or f"none: {ops.library.why_not}",
        "clock": "CPU time of the process",
        "python": platform.python_version(),
        "packages": {package.__name__: str(package.__version__) for package in packages},
    }

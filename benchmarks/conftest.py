"""Runs the benches: a test for every provider of every case.

A bench is a module with

    def cases(context: Context) -> Sequence[Case]         what there is to measure, goals first
    def measure(case: Case, context: Context) -> Outcome  checks the providers, times them in turn
    def guarded() -> list[Case]                           whose counts guard.py compares
    bench_… = time_alone                                  pytest-benchmark times one by itself
"""

from __future__ import annotations

import gc
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.harness import Case, Context, Outcome
from benchmarks.results import FOLDER, HERE, Run, environment

_BEGIN = time.monotonic()
_CONTEXT, _RUN = pytest.StashKey[Context](), pytest.StashKey[Run]()
# What the case at hand gave: one at a time, for it holds its inputs.
_OUTCOME: dict[Case, Outcome | None] = {}
_SHOWN = ["work", "case", "curve", "point", "provider", "measure", "value", "p25", "p75", "verdict"]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("adalora_kernels")
    group.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    smoke = "the cases for a GPU, tiny, on a CPU (with TRITON_INTERPRET=1): only to try the code"
    group.addoption("--smoke", action="store_true", help=smoke)
    out = "write the results there; otherwise a whole run that passes writes results/DEVICE.json"
    group.addoption("--out", type=Path, metavar="FILE", help=out)
    seconds = "begin no case after that; those left are named in the file"
    group.addoption("--seconds", type=float, default=float("inf"), help=seconds)


def pytest_configure(config: pytest.Config) -> None:
    device = torch.device(config.getoption("--device"))
    timed = not config.getoption("benchmark_disable")
    config.stash[_CONTEXT] = Context(device, config.getoption("--smoke"), timed)
    if device.type == "cpu":
        # With more, small ops stall at OpenMP's barrier whenever the machine is not idle.
        torch.set_num_threads(1)
    config.stash[_RUN] = Run(environment(device))
    # pytest-benchmark makes its storage directory even if it stores nothing: let it be ours.
    config.option.benchmark_storage = FOLDER.as_uri()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = metafunc.module.cases(metafunc.config.stash[_CONTEXT])
    made = []
    for case in cases:
        # It is measured by one process, where several share the tests (pytest-xdist).
        new = partial(pytest.param, case, marks=pytest.mark.xdist_group(str(case)))
        made += [new(provider, id=f"{case}, {provider}") for provider in case.providers]
    metafunc.parametrize(("case", "provider"), made)


@pytest.fixture
def outcome(request: pytest.FixtureRequest, case: Case) -> Outcome:
    """What the case gave: it is measured for the first of its providers, at once for all."""
    if case not in _OUTCOME:
        _OUTCOME.clear()
        _OUTCOME[case] = _measured(request.config, request.module, case)
    return _OUTCOME[case] or pytest.skip("not reached: no time left")


def _measured(config: pytest.Config, module: Any, case: Case) -> Outcome | None:
    run, context, outcome = config.stash[_RUN], config.stash[_CONTEXT], Outcome(case)
    expected = 0.0 if context.smoke else case.expected_seconds
    if time.monotonic() - _BEGIN + expected > config.getoption("--seconds"):
        run.not_reached.append(str(case))
        return None
    gc.collect()
    if context.on_gpu:
        torch.cuda.empty_cache()
    torch.manual_seed(0)
    try:
        outcome = module.measure(case, context)
    # Out of memory, say. The rest is measured all the same, if it can be.
    except Exception as error:
        for provider in case.providers:
            outcome.fail(provider, error)
    run.rows += outcome.rows
    for provider, why in outcome.wrong.items():
        run.wrong.append({"case": str(case), "provider": provider, "why": why})
    if config.getoption("--out") is not None:
        run.write(config.getoption("--out"))
    return outcome


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    run, path, write = config.stash[_RUN], config.getoption("--out"), terminalreporter.write_line
    if config.option.benchmark_disable:
        return
    if run.rows:
        shown = run.frame[_SHOWN].to_string(index=False, na_rep="")
        write(f"\nRatios of interleaved rounds, and counts:\n{shown}")
    for line in run.left_out:
        write(line)
    whole = [Path(arg).resolve() for arg in config.args] == [HERE]
    part = exitstatus or not whole or terminalreporter.stats.get("deselected")
    if path is None and not part and not config.getoption("--smoke"):
        path = FOLDER / f"{config.getoption('--device')}.json"
    if path is not None:
        run.write(path)
    write(f"written to {path}" if path else "not the whole suite, or not all of it passed: no file")

"""Runs the benches: `cases` and `measure` of each, a test for every rival of every case.

A bench is a module with

    def cases(context: Context) -> Sequence[Case]         what there is to measure, goals first
    def measure(case: Case, context: Context) -> Outcome  check all rivals, time them in turn
    def bench_…(…)                                        hands over what one rival gave

and perhaps `prepare(cases, context)`, for what all cases need before the first is timed. A case may
have `expected_seconds`, and is not begun where so much is not left.
"""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks.contest import Case, Context, Outcome, Refusal, lines, replay
from benchmarks.results import FOLDER, HERE, Run, environment, first_line, groups

_CONTEXT = pytest.StashKey[Context]()
_RUN = pytest.StashKey[Run]()
_DEADLINE = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("adalora_kernels")
    group.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    group.addoption(
        "--smoke",
        action="store_true",
        help="the cases for a GPU, tiny, on a CPU (with TRITON_INTERPRET=1): only to try the code",
    )
    group.addoption(
        "--out",
        type=Path,
        metavar="FILE",
        help="write the results there, as far as the run got; otherwise a whole run of the suite "
        "that passes writes results/DEVICE.json",
    )
    group.addoption(
        "--seconds", type=float, help="begin no case after that; those left are named in the file"
    )


def pytest_configure(config: pytest.Config) -> None:
    device = torch.device(config.getoption("--device"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: no CUDA device; --smoke runs on a CPU")
    timed = not config.getoption("benchmark_disable")
    config.stash[_CONTEXT] = Context(device, config.getoption("--smoke"), timed)
    if device.type == "cpu":
        # With more, small ops stall at OpenMP's barrier whenever the machine is not idle.
        torch.set_num_threads(1)
    config.stash[_RUN] = Run(environment(device))
    seconds = config.getoption("--seconds")
    config.stash[_DEADLINE] = time.monotonic() + (float("inf") if seconds is None else seconds)
    # pytest-benchmark makes its storage directory even if it stores nothing: let it be ours.
    config.option.benchmark_storage = FOLDER.as_uri()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = metafunc.module.cases(metafunc.config.stash[_CONTEXT])
    pairs = [(case, rival) for case in cases for rival in case.rivals]
    ids = [f"{case}, {rival}" for case, rival in pairs]
    metafunc.parametrize(("case", "rival"), pairs, ids=ids)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        case = item.callspec.params["case"]  # type: ignore[attr-defined]
        module = item.module.__name__.rpartition("bench_")[2]  # type: ignore[attr-defined]
        marker = pytest.mark.benchmark(group=f"{module}: {case}", timer=replay.interleaved_rounds)
        item.add_marker(marker)


@pytest.fixture(scope="session")
def run(pytestconfig: pytest.Config) -> Run:
    """Where a bench puts what came out."""
    return pytestconfig.stash[_RUN]


@dataclass
class Measured:
    """The case of a bench that was measured last; pytest runs its rivals one after the other."""

    module: ModuleType
    case: Case | None = None
    outcome: Outcome | None = None


@pytest.fixture(scope="module")
def measured(request: pytest.FixtureRequest) -> Measured:
    """Of a bench, which gets to prepare itself first."""
    context = request.config.stash[_CONTEXT]
    if hasattr(request.module, "prepare") and context.for_gpu:
        request.module.prepare(request.module.cases(context), context)
    return Measured(request.module)


@pytest.fixture
def outcome(case: Case, pytestconfig: pytest.Config, run: Run, measured: Measured) -> Outcome:
    """Of the case: measured when the first of its rivals asks, the same for the others."""
    if measured.case is not case:
        context = pytestconfig.stash[_CONTEXT]
        measured.case, measured.outcome = case, None
        expected = getattr(case, "expected_seconds", 0.0)
        if time.monotonic() + expected > pytestconfig.stash[_DEADLINE]:
            run.not_reached.append(str(case))
        else:
            if context.timed and not context.smoke:
                run.environment["ceilings"] = context.ceilings.as_json()
            measured.outcome = _measure(measured.module, case, context, run)
        path = pytestconfig.getoption("--out")
        if path is not None:
            run.write(path)
    if measured.outcome is None:
        pytest.skip("not reached: no time left")
    return measured.outcome


def _measure(module: ModuleType, case: Case, context: Context, run: Run) -> Outcome:
    torch.manual_seed(0)
    try:
        outcome: Outcome = module.measure(case, context)
    # Out of memory, say. The rest is measured all the same, if it can be.
    except Exception as error:
        outcome = Outcome(refused={name: Refusal(first_line(error), True) for name in case.rivals})
    for rival, refusal in outcome.refused.items():
        run.refused.append({"case": str(case), "rival": rival, "why": refusal.why})
    gc.collect()
    if context.device.type == "cuda":
        torch.cuda.empty_cache()
    return outcome


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    run, path = config.stash[_RUN], config.getoption("--out")
    if config.option.benchmark_disable:
        return
    for group in groups(run.rows):
        first = group[0]
        settings = (f"{k} {v}" for k, v in first.settings.items() if not isinstance(v, dict))
        terminalreporter.write_line(f"\n{first.case}: {', '.join(settings)}")
        for line in lines(group):
            terminalreporter.write_line(line)
    for entry in run.refused:
        terminalreporter.write_line("REFUSED {rival}, {case}: {why}".format(**entry))
    if run.not_reached:
        terminalreporter.write_line(f"{len(run.not_reached)} cases not reached")
    if path is None:
        whole = [Path(arg).resolve() for arg in config.args] == [HERE]
        context = config.stash[_CONTEXT]
        if exitstatus or not whole or context.smoke or terminalreporter.stats.get("deselected"):
            terminalreporter.write_line(
                "not the whole suite, or not all of it passed: no file written"
            )
            return
        path = FOLDER / f"{context.device.type}.json"
    run.write(path)
    terminalreporter.write_line(f"written to {path}")

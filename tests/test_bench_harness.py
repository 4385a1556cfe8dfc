"""What all benches rely on: a slow-down is measured, a wrong result refused, a count exact."""

import json
import math
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import contest, counting, guard, numerics, results, timing

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


def work(milliseconds):
    """So much time of the CPU, whatever else the machine does."""
    end = time.process_time() + milliseconds * 1e-3
    while time.process_time() < end:
        pass


def a_run(**milliseconds):
    """What a bench would write of rivals that take so long; the first is the floor."""
    calls = {name: [partial(work, each)] for name, each in milliseconds.items()}
    outcome, (first, *_) = contest.Outcome(), milliseconds
    samples = outcome.time(contest.Context(CPU), calls, seconds=0.0, rounds=(7, 7))
    run = results.Run({})
    for name, timed in timing.timings(samples, first).items():
        settings, goal = {"M": 1}, ("<=", 1.5)
        run.rows += [
            results.Row("work", settings, name, "time / floor", timed.slower, goal, timed.seconds),
            results.Row("work", settings, name, "the floor's time / time", timed.faster),
            # Of the machine, not of the rivals: nobody is held to it.
            results.Row("work", settings, name, "GB/s", results.speed(1e-3, timed.seconds)),
        ]
    return run


def test_a_planted_slow_down_is_caught():
    before = a_run(floor=2.0, ours=2.2, theirs=6.0)
    after = a_run(floor=2.0, ours=4.4, theirs=6.0)
    verdicts = [
        {row.rival: row.verdict for row in run.rows if row.goal and row.measure == "time / floor"}
        for run in (before, after)
    ]
    met, missed = "goal <= 1.5: met", "goal <= 1.5: MISSED"
    assert verdicts == [
        {"floor": met, "ours": met, "theirs": missed},
        {"floor": met, "ours": missed, "theirs": missed},
    ]
    found = list(guard.slower(before, after))
    assert [line.split(": ")[2:4] for line in found] == [
        ["ours", "time / floor"],
        ["ours", "the floor's time / time"],
    ]
    # To become faster is no reason to complain.
    assert list(guard.slower(after, before)) == []
    assert list(guard.slower(before, before)) == []


def test_files_of_results_are_compared_by_name(tmp_path, capsys):
    paths = [tmp_path / "before.json", tmp_path / "after.json"]
    for path, ours in zip(paths, (2.2, 4.4), strict=True):
        a_run(floor=2.0, ours=ours).write(path)
    assert guard.main([str(path) for path in paths]) == 1
    assert capsys.readouterr().out.count("work: M 1: ours: ") == 2
    assert guard.main([str(paths[0])] * 2) == 0
    assert capsys.readouterr().out == "nothing became slower\n"


def test_rivals_take_turns():
    order = []
    calls = {name: [partial(order.append, name)] for name in "abc"}
    samples = timing.interleaved(calls, CPU, seconds=0.0, rounds=(2, 2))
    assert "".join(order) == "abc" + "bca" + "cab"  # The first round is only for warming up.
    assert [len(samples[name].seconds) for name in "abc"] == [2, 2, 2]


def test_ratios_are_taken_within_a_round():
    samples = {
        "a": timing.Sample([1.0, 2.0, 4.0], "made up"),
        "b": timing.Sample([2.0, 4.0, 8.0], "made up"),
    }
    timed = timing.timings(samples, "a")["b"]
    assert (timed.slower.p25, timed.slower.p75, timed.faster.median) == (2.0, 2.0, 0.5)
    assert timed.seconds.median == 4.0


@pytest.mark.parametrize("wrong", [1.001, math.nan], ids=["scaled", "not written"])
def test_a_wrong_result_is_refused(wrong):
    exact = torch.randn(100, dtype=torch.float64)
    eager = exact.float()
    check = numerics.check
    check("right", eager, exact, eager)
    actual = eager.clone()
    actual[-1] *= wrong
    with pytest.raises(ArithmeticError, match=r"^ours: error "):
        check("ours", actual, exact, eager)
    with pytest.raises(ArithmeticError, match=r"^theirs: error "):
        check("theirs", actual, exact)


TOY = """
from dataclasses import dataclass

from benchmarks.contest import Outcome
from benchmarks.results import Row
from benchmarks.timing import timings


@dataclass(frozen=True)
class Toy:
    name: str
    rivals = ("floor", "ours", "wrong", "theirs, wrong")

    def __str__(self):
        return f"toy {self.name}"


def cases(context):
    return [Toy("one"), Toy("two"), Toy("broken")]


def measure(case, context):
    if case.name == "broken":
        raise MemoryError("no room")
    outcome, calls = Outcome(), {name: [int] for name in case.rivals}
    wrong = {name: ArithmeticError("off by one") for name in calls if "wrong" in name}
    outcome.drop_wrong(calls, wrong, ours=("ours", "wrong"))
    samples = outcome.time(context, calls, seconds=0.0, rounds=(3, 3))
    for name in calls:
        outcome.rows.append(Row("toy", {"n": case.name}, name, "count", 7))
    for name, timed in (timings(samples, "floor") if samples else {}).items():
        outcome.rows.append(Row("toy", {"n": case.name}, name, "time / floor", timed.slower))
    return outcome


def bench_toy(outcome, rival, benchmark, run):
    outcome.report(rival, benchmark, run)
"""


@pytest.fixture
def toy(tmp_path):
    """Runs a bench of two cases and one that fails; the exit status, what was printed and wrote."""
    (tmp_path / "bench_toy.py").write_text(TOY)

    def run(*options):
        out = tmp_path / "toy.json"
        command = [sys.executable, "-m", "pytest", "-c", "benchmarks/pytest.ini"]
        command += ["-p", "benchmarks.conftest", tmp_path / "bench_toy.py", "--out", out, *options]
        # In a worker of pytest-xdist pytest-benchmark turns itself off.
        env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
        done = subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120
        )
        return done, json.loads(out.read_text()) if out.exists() else None

    return run


def test_a_bench_reports_who_is_right_and_refuses_the_others(toy, tmp_path):
    done, written = toy("--benchmark-json", tmp_path / "benchmark.json")
    # Ours that is wrong fails the run, and so does a case that nobody survives; a rival does not.
    assert done.returncode == 1
    assert "6 failed, 4 passed, 2 skipped" in done.stdout, done.stdout
    right = [(n, rival) for n in ("one", "two") for rival in ("floor", "ours")]
    timed = [row for row in written["rows"] if row["measure"] == "time / floor"]
    assert [(row["settings"]["n"], row["rival"]) for row in timed] == right
    refused = [(e["case"], e["rival"], e["why"].partition(":")[0]) for e in written["refused"]]
    wrong = [
        (f"toy {n}", rival, "ArithmeticError")
        for n in ("one", "two")
        for rival in ("wrong", "theirs, wrong")
    ]
    broken = ("floor", "ours", "wrong", "theirs, wrong")
    assert refused == wrong + [("toy broken", rival, "MemoryError") for rival in broken]
    assert {"commit", "device", "processor", "python", "packages"} <= written["environment"].keys()
    assert written["environment"]["ceilings"]["copy B/s"] > 0

    # What pytest-benchmark shows are those samples, in groups.
    own = json.loads((tmp_path / "benchmark.json").read_text())["benchmarks"]
    assert [(b["group"], b["stats"]["rounds"]) for b in own] == [
        ("toy: toy one", 3),
        ("toy: toy one", 3),
        ("toy: toy two", 3),
        ("toy: toy two", 3),
    ]
    assert own[1]["extra_info"]["count"] == 7


def test_what_there_is_no_time_for_is_named(toy):
    done, written = toy("--seconds", "0")
    assert done.returncode == 0 and "3 cases not reached" in done.stdout
    assert written["not_reached"] == ["toy one", "toy two", "toy broken"]
    assert written["rows"] == written["refused"] == []


def test_without_timing_nothing_is_written(toy):
    done, written = toy("--benchmark-disable", "-k", "two and ours")
    assert done.returncode == 0 and "1 passed" in done.stdout
    assert not any(row["measure"].startswith("time") for row in written["rows"])


def test_a_run_is_read_as_it_was_written(tmp_path):
    spread = results.Spread(2.0, 1.0, 3.0)
    rows = [
        results.Row("a", {"M": 1}, "x", "time / y", spread, (">=", 2.0), spread, {"bytes": 3}),
        results.Row("a", {"M": 1}, "x", "dispatched ops", 0),
    ]
    run = results.Run({"device": "cpu"}, rows, [{"case": "b", "rival": "z", "why": "?"}], ["c"])
    path = tmp_path / "folder" / "run.json"
    run.write(path)
    assert results.Run.read(path) == run
    assert rows[0].verdict == "goal >= 2: met, within the spread"
    path.write_text('{"rows": 3}')
    with pytest.raises(ValueError, match=r"run\.json is no file of benchmark results"):
        results.Run.read(path)


def test_memory_is_counted_to_the_byte():
    x = torch.ones(1000, dtype=torch.float64)

    def call():
        kept = x + 1.0  # 8000 bytes
        temporary = torch.cat([x, x])  # 16000
        del temporary
        return kept * 2.0  # 8000

    assert counting.peak_extra_memory(call, CPU) == 24000


def test_ops_are_counted_inside_ours_too():
    from adalora_kernels import SVDLinear

    layer, x = SVDLinear(8, 8, r=2), torch.randn(3, 8)
    ops = counting.count_ops(lambda: layer(x))
    assert ops.calls["adalora::svd_linear"] == 1 and ops.calls.total() < 4
    assert ops.inner.total() > 2 and ops.host_syncs == 0
    ops = counting.count_ops(lambda: x.sum().item())
    assert ops.host_syncs == 1


def test_kernel_names_are_cut_to_what_a_reader_needs():
    use = counting.KernelUse
    ours = "void adalora::cuda::(anonymous namespace)::update<float>(adalora::Table<int>, int*)"
    assert use(ours, 1, 1.0).short_name == "update"
    assert use("_gemm_kernel", 1, 1.0).short_name == "_gemm_kernel"
    assert use("Memset (Device)", 1, 1.0).is_kernel is False

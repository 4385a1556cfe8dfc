"""What all benches rely on: a slow-down is measured, a wrong result is not, a count is exact."""

import json
import math
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch

from benchmarks import counting, guard, harness, results

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


def work(milliseconds):
    """Take so much time of the CPU, whatever else the machine does."""
    end = time.process_time() + milliseconds * 1e-3
    while time.process_time() < end:
        pass


def a_run(**milliseconds):
    """What a bench would write of providers that take so long; the first is the baseline."""
    first, measure = next(iter(milliseconds)), "time / floor"
    goals = {(name, measure): "<= 1.5" for name in milliseconds}
    outcome = harness.Outcome(harness.Case("work", {"M": 1}, list(milliseconds), goals, None))
    calls = {name: [partial(work, each)] for name, each in milliseconds.items()}
    samples = outcome.time(harness.Context(CPU), calls, seconds=0.0, rounds=(7, 7))
    for each in (measure, "the floor's time / time"):
        outcome.compare(samples, first, each)
    return results.Run({}, outcome.rows)


def test_a_planted_slow_down_is_caught(tmp_path, capsys):
    before, after = a_run(floor=2.0, ours=2.2, theirs=6.0), a_run(floor=2.0, ours=4.4, theirs=6.0)
    verdicts = [run.frame.dropna(subset="goal").verdict.tolist() for run in (before, after)]
    assert verdicts == [["met", "met", "MISSED"], ["met", "MISSED", "MISSED"]]
    paths = [tmp_path / "before.json", tmp_path / "after.json"]
    for path, run in zip(paths, (before, after), strict=True):
        run.write(path)
    assert guard.main([str(path) for path in paths]) == 1
    found = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[2:4] for line in found] == [
        ["ours", "time / floor"],
        ["ours", "the floor's time / time"],
    ]
    # To become faster is no reason to complain.
    assert list(guard.slower(after, before)) == list(guard.slower(before, before)) == []


def test_providers_take_turns(monkeypatch):
    order = []
    calls = {name: [partial(order.append, name)] for name in "abc"}
    monkeypatch.setattr(harness, "_timed", lambda device, run: run() or 1.0)
    harness.interleaved(calls, CPU, seconds=0.0, rounds=(2, 2))
    assert "".join(order[-6:]) == "abcbca"  # After each has been prepared.


def test_ratios_are_taken_within_a_round():
    outcome = harness.Outcome(harness.Case("work", {}, "ab", {}, None))
    seconds = pd.DataFrame({"a": [1.0, 2.0, 4.0], "b": [2.0, 4.0, 8.0]})
    outcome.compare(harness.Samples(seconds, dict.fromkeys("ab", "made up")), "a", "time / a", "b")
    (row,) = outcome.rows
    assert (row["p25"], row["value"], row["p75"], row["seconds"]) == (2, 2, 2, 4)


@pytest.mark.parametrize("wrong", [1.001, math.nan], ids=["scaled", "not written"])
def test_a_wrong_result_is_rejected(wrong):
    exact = torch.randn(100, dtype=torch.float64)
    eager = exact.float()
    harness.check("right", eager, exact, eager)
    actual = eager.clone()
    actual[-1] *= wrong
    for name, bound in (("ours", eager), ("theirs", None)):
        with pytest.raises(ArithmeticError, match=rf"^{name}: error "):
            harness.check(name, actual, exact, bound)


TOY = """
from benchmarks.harness import Case, Outcome, time_alone

NAMES = ("F.linear", "ours", "ours, wrong", "PEFT, wrong")


def cases(context):
    late = Case("toy", {"n": "late"}, NAMES, {}, None, expected_seconds=1e9)
    return [*(Case("toy", {"n": n}, NAMES, {}, n) for n in ("one", "broken")), late]


def check(name, provider):
    if "wrong" in name:
        raise ArithmeticError("off by one")


def measure(case, context):
    if case.of == "broken":
        raise MemoryError("no room")
    outcome, providers = Outcome(case), {name: [int] for name in NAMES}
    outcome.keep_right(providers, check)
    samples = outcome.time(context, providers, seconds=0, rounds=(3, 3))
    if samples is not None:
        outcome.compare(samples, "F.linear", "time / F.linear")
    return outcome


bench_toy = time_alone
"""


def test_a_bench_reports_who_is_right_and_rejects_the_others(tmp_path):
    bench, out, own = (tmp_path / name for name in ("bench_toy.py", "toy.json", "benchmark.json"))
    bench.write_text(TOY)
    command = [sys.executable, "-m", "pytest", "-c", "benchmarks/pytest.ini", bench]
    command += ["-p", "benchmarks.conftest", "--out", out, "--benchmark-json", own]
    # In a worker of pytest-xdist pytest-benchmark turns itself off.
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    options = {"cwd": ROOT, "env": env, "capture_output": True, "text": True, "timeout": 120}
    done = subprocess.run([*command, "--seconds", "1e6"], **options)
    written = json.loads(out.read_text())
    # Ours that is wrong fails the run, and so does a case that nobody survives; PEFT's does not.
    assert "3 failed, 2 passed, 7 skipped" in done.stdout, done.stdout
    assert "1 cases not reached" in done.stdout and written["not_reached"] == ["toy: n late"]
    assert [row["provider"] for row in written["rows"]] == ["F.linear", "ours"]
    wrong = [(e["case"], e["why"].partition(":")[0]) for e in written["wrong"]]
    broken = [("toy: n broken", "MemoryError")] * 4
    assert wrong == [("toy: n one", "ArithmeticError")] * 2 + broken
    asked = {"commit", "device", "processor", "python", "packages", "compiled library"}
    assert asked <= written["environment"].keys()
    # pytest-benchmark has timed them itself, in groups.
    own = json.loads(own.read_text())["benchmarks"]
    assert [each["group"] for each in own] == ["toy: n one"] * 2
    assert own[1]["stats"]["median"] > 0 and own[1]["extra_info"].keys() == {"time / F.linear"}


def test_memory_is_counted_to_the_byte():
    x = torch.ones(1000, dtype=torch.float64)

    def call():
        kept = x + 1.0  # 8000 bytes
        temporary = torch.cat([x, x])  # 16000
        del temporary
        return kept * 2.0  # 8000

    assert counting.peak_extra_megabytes(call, CPU) == 24000 / 1e6


def test_ops_are_counted_inside_ours_too():
    from adalora_kernels import SVDLinear

    layer, x = SVDLinear(8, 8, r=2), torch.randn(3, 8)
    ops = counting.count_ops(lambda: layer(x))
    assert ops.calls["adalora::svd_linear"] == 1 and ops.calls.total() < 4
    assert ops.inner.total() > 2 and ops.host_syncs == 0
    assert counting.count_ops(lambda: x.sum().item()).host_syncs == 1


def test_ours_is_checked_with_memory_poisoned():
    torch.use_deterministic_algorithms(False)
    seen, outcome = {}, harness.Outcome(harness.Case("work", {}, (), {}, None))

    def check(name, provider):
        seen[name] = torch.are_deterministic_algorithms_enabled()

    outcome.keep_right({"ours": None, "PEFT": None}, check)
    assert seen == {"ours": True, "PEFT": False} and outcome.wrong == {}

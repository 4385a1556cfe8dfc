"""What all benches rely on: a slow-down is measured, a wrong result is not, a count is exact."""

import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch

import adalora_kernels
from adalora_kernels import ops
from benchmarks import bench_whole_model, counting, guard, harness, results, whole_models

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


def a_run(**seconds):
    """What a bench would write of providers that take so long; the first is the baseline."""
    goals = {(name, "time / floor"): "<= 1.5" for name in seconds}
    outcome = harness.Outcome(harness.Case("work", {"M": 1}, list(seconds), goals, None))
    outcome.seconds = pd.DataFrame({name: [0.99 * s, s, 1.01 * s] for name, s in seconds.items()})
    outcome.compare("floor", "time / floor")
    outcome.compare("floor", "the floor's time / time")
    return results.Run({}, outcome.rows)


def test_a_planted_slow_down_is_caught(tmp_path, capsys):
    before, after = a_run(floor=2.0, ours=2.2, theirs=6.0), a_run(floor=2.0, ours=4.4, theirs=6.0)
    verdicts = [run.frame.dropna(subset="goal").verdict.tolist() for run in (before, after)]
    assert verdicts == [["met", "met", "MISSED"], ["met", "MISSED", "MISSED"]]
    paths = [str(tmp_path / name) for name in ("before.json", "after.json")]
    before.write(Path(paths[0]))
    after.write(Path(paths[1]))
    assert guard.main(paths) == 1
    found = [line.split(": ")[2:4] for line in capsys.readouterr().out.splitlines()]
    assert found == [["ours", "the floor's time / time"], ["ours", "time / floor"]]
    # To become faster is no reason to complain.
    assert guard.main(paths[::-1]) == 0


def test_providers_take_turns(monkeypatch):
    order, outcome = [], harness.Outcome(harness.Case("work", {}, "abc", {}, None))
    monkeypatch.setattr(harness, "_timed", lambda device, run: run() or 1.0)
    calls = {name: [partial(order.append, name)] for name in "abc"}
    outcome.time(harness.Context(CPU), calls, seconds=0.0, rounds=(2, 2))
    assert "".join(order[-6:]) == "abcbca"  # After each has been prepared.


def test_ratios_are_taken_within_a_round():
    outcome = harness.Outcome(harness.Case("work", {}, "ab", {}, None))
    outcome.seconds = pd.DataFrame({"a": [1.0, 2.0, 4.0], "b": [2.0, 4.0, 8.0]})
    outcome.compare("a", "time / a", "b")
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
bench_toy = time_alone


def cases(context):
    late = Case("toy", {"n": 2}, NAMES, {}, None, expected_seconds=1e9)
    return [Case("toy", {"n": 1}, NAMES, {}, None), late]


def check(name, provider):
    if "wrong" in name:
        raise ArithmeticError("off by one")


def measure(case, context):
    outcome, providers = Outcome(case), {name: [int] for name in NAMES}
    outcome.keep_right(providers, check)
    outcome.time(context, providers, seconds=0, rounds=(3, 3))
    outcome.compare("F.linear", "time / F.linear")
    return outcome
"""


def test_a_bench_reports_who_is_right_and_rejects_the_others(tmp_path):
    out, bench = tmp_path / "toy.json", tmp_path / "bench_toy.py"
    bench.write_text(TOY)
    command = [sys.executable, "-m", "pytest", "-c", "benchmarks/pytest.ini", bench, "--out", out]
    # In a worker of pytest-xdist pytest-benchmark turns itself off.
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    options = {"cwd": ROOT, "env": env, "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run([*command, "-p", "benchmarks.conftest", "--seconds=1e6"], **options)
    # Ours that is wrong fails the run, PEFT's does not; pytest-benchmark times the others.
    assert "1 failed, 2 passed, 5 skipped" in done.stdout, done.stdout
    assert "benchmark 'toy: n 1': 2 tests" in done.stdout
    run = results.Run.read(out)
    assert run.not_reached == ["toy: n 2"] and "commit" in run.environment
    assert [row["provider"] for row in run.rows] == ["F.linear", "ours"]
    assert [entry["provider"] for entry in run.wrong] == ["ours, wrong", "PEFT, wrong"]


def test_memory_is_counted_to_the_byte():
    x = torch.ones(1000, dtype=torch.float64)

    def call():
        kept = x + 1.0  # 8000 bytes
        temporary = torch.cat([x, x])  # 16000
        del temporary
        return kept * 2.0  # 8000

    assert counting.peak_extra_megabytes(call, CPU) == 24000 / 1e6


def test_ops_are_counted_inside_ours_too():
    layer, x = adalora_kernels.SVDLinear(8, 8, r=2), torch.randn(3, 8)
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


@pytest.mark.full
@pytest.mark.skipif("cpu" not in ops.library.device_types, reason="needs the compiled library")
def test_counts_are_those_of_the_baseline():
    # In a process of its own: here memory is poisoned, which takes ops.
    command = [sys.executable, "-m", "benchmarks.guard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    if done.returncode == 2:
        pytest.skip(f"other versions than those of constraints.txt: {done.stdout.strip()}")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_baseline_is_of_the_pinned_versions_and_of_every_bench():
    baseline = json.loads(guard.BASELINE.read_text())
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    for name in ("torch", "peft", "transformers"):
        assert f"{name}=={baseline['versions'][name].partition('+')[0]}" in pins
    works = {"one layer, forward", "one layer, forward + backward", "training step"}
    works |= {"importance only", "masking step", "orthogonality"}
    assert {row["work"] for row in baseline["rows"]} == works
    asked = {"dispatched ops", "ops inside those", "host syncs", "peak extra MB"}
    assert asked < {row["measure"] for row in baseline["rows"]}


def test_one_op_more_is_caught(monkeypatch, tmp_path, capsys):
    bench, once = bench_whole_model, adalora_kernels.orth_reg_grad_
    cases = bench.cases(harness.Context(CPU, smoke=True))
    case = next(case for case in cases if case.work == bench.ORTHOGONALITY)
    monkeypatch.setattr(guard, "BENCHES", ["whole_model"])
    monkeypatch.setattr(guard, "BASELINE", tmp_path / "baseline.json")
    monkeypatch.setattr(bench, "guarded", lambda: [case])
    assert guard.main(["--update"]) == guard.main([]) == 0
    monkeypatch.setattr(adalora_kernels, "orth_reg_grad_", lambda *a: (torch.ones(1), once(*a))[1])
    assert guard.main([]) == 1
    assert f"{whole_models.GRAD_OF_ADAPTERS}: dispatched ops: " in capsys.readouterr().out
    guard.BASELINE.write_text(json.dumps({"versions": {"torch": "1.0"}, "rows": []}))
    assert guard.main([]) == 2

"""The bench of one layer, as far as it runs without a GPU."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import bench_svd_linear as bench
from benchmarks import contest, timing
from benchmarks import svd_linear_rivals as layer

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
GOAL_SHAPES = [(4096, 4096), (4096, 14336), (14336, 4096)]


@pytest.fixture(scope="module", autouse=True)
def smoke_run(tmp_path_factory):
    """(process, file) of the whole bench, once; it runs beside the other tests."""
    out = tmp_path_factory.mktemp("smoke") / "results.json"
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_svd_linear.py", "--smoke"]
    process = subprocess.Popen(
        [*command, "--out", str(out)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    yield process, out
    process.kill()
    process.communicate()


@pytest.fixture
def counting():
    """Where rivals are checked and counted only."""
    return contest.Context(CPU, timed=False)


@pytest.fixture
def gpu_cases():
    return bench.cases(contest.Context(torch.device("cuda")))


@pytest.fixture
def cpu_cases():
    return bench.cases(contest.Context(CPU))


def on_cpu(**options):
    return layer.Case(32, 48, 16, 8, dtype=torch.float32, on_gpu=False, **options)


def ratios(case, direction, seconds):
    """The rows for made-up seconds, by rival."""
    rivals = bench.rivals_of(case, CPU)
    samples = {name: timing.Sample([t, t, t], "made up") for name, t in seconds.items()}
    return list(bench.ratios(case, direction, rivals, samples, CPU))


def test_goals_on_a_gpu_are_those_of_the_design(gpu_cases):
    rows = []
    for case in gpu_cases:
        for direction in case.directions:
            if case.goal("auto", direction):
                peft = (
                    {"PEFT": 2.4, "PEFT bf16": 1.2, "PEFT compiled": 1.3} if case.compiled else {}
                )
                seconds = {"F.linear": 1.0, "auto": 1.05, "auto bf16": 1.0, "cublas": 0.9, **peft}
                rows += ratios(case, direction, seconds)
    verdicts = [row.verdict for row in rows if row.goal and row.measure == "time / F.linear"]
    # In the order of the cases: forward, forward + backward of three; few rows of three by three.
    large = [f"goal <= {limit}" for limit in (1.06, 1.09, 1.03, 1.09, 1.05, 1.09)]
    assert [v.partition(":")[0] for v in verdicts] == large + ["goal <= 1.1"] * 9
    # A value that is the limit is within the spread.
    assert ["MISSED" in v for v in verdicts] == [i == 2 for i in range(15)]
    against_peft = {row.measure: row.verdict for row in rows if row.goal and row.goal[0] == ">="}
    assert against_peft == {
        "PEFT's time / time": "goal >= 2: met",
        "PEFT bf16's time / time": "goal >= 1.4: MISSED",
        "PEFT compiled's time / time": "goal >= 1.2: met",
    }


def test_goals_on_a_cpu_are_those_of_the_design(cpu_cases):
    goals = {}
    for case in cpu_cases:
        for direction in case.directions:
            rows = ratios(case, direction, dict.fromkeys(case.rivals, 1.0))
            for row in rows:
                if row.goal:
                    key = (case.M, case.K, case.N, case.r, case.dropout)
                    goals.setdefault((direction, *key), []).append((row.rival, row.goal))
    shapes = [(2048, 768, 768, 12), (2048, 768, 3072, 12)]
    assert goals == {
        ("forward + backward", *shape, dropout): [
            ("SVDLinear", ("<=", limit)),
            ("peft.apply", ("<=", limit)),
        ]
        for shape in shapes
        for dropout, limit in ((0.0, 1.12), (0.1, 1.35))
    }


def test_the_cases_are_those_asked_for(gpu_cases, cpu_cases):
    for cases in (gpu_cases, cpu_cases):
        assert len({str(case) for case in cases}) == len(cases)
    assert len(gpu_cases) == 3 * 6 * 8 + 3 + 14 and len(cpu_cases) == 4 + 14
    assert all(case.goal("auto", "forward") for case in gpu_cases[:12])
    assert [(case.K, case.N) for case in gpu_cases if case.compiled] == GOAL_SHAPES
    assert [case.compiled for case in cpu_cases[:4]] == [True, False, False, False]


def test_along_a_curve_nothing_else_varies(gpu_cases, cpu_cases):
    for cases in (gpu_cases, cpu_cases):
        for key, points in (("M", 6), ("r", 5), ("dtype", 3)):
            curve = [case.settings for case in cases if case.curve == key]
            assert len({settings.pop(key) for settings in curve}) == points == len(curve)
            assert all(settings == curve[0] for settings in curve)


def wrong_results(y):
    unwritten = y.clone()
    unwritten.view(-1)[-1] = torch.nan
    return {"scaled": y * 1.05, "unwritten": unwritten, "another function": y.detach() + y * 1e-2}


def spoil(monkeypatch, case, name, spoiled):
    """Have what one rival gives go through `spoiled`."""
    rivals = bench.rivals_of(case, CPU)
    right = rivals[name].forward
    rivals[name] = dataclasses.replace(rivals[name], forward=lambda one: spoiled(right(one)))
    monkeypatch.setattr(bench, "rivals_of", lambda *_: dict(rivals))


@pytest.mark.parametrize("how", ["scaled", "unwritten", "another function"])
@pytest.mark.parametrize(
    ("name", "dropout", "ours"),
    [
        ("SVDLinear", 0.0, True),
        ("peft.apply", 0.1, True),
        ("PEFT", 0.0, False),
        ("loralib", 0.1, False),
    ],
)
def test_a_wrong_result_is_refused_and_not_timed(monkeypatch, name, dropout, ours, how):
    case = on_cpu(dropout=dropout, curve="M")
    spoil(monkeypatch, case, name, lambda y: wrong_results(y)[how])
    outcome = bench.measure(case, contest.Context(CPU, smoke=True))
    assert outcome.refused.keys() == {name}
    assert outcome.refused[name].why.startswith("ArithmeticError") and (
        outcome.refused[name].ours == ours
    )
    others = {*case.rivals} - {name}
    assert outcome.samples.keys() == others == {row.rival for row in outcome.rows}


def test_a_rival_that_raises_ends_nothing(counting, monkeypatch):
    def fail(y):
        raise NotImplementedError("not on Tuesdays")

    case = on_cpu(counted=True)
    spoil(monkeypatch, case, "PEFT", fail)
    outcome = bench.measure(case, counting)
    assert outcome.refused["PEFT"].why == "NotImplementedError: not on Tuesdays"
    assert not outcome.refused["PEFT"].ours
    assert {row.rival for row in outcome.rows} == {*case.rivals} - {"PEFT"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_rivals_agree_in_other_types_and_go_on_with_dropout(dtype):
    case = dataclasses.replace(on_cpu(dropout=0.5), dtype=dtype)
    inputs = layer.make_inputs(case, 2, CPU)
    rivals = bench.rivals_of(case, CPU)
    assert layer.wrong_ones(case, rivals, inputs) == {}
    for name in ("PEFT", "loralib"):
        ys = [rivals[name].forward(inputs[0]) for _ in range(2)]
        assert ys[0].dtype == dtype and not torch.equal(*ys)


@pytest.mark.parametrize(("K", "N"), GOAL_SHAPES)
def test_what_is_planned_is_the_arithmetic_of_the_design(K, N):
    guarded = {}
    for row in bench.guarded_plans():
        settings = row.settings
        if (settings["K"], settings["N"]) == (K, N):
            key = (settings["M"], row.rival, row.case.removeprefix("svd_linear "))
            guarded.setdefault(key, {})[row.measure] = row.number
    M, r = 8192, 16
    x, y, weight, A, B, h, E = (
        2 * M * K,
        2 * M * N,
        2 * K * N,
        4 * r * K,
        4 * r * N,
        4 * M * r,
        4 * r,
    )
    down = x + A + h
    gemm = x + weight + h + E + B + y
    assert guarded[M, "two_pass", "forward"] == {
        "planned launches": 2,
        "planned bytes": down + gemm,
    }
    assert guarded[M, "cublas", "forward"] == {
        "planned launches": 3,
        "planned bytes": down + (x + weight + y) + (2 * y + h + E + B),
    }
    assert guarded[M, "auto", "forward"] == guarded[M, "two_pass", "forward"]
    launches = {
        key: counts["planned launches"] for key, counts in guarded.items() if key[1] != "auto"
    }
    assert launches == {
        (8192, "two_pass", "forward"): 2,
        (8192, "two_pass", "forward + backward"): 7,
        (8192, "cublas", "forward"): 3,
        (8192, "cublas", "forward + backward"): 9,
        (64, "one_pass", "forward"): 1,
        (64, "two_pass", "forward"): 2,
        (64, "two_pass", "forward + backward"): 7,
        (64, "cublas", "forward"): 3,
        (64, "cublas", "forward + backward"): 9,
    }


def test_what_is_guarded_is_the_same_in_every_run(counting):
    runs = [list(bench.guarded(counting)) for _ in range(2)]
    assert runs[0] == runs[1]
    found = {
        (row.rival, row.case.removeprefix("svd_linear "), row.measure): row.number
        for row in runs[0]
        if row.settings["M"] == 256 and not row.settings["dropout"]
    }
    y = dx = 256 * 768 * 4 / 1e6
    assert found["F.linear", "forward", "peak extra MB"] == y
    assert found["F.linear", "forward + backward", "peak extra MB"] == y + dx
    assert found["SVDLinear", "forward + backward", "dispatched ops"] == 2
    assert {rival for rival, *_ in found} == {
        "F.linear",
        "PEFT",
        "loralib",
        "reference.py",
        "SVDLinear",
        "peft.apply",
    }


@pytest.fixture(scope="module")
def smoke(smoke_run):
    """(what was printed, the results as JSON)."""
    process, out = smoke_run
    printed, _ = process.communicate(timeout=180)
    assert process.returncode == 0, printed
    return printed, json.loads(out.read_text())


def test_smoke_has_a_row_for_every_rival_of_every_case(smoke):
    printed, results = smoke
    assert results["refused"] == results["not_reached"] == [] and "warming up:" not in printed
    keys = ("K", "N", "M", "r", "dropout")
    found = {
        (*(row["settings"][key] for key in keys), row["case"], row["rival"])
        for row in results["rows"]
        if row["measure"] == "time / F.linear"
    }
    always = {"F.linear", "auto", "PEFT"}
    expected = set()
    for case in bench.cases(contest.Context(CPU, smoke=True)):
        rivals = set(always)
        if not case.dropout:
            rivals |= {"two_pass", "cublas"}
            rivals |= set() if case.curve else {"auto fp16", "PEFT fp16"}
        if case.compiled:
            rivals |= {"PEFT compiled", "loralib", "reference.py"}
        for direction in ("forward", "forward + backward"):
            few = {"one_pass"} if direction == "forward" and not case.dropout else set()
            key = (case.K, case.N, case.M, case.r, case.dropout, f"svd_linear {direction}")
            expected |= {(*key, rival) for rival in rivals | few}
    assert found == expected


def test_smoke_says_what_a_reader_needs(smoke):
    _, results = smoke
    timed = [row for row in results["rows"] if row["measure"] == "time / F.linear"]
    for row in timed:
        details = row["details"]
        assert row["value"]["p25"] <= row["value"]["median"] <= row["value"]["p75"]
        assert row["seconds"]["median"] > 0 and details["TFLOP/s"] > 0 and details["GB/s"] > 0
        assert details["clock"] == "CPU time of the process"
        assert row["settings"]["dtype"] == "float16"
    plans = {row["rival"]: row["details"].get("plan", "") for row in timed}
    assert plans["two_pass"].startswith("two_pass ") and plans["one_pass"].startswith("one_pass ")
    assert plans["cublas"] == "cublas, dx cublas"
    counted = {(row["rival"], row["measure"]) for row in results["rows"]} - {
        (row["rival"], "time / F.linear") for row in timed
    }
    for rival in ("F.linear", "auto", "PEFT"):
        assert {(rival, "peak extra MB"), (rival, "dispatched ops")} <= counted
    assert ("auto", "PEFT's time / time") in counted

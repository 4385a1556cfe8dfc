"""The benchmark round for a GPU, as far as it runs without one."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench():
    """The module; `benchmarks` is no installed package."""
    sys.path.insert(0, str(ROOT))
    yield importlib.import_module("benchmarks.gpu_svd_linear")
    sys.path.remove(str(ROOT))


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """(what was printed, the report as JSON, the long table) of the whole script, once."""
    out = tmp_path_factory.mktemp("round")
    command = [sys.executable, "-m", "benchmarks.gpu_svd_linear", "--smoke", "--workers", "1"]
    run = subprocess.run(
        [*command, "--out", out],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "warming up:" not in run.stdout, run.stdout
    report = json.loads((out / "svd_linear_gpu.json").read_text())
    return run.stdout, report, (out / "svd_linear_gpu.txt").read_text()


def test_smoke_has_a_row_for_every_rival_of_every_case(bench, smoke):
    _, report, table = smoke
    assert report["refused"] == report["not_reached"] == []
    settings = ("K", "N", "M", "r", "dropout")
    found = {
        (*(row["settings"][s] for s in settings), row["case"], row["rival"])
        for row in report["rows"]
        if row["measure"] == bench.RATIO
    }
    always = {"F.linear", "auto", "PEFT"}
    paths = {"two_pass", "cublas", "auto fp16", "PEFT fp16"}
    expected = set()
    for case in bench.smoke_cases():
        rivals = always if case.dropout else always | paths
        rivals = rivals | {"PEFT compiled"} if case.compiled else rivals
        for direction in ("forward", "forward + backward"):
            few = {"one_pass"} if direction == "forward" and not case.dropout else set()
            key = (case.K, case.N, case.M, case.r, case.dropout, f"svd_linear {direction}")
            expected |= {(*key, rival) for rival in rivals | few}
            assert any(line.startswith(f"{direction:18} {case}") for line in table.splitlines())
    assert found == expected


def test_smoke_says_what_a_reader_needs(smoke):
    printed, report, _ = smoke
    for row in report["rows"]:
        assert row["value"]["p25"] <= row["value"]["median"] <= row["value"]["p75"]
        if row["measure"] == "time / F.linear":
            assert row["seconds"]["median"] > 0 and row["TFLOP/s"] > 0 and row["GB/s"] > 0
            assert row["clock"] == "wall clock" and row["settings"]["dtype"] == "fp16"
    plans = {row["rival"]: row["plan"] for row in report["rows"] if "plan" in row}
    assert plans["two_pass"].startswith("two_pass ") and plans["one_pass"].startswith("one_pass ")
    assert plans["cublas"] == "cublas, dx cublas"
    assert {"commit", "device", "driver", "cuda", "python"} <= report["environment"].keys()
    assert report["environment"]["packages"]["torch"] == torch.__version__
    assert set(report["formulas"]) == {"ratio", "TFLOP/s", "GB/s"}
    assert min(report["ceilings"].values()) > 0
    assert len(printed.splitlines()) <= 60


def wrong_results(y):
    unwritten = y.clone()
    unwritten.view(-1)[-1] = torch.nan
    return {"scaled": y * 1.05, "unwritten": unwritten, "another function": y.detach() + y * 1e-2}


@pytest.mark.parametrize("how", ["scaled", "unwritten", "another function"])
def test_a_wrong_result_is_refused_and_not_timed(bench, monkeypatch, how):
    case = bench.Case(32, 48, 16, 8, dtype=torch.float16)
    right = bench.rivals_of(case, CPU)
    wrong = bench.dataclasses.replace(
        right["auto"], forward=lambda inputs: wrong_results(right["auto"].forward(inputs))[how]
    )
    rivals = {"F.linear": right["F.linear"], "auto": right["auto"], "two_pass": wrong}
    monkeypatch.setattr(bench, "rivals_of", lambda *_: dict(rivals))
    report = bench.Report(bench.environment(CPU), bench.measure_ceilings(CPU), bench.FORMULAS)
    bench.measure(case, CPU, report, seconds=0.0)
    assert report.ours_refused
    assert [(e["rival"], e["why"].partition(":")[0]) for e in report.refused] == [
        ("two_pass", "ArithmeticError")
    ]
    assert {result.row.rival for result in report.results} == {"F.linear", "auto"}
    assert "REFUSED two_pass" in "\n".join(bench.short_table(report))


def test_a_rival_that_raises_ends_nothing(bench, monkeypatch):
    def fail(inputs):
        raise NotImplementedError("not on Tuesdays")

    case = bench.Case(32, 48, 1, 8, dtype=torch.float16)
    rivals = bench.rivals_of(case, CPU)
    peft = bench.dataclasses.replace(rivals["PEFT"], forward=fail)
    rivals = {"F.linear": rivals["F.linear"], "auto": rivals["auto"], "PEFT": peft}
    monkeypatch.setattr(bench, "rivals_of", lambda *_: dict(rivals))
    report = bench.Report(bench.environment(CPU), bench.measure_ceilings(CPU), bench.FORMULAS)
    bench.measure(case, CPU, report, seconds=0.0)
    assert report.refused[0]["why"] == "NotImplementedError: not on Tuesdays"
    assert not report.ours_refused and len(report.results) == 4


def with_times(bench, case, direction, times):
    """Results of made-up seconds, by rival."""
    rivals = bench.rivals_of(case, CPU)
    samples = {name: bench.Sample([t, t, t], "made up") for name, t in times.items()}
    return bench.results_of(case, direction, rivals, samples, CPU)


def test_goals_are_those_of_the_design(bench):
    report = bench.Report(bench.environment(CPU), bench.measure_ceilings(CPU), bench.FORMULAS)
    slow = {"PEFT": 2.4, "PEFT bf16": 1.2, "PEFT compiled": 1.3}
    for case in bench.all_cases():
        for direction in ("forward", "forward + backward"):
            if case.goal(direction):
                peft = slow if case.compiled else {}
                times = {"F.linear": 1.0, "auto": 1.05, "auto bf16": 1.0, "cublas": 0.9, **peft}
                report.results += with_times(bench, case, direction, times)
    verdicts = [r.row.verdict for r in report.results if r.row.rival == "auto"]
    # In the order of the cases: forward, forward + backward of three; few rows of three by three.
    large = [f"goal <= {limit}" for limit in (1.06, 1.09, 1.03, 1.09, 1.05, 1.09)]
    assert [v.partition(":")[0] for v in verdicts] == large + ["goal <= 1.1"] * 9
    assert [v.endswith("MISSED") for v in verdicts] == [i == 2 for i in range(15)]
    lines = list(bench.short_table(report))
    assert len(lines) <= 60
    peft = [line for line in lines if line.startswith("PEFT's time / ours")]
    assert len(peft) == 3
    for text in ("goal >= 2: met", "PEFT bf16 1.200", "goal >= 1.4: MISSED", "goal >= 1.2: met"):
        assert text in peft[0]
    assert any("auto takes 1.167 x the time of cublas" in line for line in lines)


def test_the_cases_are_those_asked_for(bench):
    cases = bench.all_cases()
    assert len({str(case) for case in cases}) == len(cases) == 3 * 6 * 7 + 3
    assert all(case.goal("forward") for case in cases[:12])
    assert [case.compiled for case in cases] == [True] * 3 + [False] * (len(cases) - 3)


def test_what_the_budget_does_not_reach_is_listed(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "warm_up", lambda *_: 0)
    bench.run(bench.smoke_cases(), CPU, tmp_path, seconds=0.0, workers=1)
    report = json.loads((tmp_path / "svd_linear_gpu.json").read_text())
    assert report["rows"] == [] and len(report["not_reached"]) == len(bench.smoke_cases())


def test_ratios_are_taken_within_a_round(bench):
    samples = {
        "a": bench.Sample([1.0, 2.0, 4.0], "made up"),
        "b": bench.Sample([2.0, 4.0, 8.0], "made up"),
    }
    timing = bench.timings(samples, "a")["b"]
    assert (timing.slower.p25, timing.slower.p75, timing.faster.median) == (2.0, 2.0, 0.5)
    assert timing.seconds.median == 4.0


@pytest.fixture(scope="module")
def allocation(bench):
    """The module; `bench` makes it importable."""
    return importlib.import_module("benchmarks.gpu_allocation")


@pytest.fixture(scope="module")
def allocation_smoke(tmp_path_factory):
    """(what was printed, the report as JSON) of the whole script, once."""
    out = tmp_path_factory.mktemp("allocation")
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_allocation", "--smoke", "--out", out],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout, json.loads((out / "allocation_gpu.json").read_text())


def test_allocation_smoke_has_every_rival_of_every_case(allocation, allocation_smoke):
    printed, report = allocation_smoke
    assert report["refused"] == report["not_reached"] == []
    found = {}
    for row in report["rows"]:
        found.setdefault((row["case"], row["measure"]), []).append(row["rival"])
    a = allocation
    steps = [a.PEFT, a.APPLIED, a.STEP]
    orthogonality = [a.PEFT, a.APPLIED, a.ORTH_REG, a.GRAD_OF_MODEL, a.GRAD_OF_ADAPTERS, a.BATCHED]
    expected = {
        (a.DEVICE, a.RATIO): [a.FLOOR, a.UPDATE, a.FOREACH],
        (a.DEVICE, a.RATE): [a.FLOOR, a.UPDATE, a.FOREACH],
        (a.MASKING, a.FASTER): [*steps, a.CAPTURED],
        (a.MASKING, "dispatched ops"): [*steps, a.CAPTURED],
        (a.IMPORTANCE, a.FASTER): [*steps, a.FOREACH],
        (a.ORTHOGONALITY, a.FASTER): orthogonality,
        (a.ORTHOGONALITY, "dispatched ops"): orthogonality,
        (a.ORTHOGONALITY_DEVICE, a.FASTER): [a.PEFT, a.GRAD_OF_ADAPTERS, a.BATCHED],
        (a.ORTHOGONALITY_DEVICE, a.RATE): [a.GRAD_OF_ADAPTERS, a.BATCHED],
    }
    assert {key: sorted(rivals) for key, rivals in found.items()} == {
        key: sorted(rivals) for key, rivals in expected.items()
    }
    assert report["environment"]["implementations"].keys() >= {"importance_update_", "allocate_"}
    assert all(rival in printed for rivals in expected.values() for rival in rivals)
    assert max(map(len, printed.splitlines())) <= 150


def new_report(allocation):
    ceilings = allocation.measure_ceilings(CPU)
    report = allocation.Report(allocation.environment(CPU), ceilings, allocation.FORMULAS)
    allocation.note_implementations(report, "cpu")
    return report


def test_kernels_that_are_not_there_fail_the_run_and_are_in_the_table(allocation, monkeypatch):
    from adalora_kernels.ops import Implementation

    rows = [
        Implementation("svd_linear", "triton", ""),
        Implementation("importance_update_", "reference (plain PyTorch)", "built for CPU only"),
        Implementation("allocate_", "CUDA C++", ""),
    ]
    monkeypatch.setattr(allocation.ops, "implementations", lambda _: rows)
    report = new_report(allocation)
    assert not report.ours_refused
    allocation.note_implementations(report, "cuda")
    assert report.ours_refused
    table = "\n".join(allocation.table(report))
    assert (
        "REFUSED CUDA C++, all: NOT THERE, below importance_update_ are plain PyTorch: "
        "built for CPU only" in table
    )
    for line in (
        "ours, reference (plain PyTorch): importance_update_",
        "ours, CUDA C++: allocate_",
    ):
        assert line in table.splitlines()


def test_wrong_rivals_of_the_allocation_are_refused(allocation, monkeypatch):
    def wrong_importance(model, *args):
        right = ours_importance(model, *args)
        return dataclasses.replace(right, scores=lambda: right.scores() * 1.001)

    def wrong_orthogonality(model, **options):
        return allocation.Orthogonality(model, lambda: model.base_model().loss * 1.001)

    rivals = allocation.rivals_
    ours_importance = rivals.direct_importance
    monkeypatch.setattr(rivals, "direct_importance", wrong_importance)
    monkeypatch.setattr(rivals, "direct_orthogonality", wrong_orthogonality)
    report = new_report(allocation)
    allocation.measure(allocation.TINY, CPU, report, seconds=0.0)
    wrong = {allocation.STEP, allocation.GRAD_OF_MODEL, allocation.GRAD_OF_ADAPTERS}
    assert {e["rival"] for e in report.refused} == wrong and report.ours_refused
    assert all(e["why"].startswith("ArithmeticError") for e in report.refused)
    wrong |= {allocation.UPDATE, allocation.CAPTURED}
    assert wrong.isdisjoint(result.row.rival for result in report.results)


def test_goals_of_the_allocation_are_those_of_the_design(allocation, monkeypatch):
    made_up = {"RankAllocator.step": 0.031, "allocator.update()": 1.25, "torch._foreach": 9.0}

    def samples(calls, *_, **__):
        return {name: allocation.Sample([made_up.get(name, 1.0)] * 3, "made up") for name in calls}

    monkeypatch.setattr(allocation, "LLAMA_8B", allocation.TINY)
    for timer in ("interleaved", "wall_clock"):
        monkeypatch.setattr(allocation, timer, samples)
    report = new_report(allocation)
    allocation.measure(allocation.TINY, CPU, report, seconds=0.0)
    verdicts = {(r.row.case, r.row.rival): r.row.verdict for r in report.results if r.row.verdict}
    a = allocation
    assert verdicts == {
        (a.DEVICE, a.UPDATE): "goal <= 1.3: met",
        (a.MASKING, a.STEP): "goal >= 30: met",
        **{(a.MASKING, name): "goal >= 30: MISSED" for name in (a.APPLIED, a.CAPTURED)},
        **{
            (a.ORTHOGONALITY, name): "goal >= 30: MISSED"
            for name in (a.APPLIED, a.ORTH_REG, a.GRAD_OF_MODEL, a.GRAD_OF_ADAPTERS)
        },
    }


def test_kernel_names_are_cut_to_what_a_reader_needs(allocation):
    use = importlib.import_module("benchmarks.gpu_timing").KernelUse
    ours = "void adalora::cuda::(anonymous namespace)::update<float>(adalora::Table<int>, int*)"
    assert use(ours, 1, 1.0).short_name == "update"
    assert use("_gemm_kernel", 1, 1.0).short_name == "_gemm_kernel"
    assert use("Memset (Device)", 1, 1.0).is_kernel is False


@pytest.fixture
def round_(tmp_path):
    """Runs stages with an interpreter that only says how it was called."""
    script = tmp_path / "benchmarks" / "gpu_round.sh"
    script.parent.mkdir()
    script.write_text((ROOT / "benchmarks" / "gpu_round.sh").read_text())
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\n[ "$1" = -c ] && exit ${NO_LIBRARY:-0}\n'
        'echo "library=$ADALORA_KERNELS_LIBRARY build=$ADALORA_KERNELS_BUILD: $*"\n'
        '[ "$1" != setup.py ]\n'
    )
    python.chmod(0o755)

    def run(*stages, **environment):
        env = {**os.environ, "PYTHON": str(python), "OUT": str(tmp_path / "out"), **environment}
        done = subprocess.run(
            ["bash", script, *stages], env=env, capture_output=True, text=True, timeout=60
        )
        return done, (tmp_path / "out" / "log.txt").read_text()

    return run


def test_round_builds_the_library_unless_there_is_one(round_, tmp_path):
    done, log = round_("carried", "build", "allocation")
    assert done.returncode == 0 and "build=cuda" not in log
    assert "library= build=: -m benchmarks.gpu_allocation" in log
    done, log = round_("carried", "build", "allocation", NO_LIBRARY="1")
    assert done.returncode == 1 and "FAILED" in done.stdout
    assert "library= build=cuda: setup.py build_ext --inplace" in log
    assert "library= build=: -m benchmarks.gpu_allocation" in log


def test_round_tries_a_library_that_was_brought_along(round_, tmp_path):
    library = tmp_path / "build" / "carried" / "_C.abi3.so"
    library.parent.mkdir(parents=True)
    library.touch()
    _, log = round_("carried", "build", "allocation", NO_LIBRARY="1")
    assert f"library={library} build=: -m adalora_kernels" in log
    # The build failed.
    assert f"library={library} build=: -m benchmarks.gpu_allocation" in log


def test_round_keeps_time_for_the_benchmarks(round_):
    _, log = round_("build", "tune", "allocation", "svd_linear", NO_LIBRARY="1")
    assert "== build, at most 120 s" in log and "== allocation, at most 80 s" in log
    done, log = round_("build", "tune", "allocation", NO_LIBRARY="1", ROUND_SECONDS="87")
    assert "tune (optional)                no time for it" in done.stdout
    assert "== tune" not in log
    limit = int(log.partition("== allocation, at most ")[2].partition(" s")[0])
    assert 80 >= limit > 70


def test_the_script_is_valid_bash():
    script = ROOT / "benchmarks" / "gpu_round.sh"
    subprocess.run(["bash", "-n", script], check=True)

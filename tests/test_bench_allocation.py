"""The benches over all adapters of a model, as far as they run without a GPU."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import (
    allocation_cases,
    allocation_rivals,
    bench_allocation,
    bench_importance,
    bench_orth_reg,
    contest,
    orth_reg_rivals,
    peft_models,
    timing,
)

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
BENCHES = (bench_importance, bench_allocation, bench_orth_reg)


@pytest.fixture(scope="module", autouse=True)
def smoke_run(tmp_path_factory):
    """(process, file) of the three benches, once; it runs beside the other tests."""
    out = tmp_path_factory.mktemp("smoke") / "results.json"
    files = [bench.__file__ for bench in BENCHES]
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", *files, "--smoke", "--out", str(out)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    yield process, out
    process.kill()
    process.communicate()


@pytest.fixture
def shared():
    """The module of the cases."""
    return allocation_cases


@pytest.fixture
def tiny():
    return peft_models.SMOKE[0]


def context(**options):
    where = contest.Context(CPU, **options)
    # Not measured: nothing here is about speed.
    where.__dict__["ceilings"] = timing.Ceilings(1e9, 1e9, torch.float32)
    return where


def case_of(bench, work, where):
    """The first one of this work."""
    return next(case for case in bench.cases(where) if case.work == work)


@pytest.mark.gpu
@pytest.mark.parametrize("rivals", [allocation_rivals, orth_reg_rivals], ids=["steps", "orth_reg"])
def test_right_rivals_are_not_refused(rivals, tiny):
    """On a GPU the captured step is among them."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = allocation_rivals.models_of(tiny, list(rivals.MAKE), device)
    made = {name: make(models[name]) for name, make in rivals.MAKE.items()}
    wrong = getattr(rivals, "wrong_importance", None) or rivals.wrong_orthogonality
    assert wrong(made) == {}


def test_rivals_can_share_a_model_and_leave_it_as_it_was(tiny, monkeypatch):
    rivals, models = allocation_rivals, peft_models
    monkeypatch.setattr(rivals, "_LARGE", 0)
    shared = rivals.models_of(tiny, list(rivals.MAKE), CPU)
    assert len({id(model) for model in shared.values()}) == 2
    made = {name: make(shared[name]) for name, make in rivals.MAKE.items()}
    assert rivals.wrong_importance(made) == {}
    for rival in (rivals.PEFT, rivals.APPLIED):
        untouched = models.trained(models.adapted_model(tiny))
        for after, before in zip(models.trained(shared[rival]), untouched, strict=True):
            assert torch.equal(after, before)


def scores_of_another(model):
    right = allocation_rivals.direct_importance(model)
    return dataclasses.replace(right, scores=lambda: right.scores() * 1.001)


def averages_without_the_last(model):
    right = allocation_rivals.loralib_importance(model)

    def averages():
        ipt, unc = right.averages()
        return ipt, [*unc[:-1], unc[-1] * torch.nan]

    return dataclasses.replace(right, averages=averages)


def masking_nothing(model):
    right = allocation_rivals.applied_importance(model)
    return dataclasses.replace(right, step=lambda step: right.step(5))


@pytest.mark.parametrize(
    ("rival", "plant", "ours"),
    [
        ("STEP", scores_of_another, True),
        ("APPLIED", masking_nothing, True),
        ("LORALIB", averages_without_the_last, False),
    ],
)
def test_a_wrong_step_is_refused_and_not_timed(monkeypatch, rival, plant, ours):
    rivals, bench = allocation_rivals, bench_allocation
    name = getattr(rivals, rival)
    monkeypatch.setitem(rivals.MAKE, name, plant)
    where = context(smoke=True)
    outcome = bench.measure(case_of(bench, bench.MASKING, where), where)
    assert {name: refusal.ours for name, refusal in outcome.refused.items()} == {name: ours}
    assert outcome.refused[name].why.startswith("ArithmeticError")
    timed = {row.rival for row in outcome.rows}
    assert name not in timed | outcome.samples.keys() and rivals.CAPTURED in timed


def test_a_wrong_update_is_not_captured(monkeypatch):
    rivals, bench = allocation_rivals, bench_importance
    monkeypatch.setitem(rivals.MAKE, rivals.UPDATE, scores_of_another)
    where = context(smoke=True)
    outcome = bench.measure(case_of(bench, bench.DEVICE, where), where)
    assert outcome.refused.keys() == {rivals.UPDATE} and outcome.refused[rivals.UPDATE].ours
    assert {row.rival for row in outcome.rows} == {bench.COPY, rivals.FOREACH, rivals.REFERENCE}


@pytest.mark.parametrize("work", ["ORTHOGONALITY", "DEVICE"])
def test_a_wrong_regulariser_is_refused_and_not_timed(monkeypatch, work):
    rivals, bench = orth_reg_rivals, bench_orth_reg

    def wrong(model):
        return rivals.Orthogonality(model, lambda: model.base_model().loss * 1.001)

    monkeypatch.setitem(rivals.MAKE, rivals.GRAD_OF_ADAPTERS, wrong)
    where = context(smoke=True)
    outcome = bench.measure(case_of(bench, getattr(bench, work), where), where)
    assert outcome.refused.keys() == {rivals.GRAD_OF_ADAPTERS}
    assert outcome.refused[rivals.GRAD_OF_ADAPTERS].ours
    assert rivals.GRAD_OF_ADAPTERS not in {row.rival for row in outcome.rows}


def test_a_graph_that_cannot_be_captured_ends_nothing(monkeypatch):
    rivals, bench = allocation_rivals, bench_allocation

    def fail(model):
        raise RuntimeError("operation not permitted when stream is capturing\nmore of it")

    monkeypatch.setitem(rivals.MAKE, rivals.CAPTURED, fail)
    where = context(smoke=True)
    outcome = bench.measure(case_of(bench, bench.MASKING, where), where)
    refusal = outcome.refused[rivals.CAPTURED]
    assert refusal.ours and refusal.why.endswith("permitted when stream is capturing")
    assert outcome.samples.keys() == set(bench.RIVALS)


def test_kernels_that_are_not_there_fail_the_run(shared, monkeypatch):
    from adalora_kernels.ops import Implementation

    plain = "reference (plain PyTorch)"
    rows = [
        Implementation("svd_linear", plain, "no triton"),
        Implementation("importance_update_", plain, "built for CPU only"),
        Implementation("allocate_", "CUDA C++", ""),
    ]
    monkeypatch.setattr(shared.ops, "implementations", lambda _: rows)
    assert shared.missing_kernels(CPU) == ""
    why = shared.missing_kernels(torch.device("cuda"))
    assert why == "NOT THERE, importance_update_ are plain PyTorch: built for CPU only"
    monkeypatch.setattr(shared, "missing_kernels", lambda _: why)
    monkeypatch.setattr(shared, "peak_extra_memory", lambda *_: 0)
    where = context(smoke=True)
    for bench in BENCHES:
        case = bench.cases(where)[0]
        outcome = bench.measure(case, where)
        ours = set(case.rivals) & set(bench.OURS)
        assert {each for each, refusal in outcome.refused.items() if refusal.ours} == ours
        assert {row.rival for row in outcome.rows} == set(case.rivals) - ours


@pytest.fixture
def made_up(shared, monkeypatch):
    """Seconds of some rivals, 1 of the others, in place of timing; no memory."""
    seconds = {}
    monkeypatch.setattr(shared, "peak_extra_memory", lambda *_: 0)

    def samples(calls, *_, **__):
        return {name: timing.Sample([seconds.get(name, 1.0)] * 3, "made up") for name in calls}

    monkeypatch.setattr(contest, "interleaved", samples)
    return seconds


def verdicts(where):
    """Of the goals on times, by bench, work and rival."""
    found = {}
    for bench in BENCHES:
        for case in bench.cases(where):
            rows = bench.measure(case, where).rows
            found |= {
                (bench.__name__.rpartition("bench_")[2], case.work, row.rival): row.verdict
                for row in rows
                if row.verdict and row.seconds is not None
            }
    return found


def test_goals_on_a_gpu_are_those_of_the_design(shared, tiny, made_up, monkeypatch):
    monkeypatch.setattr(shared, "LLAMA_8B", tiny)
    made_up |= {"RankAllocator.step": 0.031, "RankAllocator.update": 1.25, "torch._foreach": 9.0}
    orthogonality = orth_reg_rivals
    assert verdicts(context(smoke=True)) == {
        ("importance", "importance + allocation on the device", "RankAllocator.update"): (
            "goal <= 1.3: met"
        ),
        ("allocation", "masking step", "RankAllocator.step"): "goal >= 30: met",
        **{
            ("allocation", "masking step", name): "goal >= 30: MISSED"
            for name in ("adalora_kernels.peft.apply", "RankAllocator.update, captured")
        },
        **{
            ("orth_reg", "orthogonality", name): "goal >= 30: MISSED" for name in orthogonality.OURS
        },
    }


def test_goals_on_a_cpu_are_those_of_the_design(shared, tiny, made_up, monkeypatch):
    monkeypatch.setattr(shared, "DEBERTA_BASE", tiny)
    monkeypatch.setattr(shared, "architectures", lambda _: (tiny,))
    monkeypatch.setattr(bench_orth_reg, "architectures", lambda _: (tiny,))
    made_up |= {"RankAllocator.step": 0.09, "orth_reg_grad_(model)": 0.33}
    orthogonality = orth_reg_rivals
    assert verdicts(context()) == {
        ("allocation", "masking step", "RankAllocator.step"): "goal >= 10: met",
        ("allocation", "masking step", "adalora_kernels.peft.apply"): "goal >= 10: MISSED",
        **{
            ("orth_reg", "orthogonality", name): (
                "goal >= 3: met" if name == orthogonality.GRAD_OF_MODEL else "goal >= 3: MISSED"
            )
            for name in orthogonality.OURS
        },
    }


def test_ops_and_host_syncs_are_held_to_the_design():
    where = context(smoke=True, timed=False)
    bench = bench_allocation
    rows = bench.measure(case_of(bench, bench.MASKING, where), where).rows
    goals = {(row.rival, row.measure): row.verdict for row in rows if row.goal}
    for name in (bench.APPLIED, bench.STEP, bench.CAPTURED):
        assert goals[name, "dispatched ops"] == "goal <= 40: met"
        assert goals[name, "host syncs"] == "goal <= 0: met"
    syncs = {row.rival: row.number for row in rows if row.measure == "host syncs"}
    assert syncs[bench.PEFT] == syncs[bench.LORALIB] == 1
    bench = bench_orth_reg
    rows = bench.measure(case_of(bench, bench.ORTHOGONALITY, where), where).rows
    verdict = {r.rival: r.verdict for r in rows if r.measure == "dispatched ops" and r.goal}
    assert verdict == dict.fromkeys(
        ("orth_reg_grad_(model)", "orth_reg_grad_(adapters)"), "goal <= 10: met"
    )


@pytest.mark.parametrize("on_gpu", [False, True])
def test_the_cases_are_those_asked_for(shared, on_gpu, monkeypatch):
    monkeypatch.setattr(contest.Context, "for_gpu", on_gpu)
    where = context()
    for bench in BENCHES:
        cases = bench.cases(where)
        assert len({str(case) for case in cases}) == len(cases)
        assert shared.has_goals(cases[0], where)
        curves = {}
        for case in cases:
            settings = dict(case.row("", "", 0).settings)
            if "curve" in settings:
                key = settings["curve"]
                value = settings.pop(key)
                curves.setdefault((case.work, str(sorted(settings.items()))), []).append(value)
            else:
                assert settings["matrices"] == settings["layers"] * len(settings["shapes"])
        # A masking step has all of an update without masking in it.
        asked = bench is not bench_importance
        expected = [[1, 4, 16, 64, 256], [1, 10, 100, 1000]] if asked else []
        assert sorted(curves.values()) == expected


def test_what_is_guarded_is_the_same_in_every_run(tiny, monkeypatch):
    where = context(timed=False)
    for bench in BENCHES:
        monkeypatch.setattr(bench, "DEBERTA_BASE", tiny)
        first, second = ([row.as_json() for row in bench.guarded(where)] for _ in range(2))
        assert first == second and {row["rival"] for row in first} == set(bench.RIVALS)
        measures = {"dispatched ops", "ops inside those", "host syncs", "peak extra MB"}
        assert {row["measure"] for row in first} == measures


def test_smoke_has_a_row_for_every_rival_of_every_case(smoke_run):
    process, out = smoke_run
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    contents = json.loads(out.read_text())
    assert contents["refused"] == contents["not_reached"] == []
    found = {}
    for row in contents["rows"]:
        key = (row["case"], json.dumps(row["settings"]), row["rival"])
        found.setdefault(key, set()).add(row["measure"])
    where, expected = context(smoke=True), {}
    for bench in BENCHES:
        for case in bench.cases(where):
            settings = json.dumps(case.row("", "", 0).settings)
            measures = {"PEFT's time / time"}
            if case.work == "importance + allocation on the device":
                measures = {"time / copy of as many bytes", "GB/s at 24 B per entry"}
            elif case.work == "single ops":
                measures = {"dispatched ops"}
            expected |= {(case.work, settings, rival): measures for rival in case.rivals}
    assert found.keys() == expected.keys()
    assert all(expected[key] <= measures for key, measures in found.items())

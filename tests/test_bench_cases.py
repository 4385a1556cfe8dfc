"""Wrong results are not timed, the cases and goals are those asked for, and all of it runs."""

import dataclasses
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import bench_svd_linear, bench_train_step, bench_whole_model, harness, results
from benchmarks import svd_linear_layers as layers
from benchmarks import whole_models as whole

ROOT = Path(__file__).resolve().parent.parent
CPU = harness.Context(torch.device("cpu"))
GPU = harness.Context(torch.device("cuda"))
SMOKE = harness.Context(CPU.device, smoke=True)
BENCHES = (bench_svd_linear, bench_whole_model, bench_train_step)


def check_only_wrong(bench, case, name):
    outcome = bench.measure(case, SMOKE)
    assert outcome.wrong.keys() == {name} and outcome.wrong[name].startswith("ArithmeticError")
    assert outcome.calls.keys() == set(case.providers) - {name}


def unwritten(y):
    y = y.clone()
    y.view(-1)[-1] = torch.nan
    return y


FAULTS = {"scaled": lambda y: y * 1.05, "unwritten": unwritten, "other": lambda y: y + y.detach()}
LAYER_FAULTS = [("SVDLinear", 0, "scaled"), ("peft.apply", 0.1, "other"), ("PEFT", 0, "unwritten")]


@pytest.mark.parametrize(("name", "dropout", "fault"), LAYER_FAULTS)
def test_a_wrong_layer_is_not_timed(monkeypatch, name, dropout, fault):
    options = {"dropout": dropout, "dtype": torch.float32, "on_gpu": False}
    case = bench_svd_linear._cases([layers.Layer(32, 48, 16, 8, **options)])[1]
    providers = layers.providers_of(case.of, CPU.device)
    right = providers[name].forward
    wrong = dataclasses.replace(providers[name], forward=lambda one: FAULTS[fault](right(one)))
    monkeypatch.setattr(layers, "providers_of", lambda *_: {**providers, name: wrong})
    check_only_wrong(bench_svd_linear, case, name)


def nan_averages(model):
    right = whole.our_step(model)
    return right._replace(results=lambda: [t * torch.nan for t in right.results()])


idle = partial(whole.our_step, call=lambda step: None)
MODEL_FAULTS = [
    ("masking step", "STEPS", whole.STEP, nan_averages),
    ("masking step", "STEPS", whole.APPLIED, idle),
    ("importance + allocation on the device", "STEPS", whole.UPDATE, idle),
    ("orthogonality", "REGULARISERS", whole.GRAD_OF_ADAPTERS, None),
]


@pytest.mark.parametrize(("work", "table", "name", "plant"), MODEL_FAULTS)
def test_wrong_work_on_a_model_is_not_timed(monkeypatch, work, table, name, plant):
    plant = plant or (lambda model: whole.regulariser(model, lambda: model.base_model().loss))
    monkeypatch.setattr(whole, table, {**getattr(whole, table), name: plant})
    case = next(case for case in bench_whole_model.cases(SMOKE) if case.work == work)
    check_only_wrong(bench_whole_model, case, name)


def no_regulariser(trainee):
    trainee.allocator.orth_reg_weight = 0.0


def another_function(trainee):
    inner = trainee.model.base_model.model.model.layers[0]
    inner.register_forward_hook(lambda module, args, output: output * 1.01)


SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TINY = bench_train_step._llama("tiny", **SIZES, num_attention_heads=4, num_key_value_heads=2)


@pytest.mark.parametrize("plant", [no_regulariser, another_function])
def test_a_wrong_step_is_not_timed(plant, monkeypatch):
    case, name = bench_train_step.Step(TINY, 2, 16).case, bench_train_step.APPLIED
    made = bench_train_step.make_trainees(TINY, case.providers, CPU.device, torch.float32)
    plant(made[name])
    monkeypatch.setattr(bench_train_step, "_trainees", lambda *_: made)
    check_only_wrong(bench_train_step, case, name)


def test_cases_and_goals_are_those_of_the_design():
    limits, curves = {}, set()
    for context in (GPU, CPU):
        cases = [case for bench in BENCHES for case in bench.cases(context)]
        curves |= {(case.work, case.curve) for case in cases if case.curve}
        for case in cases:
            goals = limits.setdefault((context.for_gpu, case.work), set())
            goals |= {goal for (_, measure), goal in case.goals.items() if "time" in measure}
    both, step = "one layer, forward + backward", "training step"
    assert curves >= {("masking step", "matrices"), ("orthogonality", "r"), (both, "M")}
    assert limits[True, "one layer, forward"] == {"<= 1.03", "<= 1.05", "<= 1.06", "<= 1.1"}
    assert limits[True, both] == {"<= 1.09", ">= 2", ">= 1.4", ">= 1.2"}
    assert limits[True, "importance + allocation on the device"] == {"<= 1.3"}
    assert limits[True, "orthogonality"] == limits[True, "masking step"] == {">= 30"}
    assert limits[False, both] == {"<= 1.12", "<= 1.35"}
    assert limits[False, "masking step"] == {">= 10"} and limits[False, "orthogonality"] == {">= 3"}
    assert limits[True, step] == limits[False, step] == {"<= 1"}


@pytest.mark.parametrize("shape", bench_svd_linear.GOAL_SHAPES)
def test_what_is_planned_is_the_arithmetic_of_the_design(shape):
    (K, N), M, r = shape, 8192, 16
    x, y, weight, A, B, h, E = (2 * M * K, 2 * M * N, 2 * K * N, *(4 * r * n for n in (K, N, M, 1)))
    moved = {"two_pass": (x + A + h) + (x + weight + h + E + B + y)}
    moved["cublas"] = (x + A + h) + (x + weight + y) + (2 * y + h + E + B)
    for path, launches in (("two_pass", [2, 7]), ("cublas", [3, 9])):
        both = [layers.Layer(K, N, M, r, way) for way in (layers.FORWARD, layers.BACKWARD)]
        there = [bench_svd_linear.planned(layer, path, bench_svd_linear._H200) for layer in both]
        assert [len(launched) for launched in there] == launches
        assert sum(launch.moved for launch in there[0]) == moved[path]


@pytest.mark.full
def test_smoke_has_a_ratio_for_every_provider_of_every_case(tmp_path):
    out, command = tmp_path / "out.json", [sys.executable, "-m", "pytest", "benchmarks", "--smoke"]
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    options = {"env": env | {"TRITON_INTERPRET": "1"}, "capture_output": True, "text": True}
    done = subprocess.run([*command, "--out", out], cwd=ROOT, timeout=600, **options)
    assert done.returncode == 0, done.stdout
    run = results.Run.read(out)
    assert run.wrong == run.not_reached == []
    rows = [row for row in run.rows if "clock" in row]
    found = {(row["work"], json.dumps(row["settings"]), row["provider"]) for row in rows}
    cases = [case for bench in BENCHES for case in bench.cases(SMOKE)]
    named = {(c.work, json.dumps(c.settings), name) for c in cases for name in c.providers}
    assert found == named and all(row["p25"] <= row["value"] <= row["p75"] for row in rows)

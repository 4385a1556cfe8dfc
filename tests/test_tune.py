"""Tuning: every candidate is called, the fastest is kept."""

import pytest
import torch

from adalora_kernels import __main__ as command
from adalora_kernels.kernels.launch import INTERPRETED
from adalora_kernels.kernels.svd_linear import plans
from adalora_kernels.kernels.tune import Layer, candidates, tune

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
LAYER = Layer(torch.float16, 16, 32, 48, 4)


def test_the_fastest_candidate_is_kept():
    def seconds(calls_of):
        for calls in calls_of.values():
            for call in calls[:2]:
                assert all(t.isfinite().all() for t in call())
        # The second one is the fastest.
        return {plan: abs(i - 1.0) + 1.0 for i, plan in enumerate(calls_of)}

    found = {
        problem.product: (problem, plan, s) for problem, plan, s in tune([LAYER], DEVICE, seconds)
    }
    problem, plan, s = found["y"]
    assert problem == plans.Problem(torch.float16, 16, 32, 48, 16, "y") and s == 1.0
    assert plan == candidates(plans.device_of(DEVICE), problem)[1]
    assert found["dx"][0] == plans.Problem(torch.float16, 16, 48, 32, 16, "dx")


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs an NVIDIA GPU")
def test_plans_take_turns():
    found = list(tune([LAYER], DEVICE))
    assert [problem.product for problem, _, _ in found] == ["y", "dx"]
    assert all(0 < seconds < 1 for _, _, seconds in found)


def test_candidates_cover_the_paths_that_can_run():
    gpu = plans.Device("NVIDIA H200", "sm_90", 132)
    few = candidates(gpu, plans.Problem(torch.bfloat16, 16, 4096, 4096, 16, "y"))
    assert {plan.path for plan in few} == {"two_pass", "cublas"}
    all_of_them = candidates(gpu, plans.Problem(torch.bfloat16, 8192, 4096, 4096, 16, "y"))
    assert {plan.path for plan in all_of_them} == set(plans.PATHS)
    many = candidates(gpu, plans.Problem(torch.bfloat16, 8192, 4096, 4096, 64, "dx"))
    assert {plan.path for plan in many} == {"two_pass", "cublas"}


def test_what_is_measured_is_written_and_used(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("ADALORA_KERNELS_CACHE", str(tmp_path))
    plans.forget_tables()
    command.tune([LAYER], DEVICE, lambda calls_of: dict.fromkeys(calls_of, 1e-6))
    assert capsys.readouterr().out.count("1.0 us") == 2
    gpu = plans.device_of(DEVICE)
    table = plans.read_table(plans.cache_path(), gpu.name)
    assert {problem.product for problem in table} == {"y", "dx"}
    for problem, plan in table.items():
        assert plans.choose(gpu, problem) == plan
    plans.forget_tables()


def test_the_command_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["--tune"]) == 1
    assert "NVIDIA GPU" in capsys.readouterr().err

"""One budget over the stages of a pipeline: the ranks are those of one process."""

import pytest
import torch
from pipeline_runs import RANKS, STEPS, train
from ranks import on_ranks

from adalora_kernels.allocator.members import Members


@pytest.mark.parametrize(
    ("world", "cases", "stages"),
    [
        pytest.param(2, ["attached"], "stages", id="2", marks=pytest.mark.full),
        pytest.param(2, ["by_hand"], "stages", id="2_by_hand", marks=pytest.mark.full),
        pytest.param(4, ["attached", "by_hand"], "stages", id="4"),
        pytest.param(
            4, ["attached", "by_hand"], "sharded_stages", id="4_sharded", marks=pytest.mark.full
        ),
    ],
)
def test_stages_share_one_budget(world, cases, stages):
    results = on_ranks(world, f"pipeline_runs:train_{stages}", {"cases": cases})
    for case in cases:
        expected = train(1, None, attached=case == "attached")
        assert sum(map(sum, expected["pattern"].values())) == 3 * len(RANKS) + 3
        assert expected["summary"]["untrained"] == ["spare.lora_E"]
        seen, error = set(), 0.0
        for result in (r[case] for r in results):
            for name, flags in result["pattern"].items():
                assert flags == expected["pattern"][name], name
            for name, value in result["values"].items():
                wanted = expected["values"][name]
                error = max(error, ((value - wanted).norm() / wanted.norm()).item())
            seen |= result["values"].keys()
            assert result["budgets"] == expected["budgets"]
            assert result["skipped"] == expected["skipped"] == (case == "by_hand")
            for key in ("init_budget", "target_budget", "budget"):
                assert result["summary"][key] == expected["summary"][key], key
            # The first stages prune more or less than they would for themselves.
        assert seen == expected["values"].keys()
        assert error <= 1e-9, (case, error)
        if case == "attached":
            # Sharded stages have two processes each, and each the whole of its stage.
            parts = sum(r[case]["orth_reg"] for r in results)
            parts /= 2 if stages == "sharded_stages" else 1
            assert parts == pytest.approx(expected["orth_reg"], rel=1e-12)
        else:
            assert len(expected["budgets"]) == STEPS


@pytest.mark.full
def test_stages_have_replicas():
    results = on_ranks(4, "pipeline_runs:train_replicas_of_stages")
    expected = train(1, None)
    for result in (r["attached"] for r in results):
        for name, flags in result["pattern"].items():
            assert flags == expected["pattern"][name], name
        for name, value in result["values"].items():
            wanted = expected["values"][name]
            assert (value - wanted).norm() <= 1e-9 * wanted.norm(), name


@pytest.mark.full
def test_pefts_models_share_a_budget():
    results = on_ranks(2, "pipeline_runs:pefts_stages")
    assert [targets for targets, _ in results] == [[12, 12]] * 2
    first, second = (rank for _, rank in results)
    assert first + second == 12 and first > second


@pytest.mark.full
def test_what_shares_no_budget_is_refused():
    for said in on_ranks(2, "pipeline_runs:mistakes"):
        assert said["the same"].startswith("ValueError: process_group is for processes with diff")
        assert "layers.0.lora_E is on those of rank 0 and 1" in said["the same"]
        assert said["compared"].startswith("ValueError: check_replicas=True would compare")
        assert said["no group"].startswith("TypeError: process_group must be a")
        assert said["synced"].startswith("ValueError: sync_gradients=True would average over the s")
        assert said["updated"].startswith("RuntimeError: update() does not bring")
        assert said["alone"] == "no error" and said["budget alone"]


def test_a_stage_of_which_nothing_is_trained_takes_no_part():
    members = Members([2, 3], torch.device("cpu"))
    lora_E = [torch.zeros(r, 1, requires_grad=True) for r in (2, 3)]
    members.look(lora_E)
    assert members.taking == [True, True]
    members.others_had = True
    members.look(lora_E)
    assert members.taking == [False, False] and not members.in_play.any()

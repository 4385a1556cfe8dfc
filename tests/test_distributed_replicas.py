"""Whole copies of the adapters in several processes: kept equal, compared, and misused."""

import pytest
import torch
from helpers import Mlp
from ranks import gpus_for_nccl, on_ranks
from replicas_runs import CASES, STEPS, attached, train

from adalora_kernels import RankAllocator
from adalora_kernels.distributed.groups import group_of

FULL = pytest.mark.full


def distance(ours, theirs):
    a, b = (torch.cat([t.double().flatten() for t in r["values"].values()]) for r in (ours, theirs))
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.gpu
def test_synced_replicas_over_nccl():
    world = gpus_for_nccl()
    results = on_ranks(
        world, "replicas_runs:train_cases", {"names": ["accumulated"]}, backend="nccl"
    )
    expected = train(world=world, rank=None, **CASES["accumulated"])
    for result in (r["accumulated"] for r in results):
        assert result["hash"] == results[0]["accumulated"]["hash"]
        assert result["ranks"] == expected["ranks"]
        assert distance(result, expected) <= 1e-9


@pytest.mark.parametrize(
    ("world", "names"),
    [
        pytest.param(2, ["accumulated"], id="2"),
        pytest.param(2, [n for n in CASES if n != "accumulated"], id="2_more", marks=FULL),
        pytest.param(4, list(CASES), id="4", marks=FULL),
    ],
)
def test_synced_replicas_are_one_process_over_the_same_data(world, names):
    results = on_ranks(world, "replicas_runs:train_cases", {"names": names})
    for name in names:
        expected = train(world=world, rank=None, **CASES[name])
        for result in results:
            ours = result[name]
            assert ours["hash"] == results[0][name]["hash"], name
            assert ours["ranks"] == expected["ranks"], name
            assert ours["step"] == expected["step"] == STEPS, name
            assert ours["untrained"] == expected["untrained"], name
            # What is float32 in it is as exact as that.
            assert distance(ours, expected) <= (1e-6 if name == "mixed" else 1e-9), name
            if name != "closure":
                # Which gradients there are, and the gradients of each dtype.
                count = 3 if name == "mixed" else 2
                assert ours["collectives"] == {"all_reduce": count}, name
        pruned = {n: r for n, r in expected["ranks"].items() if n not in expected["untrained"]}
        assert sum(pruned.values()) == 3 * len(pruned), name


@FULL
def test_gradients_that_nobody_has_stay_none():
    for unchanged, are_none in on_ranks(2, "replicas_runs:none_anywhere"):
        assert unchanged and are_none


@pytest.fixture(scope="module")
def mistakes():
    return on_ranks(2, "replicas_runs:mistakes")


@pytest.mark.parametrize(
    ("mistake", "says"),
    [
        ("clipped before", "RuntimeError: the gradients have been changed"),
        ("backward after", "RuntimeError: there has been a backward"),
        ("scaler", "RuntimeError: a GradScaler has looked at the gradients of this process alone"),
        ("others", "ValueError: sync_gradients: the optimizer's parameters on rank 1"),
    ],
)
def test_what_would_be_averaged_too_late_is_an_error_in_each_process(mistakes, mistake, says):
    for errors in mistakes:
        assert errors[mistake].startswith(says)
        assert not errors["still detached"]


def test_a_replica_that_drifts_is_named_in_each_process(mistakes):
    for errors in mistakes:
        drift = {key: error for key, error in errors.items() if key.startswith("drift")}
        *before, last = drift.items()
        assert len(before) >= 2 and {error for _, error in before} == {"no error"}
        assert last[0] == "drift 24"
        assert last[1].startswith("RuntimeError: replicas differ at step 24: the ")
        assert "of layers.0.lora_E on rank 1 is not that of rank 0" in last[1]


def test_arguments_are_checked():
    model = Mlp()
    with pytest.raises(TypeError, match="check_replicas must be a bool or a process group, got s"):
        RankAllocator(model, target_r=3, check_replicas="yes")
    with pytest.raises(TypeError, match="sync_gradients must be a bool or a process group, got s"):
        attached("yes")
    with pytest.raises(RuntimeError, match=r"sync_gradients=True needs the processes of torch"):
        attached(True)
    _, _, allocator = attached(False)
    with pytest.raises(RuntimeError, match=r"needs attach\(optimizer, sync_gradients=True\)"):
        allocator.sync_gradients()


def test_one_process_has_nothing_to_compare_with():
    model = Mlp(dtype=torch.float64)
    optimizer = torch.optim.AdamW(model.parameters())
    allocator = RankAllocator(model, target_r=3, total_step=5, check_replicas=True)
    allocator.attach(optimizer)
    model(torch.randn(2, 16, dtype=torch.float64)).sum().backward()
    optimizer.step()
    assert allocator.global_step == 1 and group_of(True) is None


@FULL
def test_pefts_replicas_are_compared():
    for said in on_ranks(2, "replicas_runs:peft_that_drifts"):
        assert said[:8] == ["no error"] * 8
        assert said[8].startswith("RuntimeError: replicas differ at step 9: the ")


@FULL
def test_the_trainer_checkpoints_under_ddp_as_the_docs_say(tmp_path):
    arguments = {"folder": str(tmp_path)}
    results = on_ranks(2, "replicas_runs:trainer_with_checkpointing", arguments)
    for wrapper, result in results:
        assert wrapper == "DistributedDataParallel"
        assert result["hash"] == results[0][1]["hash"]
        assert result["step"] == 12 and sum(result["ranks"].values()) == 3 * 6

"""Adapters that FSDP2 shards are trained, pruned and regularised as those of one process."""

import re
import weakref

import pytest
import shards_runs
import torch
from ranks import gpus_for_nccl, on_ranks

from adalora_kernels.distributed import shard_placement


@pytest.fixture(scope="module")
def alone():
    """The training in one process, which has all the data."""
    return shards_runs.alone()


def assert_same(results, expected, bound=1e-9):
    """All processes have the same bits, and what they have is what one process has."""
    assert len({result["hash"] for result in results}) == 1
    for result in results:
        assert result["pattern"] == expected["pattern"]
        assert result["summary"] == expected["summary"]
        assert result["orth_reg"] == pytest.approx(expected["orth_reg"], rel=bound)
        for name, parameter in expected["parameters"].items():
            error = (result["parameters"][name] - parameter).norm() / parameter.norm().clamp_min(1)
            assert error <= bound, (name, error)
    summary = expected["summary"]
    assert summary["total_rank"] == summary["target_budget"] < summary["init_budget"]


def assert_all_same(world, cases, expected, bound=1e-9, backend="gloo"):
    arguments = {"cases": cases}
    results = on_ranks(world, "shards_runs:sharded", arguments, seconds=300, backend=backend)
    for number, case in enumerate(cases):
        try:
            assert_same([result[number] for result in results], expected, bound)
        except AssertionError as error:
            raise AssertionError(f"{case} on {world}: {error}") from error


def test_fsdp2_is_one_process(alone):
    assert_all_same(2, [{"attach": "before"}], alone)


@pytest.mark.gpu
def test_fsdp2_over_nccl_is_one_process(alone):
    cases = [{"attach": "before"}, {"placement": "in"}]
    assert_all_same(gpus_for_nccl(), cases, alone, backend="nccl")


IN = {"placement": "in"}
HSDP = {"kind": "hsdp"}


@pytest.mark.full
@pytest.mark.parametrize(
    ("world", "cases"),
    [
        (2, [IN, {"compiled": True}, {"checkpointed": True}, {"policy": "offload"}]),
        (4, [{}, IN, HSDP | IN, {"attach": "before", "checkpointed": True, "compiled": True}]),
        (4, [HSDP, HSDP | IN | {"attach": "before"}, {"attach": "made"}]),
        (2, [{"between": "evaluation"}, {"between": "unsharded"}, {"between": "evaluation"} | IN]),
    ],
    ids=["2", "4", "hsdp", "between"],
)
def test_each_way_of_sharding_is_one_process(world, cases, alone):
    assert_all_same(world, cases, alone)


@pytest.mark.full
def test_regulariser_in_the_loss_is_one_process():
    assert_same(on_ranks(4, "shards_runs:by_hand"), shards_runs.by_hand(is_sharded=False))


@pytest.mark.full
@pytest.mark.parametrize(("world", "cases"), [(2, [(1, 6)]), (4, [(1, 6), (1, 1), (2, 6), (2, 3)])])
def test_any_placement_is_one_process(world, cases):
    """The cases: dimensions of the mesh, and the rank."""
    for results in on_ranks(world, "shards_runs:placed", {"cases": cases}):
        for result in results:
            assert result["error"] <= 1e-12
            assert result["patterns"][0] == result["patterns"][1] == result["patterns"][2]


@pytest.mark.full
def test_mixed_precision_prunes_the_same(alone):
    assert_all_same(2, [{"policy": "mixed"}], alone, bound=1e-4)


def test_inf_on_one_process_makes_all_skip():
    results = on_ranks(4, "shards_runs:with_inf")
    assert len({result["hash"] for result in results}) == 1
    for result in results:
        assert result["skipped"] == [0, 0, 1, 2, 2, 2, 2, 2, 3, 3, 3]
    learns = [step not in (3, 4, 9) for step in range(1, 12)]
    holders = [result["changed"] for result in results if any(result["changed"])]
    assert holders and all(changed == learns for changed in holders)


@pytest.mark.full
def test_checkpoints_of_two_go_on_with_any_number(alone, tmp_path):
    # While it prunes; before the step that makes the pattern final; and after that.
    arguments = {"folder": str(tmp_path), "steps": [7, 21, 25]}
    uninterrupted = on_ranks(2, "shards_runs:save", arguments)
    assert_same(uninterrupted, alone)
    for world in (2, 4, 1):
        results = on_ranks(world, "shards_runs:resume", arguments | {"is_sharded": world > 1})
        for resumed in zip(*results, strict=True):
            assert_same(resumed, alone)
            if world == 2:
                assert resumed[0]["hash"] == uninterrupted[0]["hash"]


def test_shard_placement():
    model = shards_runs.net()
    placement = shard_placement(model, 4)
    for name, parameter in model.named_parameters():
        expected = 1 if name.endswith("lora_A") and parameter.shape[1] % 4 == 0 else None
        assert getattr(placement(parameter), "dim", None) == expected, name
    gone = weakref.ref(model.head.lora_A)
    del parameter, model
    assert gone() is None and placement(torch.nn.Parameter(torch.zeros(2, 8))) is None
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        shard_placement(None, 2)
    with pytest.raises(ValueError, match="world_size must be at least 1"):
        shard_placement(torch.nn.Module(), 0)


@pytest.mark.parametrize(
    ("world", "placement"),
    [
        (2, "rows"),
        pytest.param(2, "in", marks=pytest.mark.full),
        pytest.param(4, "rows", marks=pytest.mark.full),
    ],
)
def test_a_step_sends_what_the_page_says(world, placement):
    """docs/scaling.md has these formulas. Nothing is read from the device in a step."""
    adapters = shards_runs.allocator_of(shards_runs.net()).adapters
    ranks = [len(adapter.lora_E) for adapter in adapters]
    size, others = 8, world - 1  # float64
    flag = ("all_reduce", 2 * 4 * others / world)
    scores = ("all_gather", size * sum(ranks) * others)
    rows = -(-ranks[0] // world)
    lora_A = ("all_gather", size * sum(rows * a.lora_A.shape[1] for a in adapters) * others)
    products = sum(r * r for r in ranks)
    if placement == "rows":
        regulariser = [lora_A, ("all_reduce", 2 * size * products * others / world)]
    else:
        regulariser = [("all_reduce", 2 * size * 2 * products * others / world)]
    for steps in on_ranks(world, "shards_runs:sent", {"placement": placement}):
        # The schedule: no pruning until tinit 4, then every fourth step, and the final one is 22.
        for step, (sent, waits) in enumerate(steps, 1):
            assert waits == []
            expected = [*regulariser]
            if step < 22:
                expected.append(flag)
            if step == 22 or (4 < step < 22 and step % 4 == 0):
                expected.append(scores)
            assert sent == expected, step


@pytest.mark.full
def test_what_is_refused():
    for errors in on_ranks(2, "shards_runs:refused"):
        for name, words in {
            "shrink": "ValueError: shrink.* needs whole adapters",
            "load of a shrunk one": "ValueError: state is of a model that was shrunk",
            "partial": "ValueError: .*Partial",
            "3-D": "ValueError: the parameters of head.lora_E",
        }.items():
            assert re.match(words, errors[name]), (name, errors[name])
    for error in on_ranks(4, "shards_runs:refused_meshes"):
        assert error.startswith("ValueError: the adapters are sharded over device meshes"), error


@pytest.mark.full
def test_what_is_not_trained_stays():
    results = on_ranks(2, "shards_runs:partly_trained")
    expected = shards_runs.partly_trained(is_sharded=False)
    assert len(expected["summary"]["untrained"]) == 3
    assert_same(results, expected)


@pytest.mark.full
def test_float32_adapters_with_bfloat16_averages():
    results = on_ranks(4, "shards_runs:partly_trained", {"dtype": torch.float32})
    expected = shards_runs.partly_trained(is_sharded=False, dtype=torch.float32)
    assert len({result["hash"] for result in results}) == 1
    assert results[0]["summary"] == expected["summary"]

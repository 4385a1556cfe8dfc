"""Exact budgets, what is pruned, the state on the device, and what must not touch the host."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from allocator_runs import STEPS, alive, setup, train
from helpers import CountOps, Mlp, batch, trainable
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import on_ranks
from torch import nn

from adalora_kernels import RankAllocator, SVDLinear, reference
from adalora_kernels.allocator.state import AllocatorState


@pytest.mark.parametrize("deltaT", [1, 7])
@pytest.mark.parametrize("tfinal", [0, 10])
def test_exactly_the_budget_is_kept_at_every_masking_step(deltaT, tfinal):
    model, optimizer, allocator = setup(deltaT=deltaT, tfinal=tfinal)
    for step in range(1, STEPS + 1):
        train(model, optimizer, allocator, [step])
        if allocator.schedule.masks_at(step):
            assert alive(model) == allocator.schedule.budget(step)
            assert sum(allocator.ranks().values()) == allocator.schedule.budget(step)
    assert alive(model) == 9


def test_a_pruned_triplet_can_come_back_before_the_pattern_is_frozen():
    model, optimizer, allocator = setup(deltaT=3, lr=5e-2)
    died, came_back = set(), set()
    for step in range(1, STEPS - 9):
        train(model, optimizer, allocator, [step])
        if allocator.schedule.masks_at(step):
            pattern = torch.cat([torch.tensor(p) for p in allocator.rank_pattern.values()])
            died |= set((~pattern).nonzero().flatten().tolist())
            came_back |= died & set(pattern.nonzero().flatten().tolist())
    assert came_back


def test_the_final_pattern_stays():
    model, optimizer, allocator = setup()
    train(model, optimizer, allocator, range(1, 31))
    pattern = copy.deepcopy(allocator.rank_pattern)
    assert allocator.frozen
    allocator.schedule = replace(allocator.schedule, target_budget=3)
    for step in range(31, 41):
        train(model, optimizer, allocator, [step])
        for layer, alive_triplets in zip(model.layers, pattern.values(), strict=True):
            assert (layer.lora_E != 0).flatten().tolist() == alive_triplets
    assert allocator.rank_pattern == pattern


def test_what_stands_in_lora_E_is_the_function_also_when_the_pattern_is_final():
    model, optimizer, allocator = setup()
    train(model, optimizer, allocator, range(1, 6))
    earlier, x = copy.deepcopy(model), batch(0)[0]
    train(model, optimizer, allocator, range(6, 35))
    assert allocator.frozen and not torch.equal(model(x), earlier(x))
    model.load_state_dict(earlier.state_dict())
    assert torch.equal(model(x), earlier(x))
    assert model.state_dict().keys() == Mlp().state_dict().keys()


def set_scores(allocator, value):
    """Give every triplet the same score, through the averages that the scores come from."""
    for averages in (allocator._state.exp_avg_ipt, allocator._state.exp_avg_unc):
        for t in averages:
            t.fill_(value)


def test_equal_scores_keep_the_lower_indices():
    model, _, allocator = setup(target_r=2, tinit=0)
    for layer in model.layers:
        nn.init.ones_(layer.lora_E)
        for p in (layer.lora_A, layer.lora_E, layer.lora_B):
            p.grad = torch.zeros_like(p)
    set_scores(allocator, 0.0)
    allocator.step(30)
    assert alive(model) == 6
    assert allocator.rank_pattern["layers.0.lora_E"] == [True] * 6


@pytest.mark.parametrize(
    ("target", "left"),
    [
        ({"target_r": 6}, 18),
        ({"target_r": 8}, 18),
        ({"target_r": 0}, 0),
        ({"target_total_rank": 7}, 7),
    ],
)
def test_as_many_triplets_as_asked_for_are_left(target, left):
    model, optimizer, allocator = setup(**target)
    train(model, optimizer, allocator, range(1, STEPS + 1))
    assert alive(model) == allocator.summary()["total_rank"] == left


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_a_non_finite_step_is_skipped_and_counted(bad):
    model, optimizer, allocator = setup()
    train(model, optimizer, allocator, range(1, 8))
    before = allocator.scores()
    model.loss(*batch(8)).backward()
    model.layers[1].lora_B.grad[3, 2] = bad
    allocator.step(8)
    after = allocator.scores()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert allocator.summary()["skipped_steps"] == 1
    resumed = setup()[2]
    resumed.load_state_dict(allocator.state_dict())
    assert resumed.summary()["skipped_steps"] == 1
    optimizer.zero_grad()
    train(model, optimizer, allocator, range(9, STEPS + 1))
    assert alive(model) == 9 and allocator.summary()["skipped_steps"] == 1


def test_a_step_without_any_gradient_is_refused():
    model, optimizer, allocator = setup()
    model.loss(*batch(1)).backward()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="before zero_grad"):
        allocator.step(1)
    assert allocator.global_step == 0


def test_a_run_may_jump_over_the_last_budgeting_step():
    model, optimizer, allocator = setup()
    train(model, optimizer, allocator, range(1, 29))
    train(model, optimizer, allocator, [33, 34])
    assert allocator.frozen and alive(model) == 9


def test_step_reads_nothing_from_the_device():
    model, optimizer, allocator = setup(deltaT=2)
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        model.loss(*batch(step)).backward()
        optimizer.step()
        with CountOps() as count:
            allocator.step(step)
        assert count.counts["aten::_local_scalar_dense"] == 0
        assert count.counts["aten::nonzero"] == 0


def test_dispatched_ops_of_a_step_do_not_grow_with_the_model():
    idle, masking = [], []
    for layers in (2, 72):
        model = nn.ModuleList(SVDLinear(8, 8, r=4) for _ in range(layers))
        allocator = RankAllocator(model, target_r=2, total_step=10, deltaT=3)
        for p in trainable(model):
            p.grad = torch.randn_like(p)
        for step, totals in ((2, idle), (3, masking)):
            with CountOps() as count:
                allocator.step(step)
            totals.append(count.counts.total())
    assert masking[0] == masking[1] <= 18
    assert idle[0] == idle[1] == 3, "the update, and two numbers for the device"


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    ranks=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(sum),
    # Few values, so that there are ties.
    values=st.lists(
        st.sampled_from([0.0, 1e-30, 0.5, 3.0, math.inf, -math.inf, math.nan]),
        min_size=54,
        max_size=54,
    ),
    budget=st.sampled_from([0, 1, 2, 3, 5, 8, 13, 21, 34, 54, 55, 2**40]),
    prunes=st.sampled_from([True, True, False]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    strided=st.booleans(),
)
def test_pruning_writes_zeros_and_nothing_else(ranks, values, budget, prunes, dtype, strided):
    n, kinds = sum(ranks), (torch.float32, torch.bfloat16, torch.float16)
    parameters = [t for r in ranks for t in (torch.ones(r, 2, dtype=dtype), torch.ones(r, 1), None)]
    parameters[2::3] = [torch.ones(2, r) for r in ranks]
    for p in parameters:
        p.requires_grad_()
    state = AllocatorState(parameters, torch.float32)
    state.scores.copy_(torch.tensor(values[:n]))
    state.mask.copy_(before := torch.rand(n) < 0.5)
    state.budget.fill_(budget)
    state.prunes.fill_(prunes)
    memory = [torch.randn(r, 2 if strided else 1).to(kinds[i % 3]) for i, r in enumerate(ranks)]
    for m in memory:
        # 0 times inf would not be 0.
        m[::2] = math.inf
    lora_E, old = [m[:, :1] for m in memory], [m.clone() for m in memory]

    best = reference.top_b_mask(state.scores, budget)
    state.prune(lora_E)
    assert torch.equal(state.mask, best if prunes else before)
    alive = best if prunes else torch.ones_like(best)
    for _ in range(2):
        for E, m, was, lives in zip(lora_E, memory, old, alive.split(ranks), strict=True):
            assert torch.equal(E, was[:, :1].masked_fill(~lives.unsqueeze(1), 0.0))
            assert torch.equal(m[:, 1:], was[:, 1:])
        # What the mask has dropped is dropped again, whatever the scores are now.
        state.scores.zero_()
        state.prune(lora_E, again=True)
        alive = alive & state.mask


def test_the_state_follows_a_model_that_was_moved():
    model, _, allocator = setup()
    model.to("meta")
    allocator._state.follow(allocator._parameters())
    state = allocator.state_dict()
    tensors = (*state["exp_avg_ipt"], *state["exp_avg_unc"], state["scores"], state["mask"])
    assert {t.device.type for t in tensors} == {"meta"}


@pytest.mark.parametrize("at", [10, 32], ids=["budgeting", "final"])
def test_the_state_follows_a_model_that_was_cast(at):
    model, optimizer, allocator = setup()
    train(model, optimizer, allocator, range(1, at))
    model.double()
    for p in trainable(model):
        p.grad = torch.randn_like(p)
    before = allocator.scores()
    allocator.step(at)
    after = allocator.scores()
    assert {s.dtype for s in after.values()} == {torch.float64}
    assert all(torch.equal(before[n].double(), after[n]) for n in after) == (at > 30)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_state_dtype(dtype):
    model = Mlp(dtype=dtype)
    allocator = RankAllocator(model, target_r=3, total_step=10)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert {t.dtype for t in allocator.state_dict()["exp_avg_ipt"]} == {expected}
    for p in trainable(model):
        p.grad = torch.randn_like(p)
    allocator.step(3)
    assert {s.dtype for s in allocator.scores().values()} == {expected}


on_two_devices = nn.ModuleList([SVDLinear(3, 3, r=2), SVDLinear(3, 3, r=2, device="meta")])


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"target_r": -1}, ValueError, "target_r .*-1"),
        ({"target_r": 1.5}, ValueError, r"target_r .*whole .*1\.5"),
        ({"target_total_rank": -1}, ValueError, "target_total_rank .*-1"),
        ({"beta1": 1.0}, ValueError, r"beta1 .*1\.0"),
        ({"beta2": 0.0}, ValueError, r"beta2 .*0\.0"),
        ({"beta2": "x"}, TypeError, "beta2 .*str"),
        ({"tinit": 50}, ValueError, "tinit=50"),
        ({"state_dtype": torch.float16}, ValueError, r"state_dtype .*float16"),
        ({"orth_reg_weight": -0.1}, ValueError, "orth_reg_weight .*at least 0"),
        ({"orth_reg_weight": math.nan}, ValueError, "orth_reg_weight .*at least 0"),
        ({"orth_reg_weight": "0.1"}, TypeError, "orth_reg_weight .*str"),
        ({"model": on_two_devices}, ValueError, "cpu, meta"),
        ({"model": nn.Linear(3, 3)}, ValueError, "no AdaLoRA adapter"),
        ({"model": None}, TypeError, "NoneType"),
    ],
)
def test_allocator_refuses(change, error, says):
    with pytest.raises(error, match=says):
        RankAllocator(**{"model": Mlp(), "target_r": 3, "total_step": 40, **change})


def test_step_refuses():
    _, _, allocator = setup()
    with pytest.raises(ValueError, match=r"global_step .*whole .*1\.5"):
        allocator.step(1.5)
    with pytest.raises(ValueError, match=r"global_step .*-1"):
        allocator.step(-1)
    model, _, allocator = setup()
    model.loss(*batch(1)).backward()
    for scale, error, says in (
        ("1", TypeError, "grad_scale .*str"),
        (True, TypeError, "grad_scale .*bool"),
        (torch.ones(2), ValueError, r"grad_scale .*\(2,\)"),
        (torch.ones(1).double(), ValueError, "grad_scale .*float64"),
        (torch.ones(1, device="meta"), ValueError, "grad_scale .*meta"),
    ):
        with pytest.raises(error, match=says):
            allocator.step(1, grad_scale=scale)
    assert allocator.global_step == 0, "nothing was changed"


@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
def test_scaled_gradients(as_tensor):
    scores = []
    for scale in (1.0, 1024.0):
        model, _, allocator = setup()
        (scale * model.loss(*batch(1))).backward()
        factor = 1 / scale
        allocator.step(1, grad_scale=torch.tensor(factor) if as_tensor else factor)
        scores.append(torch.cat(list(allocator.scores().values())))
    torch.testing.assert_close(*scores)


def test_bfloat16_averages_take_half_of_the_memory_and_resume():
    model, optimizer, allocator = setup(state_dtype=torch.bfloat16)
    train(model, optimizer, allocator, range(1, 12))
    state = allocator.state_dict()
    assert {t.dtype for t in state["exp_avg_ipt"] + state["exp_avg_unc"]} == {torch.bfloat16}
    assert state["scores"].dtype == torch.float32
    other = setup(seed=99, state_dtype=torch.bfloat16)[2]
    other.load_state_dict(state)
    again = other.state_dict()
    assert all(
        torch.equal(a, b) for a, b in zip(again["exp_avg_unc"], state["exp_avg_unc"], strict=True)
    )
    train(model, optimizer, allocator, range(12, STEPS + 1))
    assert alive(model) == 9


def test_summary():
    model, optimizer, allocator = setup()
    train(model, optimizer, allocator, range(1, 13))
    assert allocator.summary() == {
        "step": 12,
        "phase": "budgeting",
        "budget": allocator.schedule.budget(12),
        "total_rank": allocator.schedule.budget(12),
        "init_budget": 18,
        "target_budget": 9,
        "matrices": 3,
        "untrained": [],
        "skipped_steps": 0,
        "frozen": False,
        "shrunk": False,
    }
    assert set(allocator.scores()) == set(allocator.ranks()) == set(allocator.rank_pattern)
    assert all(s.shape == (6,) for s in allocator.scores().values())


@pytest.mark.parametrize("start", ["paper", "lora"])
def test_ddp_with_reentrant_checkpointing_agrees_with_one_process(start):
    # Both ranks decide alike, bit for bit, and as accumulation in one process does.
    first, second = on_ranks(2, "ddp_runs:agreement", {"start": start})
    assert first == second
    assert first["ranks"] == first["expected"] and sum(first["ranks"].values()) == 9
    assert first["difference"] < 1e-6


def test_grad_scale_that_is_not_finite_skips_the_step():
    for scale in (torch.inf, torch.nan):
        model, _, allocator = setup()
        model.loss(*batch(1)).backward()
        allocator.step(1, grad_scale=scale)
        assert allocator.summary()["skipped_steps"] == 1
        assert not any(t.any() for t in allocator.state_dict()["exp_avg_ipt"])


def test_skipped_steps_follow_the_schedule():
    model, optimizer, allocator = setup()
    train(model, optimizer, allocator, range(1, 8))
    before = allocator.state_dict()
    last = allocator.schedule.final_step
    for step in range(8, last + 1):
        assert allocator.skip(step) == allocator.schedule.budget(step)
    assert all(map(torch.equal, before["scores"], allocator.state_dict()["scores"]))
    summary = allocator.summary()
    assert summary["skipped_steps"] == last - 8, "at the last one there is nothing to learn"
    assert summary["frozen"] and summary["total_rank"] == allocator.schedule.target_budget

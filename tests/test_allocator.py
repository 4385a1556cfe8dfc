"""The schedule, exact budgets, resuming, shrinking, and what must not touch the host."""

import copy
import io
import json
import math
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import CountOps, Mlp, batch, trainable
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from adalora_kernels import (
    BudgetSchedule,
    RankAllocator,
    SVDLinear,
    ops,
    orth_reg,
    orth_reg_grad_,
    reference,
)
from adalora_kernels.allocator.state import AllocatorState

STEPS = 40


def train(model, optimizer, allocator, steps, orth=0.1):
    """Losses of the given steps."""
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = model.loss(*batch(step))
        (loss + orth_reg(model, orth) if orth else loss).backward()
        optimizer.step()
        allocator.step(step)
        losses.append(loss.item())
    return losses


def setup(seed=0, optimizer=torch.optim.AdamW, lr=5e-3, **options):
    torch.manual_seed(seed)
    model = Mlp(lora_alpha=16)
    arguments = {"target_r": 3, "total_step": STEPS, "tinit": 5, "tfinal": 10, **options}
    allocator = RankAllocator(model, **arguments)
    return model, optimizer(trainable(model), lr=lr), allocator


def alive(model):
    return int(sum((layer.lora_E != 0).sum() for layer in model.layers))


# Schedule


def peft_budget(s, step):
    """PEFT's RankAllocator.budget_schedule and update_and_allocate, for target ≤ init."""
    if step <= s.tinit:
        return s.init_budget, False
    if step > s.total_step - s.tfinal:
        return s.target_budget, True
    remaining = 1 - (step - s.tinit) / (s.total_step - s.tfinal - s.tinit)
    budget = int((s.init_budget - s.target_budget) * (remaining**3) + s.target_budget)
    return budget, step % s.deltaT == 0 or step == s.total_step - s.tfinal


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 500),
    st.integers(0, 500),
    st.integers(0, 30),
    st.integers(0, 30),
    st.integers(1, 9),
    st.integers(1, 60),
)
def test_schedule_is_pefts(init, target, tinit, tfinal, deltaT, middle):
    target = min(init, target)
    schedule = BudgetSchedule(init, target, tinit, tfinal, deltaT, tinit + middle + tfinal)
    for step in range(schedule.total_step + 3):
        assert (schedule.budget(step), schedule.masks_at(step)) == peft_budget(schedule, step)


def test_schedule_phases():
    schedule = BudgetSchedule(18, 9, tinit=2, tfinal=3, deltaT=1, total_step=10)
    phases = [schedule.phase(step) for step in range(1, 11)]
    assert phases == ["initial"] * 2 + ["budgeting"] * 5 + ["final"] * 3


def test_target_above_the_initial_budget_prunes_nothing():
    schedule = BudgetSchedule(18, 30, 2, 3, 1, 10)
    assert {schedule.budget(step) for step in range(12)} == {18}


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"tinit": 7}, ValueError, "tinit .*tinit=7, total_step=10, tfinal=3"),
        ({"deltaT": 0}, ValueError, "deltaT .*0"),
        ({"total_step": 0}, ValueError, "total_step .*0"),
        ({"tfinal": -1}, ValueError, "tfinal .*-1"),
        ({"total_step": 10.5}, ValueError, r"total_step .*10\.5"),
        ({"total_step": "10"}, TypeError, "total_step .*str"),
        ({"target_budget": True}, TypeError, "target_budget .*bool"),
    ],
)
def test_schedule_refuses(change, error, says):
    good = {"init_budget": 18, "target_budget": 9, "tinit": 2, "tfinal": 3, "deltaT": 1}
    with pytest.raises(error, match=says):
        BudgetSchedule(**{**good, "total_step": 10, **change})


# Budgets


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
    for layer, alive_triplets in zip(model.layers, pattern.values(), strict=True):
        assert layer.mask.tolist() == alive_triplets
    allocator.schedule = replace(allocator.schedule, target_budget=3)
    train(model, optimizer, allocator, range(31, 41))
    assert allocator.rank_pattern == pattern
    for layer, alive_triplets in zip(model.layers, pattern.values(), strict=True):
        assert (layer.lora_E != 0).flatten().tolist() == alive_triplets


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


def test_a_parameter_without_gradient_is_no_error():
    model, optimizer, allocator = setup()
    model.layers[2].requires_grad_(False)
    train(model, optimizer, allocator, range(1, STEPS + 1), orth=0)
    assert sum(allocator.ranks().values()) == 9
    assert allocator.ranks()["layers.2.lora_E"] == 0, "it never had any importance"


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


def test_advance_and_update_are_a_step():
    runs = []
    for apart in (False, True):
        model, optimizer, allocator = setup(deltaT=3)
        for step in range(1, 30):
            optimizer.zero_grad()
            model.loss(*batch(step)).backward()
            optimizer.step()
            if apart:
                budget = allocator.advance(step)
                allocator.update()
            else:
                budget = allocator.step(step)
            assert budget == allocator.schedule.budget(step)
        runs.append((*model.parameters(), *allocator.state_dict()["exp_avg_unc"]))
        assert allocator.summary()["total_rank"] == allocator.schedule.budget(27)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


class Record(TorchDispatchMode):
    """Keeps what is dispatched, as a CUDA graph does: ops and memory, none of the Python."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, result in self.calls:
            # Into the memory of the first time: that is what the next op reads.
            again = func(*args, **kwargs)
            tree_map(lambda old, new: old if old is None else old.copy_(new), result, again)


def test_a_recorded_update_follows_the_budget():
    def run(replays):
        model, optimizer, allocator = setup(deltaT=4)
        record = Record()
        for step in range(1, 30):
            optimizer.zero_grad(set_to_none=False)
            model.loss(*batch(step)).backward()
            optimizer.step()
            allocator.advance(step)
            if record.calls and replays:
                record.replay()
            else:
                with record:
                    allocator.update()
            yield allocator.rank_pattern, allocator.scores(), [p.clone() for p in trainable(model)]

    budgets = set()
    for eager, replayed in zip(run(False), run(True), strict=True):
        assert eager[0] == replayed[0]
        assert all(torch.equal(eager[1][name], replayed[1][name]) for name in eager[1])
        assert all(torch.equal(a, b) for a, b in zip(eager[2], replayed[2], strict=True))
        budgets.add(sum(map(sum, eager[0].values())))
    assert len(budgets) > 3


def captured(step):
    """`step` as a CUDA graph, after three runs of it on a side stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU (CUDA graphs)")
def test_a_captured_training_step_is_the_eager_one():
    def run(captures):
        torch.manual_seed(0)
        model = Mlp(lora_alpha=16).cuda()
        allocator = RankAllocator(model, target_r=3, total_step=70, tinit=10, tfinal=10, deltaT=10)
        optimizer = torch.optim.AdamW(trainable(model), lr=5e-3, capturable=True)
        x, target = (t.cuda() for t in batch(0))

        def step():
            optimizer.zero_grad(set_to_none=False)
            model.loss(x, target).backward()
            orth_reg_grad_(allocator.adapters, 0.1)
            optimizer.step()
            allocator.update()

        # Both do what capturing does first, so that they start alike.
        for p in trainable(model):
            p.grad = torch.zeros_like(p)
        allocator.advance(1)
        replay = captured(step) if captures else step
        if not captures:
            for _ in range(3):
                step()
        for number in range(2, 52):
            for buffer, t in zip((x, target), batch(number), strict=True):
                buffer.copy_(t)
            allocator.advance(number)
            replay()
            yield allocator.rank_pattern, [p.detach().clone() for p in trainable(model)]

    budgets = set()
    for eager, replayed in zip(run(False), run(True), strict=True):
        assert eager[0] == replayed[0]
        torch.testing.assert_close(eager[1], replayed[1], rtol=1e-6, atol=1e-7)
        budgets.add(sum(map(sum, eager[0].values())))
    assert len(budgets) > 3, "three changes of the budget"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("overflow", [False, True], ids=["finite", "overflow"])
def test_attached_under_a_scaler_does_not_sync(overflow):
    """A fused optimizer has GradScaler's scale and its verdict on the device; so have we."""
    model = nn.ModuleList(SVDLinear(40, 24, r=4) for _ in range(72)).cuda()
    allocator = RankAllocator(model, target_r=2, total_step=20, tfinal=5, orth_reg_weight=0.1)
    optimizer = torch.optim.AdamW(trainable(model), fused=True)
    allocator.attach(optimizer)
    for step in range(1, 4):
        for p in trainable(model):
            p.grad = torch.randn_like(p)
        optimizer.grad_scale = torch.full((), 1024.0, device="cuda")
        optimizer.found_inf = torch.full((), float(overflow), device="cuda")
        torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert allocator.summary()["skipped_steps"] == (3 if overflow else 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_step_and_regulariser_neither_sync_nor_launch_much():
    model = nn.ModuleList(SVDLinear(40, 24, r=4) for _ in range(72)).cuda()
    allocator = RankAllocator(model, target_r=2, total_step=20, tfinal=5)
    for p in trainable(model):
        p.grad = torch.randn_like(p)
    before = allocator.state_dict()

    def both(step):
        orth_reg_grad_(allocator.adapters, 0.1)
        allocator.step(step)

    both(1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        both(2)
        both(15)
        both(16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    allocator.load_state_dict(before)
    with torch.profiler.profile() as profile:
        both(3)
        torch.cuda.synchronize()
    names = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(names) <= 150, names
    if "cuda" in ops.library.device_types:
        # The gradients, the averages, and the scores.
        assert len([name for name in names if "adalora" in name]) == 3, names


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


# Resuming


@pytest.mark.parametrize("at", [3, 17, 33], ids=["initial", "budgeting", "final"])
def test_resume_is_bitwise_the_uninterrupted_run(at):
    model, optimizer, allocator = setup(deltaT=2)
    expected = train(model, optimizer, allocator, range(1, STEPS + 1))

    first = setup(deltaT=2)
    losses = train(*first, range(1, at + 1))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first], file)
    # What happens to the first run after its checkpoint must not matter.
    train(*first, range(at + 1, at + 3))
    file.seek(0)
    second = setup(seed=99, deltaT=2)
    for part, state in zip(second, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    losses += train(*second, range(at + 1, STEPS + 1))
    assert losses == expected
    for a, b in zip(model.parameters(), second[0].parameters(), strict=True):
        assert torch.equal(a, b)
    assert second[2].rank_pattern == allocator.rank_pattern
    ours, theirs = second[2].state_dict(), allocator.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ("scores", "mask", "skipped"))


def test_a_saved_state_does_not_change_any_more():
    model, optimizer, allocator = setup()
    train(model, optimizer, allocator, range(1, 12))
    state = allocator.state_dict()
    other = setup(seed=99)
    other[2].load_state_dict(state)
    before = copy.deepcopy(state)
    train(model, optimizer, allocator, range(12, 15))
    train(*other, range(12, 15))
    for key in ("exp_avg_ipt", "exp_avg_unc", "scores", "mask", "skipped"):
        torch.testing.assert_close(state[key], before[key], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.pop("scores"), r"lacks \['scores'\]"),
        (lambda s: s.update(format=99), "format 99"),
        (lambda s: s.update(names=["a", "b", "c"]), "'a' where the model has 'layers.0.lora_E'"),
        (lambda s: s.update(names=s["names"][:2]), "2 of them where the model has 3"),
        (lambda s: s.update(ranks=[6, 6, 5]), r"ranks \[6, 6, 5\]"),
        (lambda s: s.update(scores=torch.zeros(5)), "scores"),
        (lambda s: s["exp_avg_ipt"].pop(), "exp_avg_ipt"),
    ],
)
def test_load_state_dict_refuses_and_changes_nothing(change, says):
    model, optimizer, allocator = setup()
    train(model, optimizer, allocator, range(1, 12))
    before, state = allocator.state_dict(), allocator.state_dict()
    change(state)
    with pytest.raises(ValueError, match=says):
        allocator.load_state_dict(state)
    with pytest.raises(TypeError, match="NoneType"):
        allocator.load_state_dict(None)
    after = allocator.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in ("scores", "mask", "skipped"))
    assert before["global_step"] == after["global_step"] == 11


# Shrinking


def optimizers():
    def sgd(parameters, lr):
        return torch.optim.SGD(parameters, lr=0.3, momentum=0.9)

    return {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": sgd}


@pytest.mark.parametrize("kind", optimizers().values(), ids=optimizers().keys())
def test_shrinking_does_not_change_the_training(kind):
    runs = []
    for shrinks in (False, True):
        model, optimizer, allocator = setup(optimizer=kind, lr=2e-2)
        parameters = trainable(model)
        losses = train(model, optimizer, allocator, range(1, 31), orth=0)
        if shrinks:
            allocator.shrink(optimizer)
            assert [id(p) for p in trainable(model)] == [id(p) for p in parameters]
            ranks = allocator.ranks()
            for layer, rank in zip(model.layers, ranks.values(), strict=True):
                assert layer.lora_A.shape == (rank, layer.in_features)
                assert layer.lora_E.shape == (rank, 1)
                assert layer.lora_B.shape == (layer.out_features, rank)
                assert layer.r == rank and layer.ranknum.item() == 6
                assert layer.lora_A.grad.shape == layer.lora_A.shape
            allocator.shrink(optimizer)
            assert allocator.ranks() == ranks
        losses += train(model, optimizer, allocator, range(31, STEPS + 1), orth=0)
        runs.append(losses)
    torch.testing.assert_close(*map(torch.tensor, runs), rtol=2e-6, atol=0)


def test_shrinking_to_rank_zero_leaves_the_base_layer():
    model, optimizer, allocator = setup(target_r=0)
    train(model, optimizer, allocator, range(1, 31), orth=0)
    allocator.shrink(optimizer)
    x = torch.randn(5, 16)
    layer = model.layers[0]
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert torch.equal(layer.eval()(x), layer.train()(x))


def test_resume_after_shrinking():
    model, optimizer, allocator = setup()
    train(model, optimizer, allocator, range(1, 33), orth=0)
    allocator.shrink(optimizer)
    parts = (allocator, model, optimizer)
    states = copy.deepcopy([part.state_dict() for part in parts])
    expected = train(model, optimizer, allocator, range(33, STEPS + 1), orth=0)
    other, other_optimizer, other_allocator = setup(seed=99)
    # The allocator first: it gives the adapters the shapes that the weights need.
    for part, state in zip((other_allocator, other, other_optimizer), states, strict=True):
        part.load_state_dict(state)
    losses = train(other, other_optimizer, other_allocator, range(33, STEPS + 1), orth=0)
    assert losses == expected
    assert other_allocator.rank_pattern == allocator.rank_pattern
    other_allocator.load_state_dict(states[0])
    assert other.layers[0].mask.all()


def test_shrink_refuses():
    model, optimizer, allocator = setup()
    with pytest.raises(RuntimeError, match="= 30, not at 0"):
        allocator.shrink(optimizer)
    train(model, optimizer, allocator, range(1, 31))
    with pytest.raises(TypeError, match="list"):
        allocator.shrink([optimizer])
    optimizer.state[model.layers[2].lora_A]["row"] = torch.ones(6)
    with pytest.raises(ValueError, match=r"'row' of layers\.2\.lora_E"):
        allocator.shrink(optimizer)
    assert model.layers[0].lora_A.shape == (6, 16), "nothing was changed"
    model, optimizer, allocator = setup()
    train(model, optimizer, allocator, range(1, 31))
    state = allocator.state_dict()
    allocator.shrink()
    for change in ({"shrunk": False}, {"shrunk": True, "mask": ~state["mask"]}):
        with pytest.raises(ValueError, match="shrink"):
            allocator.load_state_dict(state | change)


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
        "skipped_steps": 0,
        "frozen": False,
        "shrunk": False,
    }
    assert set(allocator.scores()) == set(allocator.ranks()) == set(allocator.rank_pattern)
    assert all(s.shape == (6,) for s in allocator.scores().values())


def test_ddp_with_reentrant_checkpointing_agrees_with_one_process(tmp_path):
    script = Path(__file__).with_name("ddp_training.py")
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(rank), tmp_path / "rendezvous"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    reports = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=120)
            assert process.returncode == 0, err
            reports.append(json.loads(out))
    finally:
        for process in processes:
            process.kill()
    # Both ranks decide alike, bit for bit, and as accumulation in one process does.
    first, second = reports
    assert first == second
    assert first["ranks"] == first["expected"] and sum(first["ranks"].values()) == 9
    assert first["difference"] < 1e-6


# Attached to an optimizer


def attached_setup(optimizer="adamw", **options):
    """As `setup`, with the allocator attached and an orthogonality weight of 0.1."""
    model, _, allocator = setup(orth_reg_weight=0.1, **options)
    kinds = {
        "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
        "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    }
    made = kinds[optimizer](trainable(model))
    allocator.attach(made)
    return model, made, allocator


@pytest.mark.parametrize(
    ("kind", "micro_batches"),
    [
        ("adamw", 4),
        ("fused", 1),
        pytest.param("sgd", 1, marks=pytest.mark.full),
        pytest.param("adamw", 1, marks=pytest.mark.full),
        pytest.param("fused", 4, marks=pytest.mark.full),
        pytest.param("sgd", 4, marks=pytest.mark.full),
    ],
)
def test_attached_is_the_loop_by_hand(kind, micro_batches):
    results = []
    for by_hand in (False, True):
        model, optimizer, allocator = attached_setup(kind)
        if by_hand:
            allocator.detach()
            assert not allocator.attached
        for step in range(1, allocator.schedule.total_step + 1):
            for i in range(micro_batches):
                (model.loss(*batch(100 * step + i)) / micro_batches).backward()
            if by_hand:
                orth_reg_grad_(model, 0.1)
            optimizer.step()
            if by_hand:
                allocator.step(step)
            optimizer.zero_grad()
        results.append((*model.parameters(), *allocator.state_dict()["exp_avg_ipt"]))
        assert allocator.frozen and allocator.global_step == allocator.schedule.total_step
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_attach_refuses():
    model, optimizer, allocator = attached_setup()
    with pytest.raises(RuntimeError, match=r"attached .*detach"):
        allocator.attach(optimizer)
    model.loss(*batch(1)).backward()
    with pytest.raises(RuntimeError, match=r"attached .*step\(\)"):
        allocator.step(1)
    with pytest.raises(RuntimeError, match="closure"):
        optimizer.step(lambda: model.loss(*batch(1)))
    allocator.detach()
    allocator.detach()
    with pytest.raises(TypeError, match=r"optimizer .*Mlp"):
        allocator.attach(model)
    few = torch.optim.SGD([model.layers[0].lora_A], lr=0.1)
    with pytest.raises(ValueError, match=r"optimizer .*layers\.0\.lora_E"):
        allocator.attach(few)
    few.step()
    assert allocator.global_step == 0 and not allocator.attached
    model.layers[0].lora_A.requires_grad_(False)
    allocator.attach(torch.optim.SGD(trainable(model), lr=0.1))


def test_an_optimizer_step_without_gradients_does_not_count():
    model, optimizer, allocator = attached_setup()
    optimizer.step()
    assert allocator.global_step == 0 and allocator.orth_reg is None
    assert all(p.grad is None for p in model.parameters())
    model.loss(*batch(1)).backward()
    optimizer.step()
    assert allocator.global_step == 1
    assert allocator.orth_reg > 0


def test_no_regulariser_at_weight_zero():
    model, optimizer, allocator = attached_setup()
    allocator.orth_reg_weight = 0.0
    model.loss(*batch(1)).backward()
    with CountOps() as ops:
        optimizer.step()
    assert ops.counts["aten::bmm"] == 0 and allocator.orth_reg is None
    assert ops.counts["adalora::importance_update_"] == 1
    allocator.orth_reg_weight = 0.1
    with CountOps() as ops:
        optimizer.step()
    assert ops.counts["aten::bmm"] > 0 and allocator.orth_reg > 0


@pytest.mark.parametrize("clip", [False, True], ids=["scaled", "unscaled"])
@pytest.mark.parametrize("kind", ["adamw", "fused"])
def test_attached_under_a_grad_scaler(kind, clip):
    """The same as without one; a step that overflows, outside the adapters, teaches nothing."""
    results = []
    for scaled in (False, True):
        model, optimizer, allocator = attached_setup(kind)
        other = nn.Parameter(torch.zeros(1))
        optimizer.add_param_group({"params": [other]})
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        for step in range(1, 13):
            loss = model.loss(*batch(step)) + 0 * other.sum()
            if step == 5:
                if not scaled:
                    continue
                loss = loss + torch.inf * other.sum()
            scaler.scale(loss).backward()
            if clip:
                scaler.unscale_(optimizer)
            before = copy.deepcopy(allocator.state_dict())
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if step == 5:
                after = allocator.state_dict()
                for key in ("exp_avg_ipt", "exp_avg_unc"):
                    assert all(map(torch.equal, before[key], after[key]))
        results.append([*model.parameters(), *allocator.state_dict()["exp_avg_ipt"]])
        # A scaler does not call the optimizer at all then, but for a fused one.
        counted = scaled and kind == "fused"
        assert allocator.summary()["skipped_steps"] == int(counted)
        assert allocator.global_step == (12 if counted else 11)
    if kind == "adamw":  # the budget of a fused one is a step ahead
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


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


def test_a_copy_is_not_attached():
    model, optimizer, allocator = attached_setup()
    for copied in (copy.deepcopy(allocator), pickle.loads(pickle.dumps(allocator))):
        assert not copied.attached
    assert allocator.attached
    model.loss(*batch(1)).backward()
    optimizer.step()
    assert allocator.global_step == 1 and copied.global_step == 0


def test_a_schedule_without_an_end():
    model, _, allocator = setup(total_step=None)
    model.loss(*batch(1)).backward()
    with pytest.raises(RuntimeError, match="total_step is not known"):
        allocator.step(1)
    assert allocator.global_step == 0 and allocator.summary()["phase"] == "initial"
    for wrong, error in ((0, ValueError), (1.5, ValueError), (None, TypeError)):
        with pytest.raises(error, match="total_step"):
            allocator.set_total_step(wrong)
    with pytest.raises(ValueError, match="tinit must be less"):
        allocator.set_total_step(allocator.schedule.tinit)
    allocator.set_total_step(30)
    allocator.step(1)
    assert allocator.schedule.total_step == 30

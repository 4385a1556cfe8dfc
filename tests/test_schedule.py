"""The budget schedule."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from allocator_runs import setup
from helpers import batch
from hypothesis import given, settings
from hypothesis import strategies as st

from adalora_kernels import (
    BudgetSchedule,
)


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


def test_numbers_as_scripts_have_them():
    plain = BudgetSchedule(18, 9, tinit=2, tfinal=3, deltaT=1, total_step=12)
    others = [
        BudgetSchedule(18.0, np.int64(9), 0.2 * 10, torch.tensor(3), np.float32(1), 24 / 2),
        replace(plain, total_step=np.array(12), tinit=torch.tensor(2.0)),
    ]
    for schedule in others:
        assert schedule == plain
        assert {type(value) for value in asdict(schedule).values()} == {int}
        for step in (3, 3.0, np.int32(3), torch.tensor(3)):
            assert schedule.budget(step) == plain.budget(3) and type(schedule.budget(step)) is int
            assert schedule.masks_at(step) is True and schedule.phase(step) == "budgeting"
    with pytest.raises(ValueError, match="step must be a whole number"):
        plain.budget(2.5)


@pytest.mark.parametrize(
    "number",
    [np.int64, np.float32, torch.tensor, float],
    ids=["numpy_int", "numpy_float", "tensor", "float"],
)
def test_an_allocator_takes_any_kind_of_number(number):
    kinds = {"total_step": 12, "tinit": 2, "tfinal": 3, "deltaT": 1, "target_r": 3}
    runs = []
    for convert in (int, number):
        fraction = (lambda x: x) if convert is int else np.float64
        model, optimizer, allocator = setup(
            **{name: convert(value) for name, value in kinds.items()},
            beta1=fraction(0.85),
            beta2=fraction(0.85),
            orth_reg_weight=fraction(0.1),
        )
        allocator.set_total_step(convert(12))
        for step in range(1, 12):
            optimizer.zero_grad()
            model.loss(*batch(step)).backward()
            optimizer.step()
            budget = allocator.step(convert(step), grad_scale=fraction(1.0))
            assert type(budget) is int
        allocator.skip(convert(12))
        allocator.advance(convert(12))
        assert type(allocator.state_dict()["global_step"]) is int
        assert type(allocator.beta1) is float and type(allocator.orth_reg_weight) is float
        runs.append(allocator)
    assert runs[0].rank_pattern == runs[1].rank_pattern
    assert runs[0].schedule == runs[1].schedule


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

"""An allocator that optimizers step."""

import copy
import pickle

import pytest
import torch
from allocator_runs import attached_setup
from helpers import CountOps, batch, trainable
from torch import nn

from adalora_kernels import (
    orth_reg_grad_,
)


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


def test_a_copy_is_not_attached():
    model, optimizer, allocator = attached_setup()
    for copied in (copy.deepcopy(allocator), pickle.loads(pickle.dumps(allocator))):
        assert not copied.attached
    assert allocator.attached
    model.loss(*batch(1)).backward()
    optimizer.step()
    assert allocator.global_step == 1 and copied.global_step == 0

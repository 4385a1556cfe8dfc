"""Optimizers that are called with a closure, which makes the gradients."""

import copy

import pytest
import torch
from allocator_runs import alive, setup
from helpers import batch, trainable

from adalora_kernels import orth_reg, orth_reg_grad_


def attached(make, weight=0.1, **options):
    arguments = {"total_step": 12, "tinit": 2, "tfinal": 3, "orth_reg_weight": weight, **options}
    model, _, allocator = setup(**arguments)
    optimizer = make(trainable(model))
    allocator.attach(optimizer)
    return model, optimizer, allocator


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2)


def closure_of(model, optimizer, step, returns="tensor"):
    def closure():
        optimizer.zero_grad()
        loss = model.loss(*batch(step))
        loss.backward()
        return {"tensor": loss.detach(), "number": loss.item(), "none": None}[returns]

    return closure


@pytest.mark.parametrize("weight", [0.0, 0.1])
@pytest.mark.parametrize("returns", ["tensor", "number", "none"])
@pytest.mark.parametrize("keyword", [False, True], ids=["first", "keyword"])
def test_a_closure_changes_nothing_in_a_training(weight, returns, keyword):
    runs = []
    for with_closure in (False, True):
        model, optimizer, allocator = attached(adamw, weight)
        for step in range(1, 13):
            if with_closure:
                closure = closure_of(model, optimizer, step, returns)
                task = model.loss(*batch(step)).item()
                value = orth_reg(model, weight).item()
                loss = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
                if returns == "none":
                    assert loss is None
                else:
                    assert float(loss) == pytest.approx(task + value)
                if weight:
                    assert allocator.orth_reg == pytest.approx(value)
            else:
                optimizer.zero_grad()
                model.loss(*batch(step)).backward()
                optimizer.step()
        runs.append((*model.parameters(), *allocator.scores().values()))
        assert alive(model) == 9 and allocator.global_step == 12 and allocator.frozen
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_the_loss_of_a_closure_keeps_its_dtype():
    model, optimizer, _ = attached(adamw)

    def closure():
        loss = model.loss(*batch(1))
        loss.backward()
        return loss.bfloat16()

    assert optimizer.step(closure).dtype == torch.bfloat16


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs_sees_the_function_whose_gradient_it_gets(line_search):
    """As with the regulariser in the loss, and an allocator that is stepped by hand."""

    def lbfgs(parameters):
        return torch.optim.LBFGS(parameters, lr=0.3, max_iter=5, line_search_fn=line_search)

    runs = []
    for by_hand in (False, True):
        model, optimizer, allocator = attached(lbfgs)
        if by_hand:
            allocator.detach()
        losses = []
        for step in range(1, 13):

            def closure(model=model, optimizer=optimizer, by_hand=by_hand, step=step):
                optimizer.zero_grad()
                loss = model.loss(*batch(step))
                loss.backward()
                if by_hand:
                    loss = loss + orth_reg_grad_(model, 0.1)
                return loss

            losses.append(float(optimizer.step(closure)))
            if by_hand:
                allocator.step(step)
        assert alive(model) == 9 and allocator.global_step == 12
        runs.append((torch.tensor(losses), *model.parameters(), *allocator.scores().values()))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert runs[0][0][-1] < runs[0][0][0]


def test_a_closure_without_gradients_is_no_step():
    """Lightning's, when training_step returns None."""
    model, optimizer, allocator = attached(adamw)
    before = copy.deepcopy(model.state_dict())
    assert optimizer.step(lambda: None) is None
    assert optimizer.step(lambda: 3.0) == 3.0
    assert allocator.global_step == 0 and allocator.orth_reg is None
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_an_error_in_a_closure_leaves_everything_ready():
    model, optimizer, allocator = attached(adamw)

    def broken():
        raise ArithmeticError("a batch that can't be read")

    with pytest.raises(ArithmeticError):
        optimizer.step(broken)
    optimizer.step(closure_of(model, optimizer, 1))
    assert allocator.global_step == 1

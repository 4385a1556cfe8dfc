"""Dropping pruned triplets for real."""

import copy
import functools
import inspect

import pytest
import torch
from allocator_runs import STEPS, setup, train
from helpers import batch, trainable
from sam import SAM
from torch import nn

# Those of torch's whose update of an entry depends on that entry alone.
CUT = ("AdamW", "Adam", "Adamax", "NAdam", "RAdam")
CUT += ("SGD", "Adadelta", "Adagrad", "ASGD", "RMSprop", "Rprop")
REFUSED = ("Adafactor", "LBFGS", "Muon")


def optimizers():
    rates = {"Adadelta": 1.0, "SGD": 0.3}
    for name in CUT:
        options = {"momentum": 0.9} if name == "SGD" else {}
        kind = functools.partial(getattr(torch.optim, name), **options)
        marks = () if name in ("AdamW", "SGD", "Rprop") else pytest.mark.full
        yield pytest.param(kind, rates.get(name, 2e-2), id=name, marks=marks)


def test_every_optimizer_of_torch_is_known():
    kinds = {name for name, kind in vars(torch.optim).items() if inspect.isclass(kind)}
    assert kinds - {"Optimizer", "SparseAdam"} == {*CUT, *REFUSED} & kinds


@pytest.mark.parametrize(("kind", "lr"), list(optimizers()))
def test_shrinking_does_not_change_the_training(kind, lr):
    runs = []
    for shrinks in (False, True):
        model, optimizer, allocator = setup(optimizer=kind, lr=lr)
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


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("adapter_first", [True, False], ids=["first", "behind_a_head"])
def test_optimizers_that_are_refused(name, adapter_first):
    if not hasattr(torch.optim, name):
        pytest.skip(f"torch {torch.__version__} has no {name}")
    model, _, allocator = setup(total_step=6, tinit=1, tfinal=3)
    head = nn.Parameter(torch.ones(8, 8))
    parameters = [p for p in trainable(model) if p.dim() == 2]
    parameters.insert(len(parameters) if adapter_first else 0, head)
    optimizer = getattr(torch.optim, name)(parameters, lr=1e-2)

    def closure():
        optimizer.zero_grad()
        x, target = batch(1)
        loss = (model(x) @ head - target).square().mean()
        loss.backward()
        return loss

    for step in range(1, 5):
        optimizer.step(closure)
        allocator.step(step)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=rf"optimizer is a {name}, whose state can't be cut"):
        allocator.shrink(optimizer)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    allocator.shrink(getattr(torch.optim, name)(parameters, lr=1e-2))
    assert allocator.shrunk, "a new one has no state yet"


def test_the_state_of_all_optimizers_that_are_followed_is_cut():
    model, _, allocator = setup(total_step=12, tinit=2, tfinal=4)
    sam = SAM(trainable(model), torch.optim.AdamW, lr=1e-2)
    other = torch.optim.SGD(trainable(model), lr=0.1, momentum=0.9)
    allocator.attach(sam)
    allocator.attach(other)
    for step in range(1, 13):
        model.loss(*batch(step)).backward()
        if step % 2:
            other.step()
        else:
            sam.first_step(zero_grad=True)
            model.loss(*batch(step)).backward()
            sam.second_step()
        sam.zero_grad()
        if step == 9:
            allocator.shrink()
            assert sum(layer.r for layer in model.layers) == 9
    assert allocator.global_step == 12
    detached = setup(total_step=12, tinit=2, tfinal=4)
    model, _, allocator = detached
    sam = SAM(trainable(model), torch.optim.AdamW, lr=1e-2)
    for step in range(1, 13):
        model.loss(*batch(step)).backward()
        sam.first_step(zero_grad=True)
        model.loss(*batch(step)).backward()
        sam.second_step()
        allocator.step(step)
        sam.zero_grad()
        if step == 9:
            allocator.shrink(sam)


def test_the_function_stays_whatever_stands_in_lora_E():
    """Other weights may have been loaded: an earlier state, or an average of states."""
    model, optimizer, allocator = setup()
    train(model, optimizer, allocator, range(1, 31), orth=0)
    pruned = allocator.rank_pattern
    with torch.no_grad():
        model.layers[0].lora_E[pruned["layers.0.lora_E"].index(False)] = 0.5
    x = torch.randn(5, 16)
    before = model(x).detach()
    allocator.shrink(optimizer)
    torch.testing.assert_close(model(x), before)
    assert sum(allocator.ranks().values()) == 10 == sum(layer.r for layer in model.layers)
    assert allocator.summary()["total_rank"] == allocator.summary()["budget"] == 10
    train(model, optimizer, allocator, range(31, STEPS + 1), orth=0)
    # A state of a shrunk model says by itself what is left, whatever this one has.
    other = setup(seed=1)
    nn.init.ones_(other[0].layers[2].lora_E)
    other[2].load_state_dict(allocator.state_dict())
    other[0].load_state_dict(model.state_dict())
    assert torch.equal(other[0](x), model(x))


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
    assert other_allocator.rank_pattern == allocator.rank_pattern


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

"""Dropping pruned triplets for real."""

import copy

import pytest
import torch
from allocator_runs import STEPS, setup, train
from helpers import trainable
from torch import nn


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

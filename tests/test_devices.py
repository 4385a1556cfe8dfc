"""Adapters on several devices of one process (`device_map`).

There are no two devices here. So the values are those of a model whose layers are only said to be
on different ones; and the devices are those of fake tensors, which have no values, but whose ops
refuse to mix devices as real ones do.
"""

import copy
import math

import pytest
import torch
from helpers import Mlp, batch, trainable
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adalora_kernels import RankAllocator, SVDLinear
from adalora_kernels.allocator import devices, state

STEPS = 20
SCHEDULE = {"target_r": 3, "total_step": STEPS, "tinit": 2, "tfinal": 5, "deltaT": 2}


@pytest.fixture
def said_to_be_apart(monkeypatch):
    """Let parameters be on different devices by what stands in `place`, which tests set."""
    place = {}
    monkeypatch.setattr(devices, "device_of", lambda p: place.get(id(p), p.device))
    return place


def put(place, model):
    """The first and the last layer on one device, that between them on another; one more apart."""
    for i, layer in enumerate(model.layers):
        for p in layer.parameters():
            place[id(p)] = f"device {[0, 1, 0][i]}"
    for p in model.last.parameters():
        place[id(p)] = "device 2"


class Net(Mlp):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(dtype=torch.float64)
        self.last = SVDLinear(8, 8, r=5, dtype=torch.float64)

    def forward(self, x):
        return self.last(torch.tanh(super().forward(x)))


def train(model, last=STEPS, first=1, saved=None, overflows=None, shrinks=None, importance="paper"):
    optimizer = torch.optim.AdamW(trainable(model), lr=5e-3)
    allocator = RankAllocator(model, orth_reg_weight=0.1, importance=importance, **SCHEDULE)
    if saved is not None:
        optimizer.load_state_dict(saved["optimizer"])
        allocator.load_state_dict(saved["allocator"])
    allocator.attach(optimizer)
    for step in range(first, last + 1):
        model.loss(*batch(step, torch.float64)).backward()
        if step == overflows:
            allocator.detach()
            optimizer.step()
            # After it, so that the weights stay finite.
            model.layers[1].lora_B.grad[0, 0] = math.nan
            allocator.step(step)
            allocator.attach(optimizer)
        else:
            optimizer.step()
        optimizer.zero_grad()
        if step == shrinks:
            allocator.shrink(optimizer)
    return allocator, {
        "allocator": allocator.state_dict(),
        "optimizer": copy.deepcopy(optimizer.state_dict()),
        "orth_reg": allocator.orth_reg,
        "its optimizer": optimizer,
    }


def assert_same(ours, theirs):
    for a, b in zip(trainable(ours), trainable(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("overflows", [None, 7], ids=["", "overflow"])
@pytest.mark.parametrize("shrinks", [None, STEPS - 2], ids=["", "shrink"])
@pytest.mark.parametrize("importance", ["paper", "norm"])
def test_several_devices_have_one_budget(said_to_be_apart, importance, overflows, shrinks):
    options = {"importance": importance, "overflows": overflows, "shrinks": shrinks}
    theirs, ours = Net(), Net()
    allocator, expected = train(theirs, **options)
    put(said_to_be_apart, ours)
    apart, result = train(ours, **options)
    assert isinstance(apart._state.shards, devices.Devices)
    assert apart.rank_pattern == allocator.rank_pattern
    assert apart.summary() == allocator.summary()
    if importance == "paper":  # By the other one nothing is learnt that could be skipped.
        assert apart.summary()["skipped_steps"] == (overflows is not None)
    torch.testing.assert_close(result["orth_reg"], expected["orth_reg"])
    assert_same(ours, theirs)


@pytest.mark.parametrize("where", ["together", "apart"])
def test_a_state_goes_on_wherever_the_adapters_are(said_to_be_apart, where):
    uninterrupted = Net()
    allocator, _ = train(uninterrupted)
    model = Net()
    put(said_to_be_apart, model)
    _, saved = train(model, last=9)
    if where == "together":
        said_to_be_apart.clear()
    resumed, _ = train(model, first=10, saved=saved)
    assert resumed.rank_pattern == allocator.rank_pattern
    assert_same(model, uninterrupted)


def test_a_model_is_divided_in_the_middle_of_a_run(said_to_be_apart):
    theirs, ours = Net(), Net()
    allocator, _ = train(theirs)
    optimizer = torch.optim.AdamW(trainable(ours), lr=5e-3)
    moved = RankAllocator(ours, orth_reg_weight=0.1, **SCHEDULE)
    moved.attach(optimizer)
    for step in range(1, STEPS + 1):
        if step == 6:
            put(said_to_be_apart, ours)
        if step == 11:
            said_to_be_apart.clear()
        ours.loss(*batch(step, torch.float64)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert moved.rank_pattern == allocator.rank_pattern
    assert_same(ours, theirs)


def test_restarting_on_several_devices(said_to_be_apart):
    results = []
    for is_apart in (False, True):
        model = Net()
        if is_apart:
            put(said_to_be_apart, model)
        allocator, result = train(model)
        allocator.restart()
        optimizer = result["its optimizer"]
        for step in range(1, STEPS + 1):
            model.loss(*batch(step, torch.float64)).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append((allocator.rank_pattern, model))
    assert results[0][0] == results[1][0]
    assert_same(results[1][1], results[0][1])


class OneDevice(TorchDispatchMode):
    """Says of our own ops what fake tensors say of torch's: all arguments are on one device."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "adalora":
            devices = {t.device for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
            assert len(devices) == 1, (func, devices)
            self.seen.add(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_op_mixes_devices(monkeypatch, dtype):
    """Fake tensors tell cpu:1 from cpu:2, and both from cpu."""
    # What is there has to be read, and fake tensors have no values.
    monkeypatch.setattr(state.AllocatorState, "count_triplets", lambda *_, **__: None)
    monkeypatch.setattr(SVDLinear, "reset_parameters", lambda *_, **__: None)
    with FakeTensorMode(), OneDevice() as checked:
        places = ["cpu:1", "cpu:2", "cpu", "cpu:2", "cpu:1"]
        model = nn.ModuleList(SVDLinear(8, 8, r=4, dtype=dtype, device=d) for d in places)
        optimizer = torch.optim.SGD(trainable(model), lr=0.1)
        schedule = {"target_r": 2, "total_step": 6, "tinit": 1, "tfinal": 2}
        allocator = RankAllocator(model, orth_reg_weight=0.1, **schedule)
        allocator.attach(optimizer)
        for _ in range(6):
            for p in trainable(model):
                p.grad = torch.zeros_like(p)
            optimizer.step()
        assert allocator.frozen and allocator._state.mask.device == torch.device("cpu:1")
        assert checked.seen == {"adalora::importance_update_", "adalora::prune_"}


def test_an_adapter_is_in_one_place(said_to_be_apart):
    model = Net()
    put(said_to_be_apart, model)
    said_to_be_apart[id(model.layers[1].lora_B)] = "device 2"
    with pytest.raises(ValueError, match="lora_A, lora_E and lora_B of an adapter on one device"):
        RankAllocator(model, **SCHEDULE)


def test_what_is_not_there_yet_is_not_mixed_with_what_is():
    model = Net()
    model.layers[1].to("meta")
    with pytest.raises(ValueError, match="got cpu, meta, some of them meta"):
        RankAllocator(model, **SCHEDULE)

"""The averages of all parameters in one tensor: where each lies, and that nothing else changes."""

import json
import math
import pickle
from pathlib import Path

import pytest
import torch
from allocator_runs import STEPS, setup, train
from helpers import trainable
from hypothesis import given, settings
from hypothesis import strategies as st
from test_importance import (
    BF16,
    FP16,
    FP32,
    FP64,
    LIBRARY,
    Adapters,
    assert_bitwise,
    everywhere,
    snapshot,
)
from torch import nn

from adalora_kernels import RankAllocator, SVDLinear, ops, reference

SHAPES = [(12, 64, 48), (3, 17, 29), (0, 9, 8), (1, 5, 1), (4, 33, 20)]


def flattened(adapters, narrow_dtype=FP32):
    """The same adapters with flat averages."""
    for name in ("ipt", "unc"):
        values = getattr(adapters, name)
        flat = reference.flat_averages(adapters.params, narrow_dtype)
        torch._foreach_copy_(reference.flat_views(flat, adapters.params), values)
        setattr(adapters, name, flat)
    return adapters


def views(adapters):
    """What `Adapters.state` has of separate averages."""
    both = (reference.flat_views(avg, adapters.params) for avg in (adapters.ipt, adapters.unc))
    return [*(t for avg in both for t in avg), adapters.scores, adapters.skipped]


def mixed(shapes, device, state=FP32):
    """Adapters of float64 between those of float32, bfloat16 and float16."""
    adapters = Adapters(shapes, device)
    kinds = (FP32, FP64, BF16, FP32, FP64, FP16)
    for i in range(len(adapters.params)):
        kind = kinds[i // 3 % len(kinds)]
        average = FP64 if kind == FP64 else state
        for values, dtype in (
            (adapters.params, kind),
            (adapters.grads, kind),
            (adapters.ipt, average),
            (adapters.unc, average),
        ):
            values[i] = values[i].to(dtype)
    return adapters


@everywhere
@pytest.mark.parametrize("state", [FP32, BF16], ids=str)
@pytest.mark.parametrize("kind", ["float32", "float64", "mixed"])
def test_flat_averages_are_bitwise_the_separate_ones(update, kind, state):
    def make():
        if kind == "mixed":
            return mixed(SHAPES * 2, update.device, state)
        dtype = getattr(torch, kind)
        return Adapters(SHAPES, update.device, dtype=dtype, state=FP64 if dtype == FP64 else state)

    separate, flat = make(), flattened(make(), state)
    assert len(flat.ipt) == (2 if kind == "mixed" else 1)
    for adapters in (separate, flat):
        adapters.grads[4] = None
        for _ in range(3):
            adapters.step(update)
    assert_bitwise(views(flat), separate.state())
    # Between the parameters there is nothing.
    for average in flat.ipt:
        own = [v for v in reference.flat_views(flat.ipt, flat.params) if v.dtype == average.dtype]
        assert (average != 0).sum() == sum(int((v != 0).sum()) for v in own)


@everywhere
def test_a_step_that_is_skipped_leaves_flat_averages(update):
    adapters = flattened(Adapters(SHAPES, update.device))
    adapters.step(update)
    before = snapshot(adapters)
    adapters.grads[-1].view(-1)[-1] = math.nan
    adapters.step(update)
    assert adapters.skipped.item() == 1
    assert_bitwise(adapters.state()[:-1], before[:-1])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    shapes=st.lists(
        st.tuples(st.integers(0, 40), st.integers(1, 90), st.integers(1, 90)),
        min_size=1,
        max_size=5,
    ),
    dtype=st.sampled_from([FP32, BF16, FP64]),
    missing=st.sets(st.integers(0, 14), max_size=6),
)
@everywhere
def test_flat_averages_of_random_adapters(update, shapes, dtype, missing):
    runs = []
    for flat in (False, True):
        state = FP64 if dtype == FP64 else FP32
        adapters = Adapters(shapes, update.device, dtype=dtype, state=state)
        adapters.grads = [None if i in missing else g for i, g in enumerate(adapters.grads)]
        adapters = flattened(adapters) if flat else adapters
        adapters.step(update)
        runs.append(views(adapters))
    assert_bitwise(*runs)


# Rows of lora_A that are computed together, one by one, and in pieces, and the edges between these.
@pytest.mark.parametrize("update", LIBRARY)
@pytest.mark.parametrize("length", [1, 2, 15, 16, 100, 511, 513, 1024, 1025, 16384, 16385])
def test_rows_of_every_length(update, length):
    adapters = Adapters([(19, length, 3)], update.device)
    exact = adapters.to(FP64).step(reference.importance_update_)
    adapters.step(update)
    for a, e in zip(adapters.state(), exact.state(), strict=True):
        torch.testing.assert_close(a.cpu().double(), e.double(), rtol=1e-5, atol=1e-6)


REFUSED = {
    "short": (r"exp_avg_ipt must have entries for all", {"ipt": lambda t: [t[:-16]]}),
    "long": (
        r"exp_avg_unc must have entries for params only: has \d+, they take \d+",
        {"unc": lambda t: [torch.cat([t, t[:16]])]},
    ),
    "matrix": ("exp_avg_ipt must be flat", {"ipt": lambda t: [t.view(16, -1)]}),
    "strided": ("exp_avg_unc must be flat", {"unc": lambda t: [t.repeat_interleave(2)[::2]]}),
    "half": ("both alike", {"ipt": lambda t: [t.half()], "unc": lambda t: [t.half()]}),
    "unlike": ("both alike", {"unc": lambda t: [t.double()]}),
    "integers": ("exp_avg_ipt must be float32", {"ipt": lambda t: [t.long()]}),
    "two_alike": ("one of two flat exp_avg_ipt must be float64", {"ipt": lambda t: [t, t]}),
    "none": ("of one length", {"ipt": lambda t: []}),
    "four": ("of one length", {"ipt": lambda t: [t] * 4}),
}


@pytest.mark.parametrize("update", LIBRARY)
@pytest.mark.parametrize(("says", "change"), REFUSED.values(), ids=REFUSED.keys())
def test_the_library_refuses_what_is_no_flat_average(update, says, change):
    adapters = flattened(Adapters([(4, 9, 8)], update.device))
    for name, value in change.items():
        setattr(adapters, name, value(getattr(adapters, name)[0]))
    before = snapshot(adapters)
    with pytest.raises(RuntimeError, match=says):
        adapters.step(update)
    torch.testing.assert_close(adapters.state(), before, rtol=0, atol=0, equal_nan=True)


# The allocator's


def test_an_allocator_has_one_tensor_of_each_average():
    model, optimizer, allocator = setup()
    train(model, optimizer, allocator, range(1, 8))
    state = allocator._state
    for flat, name in ((state.exp_avg_ipt, "exp_avg_ipt"), (state.exp_avg_unc, "exp_avg_unc")):
        assert len(flat) == 1 and flat[0].dim() == 1
        saved = allocator.state_dict()[name]
        assert [t.shape for t in saved] == [p.shape for p in allocator._parameters()]
        # Each has memory of its own, for whoever writes it to a file.
        assert len({t.untyped_storage().data_ptr() for t in saved}) == len(saved)
        assert sum(int(t.count_nonzero()) for t in saved) == int(flat[0].count_nonzero()) > 0
    train(model, optimizer, allocator, range(8, STEPS))
    assert allocator.frozen and not state.exp_avg_ipt and not state.exp_avg_unc
    allocator.shrink(optimizer)
    assert not state.exp_avg_ipt and allocator.state_dict()["exp_avg_ipt"] == []


def mixed_model():
    torch.manual_seed(0)
    model = nn.Sequential(
        SVDLinear(7, 6, r=3), SVDLinear(6, 5, r=2, dtype=FP64), SVDLinear(5, 4, r=3)
    )
    for layer in model:
        nn.init.normal_(layer.lora_E)
    return model


def gradients(model, step):
    generator = torch.Generator().manual_seed(step)
    for p in trainable(model):
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def mixed_run(steps, state_dtype=FP32, state=None):
    model = mixed_model()
    options = {"target_r": 2, "total_step": 12, "tinit": 2, "tfinal": 3}
    allocator = RankAllocator(model, state_dtype=state_dtype, **options)
    if state is not None:
        model.load_state_dict(state[0])
        allocator.load_state_dict(state[1])
    for step in steps:
        gradients(model, step)
        with torch.no_grad():
            for p in trainable(model):
                p.sub_(p.grad, alpha=0.01)
        allocator.step(step)
    return model, allocator


@pytest.mark.parametrize("state_dtype", [FP32, BF16], ids=str)
def test_parameters_of_two_dtypes_in_one_model(state_dtype):
    model, allocator = mixed_run(range(1, 8), state_dtype)
    assert [t.dtype for t in allocator._state.exp_avg_ipt] == [state_dtype, FP64]
    state = allocator.state_dict()
    assert [t.dtype for t in state["exp_avg_unc"]] == [state_dtype] * 3 + [FP64] * 3 + [
        state_dtype
    ] * 3
    # What the reference makes of separate averages.
    params = [p.detach() for p in allocator._parameters()]
    grads = [p.grad for p in allocator._parameters()]
    ipt, unc = state["exp_avg_ipt"], state["exp_avg_unc"]
    scores, skipped = state["scores"].clone(), state["skipped"].clone()
    reference.importance_update_(params, grads, ipt, unc, scores, skipped, 0.85, 0.85)
    allocator.step(7)
    after = allocator.state_dict()
    for a, e in zip(after["exp_avg_ipt"] + after["exp_avg_unc"], ipt + unc, strict=True):
        torch.testing.assert_close(a, e)
    torch.testing.assert_close(after["scores"], scores)

    # It resumes bitwise, and begins again.
    _, other = mixed_run(range(8, 13), state_dtype, (model.state_dict(), after))
    for step in range(8, 13):
        gradients(model, step)
        with torch.no_grad():
            for p in trainable(model):
                p.sub_(p.grad, alpha=0.01)
        allocator.step(step)
    assert other.frozen and other.rank_pattern == allocator.rank_pattern
    assert torch.equal(other.state_dict()["scores"], allocator.state_dict()["scores"])
    allocator.restart()
    assert [t.dtype for t in allocator._state.exp_avg_ipt] == [state_dtype, FP64]
    assert not any(t.any() for t in allocator.state_dict()["exp_avg_ipt"])


# From a model in float32 to one of two dtypes, to another of two, to float64.
@pytest.mark.parametrize("which", [slice(0, 1), slice(1, 3), slice(0, 3)], ids=str)
def test_averages_go_with_a_model_that_is_cast(which):
    model, _, allocator = setup()
    for layer in model.layers:
        nn.init.normal_(layer.lora_E)
    gradients(model, 1)
    allocator.step(1)
    before = allocator.state_dict()
    for step, cast in enumerate((model.layers[which], model.layers[1], model), 2):
        cast.double()
        gradients(model, step)
        allocator.advance(step)
        after = allocator.state_dict()
        for a, b in zip(after["exp_avg_ipt"], before["exp_avg_ipt"], strict=True):
            assert a.any() and torch.equal(a.double(), b.double())
        allocator.update()
        before = allocator.state_dict()
    assert allocator.summary()["skipped_steps"] == 0
    assert {t.dtype for t in before["exp_avg_ipt"]} == {FP64}


def test_a_restart_zeroes_the_averages_where_they_are():
    model, optimizer, allocator = setup()
    train(model, optimizer, allocator, range(1, 12))
    flat = (*allocator._state.exp_avg_ipt, *allocator._state.exp_avg_unc)
    allocator.restart()
    again = (*allocator._state.exp_avg_ipt, *allocator._state.exp_avg_unc)
    assert all(a is b for a, b in zip(flat, again, strict=True))
    assert not any(t.any() for t in again)


def test_views_are_kept_where_there_is_no_compiled_code(monkeypatch):
    monkeypatch.setattr(ops, "library", ops.library._replace(built_for=""))
    model, optimizer, allocator = setup()
    kept = allocator._state._views
    train(model, optimizer, allocator, range(1, 8))
    assert allocator._state._views is kept
    assert kept[0][-1].untyped_storage().data_ptr() == allocator._state.exp_avg_ipt[0].data_ptr()
    # Each view would be pickled with the memory of all.
    size = sum(t.nbytes for t in allocator._state.exp_avg_ipt + allocator._state.exp_avg_unc)
    pickled = pickle.dumps(allocator._state)
    assert size < len(pickled) < 2 * size + 20_000
    state = pickle.loads(pickled)
    state._views[1][0].fill_(7.0)
    assert (state.exp_avg_unc[0] == 7.0).any() and (kept[1][0] != 7.0).all()
    other = setup()
    monkeypatch.undo()
    train(*other, range(1, 8))
    for a, b in zip(model.parameters(), other[0].parameters(), strict=True):
        assert torch.equal(a, b)


def old_state():
    """A state that was saved when every parameter had averages of its own."""
    state = json.loads((Path(__file__).parent / "data" / "allocator_state.json").read_text())
    for key, value in state.items():
        if isinstance(value, dict):
            dtype = getattr(torch, value["dtype"])
            values = value.get("tensors", value.get("values"))
            state[key] = (
                [torch.tensor(v, dtype=dtype) for v in values]
                if "tensors" in value
                else torch.tensor(values, dtype=dtype)
            )
    return state


def test_a_state_of_before_is_loaded_and_saved_as_it_was():
    model = nn.Sequential(SVDLinear(3, 2, r=2), SVDLinear(2, 3, r=2))
    allocator = RankAllocator(model, target_r=1, total_step=10, tinit=1, tfinal=2)
    old = old_state()
    allocator.load_state_dict(old)
    new = allocator.state_dict()
    assert new.keys() == old.keys()
    for key, value in old.items():
        values = value if isinstance(value, list) else [value]
        others = new[key] if isinstance(value, list) else [new[key]]
        for a, b in zip(others, values, strict=True):
            same = torch.equal(a, b) and a.dtype == b.dtype if torch.is_tensor(b) else a == b
            assert same, key


def test_views_are_aligned_and_apart():
    params = mixed(SHAPES * 2, "cpu").params
    flat = reference.flat_averages(params, FP32)
    parts = reference.flat_views(flat, params)
    for number, part in enumerate(parts):
        assert part.shape == params[number].shape and part.is_contiguous()
        assert part.storage_offset() % 16 == 0
        part.fill_(number + 1)
    for number, part in enumerate(parts):
        assert (part == number + 1).all()
    # Separate ones come back as they are, and none is none.
    assert reference.flat_views(parts, params) == parts and reference.flat_views([], params) == []

"""Pruning as one op: the compiled library's is the reference, to the bit."""

import math

import pytest
import torch
from helpers import CountOps, Mlp, batch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from adalora_kernels import RankAllocator, ops, reference

prune_ = torch.ops.adalora.prune_
compiled = pytest.mark.skipif(
    "cpu" not in ops.library.device_types, reason=f"no library: {ops.library.why_not}"
)
KINDS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def arguments(ranks, values, budget, prunes=True, restarted=False, strided=False, seed=0):
    """Those of the op for adapters with these ranks, whose scores are drawn from `values`."""
    generator = torch.Generator().manual_seed(seed)
    n = sum(ranks)

    def flags(share):
        return torch.rand(n, generator=generator) < share

    scores = torch.tensor(values)[torch.randint(len(values), (n,), generator=generator)]
    memory = [torch.randn(r, 2 if strided else 1, generator=generator) for r in ranks]
    for m in memory:
        # 0 times inf would not be 0, and nothing that lives may change.
        m[::2], m[1::4] = math.inf, math.nan
    lora_E = [m.to(KINDS[i % 4])[:, :1] for i, m in enumerate(memory)]
    kept_at_0 = flags(0.2) if restarted else None
    return [
        scores,
        torch.tensor([budget]),
        torch.tensor([prunes]),
        flags(0.8),
        kept_at_0,
        flags(0.5),
        lora_E,
    ]


def copied(args):
    return [[t.clone() for t in a] if isinstance(a, list) else a for a in args[:5]] + [
        args[5].clone(),
        [E.clone() for E in args[6]],
    ]


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@compiled
@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    ranks=st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any),
    values=st.sampled_from(
        [[0.0], [0.0, 1.0], [-0.0, 0.0], [3.0, 1.0, 2.0, 0.5], [math.nan, 1.0, math.inf, -math.inf]]
    ),
    budget=st.integers(-1, 60),
    prunes=st.booleans(),
    restarted=st.booleans(),
    again=st.booleans(),
    strided=st.booleans(),
    double=st.booleans(),
    seed=st.integers(0, 9),
)
def test_the_library_prunes_as_the_reference(
    ranks, values, budget, prunes, restarted, again, strided, double, seed
):
    args = arguments(ranks, values, budget, prunes, restarted, strided, seed)
    args[0] = args[0].double() if double else args[0]
    expected, actual = copied(args), args
    reference.prune_(*expected, again)
    prune_(*actual, again)
    assert torch.equal(actual[5], expected[5])
    for a, e in zip(actual[6], expected[6], strict=True):
        assert_same(a, e)
    # A zero that is written is +0.
    assert not any(torch.signbit(E[E == 0]).any() for E in actual[6])


@compiled
def test_many_triplets_of_one_score_keep_the_first():
    args = arguments([64] * 50, [1.0], 1234)
    args[3].fill_(True)
    prune_(*args)
    assert args[5].tolist() == [True] * 1234 + [False] * (3200 - 1234)


REFUSED = {
    "scores": ("scores must be", lambda a: a.__setitem__(0, a[0][:-1])),
    "scores_dtype": ("scores must be", lambda a: a.__setitem__(0, a[0].half())),
    "budget": ("budget must be one int64", lambda a: a.__setitem__(1, a[1].int())),
    "prunes": (r"prunes must be \(1,\) in bool", lambda a: a.__setitem__(2, a[2].int())),
    "in_play": (r"in_play must be \(7,\) in bool", lambda a: a.__setitem__(3, a[3][:3])),
    "kept": (r"kept_at_0 must be \(7,\)", lambda a: a.__setitem__(4, a[5][:3])),
    "mask": (r"mask must be", lambda a: a.__setitem__(5, a[5].repeat_interleave(2)[::2])),
    "vector": (r"lora_E\[1\] must be r x 1", lambda a: a[6].__setitem__(1, torch.ones(4))),
    "matrix": (r"lora_E\[0\] must be r x 1", lambda a: a[6].__setitem__(0, torch.ones(3, 2))),
    "integers": ("lora_E must be float32", lambda a: a[6].__setitem__(0, torch.ones(3, 1).int())),
}


@compiled
@pytest.mark.parametrize(("says", "change"), REFUSED.values(), ids=REFUSED.keys())
def test_the_library_refuses(says, change):
    args = arguments([3, 4], [1.0, 2.0], 3)
    change(args)
    before = [E.clone() for E in args[6]]
    with pytest.raises(RuntimeError, match=says):
        prune_(*args)
    for a, b in zip(args[6], before, strict=True):
        assert_same(a, b)


def test_a_masking_step_is_four_ops():
    model = Mlp()
    allocator = RankAllocator(model, target_r=2, total_step=10, tfinal=2)
    for p in allocator._parameters():
        p.grad = torch.randn_like(p)
    with CountOps() as counted:
        allocator.step(3)
    assert counted.counts["adalora::prune_"] == counted.counts["adalora::importance_update_"] == 1
    assert counted.counts["aten::_local_scalar_dense"] == 0
    if "cpu" in ops.library.device_types:
        assert counted.counts.total() == 4


def test_autograd_is_told_of_the_zeros():
    """A backward through what was pruned in between would be wrong, and says so."""
    model = Mlp()
    for layer in model.layers:
        nn.init.normal_(layer.lora_E)
    allocator = RankAllocator(model, target_r=2, total_step=10, tfinal=2)
    loss = model.loss(*batch(1))
    versions = [E._version for E in allocator._parameters()[1::3]]
    for p in allocator._parameters():
        p.grad = torch.randn_like(p)
    allocator.step(3)
    assert all(
        E._version > was for E, was in zip(allocator._parameters()[1::3], versions, strict=True)
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()

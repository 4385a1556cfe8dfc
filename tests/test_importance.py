"""The importance update of a whole model: the compiled library's and that of `importance.py`.

Both are held against `reference.py`.
"""

import math
from dataclasses import dataclass

import pytest
import torch
from helpers import CountOps, assert_as_good_as_eager
from hypothesis import given, settings
from hypothesis import strategies as st

from adalora_kernels import importance, ops, reference

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


@dataclass(frozen=True)
class Implementation:
    """An implementation of the update on one device."""

    name: str
    device: str

    def __call__(self, *arguments):
        if self.name == "library":
            torch.ops.adalora.importance_update_(*arguments)
        else:
            importance.importance_update_(*arguments)


def _implementation(name, device, *marks):
    if name == "library" and device not in ops.library.device_types:
        why = ops.library.why_not or f"it was built for {ops.library.built_for}"
        marks += (pytest.mark.skip(reason=f"no {device} code: {why}"),)
    if device == "cuda":
        marks += (
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
        )
    return pytest.param(Implementation(name, device), marks=marks, id=f"{name}-{device}")


LIBRARY = [_implementation("library", device) for device in ("cpu", "cuda")]
FOREACH = [_implementation("foreach", device) for device in ("cpu", "cuda")]
everywhere = pytest.mark.parametrize("update", LIBRARY + FOREACH)


class Adapters:
    """Parameters, gradients and averages of adapters with the given (r, in, out)."""

    def __init__(self, shapes, device, *, dtype=FP32, grad_dtype=None, state=FP32, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def random(shape, kind):
            return torch.randn(shape, generator=generator).to(kind).to(device)

        self.shapes = [s for r, k, n in shapes for s in ((r, k), (r, 1), (n, r))]
        self.params = [random(s, dtype) for s in self.shapes]
        self.grads = [random(s, grad_dtype or dtype) for s in self.shapes]
        self.ipt = [random(s, FP32).abs().to(state) for s in self.shapes]
        self.unc = [random(s, FP32).abs().to(state) for s in self.shapes]
        total = sum(r for r, _, _ in shapes)
        scores_dtype = FP64 if state == FP64 else FP32
        self.scores = torch.full((total,), torch.nan, dtype=scores_dtype, device=device)
        self.skipped = torch.zeros(1, dtype=torch.int64, device=device)

    def to(self, dtype):
        """A copy on the CPU in one dtype, averages and scores included."""
        other = object.__new__(Adapters)
        for name in ("params", "ipt", "unc"):
            setattr(
                other, name, [t.detach().cpu().to(dtype, copy=True) for t in getattr(self, name)]
            )
        other.grads = [None if g is None else g.cpu().to(dtype, copy=True) for g in self.grads]
        other.scores = self.scores.cpu().to(dtype, copy=True)
        other.skipped = self.skipped.cpu().clone()
        return other

    def step(self, update, *more):
        arguments = (self.params, self.grads, self.ipt, self.unc, self.scores, self.skipped)
        update(*arguments, 0.85, 0.7, *more)
        return self

    def state(self):
        return [*self.ipt, *self.unc, self.scores, self.skipped]


def snapshot(adapters):
    return [t.clone() for t in adapters.state()]


def assert_bitwise(actual, expected):
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        # As integers: NaN is a value like any other here.
        assert torch.equal(a.flatten().view(torch.uint8), e.flatten().view(torch.uint8))


def check_update(update, adapters, steps=2):
    """Every average within a few rounding errors of the float64 one, and the scores as eager's."""
    eager, exact = adapters.to(FP32), adapters.to(FP64)
    # Of the terms that U is the difference of; its rounding errors are theirs.
    magnitude = [u.clone() for u in exact.unc]
    for _ in range(steps):
        adapters.step(update)
        eager.step(reference.importance_update_)
        exact.step(reference.importance_update_)
        for m, w, g, i in zip(magnitude, exact.params, exact.grads, exact.ipt, strict=True):
            if g is not None:
                m.mul_(0.7).add_(0.3 * ((w * g).abs() + i))
    for name, scale in (("ipt", exact.ipt), ("unc", magnitude)):
        for a, e, s in zip(getattr(adapters, name), getattr(exact, name), scale, strict=True):
            eps = torch.finfo(a.dtype if a.dtype == BF16 else FP32).eps
            error = (a.detach().cpu().double() - e).abs()
            assert (error <= 6 * steps * eps * s + 1e-45).all(), (name, float((error / s).max()))
    if adapters.scores.dtype == FP32 and adapters.ipt[0].dtype == FP32:
        assert_as_good_as_eager(adapters.scores.cpu(), eager.scores, exact.scores, "scores")
    assert adapters.skipped.item() == 0


SHAPES = {
    "r1": [(1, 7, 5)],
    "r3_odd": [(3, 17, 29), (3, 1, 1)],
    "r12": [(12, 768, 768), (12, 768, 3072)],
    "r64": [(64, 130, 200)],
    "r300": [(300, 20, 33)],
    "long": [(2, 40_000, 35_001)],
    "one_huge_and_many_tiny": [(16, 3000, 5000), *[(2, 3, 4)] * 90],
    "rank_zero": [(4, 9, 8), (0, 9, 8), (2, 5, 6)],
}


@everywhere
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
def test_importance(update, shapes):
    check_update(update, Adapters(shapes, update.device))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shapes=st.lists(
        st.tuples(st.integers(0, 40), st.integers(1, 90), st.integers(1, 90)),
        min_size=1,
        max_size=5,
    ),
    dtype=st.sampled_from([FP32, BF16, FP16]),
    grad_dtype=st.sampled_from([None, FP32]),
    state=st.sampled_from([FP32, BF16]),
    missing=st.sets(st.integers(0, 14), max_size=6),
    transposed=st.booleans(),
    seed=st.integers(0, 9),
)
@everywhere
def test_importance_of_random_adapters(
    update, shapes, dtype, grad_dtype, state, missing, transposed, seed
):
    adapters = Adapters(
        shapes, update.device, dtype=dtype, grad_dtype=grad_dtype, state=state, seed=seed
    )
    if transposed:
        adapters.params = [p.T.contiguous().T for p in adapters.params]
        adapters.grads[-1] = adapters.grads[-1].T.contiguous().T
    for i in missing:
        if i < len(adapters.grads):
            adapters.grads[i] = None
    if any(g is not None and g.numel() for g in adapters.grads):
        check_update(update, adapters)
        return
    before = snapshot(adapters)
    adapters.step(update)
    assert_bitwise(adapters.state(), before)


@everywhere
def test_importance_in_float64(update):
    adapters = Adapters([(5, 30, 20)], update.device, dtype=FP64, state=FP64)
    exact = adapters.to(FP64).step(reference.importance_update_)
    adapters.step(update)
    for a, e in zip(adapters.state(), exact.state(), strict=True):
        torch.testing.assert_close(a.cpu(), e, rtol=1e-13, atol=1e-13)


@everywhere
def test_importance_of_unaligned_parameters(update):
    adapters = Adapters([(12, 64, 48), (4, 33, 20)], update.device)

    def shifted(t):
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)

    adapters.params = [shifted(p) for p in adapters.params]
    adapters.grads = [shifted(g) for g in adapters.grads]
    check_update(update, adapters)


@everywhere
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64], ids=str)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan], ids=str)
@pytest.mark.parametrize("where", [0, 1, 2, 5], ids=["A", "E", "B", "last"])
def test_a_non_finite_gradient_changes_nothing(update, where, bad, dtype):
    state = FP64 if dtype == FP64 else FP32
    adapters = Adapters([(12, 50, 40), (3, 20, 30)], update.device, dtype=dtype, state=state)
    adapters.step(update)
    before = snapshot(adapters)
    adapters.grads[where].view(-1)[-1] = bad
    adapters.step(update)
    assert adapters.skipped.item() == 1
    assert_bitwise(adapters.state()[:-1], before[:-1])


@everywhere
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan], ids=str)
def test_a_non_finite_scale_changes_nothing(update, bad):
    adapters = Adapters([(12, 50, 40), (3, 20, 30)], update.device)
    adapters.step(update)
    before = snapshot(adapters)
    adapters.step(update, torch.tensor(bad, device=update.device))
    assert adapters.skipped.item() == 1
    assert_bitwise(adapters.state()[:-1], before[:-1])


@everywhere
def test_overflowing_products_stay_finite(update):
    adapters = Adapters([(3, 20, 20)], update.device)
    adapters.params[0][0] = 3e38
    adapters.grads[0][0] = 3e38
    adapters.params[2][1] = math.nan
    expected = adapters.to(FP32).step(reference.importance_update_)
    adapters.step(update)
    for a, e in zip(adapters.state()[:-2], expected.state()[:-2], strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a.cpu(), e)
    # Infinite products count as the largest finite one; what is not a number, as nothing.
    assert (expected.ipt[0][0] > 0.14 * torch.finfo(FP32).max).all()


@everywhere
def test_gradient_scale(update):
    scaled, plain = (Adapters([(4, 30, 20)], update.device) for _ in range(2))
    scaled.grads = [1024 * g for g in scaled.grads]
    scaled.step(update, torch.tensor([1 / 1024], device=update.device))
    assert_bitwise(scaled.state(), plain.step(update).state())
    expected = Adapters([(4, 30, 20)], "cpu")
    expected.step(reference.importance_update_, torch.tensor([0.3]))
    actual = Adapters([(4, 30, 20)], update.device)
    actual.step(update, torch.tensor([0.3], device=update.device))
    for a, e in zip(actual.state(), expected.state(), strict=True):
        torch.testing.assert_close(a.cpu(), e)


@everywhere
def test_bfloat16_averages_are_within_the_stated_error(update):
    shapes = [(12, 300, 200)]
    narrow, wide = Adapters(shapes, update.device, state=BF16), Adapters(shapes, update.device)
    for averages in (wide.ipt, wide.unc):
        averages[:] = [t.bfloat16().float() for t in averages]
    for step in range(40):
        new = Adapters(shapes, update.device, seed=step + 1)
        for adapters in (narrow, wide):
            adapters.grads = new.grads
            adapters.step(update)
    for n, w in zip(narrow.ipt, wide.ipt, strict=True):
        # RankAllocator's docstring: 2⁻⁸ / (1 - beta).
        assert ((n.float() - w).abs() <= 2**-8 / 0.15 * w).all()


@everywhere
def test_results_are_bitwise_the_same_again(update):
    shapes = SHAPES["one_huge_and_many_tiny"] + SHAPES["r12"]
    first, second = (Adapters(shapes, update.device).step(update) for _ in range(2))
    assert_bitwise(first.state(), second.state())


def test_dispatched_ops_without_the_library_depend_on_the_shapes_only():
    counts = []
    for shapes in ([(4, 8, 8)] * 2, [(4, 8, 8)] * 72, [(4, 8, 16), (4, 16, 8)] * 36):
        adapters = Adapters(shapes, "cpu")
        with CountOps() as ops_called:
            adapters.step(importance.importance_update_)
        assert ops_called.counts["aten::_local_scalar_dense"] == 0, "nothing is read back"
        counts.append(ops_called.counts.total())
    assert counts[0] == counts[1] <= 70
    assert counts[2] <= 110


@pytest.mark.parametrize("update", FOREACH)
@pytest.mark.parametrize("limit", [1, 4000, 60_000])
def test_a_model_that_does_not_fit_a_batch(monkeypatch, update, limit):
    monkeypatch.setattr(importance, "_STACK_BYTES", {update.device: limit})
    adapters = Adapters([(12, 64, 48), (4, 33, 20), (0, 3, 3), (12, 64, 48)] * 3, update.device)
    adapters.grads[4] = None
    check_update(update, adapters)
    before = snapshot(adapters)
    adapters.grads[-1][-1, -1] = math.nan
    adapters.step(update)
    assert adapters.skipped.item() == 1
    assert_bitwise(adapters.state()[:-1], before[:-1])

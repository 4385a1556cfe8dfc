"""The ops over whole models as the compiled library implements them, against the reference."""

import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_as_good_as_eager
from hypothesis import given, settings
from hypothesis import strategies as st

from adalora_kernels import _extension, ops, reference

OPS = torch.ops.adalora
ROOT = Path(__file__).parent.parent
FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def _device(name):
    if name not in ops.library.device_types:
        why = ops.library.why_not or f"it was built for {ops.library.built_for}"
        return pytest.param(name, marks=pytest.mark.skip(reason=f"no {name} code: {why}"))
    if name == "cuda" and not torch.cuda.is_available():
        return pytest.param(name, marks=pytest.mark.skip(reason="needs an NVIDIA GPU"))
    return pytest.param(name, marks=pytest.mark.gpu if name == "cuda" else ())


on_devices = pytest.mark.parametrize("device", [_device("cpu"), _device("cuda")])


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

    def update(self, op, *more):
        arguments = (self.params, self.grads, self.ipt, self.unc, self.scores, self.skipped)
        op(*arguments, 0.85, 0.7, *more)
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


def check_update(adapters, steps=2):
    """Every average within a few rounding errors of the float64 one, and the scores as eager's."""
    eager, exact = adapters.to(FP32), adapters.to(FP64)
    # Of the terms that U is the difference of; its rounding errors are theirs.
    magnitude = [u.clone() for u in exact.unc]
    for _ in range(steps):
        adapters.update(OPS.importance_update_)
        eager.update(reference.importance_update_)
        exact.update(reference.importance_update_)
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


@on_devices
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
def test_importance(device, shapes):
    check_update(Adapters(shapes, device))


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
@on_devices
def test_importance_of_random_adapters(
    device, shapes, dtype, grad_dtype, state, missing, transposed, seed
):
    adapters = Adapters(shapes, device, dtype=dtype, grad_dtype=grad_dtype, state=state, seed=seed)
    if transposed:
        adapters.params = [p.T.contiguous().T for p in adapters.params]
        adapters.grads[-1] = adapters.grads[-1].T.contiguous().T
    for i in missing:
        if i < len(adapters.grads):
            adapters.grads[i] = None
    if any(g is not None and g.numel() for g in adapters.grads):
        check_update(adapters)
        return
    before = snapshot(adapters)
    adapters.update(OPS.importance_update_)
    assert_bitwise(adapters.state(), before)


@on_devices
def test_importance_in_float64(device):
    adapters = Adapters([(5, 30, 20)], device, dtype=FP64, state=FP64)
    exact = adapters.to(FP64).update(reference.importance_update_)
    adapters.update(OPS.importance_update_)
    for a, e in zip(adapters.state(), exact.state(), strict=True):
        torch.testing.assert_close(a.cpu(), e, rtol=1e-13, atol=1e-13)


@on_devices
def test_importance_of_unaligned_parameters(device):
    adapters = Adapters([(12, 64, 48), (4, 33, 20)], device)

    def shifted(t):
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)

    adapters.params = [shifted(p) for p in adapters.params]
    adapters.grads = [shifted(g) for g in adapters.grads]
    check_update(adapters)


@on_devices
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64], ids=str)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan], ids=str)
@pytest.mark.parametrize("where", [0, 1, 2, 5], ids=["A", "E", "B", "last"])
def test_a_non_finite_gradient_changes_nothing(device, where, bad, dtype):
    state = FP64 if dtype == FP64 else FP32
    adapters = Adapters([(12, 50, 40), (3, 20, 30)], device, dtype=dtype, state=state)
    adapters.update(OPS.importance_update_)
    before = snapshot(adapters)
    adapters.grads[where].view(-1)[-1] = bad
    adapters.update(OPS.importance_update_)
    assert adapters.skipped.item() == 1
    assert_bitwise(adapters.state()[:-1], before[:-1])


@on_devices
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan], ids=str)
def test_a_non_finite_scale_changes_nothing(device, bad):
    adapters = Adapters([(12, 50, 40), (3, 20, 30)], device)
    adapters.update(OPS.importance_update_)
    before = snapshot(adapters)
    adapters.update(OPS.importance_update_, torch.tensor(bad, device=device))
    assert adapters.skipped.item() == 1
    assert_bitwise(adapters.state()[:-1], before[:-1])


@on_devices
def test_overflowing_products_stay_finite(device):
    adapters = Adapters([(3, 20, 20)], device)
    adapters.params[0][0] = 3e38
    adapters.grads[0][0] = 3e38
    adapters.params[2][1] = math.nan
    expected = adapters.to(FP32).update(reference.importance_update_)
    adapters.update(OPS.importance_update_)
    for a, e in zip(adapters.state()[:-2], expected.state()[:-2], strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a.cpu(), e)
    # Infinite products count as the largest finite one; what is not a number, as nothing.
    assert (expected.ipt[0][0] > 0.14 * torch.finfo(FP32).max).all()


@on_devices
def test_gradient_scale(device):
    scaled, plain = (Adapters([(4, 30, 20)], device) for _ in range(2))
    scaled.grads = [1024 * g for g in scaled.grads]
    scaled.update(OPS.importance_update_, torch.tensor([1 / 1024], device=device))
    assert_bitwise(scaled.state(), plain.update(OPS.importance_update_).state())
    expected = Adapters([(4, 30, 20)], "cpu")
    expected.update(reference.importance_update_, torch.tensor([0.3]))
    actual = Adapters([(4, 30, 20)], device)
    actual.update(OPS.importance_update_, torch.tensor([0.3], device=device))
    for a, e in zip(actual.state(), expected.state(), strict=True):
        torch.testing.assert_close(a.cpu(), e)


@on_devices
def test_bfloat16_averages_are_within_the_stated_error(device):
    shapes = [(12, 300, 200)]
    narrow, wide = Adapters(shapes, device, state=BF16), Adapters(shapes, device)
    for averages in (wide.ipt, wide.unc):
        averages[:] = [t.bfloat16().float() for t in averages]
    for step in range(40):
        new = Adapters(shapes, device, seed=step + 1)
        for adapters in (narrow, wide):
            adapters.grads = new.grads
            adapters.update(OPS.importance_update_)
    for n, w in zip(narrow.ipt, wide.ipt, strict=True):
        # RankAllocator's docstring: 2⁻⁸ / (1 - beta).
        assert ((n.float() - w).abs() <= 2**-8 / 0.15 * w).all()


def model_ops(device):
    """Everything that the library computes for one model."""
    adapters = Adapters(SHAPES["one_huge_and_many_tiny"] + SHAPES["r12"], device)
    adapters.update(OPS.importance_update_)
    A, E, B = (adapters.params[i::3] for i in range(3))
    norms, residuals = OPS.orth_reg(A, B)
    dA, dB = OPS.orth_reg_backward(torch.ones_like(norms), norms, residuals, A, B)
    mask = torch.ones_like(adapters.scores, dtype=torch.bool)
    budget = torch.tensor([100], device=device)
    OPS.allocate_(adapters.scores, budget, mask, E)
    return [*adapters.state(), norms, residuals, *dA, *dB, mask, *E]


@on_devices
def test_results_are_bitwise_the_same_again(device):
    assert_bitwise(model_ops(device), model_ops(device))


@pytest.mark.parametrize("device", [_device("cpu")])
@pytest.mark.parametrize("threads", [2, 4])
def test_results_do_not_depend_on_the_number_of_threads(device, threads):
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            results.append(model_ops(device))
    finally:
        torch.set_num_threads(before)
    assert_bitwise(*results)


# Allocation


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    ranks=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(sum),
    # Few values, so that there are ties.
    values=st.lists(
        st.sampled_from([0.0, 1e-30, 0.5, 3.0, math.inf, -math.inf, math.nan]),
        min_size=54,
        max_size=54,
    ),
    budget=st.sampled_from([None, -(2**40), -1, 0, 1, 2, 3, 5, 8, 13, 21, 34, 54, 55, 2**40]),
    dtype=st.sampled_from([FP32, FP64]),
    strided=st.booleans(),
)
@on_devices
def test_allocation(device, ranks, values, budget, dtype, strided):
    n = sum(ranks)
    scores = torch.tensor(values[:n], dtype=dtype)
    kinds = (FP32, BF16, FP16)
    lora_E = [torch.randn(r, 2 if strided else 1).to(kinds[i % 3]) for i, r in enumerate(ranks)]
    mask = torch.rand(n) < 0.5
    expected_mask, expected_E = mask.clone(), [E[:, :1].clone() for E in lora_E]
    limit = None if budget is None else torch.tensor([budget])
    reference.allocate_(scores, limit, expected_mask, expected_E)
    moved = [E.to(device) for E in lora_E]
    actual_mask = mask.to(device)
    OPS.allocate_(
        scores.to(device),
        None if limit is None else limit.to(device),
        actual_mask,
        [E[:, :1] for E in moved],
    )
    assert torch.equal(actual_mask.cpu(), expected_mask)
    for actual, expected, before in zip(moved, expected_E, lora_E, strict=True):
        assert torch.equal(actual[:, :1].cpu(), expected)
        assert torch.equal(actual[:, 1:].cpu(), before[:, 1:]), "only lora_E is written"


# Orthogonality


def orth_case(shapes, dtype=FP32, device="cpu", spoil=None):
    """lora_A, lora_B close to orthogonal, where the Gram matrix cancels."""
    torch.manual_seed(1)
    A, B = [], []
    for r, k, n in shapes:
        A.append((torch.randn(r, k) / k**0.5).to(dtype))
        B.append((torch.randn(n, r) / n**0.5).to(dtype))
    if spoil == "transposed":
        A, B = [a.T.contiguous().T for a in A], [b.T.contiguous().T for b in B]
    if spoil == "strided":
        A = [torch.stack([a, a], -1)[..., 0] for a in A]
        B = [torch.stack([b, b], -1)[..., 0] for b in B]
    return [a.to(device) for a in A], [b.to(device) for b in B]


def orth_results(op, backward, A, B):
    norms, residuals = op(A, B)
    weights = torch.linspace(0.5, 2.0, len(norms), dtype=norms.dtype, device=norms.device)
    dA, dB = backward(weights, norms, residuals, A, B)
    return {"norms": norms, "residuals": residuals, "dA": dA, "dB": dB}


def check_orth(A, B):
    exact = [[t.cpu().double() for t in part] for part in (A, B)]
    eager = [[t.cpu() for t in part] for part in (A, B)]
    plain = (reference.orth_reg, reference.orth_reg_backward)
    expected = orth_results(*plain, *exact)
    rival = orth_results(*plain, *eager)
    actual = orth_results(OPS.orth_reg, OPS.orth_reg_backward, A, B)
    for name, result in actual.items():
        triples = zip(result, rival[name], expected[name], strict=True)
        if name in ("norms", "residuals"):
            triples = [(result, rival[name], expected[name])]
        for i, (a, e, o) in enumerate(triples):
            assert_as_good_as_eager(a.cpu(), e, o, f"{name}[{i}]")


ORTH_SHAPES = {
    "r1": [(1, 40, 30), (1, 1, 1)],
    "r3": [(3, 50, 70), (3, 3, 2)],
    "r12": [(12, 768, 3072), (12, 100, 7)],
    "r16": [(16, 512, 512)],
    "r33": [(33, 257, 100)],
    "r64": [(64, 500, 3000)],
    "r200": [(200, 260, 220)],
    "r300": [(300, 48, 40)],
    "odd_vectors": [(4, 48, 80), (5, 16, 112), (64, 144, 16)],
    "rank_zero": [(4, 20, 10), (0, 20, 10), (2, 5, 5)],
    # Several: one norm of near-orthogonal rows is right to a rounding step by luck, in eager too.
    "wide": [(5, 30_001, 40_003)] * 4,
}


@on_devices
@pytest.mark.parametrize("spoil", [None, "transposed", "strided"], ids=str)
@pytest.mark.parametrize("shapes", ORTH_SHAPES.values(), ids=ORTH_SHAPES.keys())
def test_orthogonality(device, shapes, spoil):
    check_orth(*orth_case(shapes, FP32, device, spoil))


@on_devices
@pytest.mark.parametrize("spoil", [None, "transposed", "strided"], ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP64], ids=str)
def test_orthogonality_at_every_size_of_block(device, dtype, spoil):
    # Lengths around those of a vector, of a page and of a tile.
    lengths = (15, 16, 33, 64, 144, 200, 271, 600)
    ranks = (*range(1, 41), 64, 100, 256)
    shapes = [(r, lengths[r % 8], lengths[(r // 8 + r) % 8]) for r in ranks]
    A, B = orth_case(shapes, dtype, device, spoil)
    if dtype != FP64:
        check_orth(A, B)
        return
    results = orth_results(OPS.orth_reg, OPS.orth_reg_backward, A, B)
    A, B = [a.cpu() for a in A], [b.cpu() for b in B]
    expected = orth_results(reference.orth_reg, reference.orth_reg_backward, A, B)
    torch.testing.assert_close(results, expected, check_device=False, rtol=1e-12, atol=1e-13)


@on_devices
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_orthogonality_of_half_precision(device, dtype):
    check_orth(*orth_case([(12, 300, 200), (1, 30, 40)], dtype, device))


@on_devices
def test_orthogonality_in_float64(device):
    A, B = orth_case([(12, 300, 200), (33, 40, 90)], FP64, device)
    actual = orth_results(OPS.orth_reg, OPS.orth_reg_backward, A, B)
    A, B = [a.cpu() for a in A], [b.cpu() for b in B]
    expected = orth_results(reference.orth_reg, reference.orth_reg_backward, A, B)
    for name in actual:
        torch.testing.assert_close(actual[name], expected[name], check_device=False)


@on_devices
def test_gradient_at_exact_orthogonality_is_zero(device):
    A, B = [torch.eye(4, 9, device=device)], [torch.eye(7, 4, device=device)]
    results = orth_results(OPS.orth_reg, OPS.orth_reg_backward, A, B)
    assert not results["norms"].any() and not results["dA"][0].any()


@on_devices
def test_gradient_of_a_sum_of_norms(device):
    # Autograd hands over an expanded scalar.
    A, B = orth_case([(12, 100, 70), (3, 20, 40)], FP32, device)
    norms, residuals = OPS.orth_reg(A, B)
    one = torch.ones((), device=device).expand(4)
    actual = OPS.orth_reg_backward(one, norms, residuals, A, B)
    expected = OPS.orth_reg_backward(one.contiguous(), norms, residuals, A, B)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    into = [[torch.zeros_like(t) for t in part] for part in (A, B)]
    OPS.orth_reg_grad_(one, norms, residuals, A, B, *into)
    torch.testing.assert_close(into, [*map(list, expected)], rtol=0, atol=0)


@on_devices
@pytest.mark.parametrize("grads", ["contiguous", "transposed"])
def test_gradients_are_added_to_what_is_there(device, grads):
    A, B = orth_case([(12, 100, 70), (3, 20, 40), (1, 9, 9)], FP32, device)
    norms, residuals = OPS.orth_reg(A, B)
    ones = torch.ones_like(norms)
    dA, dB = OPS.orth_reg_backward(ones, norms, residuals, A, B)
    there = [torch.randn_like(t) for t in (*A, *B)]
    if grads == "transposed":
        there = [t.T.contiguous().T for t in there]
    expected = [t + d for t, d in zip(there, (*dA, *dB), strict=True)]
    OPS.orth_reg_grad_(ones, norms, residuals, A, B, there[:3], there[3:])
    torch.testing.assert_close(there, expected)


# Refusals: nothing is read or written out of bounds, whatever a caller of the raw ops passes.


@on_devices
def test_importance_refuses(device):
    def refused(says, **change):
        adapters = Adapters([(4, 9, 8)], device)
        for name, value in change.items():
            setattr(adapters, name, value(adapters))
        with pytest.raises(RuntimeError, match=says):
            adapters.update(OPS.importance_update_)

    refused("params must be", params=lambda a: a.params[:2])
    refused("one length", grads=lambda a: a.grads[:2])
    refused(r"grads\[0\]", grads=lambda a: [a.grads[2], *a.grads[1:]])
    refused(r"params\[1\] must be 4 x 1", params=lambda a: [a.params[0], *a.params[1:][::-1]])
    refused("contiguous", ipt=lambda a: [a.ipt[0].T.contiguous().T, *a.ipt[1:]])
    refused("both alike", unc=lambda a: [u.double() for u in a.unc])
    refused("float32, float64", params=lambda a: [p.to(torch.complex64) for p in a.params])
    refused("scores must be", scores=lambda a: a.scores[:3])
    refused("skipped must be", skipped=lambda a: a.skipped.int())


@on_devices
def test_the_others_refuse(device):
    A, B = orth_case([(4, 9, 8)], FP32, device)
    norms, residuals = OPS.orth_reg(A, B)
    with pytest.raises(RuntimeError, match="one length"):
        OPS.orth_reg(A, B + B)
    with pytest.raises(RuntimeError, match=r"B\[0\] \(out, r\)"):
        OPS.orth_reg(A, A)
    with pytest.raises(RuntimeError, match="those of orth_reg"):
        OPS.orth_reg_backward(norms[:1], norms, residuals, A, B)
    with pytest.raises(RuntimeError, match="matrix's shape"):
        OPS.orth_reg_grad_(norms, norms, residuals, A, B, [torch.zeros_like(A[0][:, 1:])], B)
    scores, mask = torch.zeros(4, device=device), torch.ones(4, dtype=torch.bool, device=device)
    E = [torch.ones(4, 1, device=device)]
    with pytest.raises(RuntimeError, match="mask must be"):
        OPS.allocate_(scores, None, mask[:3], E)
    with pytest.raises(RuntimeError, match="budget must be one int64"):
        OPS.allocate_(scores, torch.zeros(1, device=device), mask, E)
    with pytest.raises(RuntimeError, match="scores must be"):
        OPS.allocate_(scores.bool(), None, mask, E)


# The binary

# What torch 2.11 exports of the stable ABI and this library uses, or may come to use: of
# aoti_torch/c/shim.h as it was before 2.10, and of stable/c/shim.h what is marked 2.10 or 2.11.
IN_TORCH_2_11 = re.compile(
    r"aoti_torch_(abi_version|(device_type|dtype|layout|memory_format)_\w+"
    r"|(delete|new)_tensor_(object|handle)|delete_library_object|library_init_impl"
    r"|get_(data_ptr|dim|numel|sizes?|strides?|dtype|device_type|device_index)|is_contiguous"
    r"|(create|delete)_device_guard|get_current_cuda_stream)"
    r"|torch_(call_dispatcher|library_impl|parallel_for|new_list_reserve_size|delete_list"
    r"|list_(size|get_item|push_back)|dtype_float8_e8m0fnu|dtype_float4_e2m1fn_x2)"
)


@pytest.mark.skipif(ops.library.path is None, reason=f"no library: {ops.library.why_not}")
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm (binutils)")
def test_the_library_needs_nothing_of_torch_that_2_11_lacks():
    command = ["nm", "-D", "--undefined-only", ops.library.path]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    needed = {line.split()[-1] for line in listing.splitlines()}
    of_torch = {name for name in needed if "torch" in name}
    assert "torch_library_impl" in of_torch
    assert {name for name in of_torch if not IN_TORCH_2_11.fullmatch(name)} == set()
    # Nor of Python, or of the unstable C++ interface.
    assert not {n for n in needed if n.startswith(("Py", "_Py")) or "c10" in n or "2at" in n}


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.skipif(_extension.VARIABLE in os.environ, reason="already runs under a sanitizer")
def test_address_and_undefined_behaviour_sanitizers(tmp_path):
    flags = "-O1 -g1 -DADALORA_CLONES= -fsanitize=address,undefined -fno-sanitize-recover=undefined"
    build = [sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path]
    environment = os.environ | {
        "ADALORA_KERNELS_BUILD": "cpu",
        "CXXFLAGS": flags,
        "LDFLAGS": flags,
        "CXX": "g++",
    }
    build += ["--build-temp", tmp_path / "objects"]
    subprocess.run(build, cwd=ROOT, env=environment, check=True, capture_output=True)
    (library,) = tmp_path.glob("*/_C*.so")
    # With the C++ runtime, so that torch's exceptions are found by the sanitizer's handler.
    runtimes = [
        subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(runtimes),
        # Python leaves much behind, and torch's own library is not instrumented.
        "ASAN_OPTIONS": "detect_leaks=0",
        _extension.VARIABLE: str(library),
    }
    test = [sys.executable, "-m", "pytest", "-x", __file__, "-k", "cpu and not float64"]
    done = subprocess.run(test, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    assert re.search(r"^\.+", done.stdout), "the tests ran, on this library"

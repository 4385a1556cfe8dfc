"""The references against the paper's equations, written out with loops, and against gradcheck."""

import itertools

import pytest
import torch
from helpers import adapter
from hypothesis import given, settings
from hypothesis import strategies as st

from adalora_kernels import reference

MASKS = {
    "no_mask": None,
    "all_true": [True, True, True],
    "mixed": [True, False, True],
    "all_false": [False, False, False],
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("op", ["svd_linear", "svd_delta"])
def test_forward_gradcheck(op, dropout_p, mask):
    A, E, B = adapter(3, 5, 4)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    mask = None if mask is None else torch.tensor(mask)
    seed = torch.tensor([11]) if dropout_p else None
    rest = (mask, 0.7, dropout_p, seed)
    if op == "svd_linear":
        weight = torch.randn(4, 5, dtype=torch.float64)
        bias = torch.randn(4, dtype=torch.float64, requires_grad=True)

        def run(x, bias, A, E, B):
            return reference.svd_linear(x, weight, bias, A, E, B, *rest)

        inputs = (x, bias, A, E, B)
    else:
        base = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)

        def run(base, x, A, E, B):
            return reference.svd_delta(base, x, A, E, B, *rest)

        inputs = (base, x, A, E, B)
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_explicit_backward_is_that_of_autograd(dropout_p, mask):
    A, E, B = adapter(3, 5, 4)
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 5, dtype=torch.float64)
    mask = None if mask is None else torch.tensor(mask)
    seed = torch.tensor([11]) if dropout_p else None
    rest = (0.7, dropout_p, seed)
    y, h = reference.svd_linear(x, weight, None, A, E, B, mask, *rest)
    g = torch.randn_like(y)
    expected = torch.autograd.grad(y, (x, A, E, B), g)
    with torch.no_grad():
        actual = reference.svd_linear_backward(g, x, weight, A, E, B, mask, h, *rest, True)
        delta = reference.svd_delta_backward(g, x, A, E, B, mask, h, *rest, True)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(delta[0] + g @ weight, expected[0])
    torch.testing.assert_close(delta[1:], expected[1:])


def test_forward_is_equation_3():
    A, E, B = adapter(3, 5, 4, requires_grad=False)
    x, weight = torch.randn(7, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    bias, mask = torch.randn(4, dtype=torch.float64), torch.tensor([True, False, True])
    y, h = reference.svd_linear(x, weight, bias, A, E, B, mask, 0.7, 0.0, None)
    for m, n in itertools.product(range(7), range(4)):
        expected = bias[n] + sum(x[m, k] * weight[n, k] for k in range(5))
        for i in (0, 2):
            expected += 0.7 * B[n, i] * E[i, 0] * sum(x[m, k] * A[i, k] for k in range(5))
        torch.testing.assert_close(y[m, n], expected)
    torch.testing.assert_close(h, x @ A.T)


def test_a_masked_triplet_is_as_if_it_were_not_there():
    A, E, B = adapter(3, 5, 4)
    x, weight = torch.randn(7, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    mask = torch.tensor([True, False, True])
    y, _ = reference.svd_linear(x, weight, None, A, E, B, mask, 0.7, 0.0, None)
    without = (A[mask], E[mask], B[:, mask])
    expected, _ = reference.svd_linear(x, weight, None, *without, None, 0.7, 0.0, None)
    torch.testing.assert_close(y, expected)
    dA, dE, dB = torch.autograd.grad(y.sum(), (A, E, B))
    assert not dA[1].any() and not dE[1].any() and not dB[:, 1].any()


def test_a_zero_singular_value_still_gets_its_gradient():
    A, E, B = adapter(3, 5, 4)
    zero = torch.zeros_like(E, requires_grad=True)
    x, weight = torch.randn(7, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    y, _ = reference.svd_linear(x, weight, None, A, zero, B, None, 0.7, 0.0, None)
    (dE,) = torch.autograd.grad(y.sum(), zero)
    assert dE.abs().min() > 0


def philox_4x32_10(counter, key):
    """Salmon et al. 2011, section 3.3, in Python integers."""
    for _ in range(10):
        p0, p1 = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = (
            (p1 >> 32) ^ counter[1] ^ key[0],
            p1 & 0xFFFFFFFF,
            (p0 >> 32) ^ counter[3] ^ key[1],
            p0 & 0xFFFFFFFF,
        )
        key = ((key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF)
    return list(counter)


def test_philox_known_answers():
    # The first answer of the authors' test vectors: counter 0, key 0.
    zero = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox_4x32_10((0, 0, 0, 0), (0, 0)) == zero
    assert reference.philox_uint32(torch.tensor([0]), 4).tolist() == zero
    seed = 0x0123456789ABCDEF
    words = reference.philox_uint32(torch.tensor([seed]), 10).tolist()
    key = (seed & 0xFFFFFFFF, seed >> 32)
    expected = [w for i in range(3) for w in philox_4x32_10((i, 0, 0, 0), key)]
    assert words == expected[:10]


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_mask(p):
    x = torch.empty(500, 401)
    mask = reference.dropout_mask(x, p, torch.tensor([3]))
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    # Five standard deviations of the mean, of the columns' means, and of neighbours' agreement.
    sigma = (p * (1 - p)) ** 0.5
    assert abs(mask.mean() - (1 - p)) < 5 * sigma / mask.numel() ** 0.5
    assert (mask.mean(dim=0) - (1 - p)).abs().max() < 5.5 * sigma / 500**0.5
    both = (mask[:, 1:] * mask[:, :-1]).mean()
    assert abs(both - (1 - p) ** 2) < 5 * sigma / (500 * 400) ** 0.5
    again = reference.dropout_mask(x.double(), p, torch.tensor([3]))
    assert torch.equal(mask, again.float()), "same seed, same mask, whatever the dtype"
    other = reference.dropout_mask(x, p, torch.tensor([4]))
    assert (mask != other).float().mean() > p * (1 - p)


def test_dropout_mask_of_an_extreme_probability():
    x, seed = torch.empty(1000), torch.tensor([3])
    assert reference.dropout_mask(x, 1e-9, seed).all()
    assert reference.dropout_mask(x, 1 - 1e-9, seed).sum() <= 1
    assert reference.dropout_mask(torch.empty(0, 5), 0.5, seed).shape == (0, 5)


def test_dropout_mask_off_the_cpu_reads_nothing_back():
    x = torch.empty(5, 7, device="meta")
    seed = torch.zeros(1, dtype=torch.int64, device="meta")
    assert reference.dropout_mask(x, 0.1, seed).shape == (5, 7)


def scalar_importance(history, beta1, beta2):
    """Eq. (8)-(10) for one entry; history is [(weight, gradient), …]."""
    sensitivity = uncertainty = 0.0
    for w, g in history:
        ipt = abs(w * g)
        sensitivity = beta1 * sensitivity + (1 - beta1) * ipt
        uncertainty = beta2 * uncertainty + (1 - beta2) * abs(ipt - sensitivity)
    return sensitivity, uncertainty


def importance_state(params):
    total = sum(p.shape[0] for p in params[1::3])
    dtype = params[0].dtype
    averages = [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]
    return (*averages, torch.zeros(total, dtype=dtype), torch.zeros(1, dtype=torch.int64))


def test_importance_and_scores_are_the_equations():
    params = [*adapter(2, 5, 4, requires_grad=False), *adapter(3, 4, 2, requires_grad=False)]
    ipt, unc, scores, skipped = importance_state(params)
    history = []
    for _ in range(4):
        grads = [torch.randn_like(p) for p in params]
        params = [p + 0.1 * g for p, g in zip(params, grads, strict=True)]
        reference.importance_update_(params, grads, ipt, unc, scores, skipped, 0.85, 0.6)
        history.append((params, grads))

    def entry(index, *at):
        steps = [(p[index][at].item(), g[index][at].item()) for p, g in history]
        sensitivity, uncertainty = scalar_importance(steps, 0.85, 0.6)
        return sensitivity * uncertainty

    expected = []
    for first, r, k, n in ((0, 2, 5, 4), (3, 3, 4, 2)):
        for i in range(r):
            score_A = sum(entry(first, i, j) for j in range(k)) / k
            score_B = sum(entry(first + 2, j, i) for j in range(n)) / n
            expected.append(entry(first + 1, i, 0) + score_A + score_B)
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64))
    assert skipped.item() == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_gradient_changes_no_average(bad):
    params = list(adapter(3, 5, 4, dtype=torch.float32, requires_grad=False))
    ipt, unc, scores, skipped = state = importance_state(params)
    grads = [torch.randn_like(p) for p in params]
    reference.importance_update_(params, grads, *state, 0.85, 0.85)
    before = [t.clone() for t in (*ipt, *unc, scores)]
    grads[2][1, 1] = bad
    reference.importance_update_(params, grads, *state, 0.85, 0.85)
    assert all(torch.equal(a, b) for a, b in zip(before, (*ipt, *unc, scores), strict=True))
    assert skipped.item() == 1


def test_a_parameter_without_gradient_keeps_its_averages():
    params = list(adapter(3, 5, 4, requires_grad=False))
    ipt, unc, *_ = state = importance_state(params)
    grads = [torch.randn_like(p) for p in params]
    reference.importance_update_(params, grads, *state, 0.85, 0.85)
    kept = ipt[1].clone(), unc[1].clone()
    reference.importance_update_(params, [grads[0], None, grads[2]], *state, 0.85, 0.85)
    assert torch.equal(ipt[1], kept[0]) and torch.equal(unc[1], kept[1])
    assert not torch.equal(ipt[0], (1 - 0.85) * (params[0] * grads[0]).abs())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_importance_of_half_precision_is_kept_in_float32(dtype):
    params = list(adapter(3, 5, 4, dtype=dtype, requires_grad=False))
    grads = [torch.randn_like(p) for p in params]
    ipt, unc, scores, skipped = importance_state([p.float() for p in params])
    reference.importance_update_(params, grads, ipt, unc, scores, skipped, 0.85, 0.85)
    expected = 0.15 * (params[0].float() * grads[0].float()).abs()
    torch.testing.assert_close(ipt[0], expected, rtol=1e-6, atol=0)


def test_importance_of_mixed_dtypes_and_of_rank_zero():
    dtypes = (torch.bfloat16, torch.float32, torch.bfloat16)
    params = [p.to(t) for p, t in zip(adapter(3, 5, 4, torch.float32, False), dtypes, strict=True)]
    params += adapter(0, 5, 4, torch.float32, False)
    ipt, unc, scores, skipped = importance_state([p.float() for p in params])
    reference.importance_update_(params, params, ipt, unc, scores, skipped, 0.85, 0.85)
    assert scores.shape == (3,) and scores.min() > 0
    before = scores.clone()
    nothing = [None] * 3 + params[3:]
    reference.importance_update_(params, nothing, ipt, unc, scores, skipped, 0.85, 0.85)
    assert torch.equal(scores, before) and skipped.item() == 0


def best(scores, budget):
    """Top-b by sorting Python tuples: higher score first, then the lower index; NaN last."""
    order = sorted(
        range(len(scores)),
        key=lambda i: (scores[i] != scores[i], -scores[i] if scores[i] == scores[i] else 0.0, i),
    )
    return [i in set(order[:budget]) for i in range(len(scores))]


# Few different values, so that there are ties.
SCORES = st.lists(st.sampled_from([0.0, 1e-30, 0.5, 1.0, 3.0, float("inf"), float("nan")]))


@settings(max_examples=300, deadline=None)
@given(SCORES, st.integers(0, 30), st.sampled_from([torch.float32, torch.float64]))
def test_top_b_mask_keeps_exactly_the_best(scores, budget, dtype):
    tensor = torch.tensor(scores, dtype=dtype)
    mask = reference.top_b_mask(tensor, budget)
    assert mask.tolist() == best(tensor.tolist(), budget)
    assert int(mask.sum()) == min(budget, len(scores))
    assert torch.equal(mask, reference.top_b_mask(tensor, torch.tensor(budget)))


def test_top_b_mask_is_kthvalue_without_ties():
    scores = torch.rand(50)
    for budget in range(50):
        threshold = torch.kthvalue(scores, 50 - budget)[0]
        assert torch.equal(reference.top_b_mask(scores, budget), scores > threshold)


@pytest.mark.parametrize("squared", [False, True], ids=["peft", "paper"])
def test_orth_reg_is_equation_4(squared):
    pairs = [adapter(3, 5, 4)[::2], adapter(2, 6, 7)[::2]]
    norms = []
    for a, b in pairs:
        for vectors in (a.unbind(0), b.unbind(1)):
            entries = [
                (v @ w).item() - (i == j)
                for (i, v), (j, w) in itertools.product(enumerate(vectors), repeat=2)
            ]
            norms.append(sum(e * e for e in entries) ** 0.5)
    expected = 0.3 * (sum(n * n for n in norms) if squared else sum(norms) / len(norms))
    assert reference.orth_reg(pairs, 0.3, squared).item() == pytest.approx(expected, rel=1e-12)


def test_orth_reg_has_no_gradient_where_the_matrices_are_orthogonal():
    pair = torch.eye(2, 5, requires_grad=True), torch.eye(4, 2, requires_grad=True)
    value = reference.orth_reg([pair])
    assert value.item() == 0.0
    assert not any(grad.any() for grad in torch.autograd.grad(value, pair))

"""The definition against the paper's equations in loops, PEFT, loralib, and gradcheck."""

import itertools

import pytest
import torch
from helpers import adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from loralib_twin import TwinLinear
from peft import AdaLoraConfig
from peft.tuners.adalora.layer import SVDLinear as PeftLinear
from torch import nn

from adalora_kernels import reference

MASKS = {
    "no_mask": None,
    "all_true": [True, True, True],
    "mixed": [True, False, True],
    "all_false": [False, False, False],
}
DROPOUT = pytest.mark.parametrize("dropout_p", [0.0, 0.3], ids=["", "dropout"])
MASKED = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())


def layer_tensors(*lead, mask=None, dropout_p=0.0):
    """(x, weight, bias, (A, E, B), (mask, scaling, dropout_p, seed)) in float64."""
    x = torch.randn(*lead, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    mask = None if mask is None else torch.tensor(mask)
    seed = torch.tensor([11]) if dropout_p else None
    return x, weight, bias, adapter(3, 5, 4), (mask, 0.7, dropout_p, seed)


@MASKED
@DROPOUT
@pytest.mark.parametrize("op", ["svd_linear", "svd_delta"])
def test_forward_gradcheck(op, dropout_p, mask):
    x, weight, bias, factors, rest = layer_tensors(2, 2, mask=mask, dropout_p=dropout_p)
    if op == "svd_linear":
        inputs = (x, weight, bias, *factors)
    else:
        inputs = (torch.randn(2, 2, 4, dtype=torch.float64, requires_grad=True), x, *factors)

    def run(*tensors):
        return getattr(reference, op)(*tensors, *rest)

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@MASKED
@DROPOUT
def test_explicit_backward_is_that_of_autograd(dropout_p, mask):
    x, weight, _, factors, rest = layer_tensors(7, mask=mask, dropout_p=dropout_p)
    y, h = reference.svd_linear(x, weight, None, *factors, *rest)
    g = torch.randn_like(y)
    expected = torch.autograd.grad(y, (x, *factors), g)
    tail = (*factors, rest[0], h, *rest[1:])
    with torch.no_grad():
        actual = reference.svd_linear_backward(g, x, weight, *tail, True)
        delta = reference.svd_linear_backward(g, x, None, *tail, True)
        without_dx = reference.svd_linear_backward(g, x, weight, *tail, False)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(delta[0] + g @ weight, expected[0])
    torch.testing.assert_close(delta[1:], expected[1:])
    assert without_dx[0].shape == (0,)
    torch.testing.assert_close(without_dx[1:], expected[1:])


def test_forward_is_equation_3():
    x, weight, bias, (A, E, B), rest = layer_tensors(7, mask=[True, False, True])
    y, h = reference.svd_linear(x, weight, bias, A, E, B, *rest)
    for m, n in itertools.product(range(7), range(4)):
        expected = bias[n] + sum(x[m, k] * weight[n, k] for k in range(5))
        for i in (0, 2):
            expected += 0.7 * B[n, i] * E[i, 0] * sum(x[m, k] * A[i, k] for k in range(5))
        torch.testing.assert_close(y[m, n], expected)
    torch.testing.assert_close(h, x @ A.T)


def peft_layer(weight, bias):
    base = nn.Linear(5, 4, dtype=torch.float64)
    base.load_state_dict({"weight": weight.detach(), "bias": bias.detach()})
    config = AdaLoraConfig(init_r=3, lora_alpha=16, init_lora_weights=False, total_step=1)
    layer = PeftLinear(base, "default", config, r=3, lora_alpha=16).double()
    return layer, [getattr(layer, f"lora_{f}")["default"] for f in "AEB"]


def loralib_layer(weight, bias):
    layer = TwinLinear(5, 4, r=3, lora_alpha=16, dtype=torch.float64)
    layer.weight.data, layer.bias.data = weight.detach(), bias.detach()
    return layer, [layer.lora_A, layer.lora_E, layer.lora_B]


@pytest.mark.parametrize("make", [peft_layer, loralib_layer], ids=["peft", "loralib"])
def test_the_layers_of_others_give_the_same(make):
    x, weight, bias, factors, _ = layer_tensors(2, 3)
    layer, theirs = make(weight, bias)
    for parameter, factor in zip(theirs, factors, strict=True):
        parameter.data = factor.detach().clone()
    expected = layer(x)
    actual, _ = reference.svd_linear(x, weight, bias, *factors, None, 16 / (3 + 1e-5), 0.0, None)
    torch.testing.assert_close(actual, expected)
    g = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, (x, *factors), g),
        torch.autograd.grad(expected, (x, *theirs), g),
    )


def test_a_masked_triplet_is_as_if_it_were_not_there():
    x, weight, _, (A, E, B), rest = layer_tensors(7, mask=[True, False, True])
    y, _ = reference.svd_linear(x, weight, None, A, E, B, *rest)
    kept = rest[0]
    without = (A[kept], E[kept], B[:, kept])
    expected, _ = reference.svd_linear(x, weight, None, *without, None, *rest[1:])
    torch.testing.assert_close(y, expected)
    dA, dE, dB = torch.autograd.grad(y.sum(), (A, E, B))
    assert not dA[1].any() and not dE[1].any() and not dB[:, 1].any()


def test_a_zero_singular_value_still_gets_its_gradient():
    x, weight, _, (A, E, B), rest = layer_tensors(7)
    zero = torch.zeros_like(E, requires_grad=True)
    y, _ = reference.svd_linear(x, weight, None, A, zero, B, *rest)
    (dE,) = torch.autograd.grad(y.sum(), zero)
    assert dE.abs().min() > 0


def test_dropout_is_on_the_way_to_lora_A_only():
    x, weight, bias, factors, rest = layer_tensors(7, dropout_p=0.3)
    y, h = reference.svd_linear(x, weight, bias, *factors, *rest)
    dropped = x * reference.philox_mask(x, 0.3, rest[-1]) / 0.7
    assert 0 < (dropped == 0).sum() < x.numel()
    torch.testing.assert_close(h, dropped @ factors[0].T)
    base = nn.functional.linear(x, weight, bias)
    expected, _ = reference.svd_delta(base, dropped, *factors, None, 0.7, 0.0, None)
    torch.testing.assert_close(y, expected)


def test_nothing_is_read_from_the_device():
    x, weight, A, E, B, g = (
        torch.empty(shape, device="meta")
        for shape in ((2, 7, 5), (4, 5), (3, 5), (3, 1), (4, 3), (2, 7, 4))
    )
    mask = torch.ones(3, dtype=torch.bool, device="meta")
    seed = torch.zeros(1, dtype=torch.int64, device="meta")
    y, h = reference.svd_linear(x, weight, None, A, E, B, mask, 0.7, 0.1, seed)
    assert y.shape == g.shape and h.shape == (2, 7, 3)
    grads = reference.svd_linear_backward(g, x, weight, A, E, B, mask, h, 0.7, 0.1, seed, True)
    assert [t.shape for t in grads] == [t.shape for t in (x, A, E, B)]


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

"""The ops: registration, autograd against float64, dropout, autocast, torch.compile."""

import pytest
import torch
import torch.nn.functional as F
from helpers import adapter, assert_as_good_as_eager
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_cases import (
    CASES,
    check_against_float64,
    eager,
    oracle,
    outputs_and_gradients,
    random_case,
    results,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from adalora_kernels import cpu, ops, reference, svd_delta, svd_linear

OPS = torch.ops.adalora


@pytest.mark.parametrize("dropout_p", [0.0, 0.25], ids=["", "dropout"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_error_against_float64(case, dropout_p):
    check_against_float64(random_case(**case), dropout_p=dropout_p)


@pytest.mark.parametrize("dropout_p", [0.0, 0.25], ids=["", "dropout"])
@pytest.mark.parametrize("case", ["rank_3", "mask_mixed", "bf16", "fp32_adapter_bf16_base"])
def test_error_of_the_reference(case, dropout_p):
    check_against_float64(random_case(**CASES[case]), dropout_p=dropout_p, impl="reference")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    lead=st.lists(st.integers(0, 9), max_size=3),
    in_features=st.integers(1, 40),
    out_features=st.integers(1, 40),
    r=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    wide_adapter=st.booleans(),
    bias=st.booleans(),
    mask=st.sampled_from([None, "true", "mixed", "false"]),
    dropout_p=st.sampled_from([0.0, 0.3]),
)
def test_every_entry_is_within_its_rounding_errors(lead, dtype, wide_adapter, dropout_p, **case):
    adapter_dtype = torch.float32 if wide_adapter else dtype
    tensors = random_case(lead=tuple(lead), dtype=dtype, adapter_dtype=adapter_dtype, **case)
    actual, _, exact, magnitude = results(tensors, dropout_p)
    # Of the longest sum, in float32, plus the few roundings of results to the dtype itself.
    terms = sum(tensors["lora_B"].shape) + sum(tensors["x"].shape)
    relative = terms * torch.finfo(torch.float32).eps + 4 * torch.finfo(dtype).eps
    for result in actual.values():
        for name, expected in exact.items():
            assert result[name].isfinite().all(), name
            assert ((result[name] - expected).abs() <= relative * magnitude[name]).all(), name


def test_float64():
    # The oracle has no more digits than this, so the error rule says nothing: compare directly.
    tensors = random_case(lead=(2, 5), dtype=torch.float64, mask="mixed")
    grad_y = torch.randn(2, 5, 9)
    expected = outputs_and_gradients(oracle, tensors, grad_y)

    def run(**t):
        return svd_linear(**t, scaling=1.5)

    actual = outputs_and_gradients(run, tensors, grad_y)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("op", ["svd_linear", "svd_delta"])
def test_the_low_rank_term_is_rounded_once(op, impl):
    # Of a float32 adapter over a bfloat16 base: products are formed in the wider dtype.
    case = random_case(lead=(20,), dtype=torch.bfloat16, adapter_dtype=torch.float32, bias=False)
    case["weight"].zero_()

    def run(weight, mask, bias=None, **t):
        if op == "svd_linear":
            return svd_linear(**t, weight=weight, scaling=1.5, impl=impl)
        base = torch.zeros(20, 9, dtype=torch.bfloat16)
        return svd_delta(base, **t, scaling=1.5, impl=impl)

    g = torch.randn(20, 9).to(torch.bfloat16)
    doubles = {k: t if t is None else t.double() for k, t in case.items()}
    exact = outputs_and_gradients(oracle, doubles, g.double())
    for name, actual in outputs_and_gradients(run, case, g).items():
        relative = torch.finfo(actual.dtype).eps * (0.5 if name in ("x", "y") else 50)
        bound = relative * exact[name].abs() + 1e-5
        assert ((actual - exact[name]).abs() <= bound).all(), name


@pytest.mark.parametrize("dropout_p", [0.0, 0.25], ids=["", "dropout"])
def test_non_contiguous_inputs(dropout_p):
    tensors = random_case(lead=(6, 4))
    tensors["x"] = tensors["x"].transpose(0, 1)
    tensors["weight"] = tensors["weight"].T.contiguous().T
    tensors["lora_B"] = tensors["lora_B"].T.contiguous().T
    check_against_float64(tensors, dropout_p=dropout_p)


def test_expanded_inputs_and_gradients():
    tensors = random_case(lead=(1, 5))
    tensors["x"] = tensors["x"].expand(4, 5, 13)
    check_against_float64(tensors)
    check_against_float64(random_case(lead=(4, 5)), grad_of=lambda g: g[:1, :1].expand_as(g))


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_dropout_is_the_same_in_forward_and_backward(impl):
    tensors = random_case(lead=(50,), r=4, mask=None, bias=False)
    x = tensors["x"].requires_grad_()
    weight = torch.zeros_like(tensors["weight"])
    factors = [tensors[k].requires_grad_() for k in ("lora_A", "lora_E", "lora_B")]
    y = svd_linear(x, weight, *factors, dropout_p=0.4, impl=impl)
    # y is linear in x, so with the same mask in both directions <dy/dx·x, g> = <y, g>.
    g = torch.randn_like(y)
    dx, dA = torch.autograd.grad(y, (x, factors[0]), g)
    torch.testing.assert_close((dx * x).sum(), (y * g).sum())
    torch.testing.assert_close((dA * factors[0]).sum(), (y * g).sum())
    assert (dx == 0).any(), "a dropped entry has no gradient through the adapter"


def test_dropout_depends_on_the_generator_only():
    tensors = random_case(lead=(50,), mask=None)
    torch.manual_seed(5)
    first, second = (svd_linear(**tensors, dropout_p=0.4) for _ in range(2))
    torch.manual_seed(5)
    again = svd_linear(**tensors, dropout_p=0.4)
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_dropout_expectation():
    tensors = random_case(lead=(4,), dtype=torch.float64)
    mean = sum(svd_linear(**tensors, dropout_p=0.2) for _ in range(4000)) / 4000
    exact = svd_linear(**tensors)
    deviation = (svd_linear(**tensors, dropout_p=0.2) - exact).abs().mean()
    assert (mean - exact).abs().mean() < 4 * deviation / 4000**0.5


def raw_args(requires_grad, dropout_p=0.0, mask="mixed"):
    c = random_case(lead=(2, 5), mask=mask)
    for name in ("x", "bias", "lora_A", "lora_E", "lora_B"):
        c[name].requires_grad_(requires_grad)
    seed = torch.tensor([7]) if dropout_p else None
    factors = (c["lora_A"], c["lora_E"], c["lora_B"])
    return c, factors, (c["mask"], 1.5, dropout_p, seed)


@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25], ids=["", "dropout"])
def test_opcheck_of_the_layer_ops(requires_grad, dropout_p):
    c, factors, rest = raw_args(requires_grad, dropout_p)
    opcheck(OPS.svd_linear, (c["x"], c["weight"], c["bias"], *factors, *rest))
    base = torch.randn(2, 5, 9, requires_grad=requires_grad)
    opcheck(OPS.svd_delta, (base, c["x"], *factors, *rest))


@pytest.mark.parametrize("need_dx", [False, True], ids=["no_dx", "dx"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25], ids=["", "dropout"])
def test_opcheck_of_their_backwards(dropout_p, need_dx):
    c, factors, (mask, *rest) = raw_args(False, dropout_p)
    g, h = torch.randn(2, 5, 9), torch.randn(2, 5, 3)
    tail = (mask, h, *rest, need_dx)
    for weight in (c["weight"], None):
        opcheck(OPS.svd_linear_backward, (g, c["x"], weight, *factors, *tail))


def test_opcheck_of_importance_update():
    params = adapter(3, 5, 4, dtype=torch.float32, requires_grad=False)
    averages = [[torch.rand_like(p) for p in params] for _ in range(2)]
    skipped = torch.zeros(1, dtype=torch.int64)
    grads = [torch.randn_like(params[0]), None, torch.randn_like(params[2])]
    state = (*averages, torch.zeros(3), skipped, 0.85, 0.85)
    opcheck(OPS.importance_update_, (list(params), grads, *state))
    opcheck(OPS.importance_update_, (list(params), grads, *state, torch.tensor([0.5])))


def test_opcheck_of_the_update_with_flat_averages():
    params = adapter(3, 5, 4, dtype=torch.float32, requires_grad=False)
    averages = [reference.flat_averages(params, torch.float32) for _ in range(2)]
    skipped = torch.zeros(1, dtype=torch.int64)
    state = (*averages, torch.zeros(3), skipped, 0.85, 0.85)
    opcheck(OPS.importance_update_, (list(params), [torch.randn_like(p) for p in params], *state))


@pytest.mark.parametrize("again", [False, True], ids=["", "again"])
def test_opcheck_of_prune(again):
    mask, in_play = torch.tensor([True, False, True, True, False]), torch.arange(5) < 4
    budget, prunes = torch.tensor([2]), torch.tensor([True])
    lora_E = [torch.randn(3, 1), torch.randn(2, 1)]
    for kept_at_0 in (None, ~in_play):
        opcheck(
            OPS.prune_, (torch.rand(5), budget, prunes, in_play, kept_at_0, mask, lora_E, again)
        )


def test_impl_may_be_left_out_of_a_call():
    c, factors, (mask, *rest) = raw_args(False, 0.25)
    base, g, h = torch.randn(2, 5, 9), torch.randn(2, 5, 9), torch.randn(2, 5, 3)
    for op, args in (
        (OPS.svd_linear, (c["x"], c["weight"], c["bias"], *factors, mask, *rest)),
        (OPS.svd_delta, (base, c["x"], *factors, mask, *rest)),
        (OPS.svd_linear_backward, (g, c["x"], c["weight"], *factors, mask, h, *rest, True)),
    ):
        torch.testing.assert_close(op(*args), op(*args, "auto"), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("device", "module"), [("cpu", cpu), ("xpu", reference)], ids=["cpu", "xpu"]
)
def test_which_functions_a_device_without_kernels_runs(device, module, monkeypatch):
    names, called = ("svd_linear", "svd_delta", "svd_linear_backward"), []
    for plain in (cpu, reference):
        for name in names:
            monkeypatch.setattr(plain, name, lambda *args, of=(plain, name): called.append(of))
    with FakeTensorMode():
        x, weight, y, h, A, E, B = (
            torch.empty(shape, device=device)
            for shape in ((2, 5), (4, 5), (2, 4), (2, 3), (3, 5), (3, 1), (4, 3))
        )
        options = (None, 1.5, 0.0, None)
        ops._svd_linear(x, weight, None, A, E, B, *options)
        ops._svd_delta(y, x, A, E, B, *options)
        ops._svd_linear_backward(y, x, weight, A, E, B, None, h, *options[1:], True)
        assert called == [(module, name) for name in names]
        if device != "cpu":
            with pytest.raises(RuntimeError, match=r"impl='triton' cannot run: .*CUDA.*xpu"):
                ops._svd_linear(x, weight, None, A, E, B, *options, "triton")


def test_every_op_is_checked_here():
    assert {i.op for i in ops.implementations("cpu")} == {
        "svd_linear",
        "svd_linear_backward",
        "svd_delta",
        "importance_update_",
        "prune_",
    }


@pytest.mark.parametrize("lead", [(7,), (2, 3), (), (0,)], ids=str)
def test_gradient_of_a_thawed_weight(lead):
    c = random_case(lead=lead, dtype=torch.float64)
    c["weight"].requires_grad_()
    g = torch.randn(*lead, 9, dtype=torch.float64)
    (actual,) = torch.autograd.grad(svd_linear(**c), c["weight"], g)
    (expected,) = torch.autograd.grad(oracle(**c, scaling=1.0), c["weight"], g)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("need_dx", [False, True], ids=["no_dx", "dx"])
def test_dx_is_computed_only_when_it_is_needed(need_dx, monkeypatch):
    grads = []

    def backward(*args, of=cpu.svd_linear_backward):
        grads.append(of(*args))
        return grads[-1]

    monkeypatch.setattr(cpu, "svd_linear_backward", backward)
    c, factors, _ = raw_args(True)
    x = c["x"].detach().requires_grad_(need_dx)
    svd_linear(x, c["weight"], *factors).sum().backward()
    svd_delta(torch.ones(2, 5, 9), x, *factors).sum().backward()
    assert [dx.numel() for dx, *_ in grads] == [x.numel() if need_dx else 0] * 2


def test_nothing_as_large_as_y_is_saved_or_allocated_beyond_it():
    M, K, N, r = 64, 96, 80, 4
    c = random_case(lead=(M,), in_features=K, out_features=N, r=r, mask=None)
    x, factors = c["x"].requires_grad_(), [c[k].requires_grad_() for k in c if "lora" in k]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = svd_linear(x, c["weight"], *factors, bias=c["bias"])
    inputs = {t.data_ptr() for t in (x, c["weight"], *factors)}
    assert sum(t.numel() for t in saved if t.data_ptr() not in inputs) == M * r
    assert y.shape == (M, N)

    with torch.profiler.profile(profile_memory=True) as profile:
        svd_linear(x, c["weight"], *factors, bias=c["bias"]).backward(torch.ones(M, N))
    largest = sorted(
        e.self_cpu_memory_usage for e in profile.events() if e.self_cpu_memory_usage > 0
    )
    # y, its gradient, dx; then only tensors with r in their size (8 of them at most at a time).
    assert largest[-4] <= 8 * r * 4 * max(M, K, N)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", ["svd_linear", "svd_delta"])
def test_autocast_is_that_of_linear(op, dtype, impl):
    c = random_case(lead=(6, 5), in_features=32, out_features=24, r=4)
    factors = [c[name].requires_grad_() for name in ("lora_A", "lora_E", "lora_B")]
    c["x"].requires_grad_()

    def run(tensors):
        if op == "svd_linear":
            return svd_linear(**tensors, scaling=1.5, impl=impl)
        base = F.linear(tensors["x"], tensors["weight"], tensors["bias"])
        return svd_delta(base, tensors["x"], *factors, scaling=1.5, impl=impl)

    with torch.autocast("cpu", dtype=dtype):
        base, plain, y = F.linear(c["x"], c["weight"]), eager(**c), run(c)
    assert y.dtype == base.dtype == dtype
    exact = oracle(**{k: t if t is None else t.detach().double() for k, t in c.items()})
    assert_as_good_as_eager(y, plain, exact)
    # Only the cast of x and weight and the result have the short dtype; the adapter has its own.
    cast = {k: t.detach().to(dtype) if k in ("x", "weight", "bias") else t for k, t in c.items()}
    torch.testing.assert_close(y, run(cast), rtol=0, atol=0)
    y.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in (c["x"], *factors))
    # Also where backward() is called inside the autocast region.
    with torch.autocast("cpu", dtype=dtype):
        again = torch.autograd.grad(run(c).sum(), c["lora_A"])[0]
    if impl == "auto":
        assert torch.equal(again, c["lora_A"].grad)


def test_autocast_does_not_reach_into_an_op():
    c = random_case(dtype=torch.bfloat16, adapter_dtype=torch.float32, mask=None)
    factors = (c["lora_A"], c["lora_E"], c["lora_B"])
    args = (c["x"], c["weight"], c["bias"], *factors, None, 1.5, 0.0, None)
    expected = OPS.svd_linear(*args)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = OPS.svd_linear(*args)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dropout_p", [0.0, 0.25], ids=["", "dropout"])
@pytest.mark.parametrize("op", ["svd_linear", "svd_delta"])
def test_compile_fullgraph(op, dropout_p):
    c, factors, _ = raw_args(True)
    options = {"mask": c["mask"], "scaling": 1.5, "dropout_p": dropout_p}

    def run(x, *factors):
        if op == "svd_linear":
            return svd_linear(x, c["weight"], *factors, bias=c["bias"], **options)
        return svd_delta(F.linear(x, c["weight"]), x, *factors, **options)

    inputs = (c["x"], *factors)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager_decomp_partition")
    torch.manual_seed(3)
    expected = run(*inputs)
    torch.manual_seed(3)
    actual = compiled(*inputs)
    torch.testing.assert_close(actual, expected)
    g = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, inputs, g), torch.autograd.grad(expected, inputs, g)
    )


@pytest.mark.parametrize(
    "backend",
    ["aot_eager_decomp_partition", pytest.param("inductor", marks=pytest.mark.full)],
)
def test_compile_under_autocast(backend):
    c, factors, _ = raw_args(True)

    def run(x, *factors):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return svd_linear(x, c["weight"], *factors, bias=c["bias"]).relu()

    inputs = (c["x"], *factors)
    expected, actual = run(*inputs), torch.compile(run, fullgraph=True, backend=backend)(*inputs)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual.sum(), inputs), torch.autograd.grad(expected.sum(), inputs)
    )


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non_reentrant", "reentrant"])
def test_activation_checkpointing_repeats_the_dropout(use_reentrant):
    c, factors, _ = raw_args(True)

    def run(x):
        return svd_linear(x, c["weight"], *factors, dropout_p=0.5).tanh()

    torch.manual_seed(3)
    expected = torch.autograd.grad(run(c["x"]).sum(), (c["x"], *factors))
    torch.manual_seed(3)
    checkpointed = torch.utils.checkpoint.checkpoint(run, c["x"], use_reentrant=use_reentrant)
    checkpointed.sum().backward()
    torch.testing.assert_close((c["x"].grad, *(f.grad for f in factors)), expected)

"""The functional API: bad inputs, impl, and the regulariser."""

import pytest
import torch
import torch.nn.functional as F
from helpers import CountOps, Mlp, adapter, batch
from torch import nn

from adalora_kernels import SVDLinear, orth_reg, orth_reg_grad_, svd_delta, svd_linear
from adalora_kernels.adapters import find_adapters


def arguments(**changes):
    A, E, B = adapter(3, 5, 4, dtype=torch.float32, requires_grad=False)
    good = {
        "x": torch.randn(7, 5),
        "weight": torch.randn(4, 5),
        "lora_A": A,
        "lora_E": E,
        "lora_B": B,
        "bias": torch.randn(4),
        "mask": torch.ones(3, dtype=torch.bool),
        "scaling": 1.0,
        "dropout_p": 0.0,
        "impl": "auto",
    }
    return {**good, **changes}


# (what changes, exception, what its message must say)
BAD = {
    "x_integer": ({"x": torch.ones(7, 5, dtype=torch.int64)}, TypeError, r"x .*torch\.int64"),
    "x_complex": ({"x": torch.ones(7, 5, dtype=torch.complex64)}, TypeError, "x .*complex64"),
    "x_list": ({"x": [1.0]}, TypeError, "x .*list"),
    "x_none": ({"x": None}, TypeError, "x .*NoneType"),
    "x_scalar": ({"x": torch.tensor(1.0)}, ValueError, r"x .*\(\)"),
    "A_shape": ({"lora_A": torch.ones(3, 6)}, ValueError, r"lora_A .*\(3, 6\)"),
    "A_rank": ({"lora_A": torch.ones(2, 5)}, ValueError, r"lora_E .*\(3, 1\)"),
    "A_1d": ({"lora_A": torch.ones(5)}, ValueError, r"lora_A .*\(5,\)"),
    "A_integer": ({"lora_A": torch.ones(3, 5).int()}, TypeError, "lora_A .*int32"),
    "E_1d": ({"lora_E": torch.ones(3)}, ValueError, r"lora_E .*\(3,\)"),
    "E_wide": ({"lora_E": torch.ones(3, 2)}, ValueError, r"lora_E .*\(3, 2\)"),
    "B_shape": ({"lora_B": torch.ones(3, 4)}, ValueError, r"lora_B .*\(3, 4\)"),
    "B_dtype": ({"lora_B": torch.ones(4, 3).double()}, ValueError, "lora_B .*float64"),
    "A_device": ({"lora_A": torch.ones(3, 5, device="meta")}, ValueError, "lora_A .*meta"),
    "mask_dtype": ({"mask": torch.ones(3)}, TypeError, "mask .*float32"),
    "mask_list": ({"mask": [True] * 3}, TypeError, "mask .*list"),
    "mask_shape": ({"mask": torch.ones(4, dtype=torch.bool)}, ValueError, r"mask .*\(4,\)"),
    "mask_device": (
        {"mask": torch.ones(3, dtype=torch.bool, device="meta")},
        ValueError,
        "mask .*meta",
    ),
    "scaling_tensor": ({"scaling": torch.ones(())}, TypeError, "scaling .*Tensor"),
    "scaling_none": ({"scaling": None}, TypeError, "scaling .*NoneType"),
    "dropout_negative": ({"dropout_p": -0.1}, ValueError, r"dropout_p .*-0\.1"),
    "dropout_one": ({"dropout_p": 1.0}, ValueError, r"dropout_p .*1\.0"),
    "dropout_nan": ({"dropout_p": float("nan")}, ValueError, "dropout_p .*nan"),
    "dropout_string": ({"dropout_p": "0.1"}, TypeError, "dropout_p .*str"),
    "impl_unknown": ({"impl": "fast"}, ValueError, "impl .*'fast'"),
    "impl_cuda": ({"impl": "cuda"}, RuntimeError, "no CUDA C.. kernels"),
}
BAD_LINEAR = {
    "x_features": ({"x": torch.ones(7, 6)}, ValueError, r"x .*\(7, 6\)"),
    "weight_shape": ({"weight": torch.ones(4, 6)}, ValueError, "in = 6"),
    "weight_1d": ({"weight": torch.ones(5)}, ValueError, r"weight .*\(5,\)"),
    "weight_dtype": ({"weight": torch.ones(4, 5).double()}, ValueError, "weight .*float64"),
    "weight_device": ({"weight": torch.ones(4, 5, device="meta")}, ValueError, "weight .*meta"),
    "weight_int8": ({"weight": torch.ones(4, 5).to(torch.int8)}, TypeError, "weight .*int8"),
    "bias_shape": ({"bias": torch.ones(5)}, ValueError, r"bias .*\(5,\)"),
    "bias_dtype": ({"bias": torch.ones(4).double()}, ValueError, "bias .*float64"),
}
BAD_DELTA = {
    "x_features": ({"x": torch.ones(7, 6)}, ValueError, r"lora_A .*\(3, 5\)"),
    "base_integer": ({"base_output": torch.ones(7, 4).int()}, TypeError, "base_output .*int32"),
    "base_rows": ({"base_output": torch.ones(6, 4)}, ValueError, r"base_output .*\(6, 4\)"),
    "base_features": ({"base_output": torch.ones(7, 5)}, ValueError, r"lora_B .*\(5, 3\)"),
    "base_dims": ({"base_output": torch.ones(4)}, ValueError, r"base_output .*\(4,\)"),
    "base_device": ({"base_output": torch.ones(7, 4, device="meta")}, ValueError, "meta"),
}


@pytest.mark.parametrize(
    ("changes", "error", "says"), (BAD | BAD_LINEAR).values(), ids=(BAD | BAD_LINEAR).keys()
)
def test_svd_linear_refuses(changes, error, says):
    with pytest.raises(error, match=says):
        svd_linear(**arguments(**changes))


@pytest.mark.parametrize(
    ("changes", "error", "says"), (BAD | BAD_DELTA).values(), ids=(BAD | BAD_DELTA).keys()
)
def test_svd_delta_refuses(changes, error, says):
    good = arguments(base_output=torch.randn(7, 4))
    del good["weight"], good["bias"]
    with pytest.raises(error, match=says):
        svd_delta(**{**good, **changes})


def test_reference_agrees_with_auto():
    given = arguments()
    expected = svd_linear(**{**given, "impl": "reference"})
    torch.testing.assert_close(svd_linear(**given), expected)


def test_rank_zero_is_the_base_layer():
    empty = {
        "lora_A": torch.zeros(0, 5),
        "lora_E": torch.zeros(0, 1),
        "lora_B": torch.zeros(4, 0),
        "mask": None,
    }
    given = arguments(**empty)
    expected = F.linear(given["x"], given["weight"], given["bias"])
    assert torch.equal(svd_linear(**given), expected)
    factors = (given["lora_A"], given["lora_E"], given["lora_B"])
    assert torch.equal(svd_delta(expected, given["x"], *factors), expected)


def test_svd_delta_leaves_the_base_output_alone():
    given = arguments()
    base = torch.randn(7, 4)
    before = base.clone()
    svd_delta(base, given["x"], given["lora_A"], given["lora_E"], given["lora_B"])
    assert torch.equal(base, before)


def test_svd_delta_on_a_view_of_a_custom_function():
    # What bitsandbytes' 8-bit layer returns; an in-place add on it is refused by autograd.
    class Base(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return (x @ torch.ones(5, 4)).view(7, 4)

        @staticmethod
        def backward(ctx, g):
            return g @ torch.ones(4, 5)

    given = arguments()
    x = given["x"].requires_grad_()
    factors = (given["lora_A"], given["lora_E"], given["lora_B"])
    svd_delta(Base.apply(x), x, *factors).sum().backward()
    delta = (given["lora_B"] @ (given["lora_A"] * given["lora_E"])).sum(dim=0)
    torch.testing.assert_close(x.grad, (delta + 4).expand(7, 5))


def peft_regulariser(pairs, weight, squared):
    """The formula of PEFT's AdaLoraModel.forward; squared: eq. (4) of the paper."""
    norms = []
    for A, B in pairs:
        for gram in (A @ A.T, B.T @ B):
            norms.append(torch.norm(gram - torch.eye(len(gram), dtype=gram.dtype), p="fro"))
    if squared:
        return weight * sum(n**2 for n in norms)
    return weight * sum(norms) / len(norms)


def orth_pairs(dtype=torch.float64):
    shapes = ((3, 5, 4), (3, 5, 4), (2, 6, 7), (1, 4, 4))
    return [adapter(*s, dtype=dtype)[::2] for s in shapes]


@pytest.mark.parametrize("squared", [False, True], ids=["peft", "paper"])
def test_orth_reg_value_and_gradient(squared):
    pairs = orth_pairs()
    value, expected = orth_reg(pairs, 0.3, squared), peft_regulariser(pairs, 0.3, squared)
    torch.testing.assert_close(value, expected)
    leaves = [t for pair in pairs for t in pair]
    torch.testing.assert_close(
        torch.autograd.grad(value, leaves), torch.autograd.grad(expected, leaves)
    )


@pytest.mark.parametrize("squared", [False, True], ids=["peft", "paper"])
def test_orth_reg_grad_adds_the_same_gradient(squared):
    pairs = orth_pairs()
    leaves = [t for pair in pairs for t in pair]
    value = orth_reg(pairs, 0.3, squared)
    expected = torch.autograd.grad(value, leaves)
    before = [torch.randn_like(t) for t in leaves]
    for t, g in zip(leaves[1:], before[1:], strict=True):
        t.grad = g.clone()
    actual = orth_reg_grad_(pairs, 0.3, squared)
    torch.testing.assert_close(actual, value.detach())
    assert not actual.requires_grad
    torch.testing.assert_close(leaves[0].grad, expected[0])
    for t, g, e in zip(leaves[1:], before[1:], expected[1:], strict=True):
        torch.testing.assert_close(t.grad, g + e)


@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("squared", [False, True])
def test_orth_reg_grad_into_scaled_gradients(squared, as_tensor):
    pairs = orth_pairs()
    leaves = [t for pair in pairs for t in pair]
    expected = torch.autograd.grad(orth_reg(pairs, 0.3, squared), leaves)
    scale = torch.tensor(1 / 1024) if as_tensor else 1 / 1024
    orth_reg_grad_(pairs, 0.3, squared, grad_scale=scale)
    torch.testing.assert_close([t.grad / 1024 for t in leaves], list(expected))


def test_orth_reg_grad_refuses_scales():
    pairs = orth_pairs()
    for scale, error, says in (
        ("1", TypeError, "grad_scale .*str"),
        (torch.ones(2), ValueError, r"grad_scale .*\(2,\)"),
        (torch.ones(1, device="meta"), ValueError, "grad_scale .*meta"),
    ):
        with pytest.raises(error, match=says):
            orth_reg_grad_(pairs, 0.3, grad_scale=scale)
    assert all(t.grad is None for pair in pairs for t in pair), "nothing was changed"


def test_orth_reg_grad_counts_once_under_accumulation():
    model = Mlp()
    (orth_reg(model, 0.5) + sum(model.loss(*batch(i)) / 4 for i in range(4))).backward()
    expected = [p.grad for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    for i in range(4):
        (model.loss(*batch(i)) / 4).backward()
    orth_reg_grad_(model, 0.5)
    torch.testing.assert_close([p.grad for p in model.parameters() if p.requires_grad], expected)


def test_orth_reg_grad_leaves_frozen_parameters_alone():
    pairs = orth_pairs()
    pairs[0][0].requires_grad_(False)
    orth_reg_grad_(pairs, 0.3)
    assert pairs[0][0].grad is None and pairs[0][1].grad is not None


def test_orth_reg_grad_of_a_shared_matrix_counts_both_of_its_pairs():
    A, B = adapter(3, 5, 4)[::2]
    other = adapter(3, 5, 6)[2]
    pairs = [(A, B), (A, other)]
    expected = torch.autograd.grad(orth_reg(pairs, 0.3), (A, B, other))
    orth_reg_grad_(pairs, 0.3)
    torch.testing.assert_close((A.grad, B.grad, other.grad), expected)


def test_orth_reg_takes_adapters():
    model = Mlp()
    adapters = find_adapters(model)
    assert torch.equal(orth_reg(adapters, 0.3), orth_reg(model, 0.3))
    pairs = [(a.lora_A, a.lora_B) for a in adapters]
    assert torch.equal(orth_reg_grad_(iter(adapters), 0.3), orth_reg(pairs, 0.3))


def test_dispatched_ops_of_the_regulariser_do_not_grow_with_the_model():
    for layers in (2, 72):
        model = nn.ModuleList(SVDLinear(8, 8, r=4) for _ in range(layers))
        adapters = find_adapters(model)
        leaves = [p for a in adapters for p in (a.lora_A, a.lora_B)]
        for p in leaves:
            p.grad = torch.zeros_like(p)
        with CountOps() as into_grad:
            orth_reg_grad_(adapters, 0.1)
        with CountOps() as through_autograd:
            torch.autograd.grad(orth_reg(adapters, 0.1), leaves)
        assert into_grad.counts.total() <= 5
        assert through_autograd.counts.total() <= 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_orth_reg_of_half_precision(dtype):
    pairs = orth_pairs(torch.float32)
    half = [(a.detach().to(dtype), b.detach().to(dtype)) for a, b in pairs]
    exact = peft_regulariser([(a.double(), b.double()) for a, b in half], 0.1, False)
    value = orth_reg(half, 0.1)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), exact)


def test_orth_reg_of_a_rank_zero_pair_is_zero():
    value = orth_reg([(torch.zeros(0, 5), torch.zeros(4, 0)), (torch.eye(2), torch.eye(2))], 1.0)
    assert value.item() == 0.0


@pytest.mark.parametrize(
    ("pairs", "weight", "error", "says"),
    [
        (torch.ones(2, 2), 0.1, TypeError, "Tensor"),
        (3, 0.1, TypeError, "int"),
        ([], 0.1, ValueError, "empty"),
        (nn.Linear(3, 3), 0.1, ValueError, "no AdaLoRA adapter in this Linear"),
        ([torch.ones(2, 2)], 0.1, TypeError, r"\[0\]"),
        ([(torch.ones(2, 3), torch.ones(4, 3))], 0.1, ValueError, r"\(2, 3\) and \(4, 3\)"),
        ([(torch.ones(2, 3).int(), torch.ones(4, 2))], 0.1, TypeError, "int32"),
        ([(torch.ones(2, 3), torch.ones(4, 2, device="meta"))], 0.1, ValueError, "meta"),
        ([(torch.ones(2, 3), torch.ones(4, 2))], -1.0, ValueError, "weight .*-1"),
        ([(torch.ones(2, 3), torch.ones(4, 2))], "1", TypeError, "weight .*str"),
    ],
)
def test_orth_reg_refuses(pairs, weight, error, says):
    with pytest.raises(error, match=says):
        orth_reg(pairs, weight)
    with pytest.raises(error, match=says):
        orth_reg_grad_(pairs, weight)

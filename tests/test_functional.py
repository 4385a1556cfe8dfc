"""The functional API: bad inputs and impl."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import adapter

from adalora_kernels import svd_delta, svd_linear


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
    "scaling_vector": ({"scaling": torch.ones(1)}, TypeError, r"scaling .*Tensor of shape \(1,\)"),
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


@pytest.mark.parametrize(
    "number", [np.float32(0.5), np.float64(0.5), np.array(0.5), torch.tensor(0.5)], ids=repr
)
def test_numbers_as_scripts_have_them(number):
    given = arguments(scaling=number)
    assert torch.equal(svd_linear(**given), svd_linear(**arguments(**{**given, "scaling": 0.5})))
    torch.manual_seed(0)
    dropped = svd_linear(**{**given, "dropout_p": number})
    torch.manual_seed(0)
    assert torch.equal(dropped, svd_linear(**{**given, "dropout_p": 0.5, "scaling": 0.5}))


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

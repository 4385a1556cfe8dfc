"""The sums of split products, with an accumulator that cuts off as that of tensor cores does.

Triton's interpreter rounds to nearest. Here its dot is replaced by a model of what was measured of
the A100 and the H100 (Ootomo and Yokota, IJHPCA 2022; arXiv 2512.07004): the products of one
instruction and the accumulator are aligned to the largest of them and cut off towards zero, with
up to two bits more than float32 has. The kernels are held to the error rule nevertheless.
"""

from functools import partial

import numpy as np
import pytest
import torch
from helpers import assert_as_good_as_eager

from adalora_kernels.kernels import svd_linear as kernels
from adalora_kernels.kernels.launch import INTERPRETED
from adalora_kernels.kernels.svd_linear import plans

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="models a GPU: needs the interpreter")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SCALING = 1.5


def has_bits(values, bits):
    """Tell whether float32 values have at most so many significant bits."""
    return not np.any(values.view(np.int32) & ((1 << (24 - bits)) - 1))


def add_products(a, b, acc, extra):
    """Return acc + a·b as one instruction of a tensor core computes it."""
    terms = np.concatenate((acc[:, None, :], a[:, :, None] * b[None]), axis=1)
    _, exponents = np.frexp(np.abs(terms).max(axis=1))
    unit = 24 + extra - exponents
    total = np.trunc(np.ldexp(terms, unit[:, None])).sum(axis=1)
    fractions, exponents = np.frexp(total)
    return np.ldexp(np.trunc(np.ldexp(fractions, 24)), exponents - 24 - unit)


def truncating_dot(a, b, acc, extra):
    """Return acc + a·b; values of bfloat16 or TF32 go through the model."""
    a, b = (np.ascontiguousarray(t, dtype=np.float32) for t in (a, b))
    if not (has_bits(a, 11) and has_bits(b, 11)):
        return a @ b + acc
    step = 16 if has_bits(a, 8) and has_bits(b, 8) else 8
    a, b, acc = (t.astype(np.float64) for t in (a, b, acc))
    for k in range(0, a.shape[1], step):
        acc = add_products(a[:, k : k + step], b[k : k + step], acc, extra)
    return acc.astype(np.float32)


@pytest.fixture(params=[0, 2], ids=["no_extra_bits", "two_extra_bits"])
def tensor_cores(monkeypatch, request):
    """Put the model under the kernels, and return a list to which it appends its lengths of K."""
    from triton.runtime import interpreter

    lengths = []

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        lengths.append(a.data.shape[1])
        result = truncating_dot(a.data, b.data, d.data, request.param)
        return interpreter.TensorHandle(result, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    return lengths


def gradients(x, g, A, E, B):
    """Return h, dA, dE and dB in plain PyTorch, in the type of A."""
    x, g, e = x.to(A.dtype), g.to(A.dtype), E.T * SCALING
    h, u = x @ A.T, g @ B
    dE = SCALING * (u * h).sum(0)[:, None]
    return {"h": h, "dA": (u * e).T @ x, "dE": dE, "dB": g.T @ (h * e)}


CASES = {
    # Rows, columns of x and of y, r, and the type of x and y.
    "long_rows": (64, 4096, 64, 16, BF16),
    "long_rows_more_ranks": (16, 4096, 64, 20, BF16),
    "long_columns": (2048, 64, 64, 16, BF16),
    "long_rows-fp16": (64, 4096, 64, 16, FP16),
    "many_tiles-fp16": (130, 160, 288, 12, FP16),
    "split_k-fp16": (90, 528, 80, 4, FP16),
}


@pytest.mark.parametrize(("M", "K", "N", "r", "dtype"), CASES.values(), ids=CASES)
def test_split_products_are_as_exact_as_float32(tensor_cores, M, K, N, r, dtype):
    x, g = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
    factors = torch.randn(r, K), torch.randn(r, 1), torch.randn(N, r)
    # One multiprocessor: sums are as long as they can be.
    device = plans.Device("test", "sm_90", 1)
    options = (None, SCALING, 0.0, None)
    _, h = kernels.svd_delta_fwd(torch.zeros(M, N, dtype=dtype), x, *factors, *options, device)
    backward = (g, x, None, *factors, None, h, *options[1:], False, "auto", device)
    _, dA, dE, dB = kernels.svd_linear_bwd(*backward)
    assert max(tensor_cores) > 16
    eager, exact = gradients(x, g, *factors), gradients(x, g, *(t.double() for t in factors))
    for name, actual in {"h": h, "dA": dA, "dE": dE, "dB": dB}.items():
        assert_as_good_as_eager(actual, eager[name], exact[name], name)


def test_the_model_cuts_off():
    ones = np.ones((1, 16), np.float32)
    small = np.full((16, 1), 2.0**-25, np.float32)
    model = partial(truncating_dot, ones, small, np.ones((1, 1), np.float32))
    assert model(extra=0) == 1
    assert model(extra=2) == 1 + 16 * 2.0**-25
    assert truncating_dot(ones, -small, np.ones((1, 1), np.float32), 0) == 1

"""What is tuned for CPUs, against the definition; its rounding errors are in test_ops.py."""

from functools import partial

import pytest
import torch

from adalora_kernels import cpu, reference
from benchmarks.counting import peak_extra_megabytes


def case(dtypes, lead=(6, 4), mask=True):
    """(x, weight, bias, A, E, B, mask), grad_y and y in the (x, adapter, y) `dtypes`."""
    x_dtype, adapter_dtype, y_dtype = dtypes
    x, weight, bias = (torch.randn(s).to(x_dtype) for s in ((*lead, 13), (9, 13), (9,)))
    factors = [torch.randn(s).to(adapter_dtype) for s in ((5, 13), (5, 1), (9, 5))]
    mask = torch.tensor([True, False, True, True, False]) if mask else None
    g, y = torch.randn(2, *lead, 9).to(y_dtype)
    return (x, weight, bias, *factors, mask), g, y


DTYPES = {
    "float64": (torch.float64, torch.float64, torch.float64),
    "float32_adapter": (torch.bfloat16, torch.float32, torch.bfloat16),
    "bfloat16_adapter": (torch.float32, torch.bfloat16, torch.float32),
    "base_of_another_dtype": (torch.float16, torch.float16, torch.float32),
}


@pytest.mark.parametrize("dropped", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("mask", [False, True], ids=["", "mask"])
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES.keys())
def test_values_and_dtypes_are_those_of_the_reference(dtypes, mask, dropped, monkeypatch):
    # The masks come from two streams: give both modules the same one.
    monkeypatch.setattr(cpu, "dropout_mask", reference.philox_mask)
    (x, weight, bias, *adapter), g, y = case(dtypes, mask=mask)
    options = (1.5, 0.25, torch.tensor([3])) if dropped else (1.5, 0.0, None)
    short = min(torch.finfo(t).bits for t in dtypes)
    tolerance = {64: 1e-12, 32: 1e-5, 16: 0.05}[short]

    def both(op, *args):
        results = [getattr(module, op)(*args, *options) for module in (cpu, reference)]
        torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)
        return results[1]

    if dtypes[0] == dtypes[2]:
        both("svd_linear", x, weight, bias, *adapter)
    _, h = both("svd_delta", y, x, *adapter)
    for base in (None, weight) if dtypes[0] == dtypes[2] else (None,):
        for need_dx in (True, False):
            results = [
                module.svd_linear_backward(g, x, base, *adapter, h, *options, need_dx)
                for module in (cpu, reference)
            ]
            torch.testing.assert_close(*results, rtol=tolerance, atol=20 * tolerance)


@pytest.mark.parametrize(
    "mask_of", [cpu.dropout_mask, reference.philox_mask], ids=["cpu", "philox"]
)
class TestDropoutMask:
    @pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
    def test_statistics(self, mask_of, p):
        x = torch.empty(500, 401)
        mask = mask_of(x, p, torch.tensor([3]))
        assert set(mask.unique().tolist()) == {0.0, 1.0}
        # Five standard deviations of the mean, of the columns' means, and of neighbours' agreement.
        sigma = (p * (1 - p)) ** 0.5
        assert abs(mask.mean() - (1 - p)) < 5 * sigma / mask.numel() ** 0.5
        assert (mask.mean(dim=0) - (1 - p)).abs().max() < 5.5 * sigma / 500**0.5
        both = (mask[:, 1:] * mask[:, :-1]).mean()
        assert abs(both - (1 - p) ** 2) < 5 * sigma / (500 * 400) ** 0.5
        again = mask_of(x.double(), p, torch.tensor([3]))
        assert torch.equal(mask, again.float()), "same seed, same mask, whatever the dtype"
        other = mask_of(x, p, torch.tensor([4]))
        assert (mask != other).float().mean() > p * (1 - p)

    def test_extreme_probabilities(self, mask_of):
        x, seed = torch.empty(1000), torch.tensor([3])
        assert mask_of(x, 1e-9, seed).all()
        assert mask_of(x, 1 - 1e-9, seed).sum() <= 1
        assert mask_of(torch.empty(0, 5), 0.5, seed).shape == (0, 5)


@pytest.mark.parametrize("has_weight", [False, True], ids=["svd_delta", "svd_linear"])
def test_what_is_dropped_is_not_held_until_dx_is_there(has_weight):
    x, weight, g = torch.randn(3, 256, 256)
    A, E, B, seed = torch.randn(4, 256), torch.randn(4, 1), torch.randn(256, 4), torch.tensor([3])
    _, h = cpu.svd_linear(x, weight, None, A, E, B, None, 1.0, 0.1, seed)
    call = partial(
        *(cpu.svd_linear_backward, g, x, weight if has_weight else None, A, E, B, None, h),
        *(1.0, 0.1, seed, True),
    )
    # Of the size of x: the mask of dropout, dx, and with a weight the other part of dx.
    megabytes = (2 + has_weight + 0.2) * x.numel() * x.element_size() / 1e6
    assert peak_extra_megabytes(call, torch.device("cpu")) < megabytes

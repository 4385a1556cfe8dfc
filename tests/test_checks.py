"""Numbers as scripts have them: from arithmetic, NumPy and tensors."""

import math

import numpy as np
import pytest
import torch

from adalora_kernels.checks import as_beta, as_float, as_grad_scale, as_int, as_weight


@pytest.mark.parametrize(
    "value",
    [
        *(12, 12.0, 24 / 2, np.int64(12), np.uint8(12), np.float32(12), np.array(12)),
        *(torch.tensor(12), torch.tensor(12.0), torch.tensor(12, dtype=torch.uint8)),
    ],
    ids=repr,
)
def test_whole_numbers(value):
    number = as_int("steps", value, 1)
    assert type(number) is int and number == 12
    assert type(as_float("steps", value)) is float and as_float("steps", value) == 12.0


@pytest.mark.parametrize(
    ("value", "error", "says"),
    [
        (True, TypeError, "steps must be an int, got bool"),
        (np.bool_(True), TypeError, "steps must be an int, got bool"),
        (torch.tensor(True), TypeError, "got Tensor of shape .* torch.bool"),
        ("12", TypeError, "got str"),
        (None, TypeError, "got NoneType"),
        (12j, TypeError, "got complex"),
        (np.array([12]), TypeError, r"got ndarray of shape \(1,\)"),
        (torch.tensor([12, 12]), TypeError, r"got Tensor of shape \(2,\) and torch.int64"),
        (2.5, ValueError, "steps must be a whole number, got 2.5"),
        (np.float32(2.5), ValueError, "whole number, got 2.5"),
        (math.nan, ValueError, "whole number, got nan"),
        (math.inf, ValueError, "whole number, got inf"),
        (0, ValueError, "steps must be at least 1, got 0"),
        (torch.tensor(-1), ValueError, "at least 1, got -1"),
    ],
    ids=repr,
)
def test_what_is_no_whole_number(value, error, says):
    with pytest.raises(error, match=says):
        as_int("steps", value, 1)


@pytest.mark.parametrize(
    "value", [0.5, np.float32(0.5), np.float64(0.5), np.array(0.5), torch.tensor(0.5)], ids=repr
)
def test_real_numbers(value):
    for check in (as_float, as_weight, as_beta):
        number = check("weight", value)
        assert type(number) is float and number == 0.5
    assert as_grad_scale(value, torch.device("cpu")).item() == 0.5


def test_what_is_no_real_number():
    for value in (True, "0.5", None, 1j, torch.ones(2), np.ones(1), torch.tensor(True)):
        for check in (as_float, as_weight, as_beta):
            with pytest.raises(TypeError, match="weight must be a number, got"):
                check("weight", value)
    for value in (-0.1, math.nan, np.float32(-1)):
        with pytest.raises(ValueError, match="weight must be at least 0"):
            as_weight("weight", value)
    for value in (0, 1, math.nan, torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"beta must be in \(0, 1\)"):
            as_beta("beta", value)

"""The passes over x and grad_y: how they share a GPU, and when their steps may start."""

import pytest
import torch

from adalora_kernels.kernels.launch import ceil_div, dry_run
from adalora_kernels.kernels.svd_linear import plans, svd_linear_bwd
from adalora_kernels.kernels.svd_linear.common import best_split

SMS = 132


def time_of(parts, columns, blocks):
    """Return the time until all is done, in blocks, if each multiprocessor runs one program."""
    return ceil_div(columns * parts, SMS) * ceil_div(blocks, parts)


@pytest.mark.parametrize("columns", [1, 16, 56, 57, 112, 200])
def test_no_split_takes_longer_than_filling_the_gpu_once(columns):
    for blocks in range(1, 300):
        once = max(1, min(SMS // columns, blocks))
        assert time_of(best_split(SMS, columns, blocks, blocks), columns, blocks) <= time_of(
            once, columns, blocks
        )


# Columns of programs, blocks, and the part of the multiprocessors' time that is used.
FILLED = {
    # Row blocks of `down`, and blocks of K = 4096. One part leaves half of the time unused.
    "down_of_8704_rows": (136, 32, 0.68),
    "down_of_12288_rows": (192, 32, 0.96),
    "down_of_16384_rows": (256, 32, 0.96),
    # Column blocks of g with N = 14336, and row blocks.
    "g_pass_of_8192_rows": (56, 128, 0.84),
    "g_pass_of_16384_rows": (56, 256, 0.97),
}


@pytest.mark.parametrize(("columns", "blocks", "used"), FILLED.values(), ids=FILLED)
def test_multiprocessors_are_busy(columns, blocks, used):
    parts = best_split(SMS, columns, blocks, min(blocks, plans.MOST_SPLITS))
    assert columns * blocks / SMS / time_of(parts, columns, blocks) >= used


def test_a_split_is_possible():
    assert best_split(SMS, 1, 3, 8) == 3
    assert best_split(SMS, 1, 64, 8) == 8
    assert best_split(SMS, 500, 64, 8) == 1
    assert best_split(SMS, 1, 1, 0) == 1


STARTS = {
    # GPU, rows, and whether steps start early.
    "before_sm_90": ("sm_80", 512, False),
    "sm_90": ("sm_90", 512, True),
    "sm_100": ("sm_100", 512, True),
    "many_rows": ("sm_90", 2049, False),
}


def backward(M, family="sm_90", path="two_pass", need_dx=True, opaque=False):
    """List the launches of a backward."""

    def meta(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    K, N, r = 256, 384, 16
    factors = [meta(*shape, dtype=torch.float32) for shape in ((r, K), (r, 1), (N, r))]
    h = meta(M, r, dtype=torch.float32)
    weight = None if opaque else meta(N, K)
    with dry_run() as launches:
        svd_linear_bwd(
            *(meta(M, N), meta(M, K), weight, *factors, None, h, 1.5, 0.0, None, need_dx),
            *(path, plans.Device("test", family, 100)),
        )
    return launches


@pytest.mark.parametrize(("family", "M", "early"), STARTS.values(), ids=STARTS)
def test_which_steps_start_before_the_one_before_them_has_ended(family, M, early):
    flags = [item.arguments.get("launch_pdl", False) for item in backward(M, family)]
    assert flags == [False, early, early, early]


LAUNCHES = {
    # What is asked for; the launch that comes after the passes; and what the pass over x writes.
    "two_pass": ({"path": "two_pass"}, ["gemm"], False),
    "cublas": ({"path": "cublas"}, ["cublas"], True),
    "opaque_base": ({"opaque": True}, [], True),
    "without_dx": ({"need_dx": False}, [], False),
}


@pytest.mark.parametrize(("asked", "last", "writes_dx"), LAUNCHES.values(), ids=LAUNCHES)
def test_a_backward_has_at_most_four_launches(asked, last, writes_dx):
    launches = backward(512, **asked)
    assert [item.kernel for item in launches] == ["g_pass", "g_reduce", "x_pass", *last]
    dx = launches[2].arguments["out_dx_ptr"]
    assert (dx is not None) == writes_dx
    assert dx is None or dx.shape == (512, 256)

"""The random numbers of dropout: those of the reference, and the kernels' twin of them."""

import pytest
import torch
import triton
import triton.language as tl

from adalora_kernels import reference
from adalora_kernels.kernels.launch import INTERPRETED
from adalora_kernels.kernels.svd_linear.common import Dropout, keep_mask

DEVICE = "cpu" if INTERPRETED else "cuda"
# Counters of 33 bits and more are those of matrices with more than 2³⁵ entries.
COUNTERS = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 5, 2**40 + 7, 2**60 + 9]
SEEDS = [0, 5, 2**40 + 3, 2**63 - 2]


def philox(counter, seed, rounds):
    """Salmon et al. 2011, section 3.3, in Python integers."""
    lanes = (counter & 0xFFFFFFFF, counter >> 32, 0, 0)
    key = (seed & 0xFFFFFFFF, seed >> 32)
    for _ in range(rounds):
        p0, p1 = 0xD2511F53 * lanes[0], 0xCD9E8D57 * lanes[2]
        lanes = (
            (p1 >> 32) ^ lanes[1] ^ key[0],
            p1 & 0xFFFFFFFF,
            (p0 >> 32) ^ lanes[3] ^ key[1],
            p0 & 0xFFFFFFFF,
        )
        key = ((key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF)
    return list(lanes)


def test_known_answers():
    # The first answer of the authors' test vectors: counter 0, key 0.
    zero = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox(0, 0, 10) == zero
    assert reference.philox_uint32(torch.tensor([0]), 4).tolist() == zero
    seed = 0x0123456789ABCDEF
    words = reference.philox_uint32(torch.tensor([seed]), 10).tolist()
    assert words == [word for i in range(3) for word in philox(i, seed, 10)][:10]


@pytest.mark.parametrize("seed", SEEDS)
def test_counters_of_more_than_32_bits(seed):
    words = reference.philox_4x32(torch.tensor([seed]), torch.tensor(COUNTERS), 7)
    assert words.tolist() == [philox(counter, seed, 7) for counter in COUNTERS]


def test_the_mask_has_sixteen_bits_of_seven_rounds_for_each_entry():
    x, seed = torch.empty(5, 401), torch.tensor([3])
    words = reference.philox_uint32(seed, 1003, rounds=7)
    bits = [half for word in words.tolist() for half in (word & 0xFFFF, word >> 16)][: x.numel()]
    expected = torch.tensor([b >= round(0.3 * 2**16) for b in bits]).view(x.shape)
    assert torch.equal(reference.philox_mask(x, 0.3, seed).bool(), expected)


@triton.jit(do_not_specialize=["first_row", "first_column"])
def _mask_kernel(out_ptr, dropout, first_row, first_column, K, ALIGNED: tl.constexpr):
    rows, columns = tl.arange(0, 8), tl.arange(0, 32)
    keep = keep_mask(dropout, first_row + rows, first_column, K, 32, ALIGNED)
    tl.store(out_ptr + rows[:, None] * 32 + columns[None, :], keep)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("K", [4096, 4099], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("first_row", [0, 2**20 - 3, 2**28 + 1, 2**31 - 8])
def test_the_mask_of_kernels(first_row, K, seed):
    """Row 2²⁰ has entry number 2³²; the last rows have counters of more than 32 bits."""
    seed = torch.tensor([seed], device=DEVICE)
    drop_below, first_column = reference.drop_below(0.4), 4064
    keep = torch.empty(8, 32, dtype=torch.bool, device=DEVICE)
    _mask_kernel[(1,)](keep, Dropout(seed, drop_below, 1.0), first_row, first_column, K, K % 8 == 0)
    rows, columns = torch.arange(8, device=DEVICE), torch.arange(32, device=DEVICE)
    i = ((first_row + rows)[:, None] * K + first_column + columns).flatten()
    words = reference.philox_4x32(seed, i // 8, 7).gather(1, (i // 2 % 4)[:, None])[:, 0]
    halves = (words >> 16 * (i % 2)) & 0xFFFF
    assert torch.equal(keep, (halves >= drop_below).view(8, 32))

"""Every kernel in every shipped configuration, compiled for GPUs that are not here.

Nothing is run: what is read is the resource usage, and which instructions were made. Prints a
table of it with `pytest -s`. Also run under the oldest supported triton (`make compile-oldest`).
"""

import functools
import itertools
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from compiling import Case, compile_case, launches

from adalora_kernels.kernels import plans

# Bytes that one block may use (CUDA programming guide, technical specifications).
SHARED_MEMORY = {"sm_80": 166_912, "sm_86": 101_376, "sm_90": 232_448, "sm_100": 232_448}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# (type of the adapters, r): the most registers each class of ranks can take, and plain bfloat16.
ADAPTERS = ((BF16, 16), (FP32, 16), (FP32, 64), (FP32, 256))


def adapters(family):
    """sm_86 stands for the GPUs that share sm_80's code, with less shared memory."""
    return ADAPTERS if family != "sm_86" else ADAPTERS[1:3]


def gemm_cases(family):
    for i, blocks in enumerate(plans.GEMM[family]):
        # The GEMM loops over 32 ranks at a time, so that more than 64 are no other code.
        # Adapters in bfloat16 are no more than a cast less.
        kinds = [kind for kind in adapters(family) if kind[1] <= 64 and (i == 0 or kind[0] == FP32)]
        for (adapter, r), dropout in itertools.product(kinds, (0.0, 0.1)):
            product = "dropped dx" if dropout else "dx"
            problem = plans.Problem(BF16, 8192, 4096, 4096, r, product)
            if not plans.usable(blocks, family, problem):
                continue
            options = {"r": r, "adapter": adapter, "blocks": blocks, "kernels": ("gemm",)}
            if dropout:
                yield Case(family, f"gemm{i}-dropout", dropout=0.1, parts=("backward",), **options)
            else:
                yield Case(family, f"gemm{i}", **options)
        options = {"M": 128, "blocks": blocks, "parts": ("forward",), "kernels": ("gemm",)}
        yield Case(family, f"gemm{i}-splits", **options)


def one_pass_cases(family):
    for rows, (adapter, r) in itertools.product((16, 64), adapters(family)):
        if r <= plans.ONE_PASS_RANKS:
            options = {"M": rows, "path": "one_pass", "parts": ("forward",)}
            yield Case(family, f"one_pass-{rows}", r=r, adapter=adapter, **options)


def pass_cases(family):
    for adapter, r in ADAPTERS if family != "sm_86" else ADAPTERS[1:]:
        options = {"adapter": adapter, "r": r, "delta": True}
        yield Case(family, "passes", **options)
        kernels = ("down", "x_pass", "low_rank_add")
        yield Case(family, "passes-dropout", dropout=0.1, kernels=kernels, **options)


def other_cases(family):
    """One representative of each kernel in the other types, and the general path."""
    types = ((FP16, FP16, False), (FP16, FP32, False), (FP32, FP32, False), (FP32, FP32, True))
    for dtype, adapter, tf32 in types if family != "sm_86" else ():
        options = {"dtype": dtype, "adapter": adapter, "tf32": tf32}
        name = "tf32" if tf32 else "types"
        yield Case(family, f"{name}-two_pass", kernels=("gemm",), **options)
        yield Case(family, f"{name}-delta", delta=True, dropout=0.1, **options)
        if dtype == FP16:
            small = {"M": 16, "path": "one_pass", "parts": ("forward",)}
            yield Case(family, f"{name}-one_pass", **small, **options)
    odd = {"M": 1001, "K": 1003, "N": 1005, "r": 3}
    yield Case(family, "unaligned", **odd)
    kernels = ("down", "x_pass", "gemm")
    yield Case(family, "unaligned-dropout", dropout=0.1, kernels=kernels, **odd)
    # An argument that is 1 becomes a constant.
    yield Case(family, "ones", M=1, K=1, N=1, r=1)
    yield Case(family, "ones-delta", M=1, K=1, N=1, r=1, delta=True)


CASES = [
    case
    for family in SHARED_MEMORY
    for cases in (gemm_cases, one_pass_cases, pass_cases, other_cases)
    for case in cases(family)
]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """{case: [Compiled or an error, …]}, made by one process per core."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        compile_here = functools.partial(compile_case, folder=tmp_path_factory.mktemp("triton"))
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
            results = dict(zip(CASES, pool.map(compile_here, CASES), strict=True))
    for case, kernels in results.items():
        for kernel in kernels:
            print(case.id, kernel)
    return results


def problems(case, kernel):
    """What is wrong with one result, in words."""
    if isinstance(kernel, str):
        return [kernel]
    found = []
    if kernel.stack or kernel.local:
        found.append(f"{kernel.stack} bytes of stack, {kernel.local} of local memory")
    if kernel.shared > SHARED_MEMORY[case.family]:
        found.append(f"{kernel.shared} bytes of shared memory")
    # Seen: triton 3.6.0 made nothing of a kernel whose dropout feeds tcgen05 with 256 columns.
    if kernel.instructions < 100:
        found.append(f"only {kernel.instructions} instructions")
    # Before sm_90 a tile that is multiplied transposed goes through registers, 16 bytes at a time.
    streams = kernel.kernel in ("down", "gemm", "g_pass", "x_pass")
    if streams and not case.name.startswith(("unaligned", "ones")):
        if kernel.narrow_loads > 32:
            found.append(f"{kernel.narrow_loads} loads of two bytes")
        if case.family in ("sm_90", "sm_100") and not kernel.copies:
            found.append("no asynchronous copies of 16 bytes")
    tensor_cores = {"sm_90": kernel.wgmma, "sm_100": kernel.tcgen05}.get(case.family, kernel.mma)
    half = case.dtype != FP32
    large = case.name.startswith("gemm")
    if large and half and not tensor_cores:
        found.append("no tensor core instruction of this generation")
    any_mma = kernel.wgmma + kernel.tcgen05 + kernel.mma
    if half and not any_mma and kernel.kernel not in ("g_reduce", "x_reduce"):
        found.append("no tensor core instruction")
    return [f"{case.id} {kernel.kernel} ({kernel.options}): {what}" for what in found]


@pytest.mark.parametrize("family", SHARED_MEMORY)
def test_resources(compiled, family):
    kernels = [
        (c, kernel) for c, found in compiled.items() if c.family == family for kernel in found
    ]
    assert len(kernels) > 50
    assert [what for case, kernel in kernels for what in problems(case, kernel)] == []


def test_every_shipped_configuration_is_compiled():
    for family in SHARED_MEMORY:
        shipped = {*plans.GEMM[family], *plans.ONE_PASS[family], plans.GEMM_GENERAL}
        device = plans.Device("", family, 132)
        shipped |= {
            plans.pass_blocks(kernel, device, r, BF16, True, True)._replace(tma=False)
            for kernel in plans.PASSES
            for r in (16, 64, 256)
        }
        seen = set()
        for case in CASES:
            if case.family == family:
                seen |= {blocks_of(recorded) for recorded in launches(case)}
        missing = {tuple(blocks) for blocks in shipped} - seen
        assert not missing, family


def blocks_of(recorded):
    """The Blocks of a recorded launch, as a tuple."""
    given = recorded.arguments
    sizes = (given.get(f"BLOCK_{axis}", 0) for axis in "MNK")
    options = (given["num_warps"], given["num_stages"])
    return (*sizes, *options, given.get("TMA", False), given.get("FLATTEN", False))


@pytest.mark.parametrize(
    ("blocks", "says"),
    [
        (plans.Blocks(128, 256, 64, 4, 3, tma=True), "bytes of stack"),
        (plans.Blocks(128, 256, 64, 8, 6, tma=True), "shared memory"),
        (plans.Blocks(16, 256, 64, 8, 3, tma=True), "this generation"),
    ],
    ids=["spills", "shared_memory", "no_wgmma"],
)
def test_a_bad_configuration_is_found(tmp_path, monkeypatch, blocks, says):
    case = Case("sm_90", "gemm-bad", blocks=blocks, parts=("forward",), kernels=("gemm",))
    assert_found(tmp_path, monkeypatch, case, says)


def test_small_loads_are_found(tmp_path, monkeypatch):
    # K = 4097 on the large tiles of aligned operands.
    blocks = plans.Blocks(64, 128, 64, 8, 3)
    case = Case("sm_90", "gemm-bad", K=4097, blocks=blocks, parts=("forward",), kernels=("gemm",))
    assert_found(tmp_path, monkeypatch, case, "loads of two bytes")


def assert_found(tmp_path, monkeypatch, case, says):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        (kernel,) = pool.submit(compile_case, case, tmp_path).result()
    assert any(says in what for what in problems(case, kernel)), kernel

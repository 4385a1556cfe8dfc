"""Every kernel in every shipped configuration, compiled for GPUs that are not here.

Nothing is run: what is read is the resource usage, and which instructions were made. Prints a
table of it with `pytest -s`. `make compile-others` runs it under other versions of triton.
"""

import functools
import itertools
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from compiling import Case, compile_cases, compile_for_real, launches

from adalora_kernels.kernels.svd_linear import plans

# Bytes that one block may use (CUDA programming guide, technical specifications).
SHARED_MEMORY = {"sm_80": 166_912, "sm_86": 101_376, "sm_90": 232_448, "sm_100": 232_448}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Cycles in which a multiprocessor of an H200 gets 32 KB from memory: 4.3 TB/s for 132 of 1.8 GHz.
MEMORY_CYCLES = 2**15 * 132 * 1.8e9 / 4.3e12
# Cases that a process takes at a time.
TOGETHER = 6
# (type of the adapters, r): the most registers each class of ranks can take, and plain bfloat16.
ADAPTERS = ((BF16, 16), (FP32, 16), (FP32, 64), (FP32, 256))


def adapters(family):
    """sm_86 stands for the GPUs that share sm_80's code, with less shared memory."""
    return ADAPTERS if family != "sm_86" else ADAPTERS[1:3]


def gemm_cases(family):
    for i, blocks in enumerate(plans.GEMM[family]):
        # The GEMM loops over 16 ranks at a time, so that more than 64 are no other code.
        # Adapters in bfloat16 are no more than a cast less.
        kinds = [kind for kind in adapters(family) if kind[1] <= 64 and (i == 0 or kind[0] == FP32)]
        for (adapter, r), dropout in itertools.product(kinds, (0.0, 0.1)):
            product = "dropped dx" if dropout else "dx"
            problem = plans.Problem(BF16, 8192, 4096, 4096, r, product)
            if blocks not in plans.gemm_candidates(plans.Device("", family, 0), problem):
                continue
            options = {"r": r, "adapter": adapter, "blocks": blocks, "kernels": ("gemm",)}
            if dropout:
                yield Case(family, f"gemm{i}-dropout", dropout=0.1, parts=("backward",), **options)
            else:
                yield Case(family, f"gemm{i}", **options)
        options = {"M": 128, "blocks": blocks, "parts": ("forward",), "kernels": ("gemm",)}
        yield Case(family, f"gemm{i}-splits", **options)


def few_rows_cases(family):
    """Yield the tiles for few rows, of which the GEMM of both ways is the same, and the passes."""
    for rows, tiles in zip((16, 64), plans.FEW_ROWS[family], strict=True):
        for i, blocks in enumerate(tiles):
            options = {"M": rows, "blocks": blocks, "parts": ("forward",)}
            yield Case(family, f"rows{rows}-{i}", **options)
    yield Case(family, "rows-passes", M=64, delta=True, kernels=("down", "g_pass", "x_pass"))


def fused_cases(family):
    if family == "sm_90":
        kinds = ((BF16, BF16, 16), (BF16, FP32, 16), (FP16, FP16, 16))
        for (i, tile), (dtype, adapter, r) in itertools.product(enumerate(plans.FUSED), kinds):
            options = {"dtype": dtype, "adapter": adapter, "r": r, "blocks": tile}
            yield Case(family, f"fused{i}", path="fused", parts=("forward",), **options)


def pass_cases(family):
    for adapter, r in ADAPTERS if family != "sm_86" else ADAPTERS[1:]:
        options = {"adapter": adapter, "r": r, "delta": True}
        yield Case(family, "passes-dropout", dropout=0.1, **options)
        kernels = ("down", "x_pass", "low_rank_add")  # The others know nothing of dropout.
        yield Case(family, "passes", kernels=kernels, **options)


def other_cases(family):
    """Yield one case of each kernel in the other types, and those of the general path."""
    types = ((FP16, FP16, False), (FP16, FP32, False), (FP32, FP32, False), (FP32, FP32, True))
    for dtype, adapter, tf32 in types if family != "sm_86" else ():
        options = {"dtype": dtype, "adapter": adapter, "tf32": tf32}
        name = "tf32" if tf32 else "types"
        yield Case(family, f"{name}-two_pass", kernels=("gemm",), **options)
        if dtype == FP32:
            dropped = {"dropout": 0.1, "parts": ("backward",), "kernels": ("gemm",)}
            yield Case(family, f"{name}-dropped", **dropped, **options)
        yield Case(family, f"{name}-delta", delta=True, dropout=0.1, **options)
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
    for cases in (gemm_cases, few_rows_cases, fused_cases, pass_cases, other_cases)
    for case in cases(family)
]


# One configuration of every kernel, with PEFT's default adapters, in float32.
QUICK = ("gemm0", "fused0", "passes-dropout")


def is_quick(case):
    return case.name in QUICK and (case.adapter, case.r) == (FP32, 16)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Return a function from cases of one family to {case: [Compiled or an error, …]}.

    It compiles in as many processes as there are cores for each of pytest's.
    """
    compile_here = functools.partial(compile_cases, folder=tmp_path_factory.mktemp("triton"))
    processes = os.cpu_count() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max(1, processes), context, compile_for_real) as pool:

        def compile_all(cases):
            some = [cases[i : i + TOGETHER] for i in range(0, len(cases), TOGETHER)]
            return dict(zip(cases, itertools.chain(*pool.map(compile_here, some)), strict=True))

        yield compile_all


def problems(case, kernel):
    """Say what is wrong with one result."""
    if isinstance(kernel, str):
        return [kernel]
    found = []
    if kernel.stack or kernel.local:
        found.append(f"{kernel.stack} bytes of stack, {kernel.local} of local memory")
    if kernel.shared > SHARED_MEMORY[case.family]:
        found.append(f"{kernel.shared} bytes of shared memory")
    # Seen: triton 3.6.0 made nothing of a kernel whose dropout feeds tcgen05 with 256 columns.
    if kernel.instructions < 100 and kernel.kernel != "split":
        found.append(f"only {kernel.instructions} instructions")
    # Before sm_90 a tile that is multiplied transposed goes through registers, 16 bytes at a time.
    streams = kernel.kernel in ("down", "gemm", "g_pass", "x_pass")
    if streams and not case.name.startswith(("unaligned", "ones")):
        if kernel.narrow_loads > 32:
            found.append(f"{kernel.narrow_loads} loads of two bytes")
        if case.family in ("sm_90", "sm_100") and not kernel.copies:
            found.append("no asynchronous copies of 16 bytes")
        # All products with a tile, and reading it for them, must not take longer than getting it.
        # With more ranks the products alone do, and so they do in TF32.
        tf32 = case.dtype == FP32 or (case.dtype, case.adapter) == (FP16, FP32)
        few_ranks = case.r <= 16 and not tf32
        if few_ranks and kernel.kernel != "gemm" and kernel.wgmma_cycles > MEMORY_CYCLES:
            found.append(f"{kernel.wgmma_cycles:.0f} cycles of wgmma for 32 KB")
    if "launch_pdl" in kernel.options and not kernel.waits:
        found.append("starts before the kernel before it has ended, and does not wait for it")
    tensor_cores = {"sm_90": kernel.wgmma, "sm_100": kernel.tcgen05}.get(case.family, kernel.mma)
    half = case.dtype != FP32
    large = case.name.startswith("gemm")
    if large and half and not tensor_cores:
        found.append("no tensor core instruction of this generation")
    any_mma = kernel.wgmma + kernel.tcgen05 + kernel.mma
    if half and not any_mma and kernel.kernel not in ("split", "g_reduce"):
        found.append("no tensor core instruction")
    return [f"{case.id} {kernel.kernel} ({kernel.options}): {what}" for what in found]


@pytest.mark.parametrize("family", SHARED_MEMORY)
@pytest.mark.parametrize(
    "quick",
    [True, pytest.param(False, marks=pytest.mark.full)],
    ids=["one_of_each_kernel", "all_others"],
)
def test_resources(compiled, family, quick):
    cases = [case for case in CASES if case.family == family and is_quick(case) == quick]
    results = [(case, kernel) for case, found in compiled(cases).items() for kernel in found]
    for case, kernel in results:
        print(case.id, kernel)
    if quick:
        kernels = {"down", "gemm", "low_rank_add", "g_pass", "g_reduce", "x_pass"}
        kernels |= {"split"} if family == "sm_90" else set()
        assert {kernel.kernel for _, kernel in results} == kernels
    else:
        assert len(results) > 40
    assert [what for case, kernel in results for what in problems(case, kernel)] == []


def test_every_shipped_configuration_is_compiled():
    for family in SHARED_MEMORY:
        shipped = {*plans.GEMM[family], plans.GEMM_GENERAL}
        shipped |= {
            *itertools.chain(*plans.FEW_ROWS[family]),
            *plans.FUSED[: family == "sm_90" and 2],
        }
        device = plans.Device("", family, 132)
        shipped |= {
            plans.pass_blocks(kernel, device, M, r, BF16, True, True)._replace(programs=1)
            for kernel in plans.PASSES
            for M in (plans.MOST_FEW_ROWS, 8192)
            for r in (16, 64, 256)
        }
        seen = set()
        for case in CASES:
            if case.family == family:
                seen |= {blocks_of(recorded) for recorded in launches(case)}
        missing = {tuple(blocks) for blocks in shipped} - seen
        assert not missing, family


def blocks_of(recorded):
    """Return the Blocks of a recorded launch, as a tuple."""
    given = recorded.arguments
    sizes = (given.get(f"BLOCK_{axis}", 0) for axis in "MNK")
    options = (given["num_warps"], given["num_stages"])
    return tuple(plans.Blocks(*sizes, *options, given.get("TMA", False)))


WRONG = {
    # Blocks, K and what is to be found.
    "spills": (plans.Blocks(128, 256, 64, 4, 3, tma=True), 4096, "bytes of stack"),
    "shared_memory": (plans.Blocks(128, 256, 64, 8, 6, tma=True), 4096, "shared memory"),
    "no_wgmma": (plans.Blocks(16, 256, 64, 8, 3, tma=True), 4096, "this generation"),
    # The large tiles of aligned operands, which these are not.
    "small_loads": (plans.Blocks(64, 128, 64, 8, 3), 4097, "loads of two bytes"),
}


@pytest.mark.parametrize(("blocks", "K", "says"), WRONG.values(), ids=WRONG.keys())
def test_a_bad_configuration_is_found(compiled, blocks, K, says):
    options = {"parts": ("forward",), "kernels": ("gemm",)}
    case = Case("sm_90", "gemm-bad", K=K, blocks=blocks, **options)
    (kernel,) = compiled([case])[case]
    assert any(says in what for what in problems(case, kernel)), kernel

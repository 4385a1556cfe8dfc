"""Which path and which block sizes a problem gets: a measured table, else arithmetic.

Nothing is tuned while a program runs. `python -m adalora_kernels --tune` measures and writes a
table to the user's cache; what is in there comes before what `launch_table.json` ships.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .launch import ceil_div

PATHS: tuple[str, ...] = ("two_pass", "one_pass", "cublas")
# Where one_pass ends: a tile keeps h (rows, r) beside its own accumulator.
ONE_PASS_ROWS, ONE_PASS_RANKS = 64, 32
# Each part of a sum over K is read again by every tile of the GEMM.
MOST_SPLITS = 8
_SHIPPED = Path(__file__).with_name("launch_table.json")


class Blocks(NamedTuple):
    """Block sizes and launch options of one kernel; the sizes that it hasn't are 0."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    tma: bool = False
    flatten: bool = False


class Device(NamedTuple):
    """What the choice of a plan needs to know about a GPU."""

    name: str
    family: str
    sms: int


class Problem(NamedTuple):
    """One product (M, K)·(K, N) with a low-rank term of rank ≤ r_pad, as plans tell them apart."""

    dtype: torch.dtype
    M: int
    K: int
    N: int
    r_pad: int
    product: str  # "y", "dx", or "dropped dx", in which dropout masks the low-rank term


class Plan(NamedTuple):
    """How one product with a low-rank term is computed: y in the forward, dx in the backward."""

    path: str
    gemm: Blocks


class Family(NamedTuple):
    """Ceilings of a class of GPUs, for the arithmetic: only their ratios matter."""

    flops: float  # dense bfloat16, per second, as cuBLAS reaches it
    bandwidth: float  # bytes per second
    gemm: float  # the speed of our GEMM as a part of cuBLAS's


# sm_90: measured on an H200; persistent Triton GEMMs with descriptors are reported to reach 97 to
# 98 % of cuBLAS on Hopper, and which it is decides nothing but ties. The others are data sheets
# (A100 80 GB, RTX 4090, B200) and a guess, 0.9, which leaves the compute-bound problems to cuBLAS.
FAMILIES = {
    "sm_80": Family(312e12, 2.0e12, 0.90),
    "sm_86": Family(165e12, 1.0e12, 0.90),
    "sm_90": Family(788e12, 4.3e12, 0.98),
    "sm_100": Family(2250e12, 8.0e12, 0.90),
}
# Between the end of a kernel and the start of the one that waits for it; an assumption.
_LAUNCH_SECONDS = 2e-6

# Candidates for the GEMM, largest tile first: the first usable one that keeps most multiprocessors
# busy is taken, the last one if none does.
GEMM = {
    "sm_80": (Blocks(128, 128, 64, 8, 3), Blocks(64, 64, 64, 4, 4)),
    "sm_86": (Blocks(128, 128, 32, 8, 3), Blocks(64, 64, 64, 4, 3)),
    "sm_90": (
        Blocks(128, 256, 64, 8, 3, tma=True, flatten=True),
        Blocks(128, 256, 64, 8, 4, tma=True),
        Blocks(128, 128, 64, 8, 4, tma=True),
        Blocks(64, 64, 64, 4, 5, tma=True),
    ),
    "sm_100": (
        Blocks(128, 256, 64, 8, 4, tma=True),
        Blocks(128, 128, 64, 8, 4, tma=True),
        Blocks(128, 64, 64, 8, 4, tma=True),
        Blocks(64, 64, 64, 4, 5, tma=True),
    ),
}
# For one_pass: at most 16 rows, and at most 64.
ONE_PASS = {
    "sm_80": (Blocks(16, 32, 64, 4, 6), Blocks(64, 32, 64, 4, 5)),
    "sm_86": (Blocks(16, 32, 64, 4, 5), Blocks(64, 32, 64, 4, 3)),
    "sm_90": (Blocks(16, 32, 64, 4, 6, tma=True), Blocks(64, 32, 64, 4, 6, tma=True)),
    "sm_100": (Blocks(16, 32, 64, 4, 6, tma=True), Blocks(64, 32, 64, 4, 6, tma=True)),
}
# Every GEMM in float32, and of operands that are not aligned: "auto" leaves both to cuBLAS.
GEMM_GENERAL = Blocks(64, 64, 32, 8, 3)
# The passes over x and g and the low-rank add, for r_pad up to 16, 64 and 256.
_RANK_CLASSES = (16, 64, 256)
PASSES = {
    "down": (Blocks(64, 0, 128, 4, 4), Blocks(64, 0, 64, 4, 4), Blocks(32, 0, 32, 8, 3)),
    "low_rank_add": (Blocks(64, 128, 0, 4, 1), Blocks(64, 128, 0, 4, 1), Blocks(64, 64, 0, 4, 1)),
    "g_pass": (Blocks(64, 256, 0, 8, 3), Blocks(64, 128, 0, 8, 3), Blocks(32, 32, 0, 8, 2)),
    "x_pass": (Blocks(64, 0, 256, 8, 3), Blocks(64, 0, 128, 8, 3), Blocks(32, 0, 64, 8, 2)),
    "g_reduce": (Blocks(64, 0, 0, 8, 1), Blocks(32, 0, 0, 4, 1), Blocks(16, 0, 0, 4, 1)),
}


@functools.lru_cache(maxsize=4096)
def pass_blocks(
    kernel: str, device: Device, r_pad: int, dtype: torch.dtype, wide: bool, aligned: bool
) -> Blocks:
    """The configuration of one of the PASSES.

    Args:
        dtype: of the large operand.
        wide: the adapter counts in float32 although dtype does not.
        aligned: 16 neighbours of the large operand can be read at once.
    """
    classes = zip(PASSES[kernel], _RANK_CLASSES, strict=True)
    blocks = next(b for b, most in classes if r_pad <= most)
    # Tiles of float32 take twice the registers, and without TF32 are not for tensor cores; those of
    # float16 under a float32 adapter become TF32. Before sm_90 operands are kept in registers.
    wide = wide and kernel != "low_rank_add"
    if dtype == torch.float32 or (wide and r_pad > 16 and device.family in ("sm_80", "sm_86")):
        narrow = 4
    else:
        narrow = 2 if wide and dtype == torch.float16 else 1
    # Unaligned, every entry has its own address.
    most = 256 if aligned else 32
    n, k = (min(max(size // narrow, 16), most) if size else 0 for size in (blocks.n, blocks.k))
    stages = min(blocks.stages, 2) if device.family == "sm_86" else blocks.stages
    return blocks._replace(m=min(blocks.m, most), n=n, k=k, stages=stages)


@functools.cache
def _cuda_device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    family = {(8, 0): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}
    # The others have about 100 KB of shared memory, and no wgmma or tcgen05.
    name = family.get(capability, "sm_86")
    return Device(properties.name, name, properties.multi_processor_count)


def device_of(device: torch.device) -> Device:
    """The GPU; under the interpreter, on the CPU, a small one with descriptors."""
    if device.type != "cuda":
        return Device("interpreter", "sm_90", 4)
    return _cuda_device(torch.cuda.current_device() if device.index is None else device.index)


def usable(blocks: Blocks, family: str, problem: Problem) -> bool:
    """Whether the GEMM in this configuration has registers and shared memory enough."""
    few_ranks = problem.r_pad <= 16
    if problem.product == "dropped dx":
        # The mask is made beside a whole tile.
        widest = 64 if family == "sm_100" and not few_ranks else 128
        return blocks.n <= widest and not blocks.flatten
    # Flattened, the loads of the low-rank step are pipelined like those of the main loop, and take
    # as much shared memory.
    return few_ranks or not blocks.flatten


def candidates_for(device: Device, problem: Problem) -> list[Blocks]:
    """The shipped configurations of the GEMM that can be used for a problem, largest tile first."""
    if problem.dtype == torch.float32:
        return [GEMM_GENERAL]
    return [blocks for blocks in GEMM[device.family] if usable(blocks, device.family, problem)]


def allowed(path: str, problem: Problem) -> bool:
    """Whether a path can compute a problem whose operands are aligned."""
    if path != "one_pass":
        return True
    few = problem.M <= ONE_PASS_ROWS and problem.r_pad <= ONE_PASS_RANKS
    return few and problem.product == "y" and problem.dtype != torch.float32


@functools.lru_cache(maxsize=4096)
def choose(
    device: Device, problem: Problem, paths: tuple[str, ...] = PATHS, aligned: bool = True
) -> Plan:
    """The plan for a problem.

    Args:
        paths: those to choose from; one name forces it.
        aligned: 16 neighbours of each operand can be read at once.
    """
    if not aligned:
        paths = ("cublas",) if "cublas" in paths else ("two_pass",)
    paths = tuple(path for path in paths if allowed(path, problem)) or ("two_pass",)
    entry = _table(device.name).get(problem._replace(M=bucket(problem.M)))
    if entry is not None and entry.path in paths and aligned:
        return entry
    ceilings = FAMILIES[device.family]
    path = min(paths, key=lambda path: predicted_seconds(path, ceilings, problem))
    return Plan(path, _blocks(device, problem, path, aligned))


def _blocks(device: Device, problem: Problem, path: str, aligned: bool) -> Blocks:
    if not aligned:
        return GEMM_GENERAL
    if path == "one_pass":
        return ONE_PASS[device.family][0 if problem.M <= 16 else 1]
    candidates = candidates_for(device, problem)
    for blocks in candidates:
        if ceil_div(problem.M, blocks.m) * ceil_div(problem.N, blocks.n) >= 0.75 * device.sms:
            return blocks
    return candidates[-1]


def predicted_seconds(path: str, family: Family, problem: Problem) -> float:
    """The floor of a path by its FLOPs and bytes; design, section 5."""
    dtype, M, K, N, r_pad, _ = problem
    size = dtype.itemsize
    x, w, y = M * K * size, N * K * size, M * N * size
    # Without TF32 a float32 product does not run on tensor cores, and ours is no rival then.
    flops, ours = (family.flops, family.gemm) if size == 2 else (family.flops / 16, 0.5)
    low_rank = 2 * M * N * r_pad
    product = 2 * M * K * N

    def gemm(operations: float) -> float:
        return max(operations / flops, (x + w + y) / family.bandwidth)

    if path == "one_pass":
        tiles = ceil_div(N, 32)
        return gemm(product + low_rank + 2 * M * K * tiles * r_pad) / ours + _LAUNCH_SECONDS
    down = x / family.bandwidth + _LAUNCH_SECONDS
    if path == "two_pass":
        return down + gemm(product + low_rank) / ours + _LAUNCH_SECONDS
    return down + gemm(product) + 2 * y / family.bandwidth + 2 * _LAUNCH_SECONDS


def padded_rank(r: int) -> int:
    """r rounded up to a power of two that `tl.dot` takes: the R_PAD of the kernels."""
    return max(16, bucket(r))


def bucket(M: int) -> int:
    """M rounded up to a power of two: what a measured entry is for."""
    return 1 << max(M - 1, 0).bit_length()


def cache_path() -> Path:
    """Where the user's measured table is: $ADALORA_KERNELS_CACHE, or below $XDG_CACHE_HOME."""
    folder = os.environ.get("ADALORA_KERNELS_CACHE")
    if folder is not None:
        return Path(folder) / _SHIPPED.name
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "adalora_kernels" / _SHIPPED.name


@functools.cache
def _table(device_name: str) -> Mapping[Problem, Plan]:
    """The measured plans for a device, read once per process."""
    plans: dict[Problem, Plan] = {}
    for path in (_SHIPPED, cache_path()):
        if path.exists():
            plans |= read_table(path, device_name)
    return plans


def read_table(path: Path, device_name: str) -> dict[Problem, Plan]:
    """The entries of one table file for a device, by problem with M a power of two.

    Raises:
        ValueError: the file is not such a table; the message names it.
    """
    try:
        plans = {}
        for entry in json.loads(path.read_text())["entries"]:
            if entry["device"] == device_name and entry["path"] in PATHS:
                problem = Problem(getattr(torch, entry["dtype"]), *entry["problem"])
                plans[problem] = Plan(entry["path"], Blocks(*entry["gemm"]))
        return plans
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(f"{path} is not a launch table ({error!r}); delete it") from error


def write_table(path: Path, device_name: str, plans: Mapping[Problem, Plan]) -> None:
    """Put `plans` into the table at `path`, in place of those for the same problems."""

    def key(entry: Mapping[str, Any]) -> tuple[Any, ...]:
        return entry["device"], entry["dtype"], *entry["problem"]

    old = json.loads(path.read_text())["entries"] if path.exists() else []
    new = [
        {
            "device": device_name,
            "dtype": str(problem.dtype).removeprefix("torch."),
            "problem": [bucket(problem.M), *problem[2:]],
            "path": plan.path,
            "gemm": list(plan.gemm),
        }
        for problem, plan in plans.items()
    ]
    merged = {key(entry): entry for entry in [*old, *new]}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    lines = ",\n".join(json.dumps(entry) for entry in merged.values())
    partial.write_text(f'{{"entries": [\n{lines}\n]}}\n')
    partial.replace(path)
    forget_tables()


def forget_tables() -> None:
    """Have the tables read again, and plans made anew."""
    _table.cache_clear()
    choose.cache_clear()

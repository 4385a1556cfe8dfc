"""A problem gets the path and block sizes that were measured for it, else those of arithmetic.

Nothing is tuned while a program runs. `python -m adalora_kernels --tune` measures plans and writes
them into the user's cache. An entry there comes before one of `launch_table.json`, which the
package ships, and each of them before the arithmetic, which knows a GPU by few numbers.
"""

import functools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..launch import ceil_div

PATHS: tuple[str, ...] = ("two_pass", "fused", "cublas")
# Up to which tiles are those of FEW_ROWS, the first of them and all; and up to which h is made
# within the GEMM.
FEWEST_ROWS, MOST_FEW_ROWS, FUSED_RANKS = 16, 64, 16
# Each part of a sum over K is read again by every tile of the GEMM; of FEWEST_ROWS it is small.
MOST_SPLITS, MOST_SPLITS_OF_FEW = 8, 24
# From here on the passes of the backward do not overlap: programs that wait would take the place of
# some that compute.
MOST_OVERLAPPING_ROWS = 2048
_SHIPPED = Path(__file__).with_name("launch_table.json")


class Blocks(NamedTuple):
    """`Blocks` are block sizes and launch options of one kernel; sizes that it hasn't are 0.

    `programs` of a pass run on a multiprocessor at a time.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    tma: bool = False
    programs: int = 1

    @property
    def is_large(self) -> bool:
        """Tell whether a tile of the GEMM takes a multiprocessor for itself."""
        return self.m * self.n >= 128 * 128

    @property
    def options(self) -> dict[str, int]:
        """Return the launch options by triton's names."""
        return {"num_warps": self.warps, "num_stages": self.stages}


class Device(NamedTuple):
    """A `Device` is what the choice of a plan needs to know about a GPU."""

    name: str
    family: str
    sms: int


class Problem(NamedTuple):
    """A `Problem` is one product (M, K)·(K, N) with a low-rank term of rank ≤ r_pad."""

    dtype: torch.dtype
    M: int
    K: int
    N: int
    r_pad: int
    product: str  # "y", "dx", or "dropped dx", in which dropout masks the low-rank term


class Plan(NamedTuple):
    """A `Plan` says how one product with a low-rank term is computed, y or dx."""

    path: str
    gemm: Blocks


# The configurations of the kernels, by family. "sm_86" are all GPUs of compute capability 8.x, and
# later ones with about 100 KB of shared memory and neither wgmma nor tcgen05.

# The GEMM of half-precision operands, largest tile first.
GEMM = {
    "sm_80": (
        Blocks(128, 128, 64, 8, 3),
        Blocks(128, 64, 64, 8, 3),
        Blocks(64, 64, 64, 4, 4),
    ),
    "sm_86": (
        Blocks(128, 128, 32, 8, 3),
        Blocks(128, 64, 64, 8, 3),
        Blocks(64, 64, 64, 4, 3),
    ),
    "sm_90": (
        Blocks(128, 256, 64, 8, 4, tma=True),
        Blocks(128, 128, 64, 8, 4, tma=True),
        Blocks(64, 128, 64, 4, 4, tma=True),
        Blocks(64, 64, 64, 4, 5, tma=True),
    ),
    "sm_100": (
        Blocks(128, 256, 64, 8, 4, tma=True),
        Blocks(128, 128, 64, 8, 4, tma=True),
        Blocks(128, 64, 64, 8, 3, tma=True),
        Blocks(64, 64, 64, 8, 4, tma=True),
    ),
}
# Those of the path "fused", whose programs make h in blocks of as many rows.
FUSED = (Blocks(256, 128, 64, 8, 4, tma=True), Blocks(128, 128, 64, 8, 4, tma=True))
# Those of at most FEWEST_ROWS, and of MOST_FEW_ROWS, where reading w is what counts: largest
# tile first, with as much of w under way as its multiprocessor needs.
_FEW_ROWS_BY_DESCRIPTORS = (
    (Blocks(16, 64, 128, 4, 4, tma=True), Blocks(16, 32, 512, 4, 3, tma=True)),
    (Blocks(64, 128, 128, 4, 4, tma=True), Blocks(64, 64, 128, 4, 6, tma=True)),
)
FEW_ROWS = {
    "sm_80": ((Blocks(16, 32, 64, 4, 6),), (Blocks(64, 32, 64, 4, 5),)),
    "sm_86": ((Blocks(16, 32, 64, 4, 5),), (Blocks(64, 32, 64, 4, 3),)),
    "sm_90": _FEW_ROWS_BY_DESCRIPTORS,
    "sm_100": _FEW_ROWS_BY_DESCRIPTORS,
}
# Every GEMM in float32, and of operands that are not aligned: "auto" leaves both to cuBLAS.
GEMM_GENERAL = Blocks(64, 64, 32, 8, 2)
# The passes over x and g and the low-rank add, for r_pad up to 16, 64 and 256.
_RANK_CLASSES = (16, 64, 256)
PASSES = {
    "down": (
        Blocks(128, 0, 64, 8, 4, programs=2),
        Blocks(64, 0, 64, 4, 4),
        Blocks(32, 0, 32, 8, 3),
    ),
    "low_rank_add": (Blocks(64, 128, 0, 4, 1), Blocks(64, 128, 0, 4, 1), Blocks(64, 64, 0, 8, 1)),
    "g_pass": (Blocks(64, 256, 0, 4, 3), Blocks(64, 64, 0, 8, 3), Blocks(32, 32, 0, 8, 2)),
    "x_pass": (
        Blocks(64, 0, 128, 8, 3, programs=2),
        Blocks(64, 0, 128, 8, 3),
        Blocks(32, 0, 64, 8, 2),
    ),
    "g_reduce": (Blocks(16, 0, 0, 4, 1),) * 3,
}
# For r_pad up to 16 on sm_90, where two warpgroups of 64 rows each read their own.
SM_90_PASSES = {"g_pass": Blocks(128, 256, 0, 8, 2)}
# For at most MOST_FEW_ROWS and r_pad up to 16: one block of rows, and many parts of its columns. So
# the sums of tensor cores are short; what these cut off counts more where few sums are added.
FEW_ROWS_PASSES = {"down": Blocks(64, 0, 128, 4, 4), "g_pass": Blocks(64, 128, 0, 4, 3, programs=2)}


def pass_blocks(
    kernel: str, device: Device, M: int, r_pad: int, dtype: torch.dtype, wide: bool, aligned: bool
) -> Blocks:
    """Return the configuration of one of the PASSES.

    Args:
        dtype: of the large operand.
        wide: the adapter counts in float32 although dtype does not.
        aligned: 16 neighbours of the large operand can be read at once.
    """
    classes = zip(PASSES[kernel], _RANK_CLASSES, strict=True)
    blocks = next(b for b, most in classes if r_pad <= most)
    # Before sm_90 operands are kept in registers.
    in_registers = device.family in ("sm_80", "sm_86")
    # Tiles of float32 take twice the registers, and without TF32 are not for tensor cores; those of
    # float16 under a float32 adapter become TF32.
    wide = wide and kernel != "low_rank_add"
    if dtype == torch.float32 or (wide and r_pad > 16 and in_registers):
        narrow = 4
    else:
        narrow = 2 if wide and dtype == torch.float16 else 1
    if r_pad <= _RANK_CLASSES[0]:
        if M <= MOST_FEW_ROWS:
            blocks = FEW_ROWS_PASSES.get(kernel, blocks)
        elif device.family == "sm_90" and narrow == 1:
            blocks = SM_90_PASSES.get(kernel, blocks)
    # Unaligned, every entry has its own address.
    most, most_rows = (256, 256) if aligned else (32, 64)
    m = min(blocks.m, 32 if wide and narrow == 4 else most_rows)
    if kernel == "x_pass" and (narrow == 4 or (device.family == "sm_100" and r_pad > 16)):
        # What it writes to dx takes registers, too.
        m = min(m, 16 if device.family == "sm_86" else 32)
    n, k = (min(max(size // narrow, 16), most) if size else 0 for size in (blocks.n, blocks.k))
    stages = min(blocks.stages, 2) if device.family == "sm_86" else blocks.stages
    warps = blocks.warps
    # Four warps have too few registers for products in TF32, or without tensor cores.
    if kernel == "g_pass" and (narrow > 1 or in_registers):
        warps = 8
    elif kernel == "x_pass" and in_registers:
        k = min(k, 64)
    elif blocks.k == 128 and device.family == "sm_100":
        warps = 8
    if narrow == 2:
        # TF32 adds eight terms at a time; more than four such sums, each cut off, would be worse
        # than eager's.
        m, k = (min(m, 32), k) if kernel == "x_pass" else (m, min(k, 32))
    return blocks._replace(m=m, n=n, k=k, warps=warps, stages=stages)


def gemm_candidates(device: Device, problem: Problem, path: str = "two_pass") -> list[Blocks]:
    """List a path's configurations with registers and memory enough, largest tile first."""
    if problem.dtype == torch.float32:
        return [GEMM_GENERAL]
    if path == "fused":
        return list(FUSED)
    if problem.M <= MOST_FEW_ROWS:
        return list(FEW_ROWS[device.family][0 if problem.M <= FEWEST_ROWS else 1])
    candidates = GEMM[device.family]
    # The mask is made beside a whole tile.
    widest = 128 if problem.product == "dropped dx" else 256
    # Nor do more ranks fit beside wide tiles, in each version of triton; on sm_90 they do.
    if device.family != "sm_90" and problem.r_pad > 16:
        widest = 64
    return [b for b in candidates if b.n <= widest]


def _blocks(device: Device, problem: Problem, path: str) -> Blocks:
    """Return the largest tile of which there are enough, else the smallest."""
    candidates = gemm_candidates(device, problem, path)
    enough = (b for b in candidates if _busy(b, device, problem) >= 1)
    return next(enough, candidates[-1])


def _busy(blocks: Blocks, device: Device, problem: Problem) -> float:
    """Return tiles by multiprocessors; from 1 on, nearly, there are enough."""
    return _tiles(problem, blocks) / (0.7 * device.sms)


def _tiles(problem: Problem, blocks: Blocks) -> int:
    return ceil_div(problem.M, blocks.m) * ceil_div(problem.N, blocks.n)


def is_allowed(path: str, device: Device, problem: Problem) -> bool:
    """Tell whether a path can compute a problem whose operands are aligned."""
    if path != "fused":
        return True
    # On sm_100 nobody has measured it, before sm_90 there are no descriptors.
    if device.family != "sm_90":
        return False
    # A program keeps h in parts, in registers, before it computes tiles.
    many = problem.M > MOST_FEW_ROWS and problem.r_pad <= FUSED_RANKS
    return many and problem.product == "y" and problem.dtype != torch.float32


def choose(
    device: Device,
    problem: Problem,
    path: str | Plan = "auto",
    possible: tuple[str, ...] = PATHS,
    aligned: bool = True,
) -> Plan:
    """Return the plan for a problem.

    Args:
        path: a plan, which is taken as it is; the name of one of PATHS, which is taken if it is
            possible, else two_pass is; or "auto".
        possible: the paths that can compute this product.
        aligned: 16 neighbours of each operand can be read at once.

    Raises:
        ValueError: there is no path of that name.
    """
    if isinstance(path, Plan):
        return path
    if path != "auto":
        if path not in PATHS:
            raise ValueError(f"path must be 'auto' or one of {', '.join(PATHS)}, got {path!r}")
        possible = (path,) if path in possible else ("two_pass",)
    if not aligned:
        return Plan("cublas" if "cublas" in possible else "two_pass", GEMM_GENERAL)
    paths = tuple(path for path in possible if is_allowed(path, device, problem)) or ("two_pass",)
    measured = _table(device.name).get(problem._replace(M=bucket(problem.M)))
    if measured is not None and measured.path in paths:
        return measured
    found = (Plan(path, _blocks(device, problem, path)) for path in paths)
    return min(found, key=lambda plan: predicted_seconds(plan, device, problem))


# By family: FLOP/s of a dense half-precision product in cuBLAS, bytes/s, and the end of a tile in
# our GEMM, in columns of K that take as long. Only their ratios matter. Those of sm_90 were
# measured, on an H200. Of the others the first two are from the data sheets of an A100 80 GB, an
# RTX 4090 and a B200, and the third is a guess, which leaves most compute-bound problems to cuBLAS.
CEILINGS = {
    "sm_80": (312e12, 2.0e12, 450),
    "sm_86": (165e12, 1.0e12, 450),
    "sm_90": (790e12, 4.3e12, 250),
    "sm_100": (2250e12, 8.0e12, 450),
}
# Between the end of a kernel and the start of the one that waits for it; the least that a pass over
# x takes, or one that writes y.
_LAUNCH_SECONDS, _PASS_SECONDS = 1e-6, 4e-6
# What making h for a row block takes, in tiles' time, and the time of tiles that dropout masks.
_ROW_BLOCK, _MASKED = 0.8, 1.15


def predicted_seconds(plan: Plan, device: Device, problem: Problem) -> float:
    """Compute the least time of a plan by its FLOPs, bytes and launches (design, section 5)."""
    flops, bandwidth, end = CEILINGS[device.family]
    dtype, M, K, N, r_pad, product = problem
    if dtype.itemsize == 4:
        # A guess: without TF32 such a product does not run on tensor cores, ours at half the speed.
        flops, end = flops / 16, K
    x, w, y = (n * dtype.itemsize for n in (M * K, N * K, M * N))

    def gemm(columns: int, busy: float = 1.0) -> float:
        return max(2 * M * (K + columns) * N / (flops * busy), (x + w + y) / bandwidth)

    busy = min(1.0, _busy(plan.gemm, device, problem))
    if plan.path == "fused":
        tile = 2 * plan.gemm.m * plan.gemm.n * K / flops * device.sms
        more = _fused_tiles(plan.gemm, device, problem) * tile
        return gemm(r_pad + end) / busy + more + _LAUNCH_SECONDS
    # Small tiles of few rows have enough of w under way, however few they are.
    ours = gemm(r_pad + end, busy) * (_MASKED if product == "dropped dx" else 1)
    down = max(x / bandwidth, _PASS_SECONDS) + _LAUNCH_SECONDS
    if plan.path == "two_pass":
        # With few rows the GEMM needs h as late as it is there.
        return (down if M > MOST_FEW_ROWS else 0) + ours
    # It is written, and read by the product that adds to it. (In the backward the pass over x
    # writes it. What that saves has not been measured, and so is not counted.)
    write = max(2 * y / bandwidth, _PASS_SECONDS) + 2 * M * N * r_pad / flops + _LAUNCH_SECONDS
    return down + write + gemm(0)


def _fused_tiles(blocks: Blocks, device: Device, problem: Problem) -> float:
    """Tell by how many tiles' time h makes the path "fused" longer (see gemm.py)."""
    row_blocks = ceil_div(problem.M, blocks.m)
    idle = device.sms - _tiles(problem, blocks) % device.sms
    return max(0.0, min(ceil_div(row_blocks, idle) * _ROW_BLOCK - 1, _ROW_BLOCK))


@functools.cache
def _cuda_device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    families = {(8, 0): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}
    family = families.get(capability, "sm_86")
    return Device(properties.name, family, properties.multi_processor_count)


def device_of(device: torch.device) -> Device:
    """Describe the GPU, or for a CPU (the interpreter) a small one with descriptors."""
    if device.type != "cuda":
        return Device("interpreter", "sm_90", 4)
    return _cuda_device(torch.cuda.current_device() if device.index is None else device.index)


def padded_rank(r: int) -> int:
    """Round r up to a power of two that `tl.dot` takes: the R_PAD of the kernels."""
    return max(16, bucket(r))


def bucket(M: int) -> int:
    """Round M up to a power of two, which is what a measured entry is for."""
    return 1 << max(M - 1, 0).bit_length()


def rows_bucket(M: int) -> int:
    """Round M up to a number of rows that recipes are made for, at most four in an octave."""
    step = 1 << max(0, (M - 1).bit_length() - 3)
    return ceil_div(M, step) * step


def cache_path() -> Path:
    """Return where the user's table is: in $ADALORA_KERNELS_CACHE, or below $XDG_CACHE_HOME."""
    folder = os.environ.get("ADALORA_KERNELS_CACHE")
    if folder is not None:
        return Path(folder) / _SHIPPED.name
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "adalora_kernels" / _SHIPPED.name


@functools.cache
def _table(device_name: str) -> Mapping[Problem, Plan]:
    """Read the measured plans for a device, once per process; the user's come first."""
    return read_table(_SHIPPED, device_name) | read_table(cache_path(), device_name)


def read_table(path: Path, device_name: str) -> dict[Problem, Plan]:
    """Read the entries of one table file for a device, by problem with M a power of two.

    No file is an empty table.

    Raises:
        ValueError: the file is not such a table; the message names it.
    """
    try:
        plans = {}
        for entry in _entries(path):
            if entry["device"] == device_name and entry["path"] in PATHS:
                problem = Problem(getattr(torch, entry["dtype"]), *entry["problem"])
                plans[problem] = Plan(entry["path"], Blocks(*entry["gemm"]))
        return plans
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(f"{path} is not a launch table ({error!r}); delete it") from error


def write_table(path: Path, device_name: str, plans: Mapping[Problem, Plan]) -> None:
    """Put `plans` into the table at `path`, in place of those for the same problems."""
    entries = _entries(path)
    for problem, plan in plans.items():
        key = {
            "device": device_name,
            "dtype": str(problem.dtype).removeprefix("torch."),
            "problem": [bucket(problem.M), *problem[2:]],
        }
        entries = [entry for entry in entries if not key.items() <= entry.items()]
        entries.append({**key, "path": plan.path, "gemm": list(plan.gemm)})
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    lines = ",\n".join(map(json.dumps, entries))
    partial.write_text(f'{{"entries": [\n{lines}\n]}}\n')
    partial.replace(path)
    forget_tables()


def _entries(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["entries"] if path.exists() else []


# What to call when tables are to be read again.
_clear: list[Callable[[], None]] = [_table.cache_clear]


def when_forgotten(clear: Callable[[], None]) -> None:
    """Have `forget_tables` call `clear`, which forgets what was made from plans."""
    _clear.append(clear)


def forget_tables() -> None:
    """Forget what was read and made from it, so that tables are read again."""
    for clear in _clear:
        clear()

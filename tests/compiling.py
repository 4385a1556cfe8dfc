"""Compiles recorded launches for GPUs that are not here, and reads what they need of one.

`compile_cases` runs in processes of its own, which begin with `compile_for_real`.
"""

import itertools
import math
import os
import re
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

# Multiprocessors of the GPU that a case is for: an A100, an RTX A6000, an H200, a B200.
SMS = {"sm_80": 108, "sm_86": 84, "sm_90": 132, "sm_100": 148}
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.bool: "i1",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Case:
    """A `Case` is a call of the launchers; `kernels` of it are compiled, or all if empty."""

    family: str
    name: str
    M: int = 8192
    K: int = 4096
    N: int = 4096
    r: int = 16
    dtype: torch.dtype = torch.bfloat16
    adapter: torch.dtype = torch.float32
    dropout: float = 0.0
    path: str = "two_pass"
    blocks: tuple = ()
    delta: bool = False
    tf32: bool = False
    parts: tuple[str, ...] = ("forward", "backward")
    kernels: tuple[str, ...] = ()

    @property
    def id(self):
        types = "/".join(TYPES[t] for t in (self.dtype, self.adapter))
        return f"{self.family}-{self.name}-{types}-r{self.r}"


@dataclass(frozen=True)
class Compiled:
    """A `Compiled` is what a kernel uses; bytes of stack and local memory are per thread."""

    kernel: str
    options: str
    registers: int
    stack: int
    local: int
    shared: int
    instructions: int
    copies: int  # asynchronous, of 16 bytes per thread or by descriptor
    narrow_loads: int  # of two bytes
    wgmma: int
    tcgen05: int
    mma: int
    waits: int  # for the kernel before it
    wgmma_cycles: float  # for 32 KB of the large operand of a pass


def launches(case):
    """List what the launchers would launch for a case, without a GPU and without memory."""
    from adalora_kernels.kernels import launch, svd_linear
    from adalora_kernels.kernels.svd_linear import plans

    def meta(*shape, dtype=case.dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    device = plans.Device("compile-only", case.family, SMS[case.family])
    path = plans.Plan(case.path, plans.Blocks(*case.blocks)) if case.blocks else case.path
    x, y = meta(case.M, case.K), meta(case.M, case.N)
    weight, bias = meta(case.N, case.K), meta(case.N)
    shapes = ((case.r, case.K), (case.r, 1), (case.N, case.r))
    factors = [meta(*shape, dtype=case.adapter) for shape in shapes]
    mask = meta(case.r, dtype=torch.bool)
    seed = meta(1, dtype=torch.int64) if case.dropout else None
    options = (1.5, case.dropout, seed)
    torch.backends.cuda.matmul.allow_tf32 = case.tf32
    h = meta(case.M, case.r, dtype=torch.promote_types(case.dtype, case.adapter))
    with launch.dry_run() as recorded:
        if case.delta:
            svd_linear.svd_delta_fwd(y, x, *factors, mask, *options, device)
        elif "forward" in case.parts:
            svd_linear.svd_linear_fwd(x, weight, bias, *factors, mask, *options, path, device)
        if "backward" in case.parts:
            base = None if case.delta else weight
            options = (*options, True, path, device)
            svd_linear.svd_linear_bwd(y, x, base, *factors, mask, h, *options)
    kernels = [item for item in recorded if item.function is not None]
    return [item for item in kernels if item.kernel in case.kernels or not case.kernels]


def _source(recorded):
    """Specialise the arguments as triton would at a launch."""
    from triton.compiler import ASTSource
    from triton.tools.tensor_descriptor import TensorDescriptor

    constants, attributes = {}, {}

    def kind(value, parameter, place):
        """Return the type of one argument, or of one entry of a tuple, which has a longer place."""
        if isinstance(value, torch.Tensor):
            attributes[place] = [["tt.divisibility", 16]]
            return f"*{TYPES[value.dtype]}"
        if isinstance(value, TensorDescriptor):
            return f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
        if isinstance(value, tuple):
            kinds = [kind(entry, parameter, (*place, i)) for i, entry in enumerate(value)]
            return type(value)(*kinds) if hasattr(value, "_fields") else tuple(kinds)
        is_one = value == 1 and isinstance(value, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or is_one:
            constants[place] = value
            return "constexpr"
        if isinstance(value, float):
            return "fp32"
        if value % 16 == 0 and not parameter.do_not_specialize:
            attributes[place] = [["tt.divisibility", 16]]
        return "i32"

    signature = {
        parameter.name: kind(recorded.arguments[parameter.name], parameter, (i,))
        for i, parameter in enumerate(recorded.function.params)
    }
    return ASTSource(recorded.function, signature, constants, attributes)


def _wgmma_cycles(instructions, warps):
    """Count the cycles that wgmma takes for one block of a loop.

    An instruction of a warpgroup reads 64 rows of 32 bytes, unless they are in registers, and as
    many columns of 32 bytes as its name has, at 128 bytes a cycle; the products of a column take
    half a cycle. Loops are not unrolled: what is there once runs once in a block.
    """
    found = re.findall(r"HGMMA\.64x(\d+)x\d+\S* R\d+, (gdesc|R)", instructions)
    reads = [(int(n), 64 if left == "gdesc" else 0) for n, left in found]
    return warps // 4 * sum(max((n + rows) / 4, n / 2) for n, rows in reads)


def _tool(name):
    import triton.backends.nvidia

    return Path(triton.backends.nvidia.__file__).parent / "bin" / name


def _resources(cubin, file):
    """Return {"REG": registers, "STACK": bytes, "LOCAL": bytes}; `file` is written over."""
    file.write_bytes(cubin)
    command = [_tool("cuobjdump"), "--dump-resource-usage", file]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}


def _code(cubin):
    """Return the instructions in a cubin: its sections .text.*, as they are."""
    (sections,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQ", cubin, sections + i * size) for i in range(count)]
    first = headers[names][4]
    return b"".join(
        cubin[offset : offset + length]
        for name, _, _, _, offset, length in headers
        if cubin.startswith(b".text.", first + name)
    )


def _disassemble(cubins, family, file):
    """Return the text of each one's instructions; `file` is written over.

    The tool takes a quarter of a second before it begins, hence all of them in one go.
    """
    codes = [_code(cubin) for cubin in cubins]
    file.write_bytes(b"".join(codes))
    architecture = family.replace("_", "").upper()
    command = [_tool("nvdisasm"), "--binary", architecture, "--no-dataflow", file]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = iter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/.*", said, re.MULTILINE))
    # An instruction has 16 bytes.
    found = [list(itertools.islice(lines, len(code) // 16)) for code in codes]
    assert list(map(len, found)) == [len(code) // 16 for code in codes] and not list(lines)
    return ["\n".join(one) for one in found]


def compile_for_real():
    """Have triton compile in this process, into which it is not imported yet, not interpret."""
    os.environ.pop("TRITON_INTERPRET", None)
    torch.set_num_threads(1)


def compile_cases(cases, folder):
    """Return [Compiled or the error as text, …] for the launches of each case of one family."""
    import triton
    from triton.backends.compiler import GPUTarget

    os.environ["TRITON_CACHE_DIR"] = str(folder)
    results, kernels = [[] for _ in cases], []
    for case, found in zip(cases, results, strict=True):
        target = GPUTarget("cuda", int(case.family.removeprefix("sm_")), 32)
        for recorded in launches(case):
            try:
                source, options = _source(recorded), _options(recorded)
                kernel = triton.compile(source, target=target, options=options)
            except Exception as error:
                found.append(f"{recorded.kernel}: {error!r}")
                continue
            kernels.append((case, recorded, kernel, found))
    file = Path(folder) / f"{os.getpid()}.cubin"
    cubins = [kernel.asm["cubin"] for _, _, kernel, _ in kernels]
    codes = _disassemble(cubins, cases[0].family, file)
    for (case, recorded, kernel, found), cubin, code in zip(kernels, cubins, codes, strict=True):
        used, shared = _resources(cubin, file), kernel.metadata.shared
        found.append(_compiled(case, recorded, used, shared, code))
    return results


def _options(recorded):
    names = ("num_warps", "num_stages", "launch_pdl")
    return {k: recorded.arguments[k] for k in names if k in recorded.arguments}


def _compiled(case, recorded, used, shared, code):
    """Return what is read of a kernel: resources, bytes of shared memory, and instructions."""
    blocks = {k: v for k, v in recorded.arguments.items() if k.startswith("BLOCK")}
    tile = math.prod(blocks.values()) * case.dtype.itemsize
    options = _options(recorded)
    return Compiled(
        recorded.kernel,
        ", ".join(f"{k}={v}" for k, v in {**blocks, **options}.items()),
        used["REG"],
        used["STACK"],
        used["LOCAL"],
        shared,
        len(code.splitlines()),
        len(re.findall(r"LDGSTS\S*\.128|UTMALDG", code)),
        len(re.findall(r"LDG\S*\.U16", code)),
        code.count("HGMMA"),
        len(re.findall(r"UTC\w*MMA", code)),
        len(re.findall(r"\bHMMA", code)),
        code.count("ACQBULK"),
        _wgmma_cycles(code, options["num_warps"]) * 2**15 / tile,
    )

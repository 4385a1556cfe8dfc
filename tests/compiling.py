"""Compiles recorded launches for GPUs that are not here, and reads what they need of one.

`compile_case` runs in processes of its own, which begin with `compile_for_real`.
"""

import os
import re
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


def _disassemble(cubin):
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    command = [tool, "--dump-resource-usage", "--dump-sass", cubin]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def compile_for_real():
    """Have triton compile in this process, into which it is not imported yet, not interpret."""
    os.environ.pop("TRITON_INTERPRET", None)
    torch.set_num_threads(1)


def compile_case(case, folder):
    """Return [Compiled or the error as text, …] for the launches of a case."""
    import triton
    from triton.backends.compiler import GPUTarget

    os.environ["TRITON_CACHE_DIR"] = str(folder)
    results = []
    for recorded in launches(case):
        names = ("num_warps", "num_stages", "launch_pdl")
        options = {k: recorded.arguments[k] for k in names if k in recorded.arguments}
        blocks = {k: v for k, v in recorded.arguments.items() if k.startswith("BLOCK")}
        target = GPUTarget("cuda", int(case.family.removeprefix("sm_")), 32)
        try:
            kernel = triton.compile(_source(recorded), target=target, options=options)
        except Exception as error:
            results.append(f"{recorded.kernel}: {error!r}")
            continue
        cubin = Path(folder) / f"{os.getpid()}.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        sass = _disassemble(cubin)
        used = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", sass)}
        results.append(
            Compiled(
                recorded.kernel,
                ", ".join(f"{k}={v}" for k, v in {**blocks, **options}.items()),
                used["REG"],
                used["STACK"],
                used["LOCAL"],
                kernel.metadata.shared,
                len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", sass, re.MULTILINE)),
                len(re.findall(r"LDGSTS\S*\.128|UTMALDG", sass)),
                len(re.findall(r"LDG\S*\.U16", sass)),
                sass.count("HGMMA"),
                len(re.findall(r"UTC\w*MMA", sass)),
                len(re.findall(r"\bHMMA", sass)),
            )
        )
    return results

"""Calls of a layer by the compiled launcher and by Triton's own, over a GPU that is none.

What the two launch has to be the same to the byte. Pointers differ, as results and the workspace
are new at every call, so they are compared by the names of what they point to.
"""

import struct
from typing import Any, NamedTuple

from benchmarks import fake_gpu

fake_gpu.install()

import torch  # noqa: E402  after the fake GPU, as everything that may load a driver
import triton  # noqa: E402
from torch import Tensor  # noqa: E402

from adalora_kernels import ops  # noqa: E402
from adalora_kernels.kernels.svd_linear import (  # noqa: E402
    plans,
    svd_delta_fwd,
    svd_linear_bwd,
    svd_linear_fwd,
)

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
launch_forward = torch.ops.adalora.launch_forward
launch_backward = torch.ops.adalora.launch_backward
# In maps of small matrices Triton before 3.7 leaves the bit that csrc/driver.h clears.
_LEAVES_WRONG_BIT = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
# Nothing but a pointer is as large as this. Some Pythons have their heap at low addresses.
_LEAST_POINTER = 1 << 24


class Problem(NamedTuple):
    """A `Problem` is a call of a layer; layouts are those of `lay_out`."""

    leading: tuple[int, ...] = (80,)
    K: int = 64
    N: int = 96
    R: int = 8
    dtype: torch.dtype = BF16
    adapter: torch.dtype = F32
    delta: bool = False
    base: torch.dtype | None = None  # of svd_delta, if it isn't that of x
    bias: bool = False
    mask: bool = False
    p: float = 0.0
    need_dx: bool = True
    x: str = "plain"
    weight: str = "plain"
    grad_y: str = "plain"
    small: str = "plain"  # A, E, B, bias, mask, seed and h


PLAIN = Problem()
DROPOUT = PLAIN._replace(p=0.1, mask=True)


def lay_out(values: Tensor, layout: str) -> Tensor:
    """Return a tensor of these values, which lies otherwise in memory."""
    shape, n = values.shape, values.shape[-1]
    if layout == "plain":
        return values
    if layout == "wide":  # the first part of longer rows
        return torch.cat([values, torch.zeros_like(values)], -1)[..., :n]
    if layout == "second":  # every second column
        return torch.stack([values, values], -1)[..., 0]
    if layout == "shifted":  # one entry behind what is aligned
        return torch.cat([values.new_zeros(1), values.flatten()])[1:].view(shape)
    if layout == "transposed":  # the last two dimensions, or the leading ones
        dims = (0, 1) if values.dim() > 2 else (0, -1)
        return values.transpose(*dims).contiguous().transpose(*dims)
    if layout == "expanded":  # all rows are one
        return values.flatten()[:n].expand(shape)
    assert layout == "sum"  # the gradient of a sum
    return values.new_ones(()).expand(shape)


def tensors_of(problem: Problem) -> dict[str, Tensor | None]:
    """Make what a call gets, in the order of its arguments."""
    leading, K, N, R, dtype, adapter, delta = problem[:7]

    def new(*shape: int, dtype: torch.dtype, layout: str = problem.small) -> Tensor:
        return lay_out(torch.randn(shape).to(dtype), layout)

    base = problem.base or dtype
    flags = lay_out(torch.arange(R) % 3 != 1, problem.small)
    seed = lay_out(torch.tensor([7]), problem.small)
    return {
        "x": new(*leading, K, dtype=dtype, layout=problem.x),
        "weight": None if delta else new(N, K, dtype=dtype, layout=problem.weight),
        "bias": new(N, dtype=dtype) if problem.bias and not delta else None,
        "base": new(*leading, N, dtype=base, layout=problem.grad_y) if delta else None,
        "A": new(R, K, dtype=adapter),
        "E": new(R, 1, dtype=adapter),
        "B": new(N, R, dtype=adapter),
        "mask": flags if problem.mask else None,
        "seed": seed if problem.p else None,
        "grad_y": new(*leading, N, dtype=base, layout=problem.grad_y),
        "h": new(*leading, R, dtype=torch.promote_types(dtype, adapter)),
    }


def is_tf32() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def forward(t: dict[str, Any], p: float) -> dict[str, Any]:
    """Call the compiled launcher, and return what it made."""
    given = [t[n] for n in ("x", "weight", "bias", "base", "A", "E", "B", "mask", "seed")]
    return dict(zip(("y", "h", "seed"), launch_forward(*given, 1.5, p, is_tf32()), strict=True))


def backward(t: dict[str, Any], p: float, need_dx: bool) -> dict[str, Any]:
    given = [t[n] for n in ("grad_y", "x", "weight", "A", "E", "B", "mask", "seed", "h")]
    made = launch_backward(*given, 1.5, p, need_dx, is_tf32())
    return dict(zip(("dx", "dA", "dE", "dB"), made, strict=True))


def triton_forward(t: dict[str, Any], p: float) -> dict[str, Any]:
    """Do the same by Triton's own launch."""
    adapter = [t[n] for n in ("A", "E", "B", "mask")]
    if t["base"] is None:
        y, h = svd_linear_fwd(t["x"], t["weight"], t["bias"], *adapter, 1.5, p, t["seed"])
    else:
        y, h = svd_delta_fwd(t["base"], t["x"], *adapter, 1.5, p, t["seed"])
    return {"y": y, "h": h}


def triton_backward(t: dict[str, Any], p: float, need_dx: bool) -> dict[str, Any]:
    given = [t[n] for n in ("grad_y", "x", "weight", "A", "E", "B", "mask", "h")]
    made = svd_linear_bwd(*given, 1.5, p, t["seed"], need_dx)
    return dict(zip(("dx", "dA", "dE", "dB"), made, strict=True))


def named(launches: list[fake_gpu.Launch], tensors: dict[str, Any]) -> list[Any]:
    """Return what was launched with names for pointers.

    What has no name is the workspace, or a copy of something that was not contiguous: that gets a
    number in the order in which it is first met, and how far it is from the lowest of them.
    """
    names = {t.data_ptr(): name for name, t in tensors.items() if t is not None and t.numel()}
    met: dict[int, int] = {}

    def translated(parameter: bytes) -> Any:
        if len(parameter) not in (8, 128):
            return parameter
        (value,) = struct.unpack_from("<Q", parameter)
        if value < _LEAST_POINTER:
            return parameter
        name = names.get(value) or met.setdefault(value, len(met))
        rest = parameter[8:]
        if rest and _LEAVES_WRONG_BIT:
            rest = rest[:2] + bytes([rest[2] & ~0x20]) + rest[3:]
        return name, rest

    translate = [(launch[:8], list(map(translated, launch.parameters))) for launch in launches]
    return [*translate, sorted(value - min(met) for value in met)]


def compare(problem: Problem) -> list[str]:
    """Assert that forward and backward launch what Triton would; return the kernels' names."""
    t, p = tensors_of(problem), problem.p
    forwards = (lambda: forward(t, p), lambda: triton_forward(t, p))
    backwards = (
        lambda: backward(t, p, problem.need_dx),
        lambda: triton_backward(t, p, problem.need_dx),
    )
    kernels: list[str] = []
    for mine, theirs in (forwards, backwards):
        with fake_gpu.recorded() as ours:
            made = mine()
        with fake_gpu.recorded() as expected:
            reference = theirs()
        assert made.pop("seed", None) is None
        if not problem.need_dx and "dx" in made:
            assert made.pop("dx") is None
            del reference["dx"]
        for name, result in reference.items():
            layout = (result.shape, result.stride(), result.dtype)
            assert (made[name].shape, made[name].stride(), made[name].dtype) == layout, name
        compare_launches(problem, named(ours, {**t, **made}), named(expected, {**t, **reference}))
        names = [launch.name.strip("_").removesuffix("_kernel") for launch in ours]
        if "gemm" not in names and not problem.delta:
            # What torch has multiplied is really there.
            for product in {"y", "dx"} & made.keys():
                torch.testing.assert_close(made[product], reference[product], rtol=0, atol=0)
                names.append("cublas")
        kernels += names
    return kernels


def compare_launches(problem: Problem, ours: list[Any], expected: list[Any]) -> None:
    """Assert that two lists of `named` are the same."""
    if "transposed" in problem or problem.small != "plain":
        # How far a copy is from the workspace is up to the allocator.
        ours, expected = ours[:-1], expected[:-1]
    assert len(ours) == len(expected), problem
    for i, (one, other) in enumerate(zip(ours, expected, strict=True)):
        assert one == other, f"{problem}, launch {i}:\n{one}\n{other}"


def library() -> Any:
    """Return the compiled library, by which plans are forgotten and counted."""
    import ctypes

    lib = ctypes.CDLL(str(ops.library.path))
    lib.adalora_plan_misses.restype = ctypes.c_int64
    return lib


def forget() -> None:
    """Forget what was planned, in Python and in the library; not what Triton has compiled."""
    plans.forget_tables()


def launched(problem: Problem) -> list[Any]:
    """Return what forward and backward launch."""
    t = tensors_of(problem)
    with fake_gpu.recorded() as forwards:
        y = forward(t, problem.p)
    assert y.pop("seed") is None
    with fake_gpu.recorded() as backwards:
        dx = backward(t, problem.p, problem.need_dx)
    return [named(forwards, {**t, **y}), named(backwards, {**t, **dx})]

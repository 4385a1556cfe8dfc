"""Makes a process without a GPU launch as if it had an H200, over a driver that computes nothing.

    from benchmarks import fake_gpu
    fake_gpu.install()                  # before torch, triton and this package are imported
    ...
    with fake_gpu.recorded() as launches:
        layer(x)                        # x is on the CPU and counts as being on the GPU
    launches[0].grid, launches[0].parameters

Triton compiles for sm_90 and launches by its whole real path, and so does the compiled library;
what they launch has all its parameters right and computes nothing, so what a layer returns is
memory that nobody wrote. It works in a fresh process only, and not under TRITON_INTERPRET: what it
changes is decided once, on import. `install` raises where that is not so.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import operator
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

_SOURCE = Path(__file__).with_name("fake_driver.c")
_BUILD = _SOURCE.parents[1] / "build" / "fake_gpu"
_driver: ctypes.CDLL | None = None


class Launch(NamedTuple):
    """A launch as the driver got it; `parameters` are the bytes of each of the kernel's."""

    name: str
    function: int
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_memory: int
    attributes: int
    early: bool  # may begin before the one in front of it has ended (launch_pdl)
    stream: int
    parameters: tuple[bytes, ...]


class TensorMap(NamedTuple):
    """What a tensor map says of a tensor: sizes from the last dimension on, strides in bytes."""

    address: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]


class Counts(NamedTuple):
    """Launches, calls that the driver refused, and how often code was loaded."""

    launches: int
    errors: int
    loads: int


def why_not() -> str | None:
    """Say why a fresh process cannot have the fake GPU here; None if it can."""
    if not (shutil.which("cc") or shutil.which("gcc")):
        return "the fake GPU needs a C compiler (cc or gcc)"
    if importlib.util.find_spec("triton") is None:
        return "the fake GPU needs triton, which is not installed"
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        return "the fake GPU does not work under TRITON_INTERPRET=1"
    return None


def installed() -> bool:
    """Whether this process has the fake GPU."""
    return _driver is not None


def install(device: int = 0) -> None:
    """Give this process the fake GPU, on which tensors on the CPU then count as being.

    Raises:
        RuntimeError: it cannot; the message says why.
    """
    global _driver
    if installed():
        return set_device(device)
    if why := why_not():
        raise RuntimeError(why)
    if early := {"torch", "triton", "adalora_kernels"} & sys.modules.keys():
        names = " and ".join(sorted(early))
        raise RuntimeError(f"the fake GPU works in a fresh process only: {names} came before it")
    folder = _built()
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
    # No runtime is to find a real GPU beside it.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # Whoever asks for libcuda.so.1 from now on gets the one that is loaded.
    _driver = ctypes.CDLL(str(folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
    set_device(device)
    _change_triton()
    _change_the_package()


def _built() -> Path:
    """The folder with the driver, compiled unless it is there."""
    folder = _BUILD / hashlib.sha256(_SOURCE.read_bytes()).hexdigest()[:16]
    if not (folder / "libcuda.so.1").exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch, "libcuda.so.1")
            cc = shutil.which("cc") or "gcc"
            command = [cc, "-std=c11", "-O2", "-Wall", "-Wextra", "-Wno-unused-parameter"]
            command += ["-shared", "-fPIC", "-pthread", "-Wl,-soname,libcuda.so.1"]
            subprocess.run([*command, str(_SOURCE), "-o", str(made)], check=True)
            made.rename(folder / made.name)  # At once, for others may be building it, too.
    return folder


def _change_triton() -> None:
    """Let Triton take the fake for its GPU, and say of each kernel it loads what it takes."""
    import triton
    from triton.backends.nvidia.driver import CudaDriver
    from triton.compiler.compiler import CompiledKernel

    class Driver(CudaDriver):
        def __init__(self) -> None:
            super().__init__()
            self.get_device_capability = lambda device=None: (9, 0)
            self.get_current_device = device
            self.get_current_stream = lambda device: 0

    load = CompiledKernel._init_handles

    def load_and_declare(kernel: Any) -> None:
        if kernel.module is not None:  # Triton asks at every launch, which is to cost nothing.
            return
        load(kernel)
        sizes = _parameter_sizes(kernel.asm["ptx"])
        array = (ctypes.c_uint * len(sizes))(*sizes)
        _library().adalora_fake_declare(ctypes.c_void_p(kernel.function), len(sizes), array)

    CompiledKernel._init_handles = load_and_declare
    triton.runtime.driver.set_active(Driver())


def _parameter_sizes(ptx: str) -> list[int]:
    """The bytes of every parameter of a kernel, from what it was compiled to."""
    declared = ptx[ptx.index(".entry") :].partition("(")[2].partition(")\n")[0]
    kind = r"\.param\s+(?:\.align\s+\d+\s+)?\.[a-z](\d+)[^,\[]*(?:\[(\d+)\])?"
    return [int(bits) // 8 * int(count or 1) for bits, count in re.findall(kind, declared)]


def _change_the_package() -> None:
    """Let the package take tensors on the CPU for tensors on an H200. All of it is here.

    There is no switch for this in the package: it asks the tensors themselves what device they
    are on, so these are the places where it asks.
    """
    from adalora_kernels import launching
    from adalora_kernels.kernels.svd_linear import plans

    # Plans, and with them grids and blocks, are those of this GPU instead of the interpreter's.
    h200 = plans.Device("NVIDIA H200", "sm_90", 132)
    plans.device_of = lambda device: h200
    # Calls go where those on a GPU go, at the same cost, and nothing hinders the kernels there.
    launching.is_on_gpu = operator.attrgetter("is_cpu")
    launching.why_no_triton = lambda device: None


def _library() -> Any:
    if _driver is None:
        raise RuntimeError("there is no fake GPU in this process: call install() first")
    return _driver


def device() -> int:
    """The index of the GPU that tensors on the CPU count as being on."""
    return ctypes.c_int.in_dll(_library(), "adalora_fake_device").value


def set_device(index: int) -> None:
    """Let tensors on the CPU count as being on another of the eight GPUs."""
    ctypes.c_int.in_dll(_library(), "adalora_fake_device").value = index


def counts() -> Counts:
    """Count what the driver was asked for in this process."""
    numbers = (ctypes.c_long.in_dll(_library(), f"adalora_fake_{n}") for n in Counts._fields)
    return Counts(*(number.value for number in numbers))


@contextlib.contextmanager
def capturing() -> Iterator[None]:
    """Refuse in this context what is refused while a graph is being captured, and at its end.

    Raises:
        RuntimeError: something was refused, so that the capture has failed.
    """
    capture = ctypes.c_int.in_dll(_library(), "adalora_fake_capture")
    capture.value = 1
    try:
        yield
        if capture.value < 0:
            raise RuntimeError("the capture of a graph has failed")
    finally:
        capture.value = 0


class _Function(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char * 256),
        ("shared_memory", ctypes.c_uint),
        ("parameters", ctypes.c_uint),
        ("sizes", ctypes.c_uint * 128),
    ]


class _Record(ctypes.Structure):
    _fields_ = [
        ("function", ctypes.POINTER(_Function)),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_memory", ctypes.c_uint),
        ("attributes", ctypes.c_uint),
        ("early", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("bytes", ctypes.c_void_p),
    ]


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Yield a list that holds, when the context ends, all launches that were made in it."""
    launches: list[Launch] = []
    _library().adalora_fake_record(1)
    try:
        yield launches
    finally:
        _library().adalora_fake_record(0)
        records = ctypes.POINTER(_Record)()
        count = _library().adalora_fake_recorded(ctypes.byref(records))
        launches += [_launch(records[i]) for i in range(count)]


def _launch(record: Any) -> Launch:
    function, parameters, begin = record.function.contents, [], record.bytes
    for size in function.sizes[: function.parameters]:
        parameters.append(ctypes.string_at(begin, size))
        begin += size
    return Launch(
        function.name.decode(),
        ctypes.addressof(function),
        (record.grid[0], record.grid[1], record.grid[2]),
        (record.block[0], record.block[1], record.block[2]),
        record.shared_memory,
        record.attributes,
        bool(record.early),
        record.stream or 0,
        tuple(parameters),
    )


def tensor_map(parameter: bytes) -> TensorMap:
    """Read a parameter of 128 bytes, as fake_driver.c has written it."""
    address, rank, *numbers = struct.unpack_from("<QxB6x9Q", parameter)
    return TensorMap(address, tuple(numbers[:rank]), tuple(numbers[5 : 4 + rank]))

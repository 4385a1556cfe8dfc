"""Builds csrc/ into the library that adalora_kernels loads; all else is in pyproject.toml.

ADALORA_KERNELS_BUILD says what is built:
    auto (default)  what can be: the CPU part where torch and a C++ compiler are there, the CUDA
                    part where nvcc is there, too; without either the package is pure Python
    none            nothing
    cpu, cuda       the CPU part, or both; that it can't be is an error
Whether there is a GPU does not matter. CXX, CXXFLAGS, LDFLAGS, NVCC_APPEND_FLAGS, CUDA_HOME,
TORCH_CUDA_ARCH_LIST ("8.0;9.0a;10.0+PTX") and MAX_JOBS mean what they always do.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError

CSRC = Path(__file__).parent / "csrc"
# The oldest torch that the library runs with, whichever one it is built with.
TARGET = "0x020b000000000000"
# Each serves the later minor versions of its generation, the PTX what comes after.
ARCHITECTURES = "8.0 9.0 10.0+PTX"


class CannotBuild(BaseError):
    """Says what is missing."""


def find_compiler() -> str:
    """The C++ compiler, as a command."""
    if os.environ.get("CXX"):
        return os.environ["CXX"]
    for name in ("g++", "clang++", "c++"):
        if shutil.which(name):
            return name
    raise CannotBuild("there is no C++ compiler (g++, clang++ or what CXX names)")


def find_torch() -> Path:
    """The folder of torch, which is not imported: that would take longer than most of the rest."""
    if not sys.platform.startswith("linux"):
        raise CannotBuild(f"the library is for Linux, this is {sys.platform}")
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise CannotBuild(
            "torch is not installed; install it first, and this package with --no-build-isolation"
        )
    version = importlib.metadata.version("torch")
    if tuple(map(int, version.split(".")[:2])) < (2, 11):
        raise CannotBuild(f"torch 2.11 or later is needed, this is {version}")
    return Path(spec.origin).parent


def find_nvcc() -> str:
    """The path of nvcc."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if not found:
        raise CannotBuild(f"there is no nvcc in {home + '/bin' if home else 'the PATH'}")
    return found


def architectures(nvcc: str) -> list[str]:
    """TORCH_CUDA_ARCH_LIST, or of our own list what this nvcc knows."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST")
    names = re.split(r"[\s;,]+", (wanted or ARCHITECTURES).strip())
    for name in names:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
            raise CannotBuild(
                f"TORCH_CUDA_ARCH_LIST has {name!r}, not one like 8.0, 9.0a, 10.0+PTX"
            )
    if wanted:
        return names
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    return [n for n in names if "sm_" + n.replace("+PTX", "").replace(".", "") in known]


def cuda_includes(nvcc: str) -> list[str]:
    """Where the headers of this nvcc are, which may be a script somewhere else."""
    done = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True)
    line = re.search(r"^#\$ INCLUDES=(.*)$", done.stderr, re.MULTILINE)
    return re.findall(r'-I([^"\s]+)', line[1]) if line else []


def gencode(names: list[str]) -> list[str]:
    """nvcc's flags for them."""
    flags = []
    for name in names:
        number = name.removesuffix("+PTX").replace(".", "")
        code = f"[sm_{number},compute_{number}]" if name.endswith("+PTX") else f"sm_{number}"
        flags.append(f"-gencode=arch=compute_{number},code={code}")
    return flags


def run(command: list[str]) -> None:
    print(shlex.join(command), flush=True)
    try:
        done = subprocess.run(command)
    except OSError as error:
        raise CannotBuild(f"the compiler failed ({error})") from error
    if done.returncode != 0:
        raise CannotBuild(f"the compiler failed (exit status {done.returncode})")


def build_library(folder: Path, library: Path, with_cuda: bool) -> None:
    """Compile and link; raises CannotBuild."""
    torch, cxx = find_torch(), shlex.split(find_compiler())
    flags = ["-std=c++20", "-O3", "-isystem", str(torch / "include")]
    flags += [f"-DTORCH_TARGET_VERSION={TARGET}"]
    built_for, includes, link = "CPU", [], cxx
    compilers: dict[str, list[str]] = {}
    if with_cuda:
        nvcc, flags = find_nvcc(), [*flags, "-DADALORA_WITH_CUDA"]
        names = architectures(nvcc)
        built_for += f" and CUDA ({' '.join(names)})"
        includes = [word for path in cuda_includes(nvcc) for word in ("-isystem", path)]
        host = ["-ccbin", cxx[0]] if os.environ.get("CXX") else []
        compilers[".cu"] = [nvcc, *flags, "-Xcompiler=-fPIC,-fvisibility=hidden", *host]
        compilers[".cu"] += gencode(names)
        # The static runtime of nvcc's default: it needs no CUDA where it is only loaded.
        link = [nvcc, *host]
    compilers[".cpp"] = [*cxx, *flags, "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
    compilers[".cpp"] += [*includes, f'-DADALORA_BUILT_FOR="{built_for}"']
    compilers[".cpp"] += shlex.split(os.environ.get("CXXFLAGS", ""))
    folder.mkdir(parents=True, exist_ok=True)
    library.parent.mkdir(parents=True, exist_ok=True)
    objects, commands = [], []
    for source in sorted(path for path in CSRC.glob("**/*") if path.suffix in compilers):
        objects.append(str(folder / f"{source.parent.name}_{source.stem}.o"))
        commands.append([*compilers[source.suffix], "-c", str(source), "-o", objects[-1]])
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        list(pool.map(run, commands))
    # libtorch brings libtorch_cuda with it where there is one, so both kinds of torch will do.
    link += ["-shared", *objects, f"-L{torch / 'lib'}", "-Xlinker", "--no-as-needed", "-ltorch"]
    # A process that has loaded the old library keeps it.
    new = library.with_suffix(".new")
    run([*link, *shlex.split(os.environ.get("LDFLAGS", "")), "-o", str(new)])
    new.replace(library)


class BuildLibrary(build_ext):
    """Calls the compilers; setuptools only says where the library goes."""

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp).resolve()
        if BUILD != "auto":
            build_library(folder, library, BUILD == "cuda")
            return
        for part, with_cuda in (("CUDA", True), ("CPU", False)):
            try:
                build_library(folder, library, with_cuda)
                return
            except CannotBuild as reason:
                print(f"adalora_kernels: no {part} code: {reason}", file=sys.stderr)


BUILD = os.environ.get("ADALORA_KERNELS_BUILD") or "auto"
if BUILD not in ("auto", "none", "cpu", "cuda"):
    sys.exit(f"ADALORA_KERNELS_BUILD must be auto, none, cpu or cuda, got {BUILD!r}")

options: dict[str, Any] = {}
if BUILD == "none":
    # An editable installation would load what an earlier build left.
    for old in Path(__file__).parent.glob("adalora_kernels/_C*.so"):
        old.unlink()
else:
    options = {
        # Not a Python module; the name is that of one for the stable Python ABI, which it does
        # not even use.
        "ext_modules": [Extension("adalora_kernels._C", sources=[], py_limited_api=True)],
        "cmdclass": {"build_ext": BuildLibrary},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }
setup(**options)

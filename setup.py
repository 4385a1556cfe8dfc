"""Builds csrc/ into the library that adalora_kernels loads; all else is in pyproject.toml.

ADALORA_KERNELS_BUILD says what is built:
    auto (default)  what can be: the CPU part where there is a C++ compiler, the CUDA part where
                    nvcc is there, too; what is missing is said in one line, also under pip
    none            nothing
    cpu, cuda       the CPU part, or both; that it can't be is an error. Where pip or another front
                    end makes an environment for the build, cuda brings its own nvcc
Whether there is a GPU does not matter, nor which torch is built with. CXX, CXXFLAGS, LDFLAGS,
NVCC_APPEND_FLAGS, CUDA_HOME, TORCH_CUDA_ARCH_LIST ("8.0;9.0a;10.0+PTX") and MAX_JOBS mean what they
always do.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError

CSRC = Path(__file__).parent / "csrc"
# The oldest torch that the library runs with, whichever one it is built with.
TARGET = "0x020b000000000000"
# PTX of the last serves what comes after.
ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
# nvcc in packages; all of one release, for each admits any version of the others.
NVCC = [
    f"nvidia-{name}==13.0.*; platform_system == 'Linux'"
    for name in ("cuda-nvcc", "cuda-crt", "nvvm", "cuda-cccl", "cuda-runtime")
]
NINJA = """\
cxx = {cxx}
cxxflags = {cxxflags}
nvcc = {nvcc}
nvccflags = {nvccflags}
link = {link}
ldflags = {ldflags}
rule cxx
  command = $cxx $cxxflags -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule nvcc
  command = $nvcc $nvccflags -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = $link -shared $in -o $out.new $ldflags && mv $out.new $out
"""


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


def find_ninja() -> str:
    """The path of ninja, which may be in an environment that is not activated."""
    beside = Path(sys.executable).with_name("ninja")
    found = str(beside) if beside.exists() else shutil.which("ninja")
    if not found:
        raise CannotBuild("ninja is not installed")
    return found


def find_torch() -> Path:
    """The folder of torch."""
    if not sys.platform.startswith("linux"):
        raise CannotBuild(f"the library is for Linux, this is {sys.platform}")
    # Not imported, which takes seconds: its headers are all that is needed.
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise CannotBuild(
            "torch is not installed, which is needed first with --no-build-isolation or setup.py"
        )
    version = importlib.metadata.version("torch")
    if tuple(map(int, version.split(".")[:2])) < (2, 11):
        raise CannotBuild(f"torch 2.11 or later is needed, this is {version}")
    return Path(spec.origin).parent


def cuda_home() -> str | None:
    """The folder of CUDA that is asked for."""
    return os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")


def find_nvcc() -> str:
    """The path of nvcc: that of CUDA_HOME; or the one of NVCC, or one in the PATH."""
    home = cuda_home()
    packages = [f"{folder}/nvidia/cu13/bin" for folder in sys.path if folder]
    folders = [f"{home}/bin"] if home else [*packages, os.environ.get("PATH", os.defpath)]
    found = shutil.which("nvcc", path=os.pathsep.join(folders))
    if not found:
        raise CannotBuild(f"there is no nvcc in {home + '/bin' if home else 'the PATH'}")
    return found


def architectures(nvcc: str) -> list[str]:
    """TORCH_CUDA_ARCH_LIST, or of our own list what this nvcc knows, with PTX of the newest."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if wanted:
        names = re.split(r"[\s;,]+", wanted.strip())
        for name in names:
            if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
                raise CannotBuild(
                    f"TORCH_CUDA_ARCH_LIST has {name!r}, not one like 8.0, 9.0a, 10.0+PTX"
                )
        return names
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    names = [name for name in ARCHITECTURES if "sm_" + name.replace(".", "") in known]
    if not names:
        raise CannotBuild(f"{nvcc} knows none of {', '.join(ARCHITECTURES)}")
    return [*names[:-1], f"{names[-1]}+PTX"]


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


def quoted(words: list[str]) -> str:
    return " ".join(shlex.quote(word) for word in words).replace("$", "$$")


def write_build(folder: Path, library: Path, with_cuda: bool) -> None:
    """A build.ninja in `folder` that makes `library`."""
    torch, cxx, nvcc = find_torch(), find_compiler(), None
    built = "CPU"
    includes = ["-isystem", str(torch / "include")]
    defines = [f"-DTORCH_TARGET_VERSION={TARGET}"]
    sources = [*sorted(CSRC.glob("*.cpp")), *sorted((CSRC / "cpu").glob("*.cpp"))]
    link, nvccflags = cxx, []
    if with_cuda:
        nvcc = find_nvcc()
        names = architectures(nvcc)
        built += f" and CUDA ({' '.join(names)})"
        sources += sorted((CSRC / "cuda").glob("*.cu"))
        for folder_of_cuda in cuda_includes(nvcc):
            includes += ["-isystem", folder_of_cuda]
        defines += ["-DADALORA_WITH_CUDA"]
        host = ["-ccbin", shlex.split(cxx)[0]] if os.environ.get("CXX") else []
        # The static runtime of nvcc's default: it needs no CUDA where it is only loaded.
        link = quoted([nvcc, *host])
        nvccflags = ["-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", *host]
        nvccflags += [*gencode(names), "-isystem", str(torch / "include"), *defines]
    cxxflags = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
    cxxflags += [*includes, *defines, f'-DADALORA_BUILT_FOR="{built}"']
    # libtorch brings libtorch_cuda with it where there is one, so both kinds of torch will do.
    ldflags = [f"-L{torch / 'lib'}", "-Xlinker", "--no-as-needed", "-ltorch", "-ldl"]
    if nvcc:
        # The nvcc of NVCC does not look for its runtime where that lies.
        ldflags.append(f"-L{Path(nvcc).parent.parent / 'lib'}")
    rules = NINJA.format(
        cxx=cxx,
        cxxflags=f"{quoted(cxxflags)} {os.environ.get('CXXFLAGS', '')}",
        nvcc=nvcc,
        nvccflags=quoted(nvccflags),
        link=link,
        ldflags=f"{quoted(ldflags)} {os.environ.get('LDFLAGS', '')}",
    )
    objects = []
    for source in sources:
        objects.append(f"{source.parent.name}_{source.stem}.o")
        rules += f"build {objects[-1]}: {'nvcc' if source.suffix == '.cu' else 'cxx'} {source}\n"
    rules += f"build {library}: link {' '.join(objects)}\n"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(rules)


def build_library(folder: Path, library: Path, with_cuda: bool) -> None:
    """Compile and link; raises CannotBuild."""
    ninja = find_ninja()
    write_build(folder, library, with_cuda)
    library.parent.mkdir(parents=True, exist_ok=True)
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    try:
        subprocess.run([ninja, *jobs], cwd=folder, check=True)
    except subprocess.CalledProcessError as error:
        raise CannotBuild(f"the compiler failed (exit status {error.returncode})") from error


def tell(line: str) -> None:
    """Print a line, also where pip hides what a build prints: there, where pip itself prints."""
    print(line, file=sys.stderr)
    for descriptor in (2, 1):
        shown = Path(f"/proc/{os.getppid()}/fd/{descriptor}")
        try:
            kind = shown.stat().st_mode
            if shown.samefile("/proc/self/fd/2"):
                return
            # What is written into a file would be written over by what pip writes next.
            if stat.S_ISCHR(kind) or stat.S_ISFIFO(kind):
                with shown.open("w") as output:
                    # pip may be in the middle of a line.
                    output.write(f"\n{line}\n")
                return
        except OSError:
            # Not Linux, or the process is another user's.
            continue


class BuildLibrary(build_ext):
    """Compiles with ninja; setuptools only says where the library goes."""

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp).resolve()
        if BUILD != "auto":
            build_library(folder, library, BUILD == "cuda")
            return
        try:
            build_library(folder, library, with_cuda=True)
            return
        except CannotBuild as error:
            reason = error
        try:
            build_library(folder, library, with_cuda=False)
        except CannotBuild as error:
            tell(
                f"adalora_kernels: there is no compiled library, which costs speed on GPUs: {error}"
            )
        else:
            tell(
                f"adalora_kernels: the compiled library has no CUDA part: {reason} "
                "(ADALORA_KERNELS_BUILD=cuda brings nvcc, but for --no-build-isolation)"
            )


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
    # Asked for by front ends that make an environment for the build. In others nothing is fetched.
    if BUILD == "cuda" and not cuda_home() and sys.argv[1:] == ["egg_info"]:
        options["setup_requires"] = NVCC
setup(**options)

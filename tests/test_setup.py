"""setup.py: what it builds, with compilers that only write down how they were called."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMPILER = """#!/bin/sh
echo "$(basename "$0") $*" >> "$CALLS"
[ "$1" = --list-gpu-code ] && echo sm_80 sm_90 && exit 0
while [ $# -gt 0 ]; do
  [ "$1" = -o ] && echo > "$2"
  [ "$1" = -MF ] && echo > "$2"
  shift
done
"""


@pytest.fixture
def project(tmp_path):
    """A copy of what is built, and a folder of compilers."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "adalora_kernels", tmp_path / "adalora_kernels", ignore=ignored)
    tools = tmp_path / "cuda" / "bin"
    tools.mkdir(parents=True)
    for name in ("nvcc", "compiler"):
        (tools / name).write_text(COMPILER)
        (tools / name).chmod(0o755)
    return tmp_path


def build(project, command="build_ext", **variables):
    """(exit status, output, how the compilers were called)."""
    calls = project / "calls"
    environment = os.environ | {
        "CALLS": str(calls),
        "CXX": str(project / "cuda/bin/compiler"),
        "CUDA_HOME": str(project / "cuda"),
        "ADALORA_KERNELS_BUILD": "auto",
        **variables,
    }
    for name, value in variables.items():
        if value is None:
            del environment[name]
    arguments = [sys.executable, "setup.py", *command.split()]
    if command == "build_ext":
        arguments += ["--build-lib", "built", "--build-temp", "objects"]
    done = subprocess.run(arguments, cwd=project, env=environment, capture_output=True, text=True)
    lines = calls.read_text().splitlines() if calls.exists() else []
    return done.returncode, done.stdout + done.stderr, lines


def libraries(project):
    return [str(path.relative_to(project)) for path in project.glob("**/_C*")]


def compiled(calls, compiler):
    return {word.split("/")[-1] for c in calls if c.startswith(compiler) for word in c.split()}


def test_auto_builds_both_parts_where_there_is_nvcc(project):
    status, output, calls = build(project)
    assert status == 0, output
    assert libraries(project) == ["built/adalora_kernels/_C.abi3.so"]
    assert {"library.cpp", "launcher.cpp", "importance.cpp"} <= compiled(calls, "compiler")
    assert "importance.cu" in compiled(calls, "nvcc")
    # Of the architectures what this nvcc knows, which is no sm_100, and PTX all the same.
    (call,) = {c for c in calls if "importance.cu" in c}
    assert "code=sm_80" in call and "code=[sm_90,compute_90]" in call and "sm_100" not in call
    assert any("CPU and CUDA (8.0 9.0+PTX)" in c for c in calls)
    assert all(
        "-DTORCH_TARGET_VERSION=0x020b000000000000" in c
        for c in calls
        if " -o " in c and " -c " in c
    )


def test_auto_builds_the_cpu_part_without_nvcc(project):
    status, output, calls = build(project, CUDA_HOME="/nowhere")
    assert status == 0, output
    assert "has no CUDA part: there is no nvcc in /nowhere/bin" in output
    assert libraries(project) and not compiled(calls, "nvcc")
    assert not any("ADALORA_WITH_CUDA" in c for c in calls)
    # The launcher needs no nvcc: it opens the driver when it is first needed.
    assert "launcher.cpp" in compiled(calls, "compiler")


def test_auto_without_a_compiler_is_pure_python(project):
    status, output, _ = build(project, CXX="/nowhere/g++")
    assert status == 0, output
    assert output.count("there is no compiled library, which costs speed") == 1
    assert "on GPUs: the compiler failed" in output and not libraries(project)


def test_an_nvcc_that_knows_none_of_the_architectures_builds_no_cuda_part(project):
    nvcc = project / "cuda/bin/nvcc"
    nvcc.write_text(COMPILER.replace("sm_80 sm_90", "sm_52"))
    status, output, calls = build(project)
    assert status == 0 and libraries(project), output
    assert "knows none of 8.0, 8.6, 8.9, 9.0, 10.0, 12.0" in output
    assert not any("ADALORA_WITH_CUDA" in c for c in calls)


@pytest.mark.parametrize("hides", [True, False], ids=["pip", "others"])
def test_what_is_missing_is_said_once_also_by_a_front_end_that_hides_the_build(project, hides):
    setup = [sys.executable, "setup.py", "build_ext", "--build-lib", "built", "--build-temp", "o"]
    front_end = f"import subprocess; subprocess.run({setup}, check=True, capture_output={hides})"
    environment = os.environ | {"CXX": "/nowhere/g++", "ADALORA_KERNELS_BUILD": "auto"}
    done = subprocess.run(
        [sys.executable, "-c", front_end],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("adalora_kernels: there is no compiled library") == 1


def test_a_build_with_cuda_brings_its_nvcc_unless_one_is_named(project):
    """Of an environment that a front end makes for the build."""
    ask = "from setuptools import build_meta; print(build_meta.get_requires_for_build_wheel())"
    requires = {}
    for build_of, home in (("cuda", ""), ("cuda", "/cuda"), ("auto", "")):
        environment = os.environ | {"ADALORA_KERNELS_BUILD": build_of, "CUDA_HOME": home}
        requires[build_of, home] = subprocess.run(
            [sys.executable, "-c", ask],
            cwd=project,
            env=environment,
            capture_output=True,
            text=True,
        ).stdout
    assert "nvidia-cuda-nvcc==13.0" in requires.pop(("cuda", ""))
    assert not any("nvidia" in text for text in requires.values()), requires

    packages = project / "packages/nvidia/cu13"
    packages.parent.mkdir(parents=True)
    (project / "cuda").rename(packages)
    variables = {"CXX": str(packages / "bin/compiler"), "CUDA_HOME": None}
    variables |= {"PYTHONPATH": str(project / "packages"), "PATH": "/usr/bin:/bin"}
    status, output, calls = build(project, ADALORA_KERNELS_BUILD="cuda", **variables)
    assert status == 0, output
    assert "importance.cu" in compiled(calls, "nvcc")
    assert f"-L{packages}/lib" in next(c for c in calls if "-shared" in c)


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"ADALORA_KERNELS_BUILD": "cuda", "CUDA_HOME": "/nowhere"}, "no nvcc in /nowhere/bin"),
        ({"ADALORA_KERNELS_BUILD": "cpu", "CXX": "/nowhere/g++"}, "the compiler failed"),
        ({"ADALORA_KERNELS_BUILD": "gpu"}, "must be auto, none, cpu or cuda, got 'gpu'"),
        (
            {"ADALORA_KERNELS_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": "8.0;Hopper"},
            "TORCH_CUDA_ARCH_LIST has 'Hopper'",
        ),
    ],
    ids=["cuda", "cpu", "unknown", "architecture"],
)
def test_what_is_demanded_and_cannot_be_built_fails(project, variables, says):
    status, output, _ = build(project, **variables)
    assert status != 0 and says in output and not libraries(project)


def test_cpu_builds_no_cuda_code(project):
    status, output, calls = build(project, ADALORA_KERNELS_BUILD="cpu")
    assert status == 0 and libraries(project), output
    assert not compiled(calls, "nvcc")


def test_architectures_and_flags_are_honoured(project):
    variables = {"TORCH_CUDA_ARCH_LIST": "8.6;9.0a+PTX", "CXXFLAGS": "-g7", "LDFLAGS": "-Wl,-x"}
    status, output, calls = build(project, ADALORA_KERNELS_BUILD="cuda", MAX_JOBS="1", **variables)
    assert status == 0, output
    (call,) = {c for c in calls if "importance.cu" in c}
    assert "arch=compute_86,code=sm_86" in call
    assert "arch=compute_90a,code=[sm_90a,compute_90a]" in call and "sm_80" not in call
    assert all("-g7" in c for c in calls if c.startswith("compiler"))
    assert "-Wl,-x" in next(c for c in calls if "-shared" in c)


def test_none_makes_a_pure_wheel_and_removes_an_old_library(project):
    (project / "adalora_kernels" / "_C.abi3.so").write_text("old")
    status, output, calls = build(project, "bdist_wheel", ADALORA_KERNELS_BUILD="none")
    assert status == 0 and not calls and not libraries(project), output
    (wheel,) = (project / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")


def test_one_wheel_serves_all_pythons(project):
    status, output, _ = build(project, "bdist_wheel", ADALORA_KERNELS_BUILD="cpu")
    assert status == 0, output
    (wheel,) = (project / "dist").glob("*.whl")
    assert "-cp310-abi3-linux_" in wheel.name
    assert "adalora_kernels/_C.abi3.so" in zipfile.ZipFile(wheel).namelist()

"""Loading the compiled library, and everything working without it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_importance import Adapters, assert_bitwise

from adalora_kernels import _extension, importance, ops

ROOT = Path(__file__).parent.parent
SHOW = """if True:
    from adalora_kernels import ops
    (name,) = (i.name for i in ops.implementations("cpu") if i.op == "importance_update_")
    print(*ops.library, name, sep="|", end="|")
"""


def python(*arguments, library):
    environment = os.environ | {_extension.VARIABLE: str(library)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_without_the_library_plain_pytorch_runs():
    done = python("-c", SHOW, library="")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("None||ADALORA_KERNELS_LIBRARY is empty")
    assert done.stdout.split("|")[3:] == ["torch._foreach", ""] and not done.stderr


@pytest.mark.parametrize(
    "selected",
    [
        pytest.param("budget_is_kept or recorded or dispatched", id="some"),
        pytest.param("not ddp", id="all", marks=pytest.mark.full),
    ],
)
def test_without_the_library_the_tests_of_the_allocator_pass(selected):
    files = ("tests/test_allocator.py", "tests/test_allocator_graph.py", "tests/test_members.py")
    done = python("-m", "pytest", *files, "-k", selected, library="")
    assert done.returncode == 0, done.stdout


def test_a_library_of_this_version_has_the_launcher():
    if ops.library.path is None:
        pytest.skip(f"no library: {ops.library.why_not}")
    assert hasattr(torch.ops.adalora, "launch_forward")
    assert hasattr(torch.ops.adalora, "launch_backward")


needs_cuda_part = pytest.mark.skipif(
    "cuda" not in ops.library.device_types or torch.cuda.is_available(),
    reason="needs a library with CUDA code and no GPU that runs it",
)


@needs_cuda_part
def test_where_a_gpu_cannot_run_the_library_pytorch_does():
    """Its code for GPUs is called on CPU tensors: it has none for that device."""
    on_gpus = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    calls = []

    def update_on_a_gpu(*arguments):
        calls.append(arguments)
        torch.ops.adalora.importance_update_.default.redispatch(on_gpus, *arguments)

    shapes = [(4, 64, 40), (3, 7, 5), (0, 4, 4)]
    found = Adapters(shapes, "cpu").step(update_on_a_gpu).state()
    expected = Adapters(shapes, "cpu").step(importance.importance_update_).state()
    assert_bitwise(found, expected)
    assert len(calls) == 1


@needs_cuda_part
@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="asks for a GPU that is not there")
def test_it_is_said_why_a_gpu_cannot_run_the_library(monkeypatch):
    why = ops.library.why_not_on(torch.device("cuda:0"))
    assert why.startswith(f"the library, built for {ops.library.built_for}, cannot run on it: ")
    (row,) = (r for r in ops.implementations("cuda:0") if r.op == "importance_update_")
    assert row[1:] == ("torch._foreach", why)
    assert ops.library.why_not_on(torch.device("cpu")) is None
    for_cpus = ops.library._replace(built_for="CPU")
    assert for_cpus.why_not_on(torch.device("cuda:0")) == "the library was built for CPU only"


@pytest.mark.parametrize("content", [None, b"not a library"], ids=["missing", "broken"])
def test_a_library_that_cannot_be_loaded_is_reported_and_left_out(tmp_path, content):
    path = tmp_path / "_C.abi3.so"
    if content is not None:
        path.write_bytes(content)
    done = python("-c", SHOW, library=path)
    assert done.returncode == 0, done.stderr
    assert f"RuntimeWarning: {path} cannot be loaded" in done.stderr
    assert f"{path} cannot be loaded" in done.stdout.split("|")[2]


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler (cc)")
def test_a_library_of_older_sources_is_reported_and_left_out(tmp_path):
    source, path = tmp_path / "old.c", tmp_path / "_C.abi3.so"
    source.write_text('const char* adalora_built_for(void) { return "CPU"; }')
    subprocess.run(["cc", "-shared", "-fPIC", source, "-o", path], check=True)
    done = python("-c", SHOW, library=path)
    assert done.returncode == 0, done.stderr
    assert "RuntimeWarning" in done.stderr
    assert "undefined symbol: adalora_forget_plans" in done.stdout.split("|")[2]


def test_the_report_says_which_library_runs():
    done = python("-m", "adalora_kernels", library="")
    assert done.returncode == 0, done.stdout
    assert "compiled library: none (ADALORA_KERNELS_LIBRARY is empty)" in done.stdout
    if ops.library.path is None:
        pytest.skip(f"no library to report: {ops.library.why_not}")
    done = python("-m", "adalora_kernels", library=ops.library.path)
    assert done.returncode == 0, done.stdout
    assert f"compiled library: for {ops.library.built_for}, {ops.library.path}" in done.stdout
    assert "importance_update_     C++\n" in done.stdout

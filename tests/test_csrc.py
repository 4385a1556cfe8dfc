"""The compiled library: what it refuses, that threads don't matter, and what it needs of torch."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import test_launcher
import torch
from test_importance import LIBRARY, SHAPES, Adapters, assert_bitwise

from adalora_kernels import _extension, ops

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("update", LIBRARY[:1])
@pytest.mark.parametrize("threads", [2, 4])
def test_results_do_not_depend_on_the_number_of_threads(update, threads):
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            adapters = Adapters(SHAPES["one_huge_and_many_tiny"] + SHAPES["r12"], "cpu")
            results.append(adapters.step(update).state())
    finally:
        torch.set_num_threads(before)
    assert_bitwise(*results)


# Nothing is read or written out of bounds, whatever a caller of the raw op passes.
REFUSED = {
    "incomplete": ("params must be", {"params": lambda a: a.params[:2]}),
    "lengths": ("one length", {"grads": lambda a: a.grads[:2]}),
    "grads_shape": (r"grads\[0\]", {"grads": lambda a: [a.grads[2], *a.grads[1:]]}),
    "params_shape": (
        r"params\[1\] must be 4 x 1",
        {"params": lambda a: [a.params[0], *a.params[1:][::-1]]},
    ),
    "strided": ("contiguous", {"ipt": lambda a: [a.ipt[0].T.contiguous().T, *a.ipt[1:]]}),
    "averages": ("both alike", {"unc": lambda a: [u.double() for u in a.unc]}),
    "complex": (
        "float32, float64",
        {"params": lambda a: [p.to(torch.complex64) for p in a.params]},
    ),
    "scores": ("scores must be", {"scores": lambda a: a.scores[:3]}),
    "skipped": ("skipped must be", {"skipped": lambda a: a.skipped.int()}),
}


@pytest.mark.parametrize("update", LIBRARY)
@pytest.mark.parametrize(("says", "change"), REFUSED.values(), ids=REFUSED.keys())
def test_the_library_refuses(update, says, change):
    adapters = Adapters([(4, 9, 8)], update.device)
    for name, value in change.items():
        setattr(adapters, name, value(adapters))
    with pytest.raises(RuntimeError, match=says):
        adapters.step(update)


# The binary

# What torch 2.11 exports of the stable ABI and this library uses, or may come to use: of
# aoti_torch/c/shim.h and aoti_torch/generated/c_shim_*.h as they were before 2.10, and of
# stable/c/shim.h what is marked 2.10 or 2.11.
IN_TORCH_2_11 = re.compile(
    r"aoti_torch_(abi_version|(device_type|dtype|layout|memory_format)_\w+"
    r"|(delete|new)_tensor_(object|handle)|delete_library_object|library_init_(impl|fragment)"
    r"|library_def|empty_strided|_reinterpret_tensor"
    r"|get_(data_ptr|dim|numel|sizes?|strides?|dtype|layout|device_type|device_index)|is_contiguous"
    r"|(create|delete)_device_guard|get_current_cuda_stream"
    r"|(cpu|cuda)_(randint_low|mm|addmm)_out)"
    r"|torch_(call_dispatcher|library_impl|parallel_for|new_list_reserve_size|delete_list"
    r"|list_(size|get_item|push_back)|dtype_float8_e8m0fnu|dtype_float4_e2m1fn_x2)"
)


@pytest.mark.skipif(ops.library.path is None, reason=f"no library: {ops.library.why_not}")
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm (binutils)")
def test_the_library_needs_nothing_of_torch_that_2_11_lacks():
    command = ["nm", "-D", "--undefined-only", ops.library.path]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    needed = {line.split()[-1] for line in listing.splitlines()}
    of_torch = {name for name in needed if "torch" in name}
    assert "torch_library_impl" in of_torch
    assert {name for name in of_torch if not IN_TORCH_2_11.fullmatch(name)} == set()
    # Nor of Python, or of the unstable C++ interface.
    assert not {n for n in needed if n.startswith(("Py", "_Py")) or "c10" in n or "2at" in n}


def instrumented(folder, sanitizers):
    """The library, compiled with sanitizers."""
    flags = f"-O1 -g1 -DADALORA_CLONES= -fsanitize={sanitizers}"
    build = [sys.executable, "setup.py", "build_ext", "--build-lib", folder]
    environment = os.environ | {
        "ADALORA_KERNELS_BUILD": "cpu",
        "CXXFLAGS": flags,
        "LDFLAGS": flags,
        "CXX": "g++",
    }
    build += ["--build-temp", folder / "objects"]
    subprocess.run(build, cwd=ROOT, env=environment, check=True, capture_output=True)
    (library,) = folder.glob("*/_C*.so")
    return library


def preloaded(*names):
    """What LD_PRELOAD has to be, so that Python can load such a library."""
    commands = [["g++", f"-print-file-name={name}"] for name in names]
    done = [subprocess.run(c, capture_output=True, text=True, check=True) for c in commands]
    return " ".join(one.stdout.strip() for one in done)


SANITIZED = [
    pytest.mark.full,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
    pytest.mark.skipif(_extension.VARIABLE in os.environ, reason="already runs under a sanitizer"),
]


def sanitized(test):
    for mark in SANITIZED:
        test = mark(test)
    return test


@sanitized
def test_address_and_undefined_behaviour_sanitizers(tmp_path):
    library = instrumented(tmp_path, "address,undefined -fno-sanitize-recover=undefined")
    environment = os.environ | {
        # With the C++ runtime, so that torch's exceptions are found by the sanitizer's handler.
        "LD_PRELOAD": preloaded("libasan.so", "libstdc++.so"),
        # Python leaves much behind, and torch's own library is not instrumented.
        "ASAN_OPTIONS": "detect_leaks=0",
        _extension.VARIABLE: str(library),
    }
    names = ("test_importance.py", "test_flat_averages.py", "test_prune.py", "test_launcher.py")
    files = [__file__, *(ROOT / "tests" / name for name in names)]
    # Without the fork: up to GCC 13 this sanitizer's own locks do not survive one among threads.
    chosen = "library-cpu or test_prune or (what_triton_does and not for_all and not fork)"
    test = [sys.executable, "-m", "pytest", "-x", *files, "-k", chosen]
    done = subprocess.run(test, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    assert re.search(r"^\.+", done.stdout), "the tests ran, on this library"


@sanitized
@pytest.mark.skipif(bool(test_launcher.MISSING), reason="; ".join(test_launcher.MISSING))
def test_thread_sanitizer(tmp_path, monkeypatch):
    library = instrumented(tmp_path, "thread")
    monkeypatch.setattr(ops, "library", ops.library._replace(path=library))
    monkeypatch.setenv("LD_PRELOAD", preloaded("libtsan.so"))
    # Torch's own library and Python are not instrumented.
    monkeypatch.setenv("TSAN_OPTIONS", "ignore_noninstrumented_modules=1")
    outcomes, output = test_launcher.run(tmp_path, ["threads"])
    assert outcomes == {"threads": ""} and "ThreadSanitizer" not in output, output

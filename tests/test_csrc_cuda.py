"""csrc/cuda without a GPU: its kernels run on the CPU (cuda_emulation/), and compiled by nvcc."""

import ctypes
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import assert_as_good_as_eager

from adalora_kernels import reference

ROOT = Path(__file__).parents[1]
EMULATION = ROOT / "tests" / "cuda_emulation"
SOURCE = ROOT / "csrc" / "cuda" / "importance.cu"
TORCH_INCLUDE = Path(torch.__file__).parent / "include"
# What setup.py compiles for, with 90a in place of 90.
SHIPPED = re.search(r"^ARCHITECTURES = (.+)$", (ROOT / "setup.py").read_text(), re.MULTILINE)[1]
ARCHITECTURES = ["".join(n) for n in re.findall(r"(\d+)\.(\da?)", SHIPPED.replace("9.0", "9.0a"))]
TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
FP32, BF16, FP16, FP64 = TYPES
GUARD = 64


def _compile_for_cpu(output, *options):
    command = ["g++", "-std=c++20", "-Wno-unknown-pragmas", "-DADALORA_WITH_CUDA", *options]
    command += ["-I", EMULATION, "-isystem", TORCH_INCLUDE, "-o", output, "-x", "c++", SOURCE]
    driver = "driver.cpp" if "-shared" in options else "sanitize.cpp"
    subprocess.run([*command, EMULATION / driver], check=True, capture_output=True, text=True)
    return output


def _compile_for_gpus(output):
    command = ["nvcc", "-std=c++20", "-O3", "-Xptxas", "-v", "-fatbin", "-DADALORA_WITH_CUDA"]
    for arch in ARCHITECTURES:
        command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    command += ["-I", TORCH_INCLUDE, "-o", output, SOURCE]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output, done.stderr


@pytest.fixture(scope="module")
def builds(tmp_path_factory):
    """The library for the CPU and the code for GPUs, as futures: tests run beside nvcc."""
    folder = tmp_path_factory.mktemp("csrc_cuda")
    with ThreadPoolExecutor() as pool:
        futures = {}
        if shutil.which("g++"):
            options = ("-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC")
            futures["library"] = pool.submit(_compile_for_cpu, folder / "library", *options)
        if shutil.which("nvcc"):
            futures["gpus"] = pool.submit(_compile_for_gpus, folder / "fatbin")
        yield futures


def _pointer(tensor):
    return 0 if tensor is None else tensor.data_ptr()


def _table(rows):
    flat = [int(value) for row in rows for value in row]
    return len(rows), (ctypes.c_int64 * len(flat))(*flat)


def _type(tensor):
    return 0 if tensor is None else TYPES.index(tensor.dtype)


def _padded(t, offset=0):
    """A contiguous copy in the middle of a poisoned buffer, `offset` entries off an alignment."""
    fill = 0xA5 if t.dtype in (torch.uint8, torch.int64) else float("nan")
    buffer = torch.full((t.numel() + 2 * GUARD + offset,), fill, dtype=t.dtype)
    start = GUARD + offset
    view = buffer[start : start + t.numel()].view(t.shape)
    view.copy_(t)
    return view


def _assert_guards(t):
    buffer = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
    start = t.storage_offset()
    ends = torch.cat([buffer[:start], buffer[start + t.numel() :]])
    assert ends.isnan().all() if t.is_floating_point() else (ends == 0xA5).all()


class Emulated:
    """The op of csrc/cuda on CPU tensors, as in `reference`. It checks what is written."""

    def __init__(self, path):
        self.library = ctypes.CDLL(str(path))
        self.library.importance_update_workspace.restype = ctypes.c_int64
        self.set_device()

    def set_device(self, multiprocessors=1, shuffle=0):
        self.library.set_device(multiprocessors, shuffle)

    def launches(self):
        return self.library.take_launches()

    def _call(self, name, *arguments):
        wrapped = [ctypes.c_int64(a) if isinstance(a, int) else a for a in arguments]
        assert getattr(self.library, name)(*wrapped) == 0

    def _workspace(self, name, *arguments):
        wrapped = [ctypes.c_int64(a) if isinstance(a, int) else a for a in arguments]
        size = getattr(self.library, f"{name}_workspace")(*wrapped)
        buffer = torch.full((size + 256 + GUARD,), 0xA5, dtype=torch.uint8)
        start = -buffer.data_ptr() % 256
        workspace = buffer[start : start + size].fill_(0xFF)
        return workspace, buffer[start + size :]

    def importance_update_(
        self, params, grads, ipt, unc, scores, skipped, beta1, beta2, grad_scale=None
    ):
        rows, first = [], 0
        for n in range(0, len(params), 3):
            row = []
            for w, g, i, u in zip(params, grads, ipt, unc, strict=True):
                row.append([*map(_pointer, (w, g, i, u)), _type(w), _type(g), _type(i)])
            A, E, B = params[n : n + 3]
            sizes = [E.shape[0], A.shape[1], B.shape[0], first]
            rows.append([v for part in row[n : n + 3] for v in part] + sizes)
            first += E.shape[0]
        table = _table(rows)
        workspace, guard = self._workspace("importance_update", *table, _type(scores))
        self._call(
            "importance_update",
            *table,
            first,
            _pointer(scores),
            _type(scores),
            _pointer(skipped),
            _pointer(grad_scale),
            ctypes.c_double(beta1),
            ctypes.c_double(beta2),
            _pointer(workspace),
        )
        assert (guard == 0xA5).all()
        for t in (*ipt, *unc, scores):
            _assert_guards(t)


@pytest.fixture(scope="module")
def library(builds):
    if "library" not in builds:
        pytest.skip("needs g++")
    return Emulated(builds["library"].result())


@pytest.fixture
def emulated(library):
    yield library
    library.set_device()


@pytest.mark.parametrize(
    ("has_code", "driver", "why"),
    [
        (True, 13000, ""),
        (True, 12010, ""),
        (True, 12000, "too old for launches with 32 KB of parameters"),
        (False, 13000, "no kernel image is available"),
    ],
    ids=["served", "oldest", "old_driver", "no_code"],
)
def test_it_says_why_a_device_cannot_run_it(library, has_code, driver, why):
    library.library.why_not.restype = ctypes.c_char_p
    found = library.library.why_not(has_code, driver).decode()
    assert why in found and bool(found) == bool(why)


class Model:
    """The arguments of `importance_update_` for adapters of the given (r, in, out)."""

    def __init__(self, sizes, weight=FP32, grad=FP32, state=FP32, offset=0, missing=()):
        self.params, self.grads, self.ipt, self.unc = [], [], [], []
        for r, in_features, out_features in sizes:
            for shape in ((r, in_features), (r, 1), (out_features, r)):
                self.params.append(_padded(torch.randn(shape).to(weight), offset))
                absent = len(self.params) - 1 in missing
                self.grads.append(None if absent else _padded(torch.randn(shape).to(grad), offset))
                self.ipt.append(_padded(torch.rand(shape).to(state), offset))
                self.unc.append(_padded(torch.rand(shape).to(state), offset))
        total = sum(r for r, _, _ in sizes)
        scores = FP64 if FP64 in (weight, state) else FP32
        self.scores = _padded(torch.full((total,), torch.nan, dtype=scores))
        self.skipped = torch.zeros(1, dtype=torch.int64)

    def copy(self, dtype=None):
        """The same in memory of its own; everything in `dtype` if given."""

        def one(t):
            return t if t is None else _padded(t if dtype is None else t.to(dtype))

        twin = object.__new__(Model)
        for name in ("params", "grads", "ipt", "unc"):
            setattr(twin, name, [one(t) for t in getattr(self, name)])
        twin.scores, twin.skipped = one(self.scores), self.skipped.clone()
        return twin

    def state(self):
        return (*self.ipt, *self.unc, self.scores)

    def step(self, update, beta1=0.85, beta2=0.9, grad_scale=None):
        lists = (self.params, self.grads, self.ipt, self.unc, self.scores, self.skipped)
        update(*lists, beta1, beta2, grad_scale=grad_scale)


def _compare(model, emulated, steps=1, **options):
    """`steps` steps on the emulated GPU are as good as eager ones, against float64."""
    eager, oracle = model.copy(), model.copy(FP64)
    for _ in range(steps):
        model.step(emulated.importance_update_, **options)
        eager.step(reference.importance_update_, **options)
        oracle.step(reference.importance_update_, **options)
        for one in (model, eager, oracle):
            for g in one.grads:
                if g is not None:
                    g.mul_(-0.5)
    assert model.skipped.item() == 0
    for n, (t, e, o) in enumerate(zip(model.state(), eager.state(), oracle.state(), strict=True)):
        assert_as_good_as_eager(t, e, o, f"tensor {n}")


def _bits(tensors):
    return [t.contiguous().view(torch.uint8).clone() for t in tensors]


def _assert_same_bits(one, other):
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


# Rows of several pieces, columns of several chunks, remnants of all kinds; nothing; wide rows.
SIZES = [
    (1, 40, 24),
    (3, 37, 29),
    (12, 64, 701),
    (16, 8604, 600),
    (0, 8, 8),
    (33, 50, 301),
    (2, 8197, 4099),
    (64, 36, 141),
    (257, 4, 39),
    (5, 6, 7),
]
SMALL = [(12, 20, 30), (3, 7, 9), (16, 24, 40)]


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "one-entry-off"])
def test_importance_of_large_ranks(emulated, offset):
    _compare(Model([(300, 4, 64)], offset=offset), emulated)


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "one-entry-off"])
def test_importance_of_a_whole_model(emulated, offset):
    emulated.launches()
    _compare(Model(SIZES, offset=offset), emulated)
    assert emulated.launches() == 3


@pytest.mark.parametrize(
    ("weight", "grad", "state"),
    [
        pytest.param(BF16, BF16, FP32, id="bf16"),
        pytest.param(FP16, FP16, FP32, id="fp16"),
        pytest.param(FP32, BF16, FP32, id="fp32-weights-bf16-grads"),
        pytest.param(BF16, FP32, BF16, id="bf16-weights-and-averages"),
        pytest.param(FP32, FP32, BF16, id="bf16-averages"),
        pytest.param(FP64, FP64, FP64, id="fp64"),
    ],
)
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "one-entry-off"])
def test_importance_in_other_types(emulated, weight, grad, state, offset):
    _compare(Model(SMALL, weight, grad, state, offset), emulated)


def test_importance_of_mixed_adapters(emulated):
    models = [Model(SMALL[:1], BF16, FP16), Model(SMALL[1:2], FP64, FP64, FP64), Model(SMALL[2:])]
    mixed = models[1]
    for name in ("params", "grads", "ipt", "unc"):
        setattr(mixed, name, [t for model in models for t in getattr(model, name)])
    mixed.scores = _padded(torch.full((31,), torch.nan, dtype=FP64))
    _compare(mixed, emulated)


@pytest.mark.parametrize(
    "missing",
    [
        pytest.param((0, 4, 8), id="one-of-each"),
        pytest.param((3, 4, 5), id="an-adapter"),
        pytest.param((0, 1, 3, 4, 5, 6, 7, 8), id="all-but-one"),
    ],
)
def test_missing_gradients_leave_averages_that_count(emulated, missing):
    model = Model(SMALL, missing=missing)
    before = [t.clone() for t in model.ipt]
    _compare(model, emulated)
    for n in missing:
        assert torch.equal(model.ipt[n], before[n])


def test_no_gradients_change_nothing(emulated):
    sizes = [(0, 4, 4), (2, 3, 5)]
    model = Model(sizes, missing=(3, 4, 5))
    before = _bits(model.state())
    model.step(emulated.importance_update_)
    _assert_same_bits(_bits(model.state()), before)
    assert model.skipped.item() == 0


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan], ids=["inf", "-inf", "nan"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64], ids=["fp32", "bf16", "fp16", "fp64"])
def test_gradients_that_are_not_finite(emulated, dtype, value):
    state = FP64 if dtype == FP64 else FP32
    model = Model([(3, 7, 9), (12, 20, 30), (5, 10, 1700)], dtype, dtype, state)
    # One bad entry: the first of all, one of a lora_E, the last of an incomplete chunk.
    n, entry = {torch.inf: (0, 0), -torch.inf: (4, 7)}.get(value, (8, -1))
    model.grads[n].view(-1)[entry] = value
    before = _bits(model.state())
    model.step(emulated.importance_update_)
    model.step(emulated.importance_update_)
    _assert_same_bits(_bits(model.state()), before)
    assert model.skipped.item() == 2


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan], ids=["inf", "-inf", "nan"])
def test_a_scale_that_is_not_finite(emulated, value):
    model = Model(SMALL)
    before = _bits(model.state())
    model.step(emulated.importance_update_, grad_scale=torch.tensor([value]))
    _assert_same_bits(_bits(model.state()), before)
    assert model.skipped.item() == 1


def test_products_that_are_not_finite(emulated):
    """inf * 0 counts as 0, inf as the largest finite number."""
    model = Model(SMALL)
    for n in (0, 1, 2):
        model.params[n].view(-1)[0] = torch.inf
        model.grads[n].view(-1)[0] = 0.0
        model.params[n].view(-1)[1] = torch.inf
        model.params[n].view(-1)[2] = torch.nan
    eager = model.copy()
    model.step(emulated.importance_update_)
    eager.step(reference.importance_update_)
    for t, e in zip(model.state(), eager.state(), strict=True):
        torch.testing.assert_close(t, e, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("beta1", "beta2"), [(0.85, 0.85), (0.0, 0.3), (0.999, 0.0)], ids=["usual", "small", "ends"]
)
def test_steps_in_sequence(emulated, beta1, beta2):
    scale = torch.tensor([1 / 1024])
    _compare(Model(SMALL), emulated, steps=3, beta1=beta1, beta2=beta2, grad_scale=scale)


def test_importance_does_not_depend_on_the_device(emulated):
    results = []
    for multiprocessors, shuffle in ((1, 0), (3, 0), (20, 7)):
        torch.manual_seed(1)
        model = Model([(16, 8604, 600), (12, 30, 50), (33, 20, 260)], missing=(4,))
        emulated.set_device(multiprocessors, shuffle)
        model.step(emulated.importance_update_)
        results.append(_bits(model.state()))
    _assert_same_bits(results[0], results[1])
    _assert_same_bits(results[0], results[2])


def test_more_adapters_than_fit_into_a_launch(emulated):
    # Those without triplets take their place in a table all the same.
    model = Model([(int(n % 5 == 4), 2, 3) for n in range(350)])
    emulated.launches()
    _compare(model, emulated)
    assert emulated.launches() > 3
    model.grads[-1][-1, -1] = torch.nan
    before = _bits(model.state())
    model.step(emulated.importance_update_)
    _assert_same_bits(_bits(model.state()), before)
    assert model.skipped.item() == 1


SANITIZERS = {
    "address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "thread": ("-fsanitize=thread",),
}


@pytest.mark.full
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("options", SANITIZERS.values(), ids=SANITIZERS.keys())
def test_sanitizers_find_nothing(tmp_path, options):
    # Address space layouts that this thread sanitizer doesn't know come with newer kernels.
    command = ["setarch", "-R"] if shutil.which("setarch") else []
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    command.append(_compile_for_cpu(tmp_path / "sanitized", *options))
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def gpu_code(builds):
    """(path, what ptxas said) of the code for GPUs."""
    if "gpus" not in builds:
        pytest.skip("needs nvcc")
    return builds["gpus"].result()


def test_registers(gpu_code):
    _, report = gpu_code
    found = re.findall(
        r"Compiling entry function '(\w+)' for 'sm_(\w+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers",
        report,
        re.DOTALL,
    )
    assert len(found) == 6 * len(ARCHITECTURES), report
    for kernel, arch, stack, stores, loads, registers in found:
        print(f"sm_{arch} {registers:>4} {kernel}")
        assert stack == stores == loads == "0", (kernel, arch)


def _cuobjdump():
    try:
        import triton
    except ImportError:
        return shutil.which("cuobjdump")
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return bundled if bundled.exists() else shutil.which("cuobjdump")


def test_update_keeps_eight_wide_loads_in_flight(gpu_code):
    binary, _ = gpu_code
    cuobjdump = _cuobjdump()
    if cuobjdump is None:
        pytest.skip("needs cuobjdump, which comes with triton or the CUDA toolkit")
    done = subprocess.run([cuobjdump, "-sass", binary], capture_output=True, text=True, check=True)
    kernels = re.findall(r"Function : (\w*update\w*)(.*?)(?=Function :|\Z)", done.stdout, re.DOTALL)
    floats = [code for name, code in kernels if "updateIf" in name]
    assert len(floats) == len(ARCHITECTURES)
    for code in floats:
        # Averages of two vectors, their weights, their gradients: no result is awaited between.
        between_stores = re.split(r"\bSTG\.|\bFFMA\b", code)
        assert max(len(re.findall(r"LDG\.E\S*\.128", part)) for part in between_stores) == 8

"""The fake GPU: what is launched over it is seen, in a fresh process only."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import bench_host, fake_gpu, harness, host_layers
from benchmarks.host_layers import APPLIED, FORWARD, LAYER, LORA, Host

ROOT = Path(__file__).resolve().parent.parent
CPU = harness.Context(torch.device("cpu"), timed=False)
# These tests may run in the interpreter, but not what they start.
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
with pytest.MonkeyPatch.context() as patch:
    patch.setattr(os, "environ", ENVIRONMENT)
    WHY_NOT = fake_gpu.why_not()
needs_it = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
LAYER_AND_X = """
import json
from benchmarks import fake_gpu
fake_gpu.install()
import torch
import adalora_kernels
base = torch.nn.Linear(64, 64, bias=False, dtype=torch.bfloat16).requires_grad_(False)
layer = adalora_kernels.SVDLinear.from_linear(base, 8, adapter_dtype=torch.float32)
x = torch.randn(65, 64, dtype=torch.bfloat16, requires_grad=True)
"""


def in_a_fresh_process(code):
    """What the code prints as JSON at its end, over the fake GPU."""
    command = [sys.executable, "-c", LAYER_AND_X + code]
    options = {"cwd": ROOT, "env": ENVIRONMENT, "capture_output": True, "text": True}
    done = subprocess.run(command, timeout=300, **options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@needs_it
def test_launches_are_recorded_with_their_parameters_and_tensor_maps():
    code = """
layer(x).sum().backward()
with fake_gpu.recorded() as launches:
    y = layer(x)
maps = [fake_gpu.tensor_map(p) for p in launches[1].parameters if len(p) == 128]
values = [int.from_bytes(p, "little") for p in launches[0].parameters]
print(json.dumps({
    "names": [launch.name for launch in launches],
    "functions": len({launch.function for launch in launches}),
    "threads": launches[0].block[0],
    "reads": layer.lora_A.data_ptr() in values,
    "maps": [[m.sizes, m.strides] for m in maps if m.address in (x.data_ptr(), y.data_ptr())],
    "counts": fake_gpu.counts(),
}))
"""
    found = in_a_fresh_process(code)
    assert found["names"] == ["_split_kernel", "_gemm_kernel"] and found["functions"] == 2
    assert found["threads"] % 32 == 0 and found["reads"]
    assert found["maps"] == [[[64, 65], [128]]] * 2
    assert found["counts"][:2] == [8, 0]


@needs_it
def test_the_driver_is_as_strict_as_a_real_one():
    code = """
import ctypes, struct
layer(x)
with fake_gpu.recorded() as launches:
    layer(x)
lib, function = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p(launches[0].function)
none = ctypes.c_void_p()
def launch(shared=0):
    config = struct.pack("<7I4xQQI4x", *[1] * 6, shared, 0, 0, 0)
    return lib.cuLaunchKernelEx(config, function, none, none)
small = ctypes.create_string_buffer(192)
fake_gpu.set_device(1)
found = [launch(), launch(240_000)]
lib.cuCtxSetCurrent(none)
print(json.dumps([*found, launch(), lib.cuTensorMapEncodeTiled(small, 0, 6), fake_gpu.device()]))
"""
    assert in_a_fresh_process(code) == [0, 1, 201, 1, 1]


def test_it_is_refused_where_it_would_change_nothing(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if WHY_NOT is None:
        with pytest.raises(RuntimeError, match=r"in a fresh process only: .*torch .*before it"):
            fake_gpu.install()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="does not work under TRITON_INTERPRET=1"):
        fake_gpu.install()


@needs_it
def test_a_layer_that_launches_more_than_it_should_is_not_timed():
    code = """
from benchmarks import bench_host, host_layers
case = bench_host.cases(bench_host.Context(torch.device("cpu")))[0]
make = host_layers.make
def wrong(host, name, device):
    made = make(host, name, device)
    twice = lambda x: made.forward(x) + made.forward(x).detach()
    return made._replace(forward=twice) if name == "SVDLinear" else made
host_layers.make = wrong
outcome = bench_host.measure(case, bench_host.Context(torch.device("cpu"), timed=False))
launches = {r["provider"]: r["value"] for r in outcome.rows if r["measure"] == "launches"}
print(json.dumps([outcome.wrong, launches]))
"""
    wrong, launches = in_a_fresh_process(code)
    assert wrong.keys() == {LAYER} and wrong[LAYER].startswith("ArithmeticError")
    assert launches[APPLIED] == 2


@pytest.mark.parametrize("name", [LAYER, LORA])
def test_a_wrong_layer_on_a_cpu_is_not_timed(name, monkeypatch):
    make = host_layers.make

    def wrong(host, one, device):
        made = make(host, one, device)
        right = made.forward
        return made._replace(forward=lambda x: right(x) * 1.05) if one == name else made

    case = bench_host._case(Host(host_layers.CPU, FORWARD, 0.0, 4, 32))
    monkeypatch.setattr(host_layers, "make", wrong)
    assert bench_host.measure(case, CPU).wrong.keys() == {name}


def test_without_a_compiler_it_is_skipped_with_a_reason(monkeypatch):
    monkeypatch.setattr(fake_gpu.shutil, "which", lambda name: None)
    with pytest.raises(pytest.skip.Exception, match="needs a C compiler"):
        bench_host.measure(bench_host.cases(CPU)[0], CPU)

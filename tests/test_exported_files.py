"""Files of torch.jit.trace, torch.export and ONNX: they run where this package is not installed.

Plain PEFT stands beside our models.
"""

import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

from adalora_kernels import SVDLinear

LOAD = """
import sys
sys.modules["adalora_kernels"] = None  # As if it were not installed.
import torch

folder = sys.argv[1]
x, expected = torch.load(f"{folder}/case.pt")
programs = [torch.jit.load(f"{folder}/traced.pt")]
programs += [torch.export.load(f"{folder}/{name}.pt2").module() for name in ("strict", "loose")]
for program in programs:
    torch.testing.assert_close(program(x), expected)
"""


class Own(nn.Module):
    """A model of SVDLinear."""

    def __init__(self, **options):
        super().__init__()
        self.a, self.b = SVDLinear(8, 16, r=4, **options), SVDLinear(16, 2, r=3, **options)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


class Base(nn.Module):
    """What PEFT adapts."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 2)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


def model(kind, training=False):
    """A model of one of the KINDS, with an adapter that is not zero."""
    if kind in ("plain_peft", "peft"):
        peft = pytest.importorskip("peft")
        from adalora_kernels.peft import apply

        config = peft.AdaLoraConfig(
            **{"init_r": 4, "target_r": 2, "total_step": 10, "lora_dropout": 0.25},
            target_modules=["a", "b"],
        )
        wrapped = peft.get_peft_model(Base(), config)
        if kind == "peft":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                apply(wrapped)
        net = wrapped.base_model.model
    else:
        net = Own(lora_dropout=0.25, merge_weights=kind == "merged")
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "lora_E" in name:
                p.normal_()
    return net.train(training)


KINDS = ("plain_peft", "peft", "unmerged", "merged")


def own_ops(program):
    return {str(n.target) for n in program.graph.nodes if "adalora" in str(n.target)}


@pytest.mark.parametrize("kind", KINDS)
def test_files_run_without_this_package(kind, tmp_path):
    net, x = model(kind), torch.randn(4, 8)
    torch.save((x, net(x).detach()), tmp_path / "case.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(net, x)
    torch.testing.assert_close(traced(torch.ones(7, 8)), net(torch.ones(7, 8)))
    torch.jit.save(traced, tmp_path / "traced.pt")
    for name, strict in (("strict", True), ("loose", False)):
        program = torch.export.export(net, (x,), strict=strict)
        assert not own_ops(program)
        torch.export.save(program, tmp_path / f"{name}.pt2")
    command = [sys.executable, "-c", LOAD, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "loose"])
@pytest.mark.parametrize("kind", KINDS)
def test_programs_take_any_number_of_rows(kind, strict):
    net, x = model(kind), torch.randn(4, 3, 8)
    rows = {0: torch.export.Dim("rows", min=2), 1: torch.export.Dim("columns", min=2)}
    program = torch.export.export(net, (x,), dynamic_shapes=(rows,), strict=strict)
    decomposed = program.run_decompositions()
    assert not own_ops(decomposed)
    for shape in ((4, 3, 8), (9, 2, 8)):
        given = torch.randn(shape)
        torch.testing.assert_close(program.module()(given), net(given))
        torch.testing.assert_close(decomposed.module()(given), net(given))


@pytest.mark.parametrize("kind", KINDS)
def test_a_program_in_training_mode_drops_as_torch_does(kind):
    program = torch.export.export(model(kind, training=True), (torch.randn(4, 8),))
    found = [str(n.target) for n in program.graph.nodes]
    assert sum("dropout" in op for op in found) == 2 and not own_ops(program)


def test_a_trace_of_three_dimensions_and_of_autocast():
    net, x = model("unmerged"), torch.randn(2, 3, 8)
    torch.testing.assert_close(torch.jit.trace(net, x)(x), net(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = net(x)
        traced = torch.jit.trace(net, x, check_trace=False)
        torch.testing.assert_close(traced(x), expected)


@pytest.mark.parametrize("kind", [*KINDS[:3], pytest.param("merged", marks=pytest.mark.full)])
def test_onnx(kind, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    net, x = model(kind), torch.randn(4, 8)
    file = str(tmp_path / "model.onnx")
    shapes = ({0: torch.export.Dim("rows")},)
    torch.onnx.export(net, (x,), file, dynamo=True, dynamic_shapes=shapes, verbose=False)
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for rows in (4, 9):
        given = torch.randn(rows, 8)
        (y,) = session.run(None, {session.get_inputs()[0].name: given.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), net(given))

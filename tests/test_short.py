"""The short way of a layer's call: who goes it, and that it gives what the ops give."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import short_runs
import torch
import torch.nn.functional as F
from layer_cases import random_case
from test_fake_gpu import ENVIRONMENT, needs_it

from adalora_kernels import cpu, launching, ops, svd_delta, svd_linear

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("scenario", short_runs.SCENARIOS.values(), ids=short_runs.SCENARIOS.keys())
def test_on_the_cpu(scenario):
    scenario()


@pytest.fixture(scope="module")
def over_the_fake_gpu(tmp_path_factory):
    """What each scenario raised in a fresh process that has the fake GPU, and what it printed."""
    file = tmp_path_factory.mktemp("short") / "outcomes.json"
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), ENVIRONMENT.get("PYTHONPATH", "")])
    environment = ENVIRONMENT | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "tests" / "short_runs.py", file]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    outcomes = json.loads(file.read_text()) if file.exists() else {}
    return outcomes, (done.stdout + done.stderr)[-4000:]


@needs_it
@pytest.mark.skipif(
    launching.launch_forward is None, reason="needs the compiled library's launcher"
)
@pytest.mark.parametrize("scenario", [*short_runs.SCENARIOS, *short_runs.OVER_THE_FAKE_GPU])
def test_over_the_fake_gpu(over_the_fake_gpu, scenario):
    outcomes, printed = over_the_fake_gpu
    assert outcomes.get(scenario, printed) == ""


WHY_NOT = """if True:
    import torch
    from adalora_kernels import launching, ops
    launching.why_no_triton = lambda device: None
    print({row[1:] for row in ops.implementations("cuda") if row.op.startswith("svd_")})
"""


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("ADALORA_KERNELS_LIBRARY", "", "ADALORA_KERNELS_LIBRARY is empty"),
        ("TRITON_INTERPRET", "1", "TRITON_INTERPRET=1 interprets them"),
    ],
    ids=["no_library", "interpreter"],
)
def test_why_the_library_does_not_launch(variable, value, says):
    environment = ENVIRONMENT | {variable: value}
    command = [sys.executable, "-c", WHY_NOT]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == str({("triton, launched by Triton", says)}), done.stderr


CASES = {
    "plain": {},
    "one_row": {"lead": (1,)},
    "x_1d": {"lead": ()},
    "x_3d": {"lead": (2, 5)},
    "no_rows": {"lead": (2, 0)},
    "many_rows": {"lead": (50,)},
    "fours": {"in_features": 16},
    "masked": {"mask": "mixed"},
    "float32_over_bf16": {"dtype": torch.bfloat16, "adapter_dtype": torch.float32},
    "bf16_over_float32": {"dtype": torch.float32, "adapter_dtype": torch.bfloat16},
    "float64": {"dtype": torch.float64},
    "large_mask": {"lead": (130,), "in_features": 128},
}


@pytest.mark.parametrize("dropout_p", [0.0, 0.25], ids=["", "dropout"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("op", short_runs.OPS)
def test_it_gives_what_the_op_gives(op, case, dropout_p):
    c = random_case(**case)
    leaves = [c[n].requires_grad_() for n in ("x", "lora_A", "lora_E", "lora_B")]
    x, *factors = leaves
    base = F.linear(x.detach(), c["weight"], c["bias"]).requires_grad_()
    results = []
    for way in ("short", "op"):
        torch.manual_seed(3)
        seed = ops.dropout_seed(x) if dropout_p and way == "op" else None
        rest = (c["mask"], 1.5, dropout_p, seed)
        options = {"mask": c["mask"], "scaling": 1.5, "dropout_p": dropout_p}
        if op == "svd_linear" and way == "short":
            y = svd_linear(x, c["weight"], *factors, bias=c["bias"], **options)
        elif op == "svd_linear":
            y, _ = torch.ops.adalora.svd_linear(x, c["weight"], c["bias"], *factors, *rest)
        elif way == "short":
            y = svd_delta(base, x, *factors, **options)
        else:
            y, _ = torch.ops.adalora.svd_delta(base, x, *factors, *rest)
        assert short_runs.is_short(y, op) == (way == "short")
        wanted = leaves if op == "svd_linear" else [*leaves, base]
        g = torch.randn(y.shape, generator=torch.Generator().manual_seed(4)).to(y.dtype)
        results.append((y.detach(), *torch.autograd.grad(y, wanted, g)))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other) and one.dtype == other.dtype
        assert one.stride() == other.stride()


def test_a_small_mask_of_dropout_is_kept_and_a_large_one_is_not():
    """It is the op's either way: the backward after another draw has the same one."""
    assert cpu.small_mask(torch.empty(64, 256), 0.5, torch.tensor([3])).shape == (64, 256)
    assert cpu.small_mask(torch.empty(65, 256), 0.5, torch.tensor([3])) is None
    mask = cpu.small_mask(torch.empty(2, 3, 5), 0.5, torch.tensor([3]))
    assert torch.equal(mask, cpu.dropout_mask(torch.empty(6, 5), 0.5, torch.tensor([3])))


@pytest.mark.parametrize("columns", [4, 5, 6, 7, 8])
def test_masks_of_dropout_do_not_depend_on_how_the_bits_lie(columns):
    seed = torch.tensor([3])
    flat = cpu.dropout_mask(torch.empty(12 * columns), 0.5, seed)
    assert torch.equal(cpu.dropout_mask(torch.empty(12, columns), 0.5, seed).flatten(), flat)
    assert torch.equal(cpu.dropout_mask(torch.empty(columns, 12).T, 0.5, seed).flatten(), flat)

"""The Triton kernels, through the launchers and the functional API.

On a GPU if there is one (`pytest -m gpu`), else in triton's interpreter, in which bfloat16 is
rounded towards zero, so that there results in bfloat16 are not held to the error rule.
"""

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import assert_as_good_as_eager
from layer_cases import CASES, check_against_float64, random_case
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpreterBuilder

from adalora_kernels import reference, svd_delta, svd_linear
from adalora_kernels.kernels import svd_linear as kernels
from adalora_kernels.kernels.launch import INTERPRETED, dry_run
from adalora_kernels.kernels.svd_linear import plans

pytestmark = pytest.mark.gpu

DEVICE = "cpu" if INTERPRETED else "cuda"
needs_gpu = pytest.mark.skipif(INTERPRETED, reason="needs an NVIDIA GPU")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = {
    "fp32": (FP32, FP32),
    "fp16": (FP16, FP16),
    "fp16_fp32_adapter": (FP16, FP32),
    "bf16": (BF16, BF16),
    "bf16_fp32_adapter": (BF16, FP32),
    "fp32_bf16_adapter": (FP32, BF16),
}


def check(case, impl="triton", **options):
    """The error rule. Of few numbers it is a lottery: at least sixteen of each result are drawn."""
    dtype, draws = case.get("dtype", FP32), max(2, -(-16 // case.get("r", 3)))
    if INTERPRETED and dtype == BF16:
        if case.get("adapter_dtype", dtype) == BF16:
            pytest.skip("the interpreter truncates bfloat16: needs an NVIDIA GPU")
        options["skip"] = ("y", "x", "bias")
    tensors = [random_case(**case, device=DEVICE) for _ in range(draws)]
    check_against_float64(*tensors, impl=impl, **options)


def tiered(quick, *axes):
    """Multiply dictionaries of cases out; those whose ids are not in `quick` are `full`."""
    parameters = []
    for chosen in itertools.product(*(axis.items() for axis in axes)):
        name = "-".join(filter(None, (key for key, _ in chosen)))
        marks = () if name in quick else pytest.mark.full
        parameters.append(pytest.param(*(value for _, value in chosen), id=name, marks=marks))
    assert set(quick) <= {parameter.id for parameter in parameters}
    return parameters


DROPOUT = {"": 0.0, "dropout": 0.25}
SHAPES = {
    "aligned": {"lead": (40,), "in_features": 64, "out_features": 48, "r": 8},
    "many_tiles": {"lead": (130,), "in_features": 160, "out_features": 288, "r": 12},
    "split_k": {"lead": (3, 30), "in_features": 1040, "out_features": 80, "r": 4},
    "unaligned": {"lead": (70,), "in_features": 77, "out_features": 101, "r": 5},
    "k_of_8": {"lead": (33,), "in_features": 24, "out_features": 40, "r": 3},
}
EXTREMES = {
    "many_row_blocks": {"lead": (1100,), "in_features": 16, "out_features": 16, "r": 2},
    "one_entry": {"lead": (1,), "in_features": 1, "out_features": 1, "r": 1},
    "one_column": {"lead": (5,), "in_features": 1, "out_features": 6, "r": 2},
    "rank_above_sizes": {"lead": (5,), "in_features": 7, "out_features": 6, "r": 20},
}


QUICK_CASES = [
    *("rank_1", "rank_33", "one_row-dropout", "x_1d", "x_4d-dropout", "odd", "no_bias", "no_rows"),
    *("mask_mixed-dropout", "mask_all_false", "fp32_adapter_fp16_base", "x_3d_no_rows-dropout"),
    *("many_row_blocks", "one_entry", "one_entry-dropout", "one_column", "rank_above_sizes"),
]


@pytest.mark.parametrize(("case", "dropout_p"), tiered(QUICK_CASES, CASES | EXTREMES, DROPOUT))
def test_error_against_float64(case, dropout_p):
    check(case, dropout_p=dropout_p)


QUICK_SHAPES = [
    *("aligned-fp32", "aligned-bf16", "aligned-fp32_bf16_adapter", "split_k-fp16"),
    *("many_tiles-fp16_fp32_adapter-dropout", "k_of_8-fp16-dropout"),
    *("unaligned-bf16_fp32_adapter-dropout", "unaligned-fp16_fp32_adapter"),
]


@pytest.mark.parametrize(
    ("shape", "dtypes", "dropout_p"), tiered(QUICK_SHAPES, SHAPES, DTYPES, DROPOUT)
)
def test_shapes_and_types(shape, dtypes, dropout_p):
    dtype, adapter_dtype = dtypes
    case = {**shape, "dtype": dtype, "adapter_dtype": adapter_dtype, "mask": "mixed"}
    check(case, dropout_p=dropout_p)


QUICK_PATHS = [
    *("fused-many_tiles", "two_pass-many_tiles-dropout"),
    *("two_pass-unaligned", "cublas-many_tiles", "cublas-unaligned-dropout"),
]


def one_after_the_other(self, a, b, d, *_):
    """Multiply matrices in the interpreter as a GPU without tensor cores does, by FMAs."""
    total, pairs = d.data, zip(a.data.T.astype(float), b.data.astype(float), strict=True)
    for column, row in pairs:
        total = (total + np.outer(column, row)).astype(np.float32)
    return type(d)(total, d.dtype.scalar)


@pytest.mark.skipif(not INTERPRETED, reason="a GPU does so anyway, in test_shapes_and_types")
@pytest.mark.parametrize("dropout_p", DROPOUT.values(), ids=DROPOUT.keys())
def test_float32_where_products_are_added_one_after_the_other(monkeypatch, dropout_p):
    monkeypatch.setattr(InterpreterBuilder, "create_dot", one_after_the_other)
    # Over many columns of g, and with a large low-rank term.
    case = {"lead": (30,), "in_features": 40, "out_features": 1000, "r": 32}
    check(case, dropout_p=dropout_p, impl="two_pass")


PATHS = {path: path for path in plans.PATHS}
SOME_SHAPES = {name: SHAPES[name] for name in ("aligned", "many_tiles", "unaligned")}


@pytest.mark.parametrize(
    ("path", "shape", "dropout_p"), tiered(QUICK_PATHS, PATHS, SOME_SHAPES, DROPOUT)
)
def test_every_path(path, shape, dropout_p):
    adapter_dtype = FP16 if path == "fused" else FP32
    case = {**shape, "dtype": FP16, "adapter_dtype": adapter_dtype, "mask": "mixed"}
    check(case, impl=path, dropout_p=dropout_p)


FUSED = {
    # Types; rows, in_features, out_features, and the rank.
    "one_tile": ((FP16, FP16), (65, 64, 48, 1)),
    "many_tiles": ((FP16, FP16), (700, 208, 528, 12)),
    "more_row_blocks_than_programs": ((FP16, FP16), (1400, 64, 32, 16)),
    "float32_adapters": ((BF16, FP32), (600, 192, 272, 5)),
}


@pytest.mark.parametrize(("types", "sizes"), FUSED.values(), ids=FUSED.keys())
def test_h_that_is_made_within_the_gemm(types, sizes):
    dtype, adapter_dtype = types
    lead, K, N, r = sizes
    shape = {"lead": (lead,), "in_features": K, "out_features": N, "r": r}
    case = random_case(
        **shape, dtype=dtype, adapter_dtype=adapter_dtype, mask="mixed", device=DEVICE
    )
    with dry_run() as launched:
        kernels.svd_linear_fwd(*arguments(case), "fused")
    assert [item.kernel for item in launched] == ["split", "gemm"]
    for _ in range(1 if INTERPRETED else 20):
        y, h = kernels.svd_linear_fwd(*arguments(case), "fused")
        exact = reference.svd_linear(*arguments({k: wide(t) for k, t in case.items()}))
        eager = reference.svd_linear(*arguments(case))
        assert_as_good_as_eager(h, eager[1], exact[1])
        if not (INTERPRETED and dtype == BF16):
            assert_as_good_as_eager(y, eager[0], exact[0])


@pytest.mark.parametrize("why", ["few rows", "many ranks", "float16 in parts", "dropout", "sm_80"])
def test_where_h_cannot_be_made_within_the_gemm(why):
    sizes = {"lead": (64 if why == "few rows" else 65,), "in_features": 64, "out_features": 48}
    case = random_case(
        **sizes,
        r=17 if why == "many ranks" else 8,
        dtype=FP16,
        adapter_dtype=FP32 if why == "float16 in parts" else FP16,
        device=DEVICE,
    )
    dropout = (0.5, torch.tensor([5], device=DEVICE)) if why == "dropout" else ()
    device = plans.Device("test", "sm_80" if why == "sm_80" else "sm_90", 4)
    with dry_run() as launched:
        kernels.svd_linear_fwd(*arguments(case, *dropout), "fused", device)
    assert [item.kernel for item in launched] == ["down", "gemm"]


FAMILIES = {family: family for family in plans.GEMM}


@pytest.mark.parametrize(
    ("family", "shape"),
    tiered(
        ["sm_80-aligned", "sm_86-unaligned", "sm_90-aligned", "sm_100-many_tiles"],
        FAMILIES,
        SOME_SHAPES,
    ),
)
def test_configurations_of_other_gpus(monkeypatch, family, shape):
    monkeypatch.setattr(plans, "device_of", lambda _: plans.Device("test", family, 6))
    if not INTERPRETED and family != plans.device_of(torch.device("cuda")).family:
        pytest.skip(f"needs a GPU of the class {family}, or the interpreter")
    check({**shape, "dtype": FP16}, dropout_p=0.25)


@pytest.mark.parametrize("blocks", plans.GEMM["sm_90"], ids=str)
def test_configurations_of_the_gemm(blocks):
    case = random_case(lead=(300,), in_features=192, out_features=528, dtype=FP16, device=DEVICE)
    plan = plans.Plan("two_pass", blocks)
    y, _ = forward(case, plan, sms=3)
    exact, _ = reference.svd_linear(*arguments({k: wide(t) for k, t in case.items()}))
    eager, _ = reference.svd_linear(*arguments(case))
    assert_as_good_as_eager(y, eager, exact)


def wide(t):
    return t.double() if t is not None and t.is_floating_point() else t


def arguments(case, dropout_p=0.0, seed=None):
    names = ("x", "weight", "bias", "lora_A", "lora_E", "lora_B", "mask")
    return (*(case[name] for name in names), 1.5, dropout_p, seed)


def forward(case, plan, sms):
    device = plans.device_of(case["x"].device)._replace(sms=sms)
    return kernels.svd_linear_fwd(*arguments(case), plan, device)


RANKS = {str(r): r for r in (2, 31, 100, 128, 256)}


@pytest.mark.parametrize(
    ("r", "path", "dropout_p"),
    tiered(["31-auto", "256-auto", "256-cublas-dropout"], RANKS, PATHS | {"auto": "auto"}, DROPOUT),
)
def test_ranks(r, path, dropout_p):
    sizes = {"lead": (20,), "in_features": 64, "out_features": 48}
    check({**sizes, "r": r}, impl=path, dropout_p=dropout_p)


@pytest.mark.parametrize("dropout_p", [0.0, 0.25], ids=["", "dropout"])
def test_non_contiguous_inputs(dropout_p):
    draws = []
    for _ in range(2):
        case = random_case(lead=(20, 6), in_features=32, out_features=48, device=DEVICE)
        case["x"] = case["x"].transpose(0, 1)
        case["weight"] = case["weight"].T.contiguous().T
        for name in ("lora_A", "lora_B"):
            case[name] = case[name].T.contiguous().T
        draws.append(case)
    check_against_float64(*draws, dropout_p=dropout_p, impl="triton")


def test_strided_columns():
    case = random_case(lead=(20,), in_features=64, out_features=48, device=DEVICE)
    case["x"] = case["x"].repeat_interleave(2, dim=1)[:, ::2]
    check_against_float64(case, impl="triton")


@pytest.mark.parametrize("path", ["two_pass", "cublas", "svd_delta"])
def test_factors_vectors_and_h_that_are_not_contiguous(path):
    options = {"mask": "mixed", "dtype": FP16, "adapter_dtype": FP32, "device": DEVICE}
    case = random_case(**SHAPES["aligned"], **options)
    seed, g = torch.tensor([5], device=DEVICE), torch.randn(40, 48).to(FP16).to(DEVICE)

    def apart(t):
        """The same values, with others between."""
        t = torch.stack((t, torch.full_like(t, 3)), dim=-1)[..., 0]
        assert not t.is_contiguous() or t.numel() == 1
        return t

    def run(change):
        x, weight, bias, *factors, mask, scaling, p, s = arguments(case, 0.25, seed)
        bias, mask, s, *factors = map(change, (bias, mask, s, *factors))
        if path == "svd_delta":
            y, h = kernels.svd_delta_fwd(g, x, *factors, mask, scaling, p, s)
            backward = (g, x, None, *factors, mask, change(h), scaling, p, s, True)
        else:
            y, h = kernels.svd_linear_fwd(x, weight, bias, *factors, mask, scaling, p, s, path)
            backward = (g, x, weight, *factors, mask, change(h), scaling, p, s, True, path)
        return y, h, *kernels.svd_linear_bwd(*backward)

    assert all(map(torch.equal, run(lambda t: t), run(apart)))


@pytest.mark.parametrize("path", ["two_pass", "cublas"])
def test_expanded_inputs_and_gradients(path):
    options = {"in_features": 32, "out_features": 48, "device": DEVICE}
    case = random_case(lead=(1, 5), **options)
    case["x"] = case["x"].expand(4, 5, 32)
    check_against_float64(case, impl=path)
    draws = [random_case(lead=(4, 5), **options) for _ in range(2)]
    check_against_float64(*draws, impl=path, grad_of=lambda g: g[:1, :1].expand_as(g))


@pytest.mark.parametrize("adapter_dtype", [FP16, FP32], ids=["fp16_adapter", "fp32_adapter"])
@pytest.mark.parametrize("dtypes", [(FP16, FP32), (FP32, FP16)], ids=["fp32_base", "fp16_base"])
def test_opaque_base_of_another_type(dtypes, adapter_dtype):
    dtype, base_dtype = dtypes
    sizes = {"lead": (40,), "in_features": 64, "out_features": 48, "r": 16}
    case = random_case(**sizes, dtype=dtype, adapter_dtype=adapter_dtype, device=DEVICE)
    x, _, _, *factors, mask, scaling, _, _ = arguments(case)
    base, g = torch.randn(2, 40, 48).to(DEVICE, base_dtype)

    def by_autograd(to):
        leaves = [to(t.detach()).requires_grad_() for t in (x, *factors)]
        y, _ = reference.svd_delta(to(base), *leaves, mask, scaling, 0.0, None)
        return y.detach(), *torch.autograd.grad(y, leaves, to(g))

    y, h = kernels.svd_delta_fwd(base, x, *factors, mask, scaling, 0.0, None)
    backward = (g, x, None, *factors, mask, h, scaling, 0.0, None, True)
    actual = (y, *kernels.svd_linear_bwd(*backward))
    eager, exact = by_autograd(lambda t: t), by_autograd(wide)
    for name, *results in zip(("y", "dx", "dA", "dE", "dB"), actual, eager, exact, strict=True):
        assert_as_good_as_eager(*results, name)


def forward_and_backward(case, g, path="auto", dropout_p=0.0, need_dx=True):
    """Return (y, h, dx, dA, dE, dB) straight from the launchers."""
    seed = torch.tensor([5], device=DEVICE) if dropout_p else None
    x, weight, _, *rest = arguments(case)
    y, h = kernels.svd_linear_fwd(*arguments(case, dropout_p, seed), path)
    options = (1.5, dropout_p, seed, need_dx, path)
    return y, h, *kernels.svd_linear_bwd(g, x, weight, *rest[:4], h, *options)


@pytest.mark.parametrize("path", plans.PATHS)
def test_repeated_runs_are_bitwise_equal(path):
    case = random_case(lead=(60,), in_features=528, out_features=272, device=DEVICE)
    g = torch.randn(60, 272).to(DEVICE)
    runs = [forward_and_backward(case, g, path, dropout_p=0.25) for _ in range(2)]
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("in_features", [64, 24, 21])
def test_dropout_is_that_of_the_reference(in_features):
    # A and B are the identity, so that the low-rank term is dropout(x) itself; of powers of two.
    x = (2.0 ** (torch.arange(in_features) % 24)).expand(9, in_features).contiguous().to(DEVICE)
    seed = torch.tensor([2**40 + 3], device=DEVICE)
    A, E, B = torch.eye(in_features), torch.ones(in_features, 1), torch.eye(in_features)
    y = torch.zeros(9, in_features, device=DEVICE)
    factors = (t.to(DEVICE) for t in (A, E, B))
    out, _ = kernels.svd_delta_fwd(y, x, *factors, None, 1.0, 0.5, seed)
    assert torch.equal(out, x * reference.philox_mask(x, 0.5, seed) * 2)


def test_dx_is_computed_only_when_it_is_needed():
    case = random_case(lead=(20,), in_features=64, out_features=48, device=DEVICE)
    g = torch.randn(20, 48).to(DEVICE)
    with dry_run() as with_dx:
        forward_and_backward(case, g)
    with dry_run() as without:
        *_, dx, _, _, _ = forward_and_backward(case, g, need_dx=False)
    assert dx.numel() == 0 and len(without) == len(with_dx) - 1


def test_an_inf_stays_in_its_row():
    case = random_case(lead=(20,), in_features=64, out_features=48, device=DEVICE)
    case["x"][3, 5] = torch.inf
    with np.errstate(invalid="ignore"):
        y = svd_linear(**case, impl="triton")
    assert not y[3].isfinite().any() and y[torch.arange(20) != 3].isfinite().all()


SAYS = {
    "float64": ({"dtype": torch.float64}, "float64"),
    "rank": ({"r": 257}, "ranks up to 256, got 257"),
}


@pytest.mark.parametrize(("case", "says"), SAYS.values(), ids=SAYS.keys())
def test_what_triton_cannot_do_is_refused(case, says):
    tensors = random_case(**case, device=DEVICE)
    with pytest.raises(RuntimeError, match=says):
        svd_linear(**tensors, impl="triton")
    svd_linear(**tensors)  # "auto" has the reference


def test_without_the_interpreter_a_cpu_is_refused():
    code = (
        "import torch, adalora_kernels as a; t = torch.ones(2, 2);"
        "a.svd_linear(t, t, t, t[:, :1], t, impl='triton')"
    )
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert "RuntimeError: impl='triton' cannot run" in run.stderr
    assert "TRITON_INTERPRET=1" in run.stderr


def test_empty_tensors_launch_nothing():
    tensors = random_case(lead=(0,), device=DEVICE)
    with dry_run() as launched:
        y = svd_linear(**tensors, impl="triton")
    assert y.shape == (0, 9) and not launched


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non_reentrant", "reentrant"])
def test_activation_checkpointing_repeats_the_dropout(use_reentrant):
    case = random_case(lead=(6,), in_features=32, out_features=48, device=DEVICE)
    leaves = leaves_of(case)

    def run(x):
        return svd_linear(**{**case, "x": x}, dropout_p=0.5, impl="triton").tanh()

    torch.manual_seed(3)
    expected = torch.autograd.grad(run(case["x"]).sum(), leaves)
    torch.manual_seed(3)
    torch.utils.checkpoint.checkpoint(run, case["x"], use_reentrant=use_reentrant).sum().backward()
    torch.testing.assert_close([leaf.grad for leaf in leaves], list(expected))


@pytest.mark.parametrize("op", ["svd_linear", "svd_delta"])
def test_compile_fullgraph_under_autocast(op):
    case = random_case(lead=(6,), in_features=32, out_features=48, device=DEVICE)
    leaves = leaves_of(case)
    factors = leaves[1:]

    def run(x, *factors):
        with torch.autocast(DEVICE, dtype=FP16):
            if op == "svd_linear":
                return svd_linear(x, case["weight"], *factors, impl="triton").relu()
            return svd_delta(x @ case["weight"].T, x, *factors, impl="triton").relu()

    expected = run(case["x"], *factors)
    actual = torch.compile(run, fullgraph=True, backend="aot_eager")(case["x"], *factors)
    assert expected.dtype == FP16
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual.float().sum(), leaves),
        torch.autograd.grad(expected.float().sum(), leaves),
    )


@pytest.mark.parametrize("dropout_p", [0.0, 0.25], ids=["", "dropout"])
def test_opcheck(dropout_p):
    case = random_case(lead=(2, 5), device=DEVICE)
    for name in ("x", "lora_A", "lora_E", "lora_B"):
        case[name].requires_grad_()
    seed = torch.tensor([7], device=DEVICE) if dropout_p else None
    opcheck(torch.ops.adalora.svd_linear, (*arguments(case, dropout_p, seed), "triton"))
    x, _, _, *factors, mask, scaling, _, _ = arguments(case)
    base = torch.randn(2, 5, 9).to(DEVICE).requires_grad_()
    options = (mask, scaling, dropout_p, seed, "triton")
    opcheck(torch.ops.adalora.svd_delta, (base, x, *factors, *options))


def leaves_of(case):
    return [case[k].requires_grad_() for k in ("x", "lora_A", "lora_E", "lora_B")]


@needs_gpu
def test_auto_is_triton_on_a_gpu():
    case = random_case(lead=(20,), device=DEVICE)
    svd_linear(**case)
    with torch.profiler.profile() as profile:
        svd_linear(**case)
        torch.cuda.synchronize()
    # Whoever launches them: a dry run knows of Triton's launcher only.
    names = {e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA}
    assert "_down_kernel" in names


@needs_gpu
@pytest.mark.parametrize("dropout_p", [0.0, 0.25], ids=["", "dropout"])
def test_a_captured_step_replays_on_new_values(dropout_p):
    case = random_case(lead=(96,), in_features=128, out_features=64, dtype=BF16, device=DEVICE)
    leaves, g = leaves_of(case), torch.randn(96, 64, device=DEVICE, dtype=BF16)

    def step():
        y = svd_linear(**case, dropout_p=dropout_p)
        # The graph would keep nodes of this stream alive, which other steps then find.
        return y.detach(), *torch.autograd.grad(y, leaves, g)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        case["x"].normal_()
        case["lora_E"].normal_()
    torch.manual_seed(9)
    graph.replay()
    torch.cuda.synchronize()
    replayed = [t.clone() for t in captured]
    torch.manual_seed(9)
    assert all(map(torch.equal, replayed, step()))


@needs_gpu
def test_no_host_sync():
    case = random_case(lead=(96,), in_features=128, out_features=64, mask="mixed", device=DEVICE)
    leaves, g = leaves_of(case), torch.randn(96, 64, device=DEVICE)
    torch.autograd.grad(svd_linear(**case, dropout_p=0.25), leaves, g)
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(svd_linear(**case, dropout_p=0.25), leaves, g)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_peak_memory_is_that_of_the_results():
    M, K, N, r = 4096, 2048, 2048, 16
    case = random_case(lead=(M,), in_features=K, out_features=N, r=r, dtype=BF16, device=DEVICE)
    leaves, g = leaves_of(case), torch.randn(M, N, device=DEVICE, dtype=BF16)
    torch.autograd.grad(svd_linear(**case), leaves, g)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(svd_linear(**case), leaves, g)
    torch.cuda.synchronize()
    # y, dx, and parts of u, of h and of the adapters' gradients.
    narrow = 4 * r * (M * N / 256 + 4 * M + 20 * (K + N))
    assert torch.cuda.max_memory_allocated() - before <= 2 * M * (K + N) + narrow


@needs_gpu
def test_tf32_is_used_where_torch_allows_it(allow_tf32):
    case = random_case(lead=(64,), in_features=512, out_features=64, device=DEVICE)
    exact, _ = reference.svd_linear(*arguments({k: wide(t) for k, t in case.items()}))
    errors = []
    for allowed in (False, True):
        allow_tf32(allowed)
        y = svd_linear(**case, scaling=1.5)
        errors.append((y - exact).norm() / exact.norm())
    assert errors[0] < 1e-6 < 1e-5 < errors[1] < 1e-2


# Traffic and launches, computed by the launchers.

H200 = plans.Device("H200, no table", "sm_90", 132)
# (M, K, N): MB of the forward and of the backward, as benchmarks/NOTES.md has them.
GOALS = {
    (8192, 4096, 4096): (170, 331),
    (8192, 4096, 14336): (422, 793),
    (8192, 14336, 4096): (424, 751),
}


def planned(M, K, N, r=16):
    """List the launches of the forward and of the backward; bfloat16, float32 adapters."""

    def meta(*shape, dtype=BF16):
        return torch.empty(shape, dtype=dtype, device="meta")

    x, y, weight = meta(M, K), meta(M, N), meta(N, K)
    shapes = ((r, K), (r, 1), (N, r))
    A, E, B = (meta(*shape, dtype=FP32) for shape in shapes)
    options = (None, 1.0, 0.0, None)
    with dry_run() as there:
        _, h = kernels.svd_linear_fwd(x, weight, None, A, E, B, *options, "auto", H200)
    backward = (*options[:1], h, *options[1:], True, "auto", H200)
    with dry_run() as back:
        kernels.svd_linear_bwd(y, x, weight, A, E, B, *backward)
    return there, back


@pytest.mark.parametrize(("shape", "megabytes"), GOALS.items(), ids=map(str, GOALS))
def test_launches_and_bytes_at_the_goal_shapes(shape, megabytes):
    there, back = planned(*shape)
    assert [item.kernel for item in there] == ["split", "gemm"]
    assert [item.kernel for item in back] == ["g_pass", "g_reduce", "x_pass", "gemm"]
    assert there[-1].grid == back[-1].grid == (H200.sms,), "the GEMM is persistent"
    # Design, section 5: no more than the frozen layer; one pass over g and one over x.
    M, K, N = shape
    x, w, y = 2 * M * K, 2 * N * K, 2 * M * N
    moved = [sum(item.moved for item in launches) for launches in (there, back)]
    h = 4 * 16 * M
    assert (there[-1].written, back[-1].written) == (y + h, x)
    assert moved[0] <= 1.02 * (x + w + y)
    assert moved[1] <= 1.10 * (y + x + (y + w + x))
    assert [round(number / 1e6) for number in moved] == list(megabytes)


@pytest.mark.parametrize("M", [1, 16, 64])
def test_with_few_rows_the_gemm_starts_before_h_is_there(M):
    there, _ = planned(M, 4096, 4096)
    assert [item.kernel for item in there] == ["down", "gemm"]
    assert [item.arguments.get("launch_pdl", False) for item in there] == [False, True]
    assert sum(item.moved for item in there) <= 1.15 * 2 * (4096 * 4096 + 2 * M * 4096)


def test_nothing_large_is_allocated():
    class Allocations(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if "empty" in func._schema.name and isinstance(out, torch.Tensor):
                sizes.append(out.numel() * out.element_size())
            return out

    M, K, N = 8192, 4096, 14336
    sizes = []
    with Allocations():
        planned(M, K, N)
    # x, y, weight: given. y and dx: the results. Of the rest, the backward's workspace is the
    # largest. It holds what `g_reduce` needs at once, R columns each, in float32: parts of u, one
    # for 256 columns of g; grad_h; two parts of dB; and parts of dE, one for 16 rows. Besides, one
    # number for 128 columns of x, in a place of its own.
    for size in (2 * M * K, 2 * M * N, 2 * N * K, 2 * M * N, 2 * M * K):
        sizes.remove(size)
    assert max(sizes) <= 4 * 16 * (M * N / 256 + M + 2 * N + M / 16) + 256

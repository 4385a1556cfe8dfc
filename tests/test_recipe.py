"""Recipes: one serves every M of its bucket, and a workspace is laid out as it is used."""

import inspect
import itertools

import pytest
import torch
from helpers import CountOps
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_cases import check_against_float64, random_case

from adalora_kernels.kernels import svd_linear as kernels
from adalora_kernels.kernels.launch import INTERPRETED, dry_run
from adalora_kernels.kernels.recipe import Array, Count, Scalar, Tile, run
from adalora_kernels.kernels.svd_linear import plans
from adalora_kernels.kernels.svd_linear.common import gradient

DEVICE = "cpu" if INTERPRETED else "cuda"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
H200 = plans.Device("H200, no table", "sm_90", 132)

sizes = st.integers(1, 2**16)


@given(st.integers(1, 2**20), sizes, sizes, st.integers(0, 2**16), st.integers(1, 2**30))
def test_a_count(M, per, times, plus, most):
    blocks = len(range(0, M, per))
    assert Count(per, times, plus).of(M) == blocks * times + plus
    assert Count(per, times, plus, most).of(M) == min(blocks * times + plus, most)
    assert Count().of(M) == M


def test_the_first_buckets():
    buckets = sorted({plans.rows_bucket(M) for M in range(1, 65)})
    few, more = [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16], [20, 24, 28, 32, 40, 48, 56, 64]
    assert buckets == few + more
    # Where the tiles for few rows change, and where they end.
    assert {16, plans.MOST_FEW_ROWS} <= set(buckets)


@given(st.integers(1, 2**31 - 1))
def test_buckets(M):
    bucket = plans.rows_bucket(M)
    assert M <= bucket < 1.25 * M + 1
    assert plans.rows_bucket(bucket) == bucket, "a bucket is the largest number in it"
    assert plans.bucket(bucket) == plans.bucket(M), "the table of measured plans has powers of two"
    assert (bucket - 1 < 8) or bucket * 8 % plans.bucket(bucket) == 0, "four in an octave"


@st.composite
def layers(draw):
    """Draw what `operands_of` takes, and `call_of` after the operands."""
    return {
        "K": draw(st.sampled_from([1, 16, 77, 528, 4096])),
        "N": draw(st.sampled_from([1, 16, 101, 1024])),
        "r": draw(st.sampled_from([1, 5, 16, 33, 256])),
        "dtypes": draw(st.sampled_from([(BF16, FP32), (FP16, FP16), (FP32, FP32), (FP32, BF16)])),
        "kind": draw(st.sampled_from(["svd_linear", "svd_delta", "backward", "delta's backward"])),
        "dropout": draw(st.booleans()),
    }


def operands_of(M, K, N, r, dtypes, kind, dropout=False, device="meta"):
    """The operands of one call, without values."""
    dtype, adapter = dtypes

    def new(*shape, dtype=adapter):
        return torch.empty(shape, dtype=dtype, device=device)

    given = {"x": new(M, K, dtype=dtype), "A": new(r, K), "E": new(r, 1), "B": new(N, r)}
    given["mask"] = new(r, dtype=torch.bool)
    if kind in ("svd_linear", "backward"):
        given["weight"] = new(N, K, dtype=dtype)
    if kind == "svd_delta":
        given["base"] = new(M, N, dtype=dtype)
    if "backward" in kind:
        given["grad_y"] = new(M, N, dtype=dtype)
        given["h"] = new(M, r, dtype=torch.promote_types(dtype, adapter))
    if kind == "svd_linear":
        given["bias"] = new(N, dtype=dtype)
    if dropout:
        given["seed"] = new(1, dtype=torch.int64)
    return kernels.operands(**given)


def two_of_a_bucket(M, part):
    """Two numbers of rows that share a bucket: the largest in that of M, and another."""
    most = plans.rows_bucket(M)
    least = next(M for M in range(most, 0, -1) if M == 1 or plans.rows_bucket(M - 1) != most)
    return least + int(part * (most - least)), most


PATHS = ("auto", *plans.PATHS)


@given(layers(), st.integers(1, 9000), st.floats(0, 1), st.sampled_from(PATHS), st.booleans())
@settings(deadline=None)
def test_all_of_a_bucket_have_one_recipe(layer, M, part, path, need_dx):
    calls = [
        kernels.call_of(operands_of(M, **layer), need_dx, path, H200)
        for M in two_of_a_bucket(M, part)
    ]
    assert calls[0] == calls[1]
    recipe = kernels.recipe_of(calls[0])
    assert recipe is kernels.recipe_of(calls[1])
    for step in recipe.steps:
        check_step(step)


def check_step(step):
    """What depends on M must not be part of what a kernel is compiled for."""
    if step.kernel is None:
        assert step.arguments.keys() == {"x", "w", "out"}
        return
    parameters = inspect.signature(step.kernel.fn).parameters
    options = {"num_warps", "num_stages"}
    assert parameters.keys() | options == step.arguments.keys() - {"launch_pdl"}
    options = step.kernel.kwargs if INTERPRETED else vars(step.kernel)
    for name, argument in step.arguments.items():
        for leaf in leaves(argument):
            if isinstance(leaf, Count) or leaf == Scalar("drop_below"):
                assert name in options["do_not_specialize"], f"{step.kernel.fn.__name__}: {name}"


def leaves(argument):
    """The leaves of an argument, which arrays, counts and scalars are, too."""
    if hasattr(argument, "_fields") and not isinstance(argument, (Array, Tile, Count, Scalar)):
        for field in argument:
            yield from leaves(field)
    else:
        yield argument


@given(layers(), st.integers(1, 300), st.floats(0, 1), st.integers(1, 200))
@settings(deadline=None)
def test_parts_that_are_alive_at_once_lie_apart(layer, M, part, sms):
    M, _ = two_of_a_bucket(M, part)
    given = operands_of(M, **layer, device="cpu")
    call = kernels.call_of(given, False, "two_pass", H200._replace(sms=sms))
    recipe = kernels.recipe_of(call)
    with dry_run() as launched:
        run(recipe, M, given | results_of(call, M), SCALARS)
    places, used = {}, {}
    for i, (step, launch) in enumerate(zip(recipe.steps, launched, strict=True)):
        for name, argument in step.arguments.items():
            pairs = zip(leaves(argument), leaves(launch.arguments[name]), strict=True)
            for leaf, tensor in pairs:
                if isinstance(leaf, Array) and leaf.name in names_of(recipe):
                    places[leaf.name] = tensor
                    used.setdefault(leaf.name, []).append(i)
    assert places.keys() == names_of(recipe)
    memory = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in places.values()}
    assert len(memory) == bool(places), "one allocation"
    for name, t in places.items():
        begin, end = extent(t)
        assert begin % 256 == 0 and end <= t.untyped_storage().nbytes(), name
    for one, other in itertools.combinations(places, 2):
        if used[one][0] <= used[other][-1] and used[other][0] <= used[one][-1]:
            first, second = sorted((extent(places[one]), extent(places[other])))
            assert first[1] <= second[0], (one, other)


def names_of(recipe):
    return {part.array.name for part in recipe.workspace}


def extent(t):
    """Where the bytes of a tensor begin and end in its memory."""
    begin = t.storage_offset() * t.element_size()
    return begin, begin + t.nbytes


SCALARS = {"scaling": 1.0, "drop_below": 0, "keep_scale": 1.0}


def results_of(call, M):
    """Memory for all that a call may return."""
    arrays = (call.y, call.h, *map(gradient, (call.x, call.A, call.E, call.B)))
    if call.grad_y is not None:
        arrays = arrays[2:]
    return {a.name: torch.empty(a.of(M), dtype=a.dtype) for a in arrays}


def both_ways(x, g, weight, bias, factors, mask, path, dropout_p):
    """Return {name: result} of a forward and a backward; path "delta" is that of svd_delta."""
    seed = torch.tensor([5], device=DEVICE) if dropout_p else None
    options = (1.5, dropout_p, seed)
    if path == "delta":
        weight = None
        y, h = kernels.svd_delta_fwd(g, x, *factors, mask, *options, SMALL)
    else:
        y, h = kernels.svd_linear_fwd(x, weight, bias, *factors, mask, *options, path, SMALL)
    path = "auto" if path == "delta" else path
    back = kernels.svd_linear_bwd(g, x, weight, *factors, mask, h, *options, True, path, SMALL)
    return dict(zip(("y", "h", "dx", "dA", "dE", "dB"), (y, h, *back), strict=True))


SMALL = plans.Device("60 multiprocessors", "sm_90", 60)
# Two numbers of rows in a bucket, K and N. The last are not aligned, so that blocks have 32 rows,
# of which there is one more in 320 rows, and one more part of each sum.
LAYERS = {
    "fused": (257, 320, 336, 272),
    "two_pass": (65, 80, 336, 272),
    "delta": (257, 320, 77, 71),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dropout_p", [0.0, 0.25], ids=["", "dropout"])
@pytest.mark.parametrize(("path", "layer"), LAYERS.items(), ids=LAYERS.keys())
def test_a_recipe_made_for_few_rows_serves_more(path, layer, dropout_p):
    few, many, K, N = layer
    case = random_case(lead=(few,), in_features=K, out_features=N, r=5, dtype=FP16)
    x, weight, *factors, bias, _ = (t if t is None else t.to(DEVICE) for t in case.values())
    mask, g = torch.arange(5, device=DEVICE) > 0, torch.randn(few, N).to(FP16).to(DEVICE)
    rest = (weight, bias, factors, mask, path, dropout_p)
    plans.forget_tables()
    first = both_ways(x, g, *rest)
    made = kernels.recipe_of.cache_info().misses
    # Rows of zeros add nothing to a sum, not even a rounding.
    x, g = (torch.cat((t, t.new_zeros(many - few, t.shape[1]))) for t in (x, g))
    second = both_ways(x, g, *rest)
    assert kernels.recipe_of.cache_info().misses == made == 2
    for name, result in first.items():
        rows = slice(few if name in ("y", "h", "dx") else None)
        assert torch.equal(result, second[name][rows]), name


@pytest.mark.gpu
@pytest.mark.parametrize("path", ["two_pass", "cublas"])
def test_results_are_right_for_all_of_a_bucket(path):
    options = {"in_features": 1040, "out_features": 80, "dtype": FP16, "adapter_dtype": FP32}
    plans.forget_tables()
    made = set()
    for M in (37, 40, 33):
        draws = [random_case(lead=(M,), **options, device=DEVICE) for _ in range(2)]
        check_against_float64(*draws, dropout_p=0.25, impl=path)
        made.add(kernels.recipe_of.cache_info().misses)
    assert made == {2}


def test_one_row_may_have_any_stride():
    x, wide = torch.empty(1, 64), torch.empty(5, 64)
    calls = set()
    for row in (x, wide[2:3], wide[::3][:1], x[0], x.expand(1, 1, 64)):
        given = operands_of(1, 64, 48, 4, (FP32, FP32), "svd_linear", device="cpu")
        calls.add(kernels.call_of(given | kernels.operands(x=row)))
    (call,) = calls
    assert call.x.strides == (64, 1) and "x" in call.aligned
    columns = torch.empty(1, 128)[:, ::2]
    assert kernels.call_of(given | {"x": columns}).x.strides == (128, 2)


ALIGNED = {
    "rows": (True, lambda t: t),
    "columns": (True, lambda t: t.T.contiguous().T),
    "wide_rows": (True, lambda t: torch.empty(t.shape[0], 2 * t.shape[1])[:, : t.shape[1]]),
    "odd_rows": (False, lambda t: torch.empty(t.shape[0], t.shape[1] + 1)[:, : t.shape[1]]),
    "odd_start": (False, lambda t: torch.empty(t.numel() + 1)[1:].view(t.shape)),
    "apart": (False, lambda t: torch.empty(*t.shape, 2)[..., 0]),
    "expanded": (False, lambda t: t[:1].expand_as(t)),
}


@pytest.mark.parametrize("name", ["x", "weight"])
@pytest.mark.parametrize(("aligned", "change"), ALIGNED.values(), ids=ALIGNED.keys())
def test_which_matrices_are_aligned(name, aligned, change):
    given = operands_of(32, 64, 48, 4, (FP32, FP32), "svd_linear", device="cpu")
    call = kernels.call_of(given | {name: change(given[name])})
    if (name, aligned) == ("x", True) and call.x.strides[1] != 1:
        aligned = False  # Only a weight may lie by columns.
    assert call.aligned == {"x", "weight", "y", "dx"} - (set() if aligned else {name})


@pytest.mark.parametrize("allowed", [False, True])
def test_tf32_is_for_float32_where_torch_allows_it(allow_tf32, allowed):
    allow_tf32(allowed)
    for dtype, kind in itertools.product((FP32, BF16), ("svd_linear", "svd_delta", "backward")):
        call = kernels.call_of(operands_of(80, 64, 48, 4, (dtype, FP32), kind), True, "two_pass")
        steps = kernels.recipe_of(call).steps
        precisions = {step.arguments.get("PRECISION") for step in steps} - {None}
        assert precisions == {"tf32" if allowed and dtype == FP32 else "ieee"}


def test_results_and_one_workspace_are_all_that_is_allocated():
    case = random_case(lead=(200,), in_features=4096, out_features=64, dtype=BF16, device="meta")
    x, weight, *factors, bias, mask = case.values()
    options = (1.5, 0.0, None)
    with dry_run(), CountOps() as there:
        y, h = kernels.svd_linear_fwd(x, weight, bias, *factors, mask, *options, "two_pass", H200)
    with dry_run(), CountOps() as back:
        kernels.svd_linear_bwd(y, x, weight, *factors, mask, h, *options, True, "two_pass", H200)
    assert there.counts["aten::empty"] == 2 + 1, "y, h and parts of h"
    assert back.counts["aten::empty"] == 4 + 1


@pytest.fixture
def no_user_table(monkeypatch, tmp_path):
    monkeypatch.setenv("ADALORA_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(plans, "_clear", [*plans._clear])
    plans.forget_tables()
    yield
    plans.forget_tables()


def test_recipes_are_forgotten_with_the_tables(no_user_table):
    call = kernels.call_of(
        operands_of(8192, 4096, 4096, 16, (BF16, FP32), "svd_linear"), device=H200
    )
    assert None not in [step.kernel for step in kernels.recipe_of(call).steps]
    cleared = []
    plans.when_forgotten(lambda: cleared.append(True))
    problem = plans.Problem(BF16, 8192, 4096, 4096, 16, "y")
    measured = plans.Plan("cublas", plans.GEMM_GENERAL)
    plans.write_table(plans.cache_path(), H200.name, {problem: measured})
    assert kernels.recipe_of(call).steps[-1].kernel is None
    assert cleared == [True]

"""The orthogonality regulariser: against its definition, and what it may cost."""

import pytest
import torch
from helpers import CountOps, Mlp, adapter, assert_as_good_as_eager, batch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from adalora_kernels import SVDLinear, orth_reg, orth_reg_grad_, orthogonality, reference
from adalora_kernels.adapters import find_adapters


def orth_pairs(dtype=torch.float64):
    shapes = ((3, 5, 4), (3, 5, 4), (2, 6, 7), (1, 4, 4))
    return [adapter(*s, dtype=dtype)[::2] for s in shapes]


def leaves_of(pairs):
    return [t for pair in pairs for t in pair]


@pytest.mark.parametrize("squared", [False, True], ids=["peft", "paper"])
def test_value_and_gradients_are_those_of_the_definition(squared):
    pairs = orth_pairs()
    leaves = leaves_of(pairs)
    value, expected = orth_reg(pairs, 0.3, squared), reference.orth_reg(pairs, 0.3, squared)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(
        torch.autograd.grad(value, leaves), torch.autograd.grad(expected, leaves)
    )


def near_orthogonal(shapes, dtype=torch.float32, spoil=None):
    """Pairs of (r, in, out) whose Gram matrices cancel, and the same in float64."""
    layouts = {
        None: lambda t: t,
        "transposed": lambda t: t.T.contiguous().T,
        "strided": lambda t: t.repeat_interleave(2, dim=1)[:, ::2],
    }
    pairs = []
    for r, k, n in shapes:
        a, b = torch.randn(r, k) / max(k, 1) ** 0.5, torch.randn(n, r) / max(n, 1) ** 0.5
        pairs.append(tuple(layouts[spoil](t.to(dtype)).requires_grad_() for t in (a, b)))
    exact = [tuple(t.detach().double().requires_grad_() for t in pair) for pair in pairs]
    return pairs, exact


SHAPES = {
    "r1": [(1, 40, 30), (1, 1, 1)],
    "r12": [(12, 768, 3072), (12, 100, 7), (12, 768, 768), (12, 768, 768)],
    "r33": [(33, 257, 100)],
    "r300": [(300, 48, 40)],
    "ranks": [(r, 64, 48) for r in (4, 0, 2, 4, 7, 0, 2)],
    "wide": [(5, 30_001, 40_003)] * 4,
    "no_columns": [(2, 0, 0), (3, 4, 5)],
}


@pytest.mark.parametrize("squared", [False, True], ids=["peft", "paper"])
@pytest.mark.parametrize("spoil", [None, "transposed", "strided"], ids=str)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
def test_error_against_float64(shapes, spoil, squared):
    pairs, exact = near_orthogonal(shapes, spoil=spoil)
    check_error(pairs, exact, squared)


@pytest.mark.parametrize("squared", [False, True], ids=["peft", "paper"])
def test_long_sums_are_made_in_parts(squared, monkeypatch):
    def value(*leaves):
        return orth_reg([leaves], 0.3, squared)

    leaves = adapter(2, 5, 128)[::2]
    with CountOps() as before:
        at_once = value(*leaves)
    monkeypatch.setattr(orthogonality, "_SUM_LENGTH", {"cpu": 64})
    with CountOps() as after:
        torch.testing.assert_close(value(*leaves), at_once)
    assert (after.counts - before.counts)["aten::sum"] == 1
    assert torch.autograd.gradcheck(value, leaves)
    # Of 3,072 and 768 rows, and of 7, which are no whole number of parts.
    check_error(*near_orthogonal(SHAPES["r12"]), squared)


def check_error(pairs, exact, squared=False):
    """The error rule, for the values of the pairs and for the gradients of all.

    For all at once: a single number of eager's may be right to a rounding step by luck.
    """

    def results(function, pairs):
        values = torch.stack([function([pair], 0.3, squared).detach() for pair in pairs])
        grads = torch.autograd.grad(function(pairs, 0.3, squared), leaves_of(pairs))
        assert [g.dtype for g in grads] == [t.dtype for t in leaves_of(pairs)]
        return values, torch.cat([g.flatten() for g in grads])

    oracle, eager = results(reference.orth_reg, exact), results(reference.orth_reg, pairs)
    orth_reg_grad_(pairs, 0.3, squared)
    added = torch.cat([t.grad.flatten() for t in leaves_of(pairs) if t.numel()])
    values, grads = results(orth_reg, pairs)
    assert_as_good_as_eager(values, eager[0], oracle[0], "values")
    assert_as_good_as_eager(grads, eager[1], oracle[1], "gradients")
    assert_as_good_as_eager(added, eager[1], oracle[1], ".grad")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_accumulated_in_float32(dtype):
    pairs, exact = near_orthogonal([(12, 300, 200), (1, 30, 40), (12, 300, 200)], dtype)
    check_error(pairs, exact)
    assert orth_reg(pairs).dtype == torch.float32


def test_mixed_dtypes():
    kinds = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
    pairs = [near_orthogonal([(3, 20, 10)], kind)[0][0] for kind in kinds]
    value, expected = orth_reg(pairs, 0.3), reference.orth_reg(pairs, 0.3)
    assert value.dtype == torch.float64
    torch.testing.assert_close(value, expected)
    grads = torch.autograd.grad(value, leaves_of(pairs))
    assert [g.dtype for g in grads] == [t.dtype for t in leaves_of(pairs)]
    torch.testing.assert_close(grads, torch.autograd.grad(expected, leaves_of(pairs)))


@pytest.mark.parametrize("squared", [False, True], ids=["peft", "paper"])
def test_no_gradient_at_exact_orthogonality(squared):
    pairs = [(torch.eye(2, 5, requires_grad=True), torch.eye(4, 2, requires_grad=True))]
    value = orth_reg(pairs, 1.0, squared)
    grads = torch.autograd.grad(value, pairs[0], create_graph=True)
    second = torch.autograd.grad(sum(g.sum() for g in grads), pairs[0])
    assert value.item() == 0.0 and orth_reg_grad_(pairs, 1.0, squared).item() == 0.0
    for t in (*grads, *(p.grad for p in pairs[0])):
        assert not t.any(), "0, and not NaN"
    assert all(t.isfinite().all() for t in second)


@pytest.mark.parametrize("squared", [False, True], ids=["peft", "paper"])
def test_double_backward(squared):
    pair = adapter(3, 5, 4)[::2]
    assert torch.autograd.gradgradcheck(lambda a, b: orth_reg([(a, b)], 0.3, squared), pair)


def test_compile_fullgraph():
    pairs = orth_pairs(torch.float32)
    leaves = leaves_of(pairs)

    def run(*matrices):
        return orth_reg(list(zip(matrices[::2], matrices[1::2], strict=True)), 0.3)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager_decomp_partition")
    value, expected = compiled(*leaves), run(*leaves)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(
        torch.autograd.grad(value, leaves), torch.autograd.grad(expected, leaves)
    )


def test_autocast_does_not_reach_into_it():
    pairs = orth_pairs(torch.float32)
    expected = torch.autograd.grad(orth_reg(pairs), leaves_of(pairs))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = orth_reg(pairs)
        actual = torch.autograd.grad(value, leaves_of(pairs))
        assert torch.equal(orth_reg_grad_(pairs, 0.1), value)
    assert all(map(torch.equal, actual, expected))


class LargestStack(TorchDispatchMode):
    """Notes the largest result of any op, in bytes."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, list | tuple) else [result]:
            if isinstance(t, torch.Tensor):
                self.nbytes = max(self.nbytes, t.nbytes)
        return result


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_memory_does_not_grow_with_the_model(device):
    """Stacks stay in a CPU's cache, and on other devices they are of at most 64 MB."""
    most = {"cpu": 2**20, "meta": 2**26}[device]
    pairs = [
        (torch.randn(16, 8192, device=device), torch.randn(8192, 16, device=device))
        for _ in range({"cpu": 8, "meta": 400}[device])
    ]
    for t in leaves_of(pairs):
        t.requires_grad_()
        t.grad = torch.zeros_like(t)
    with LargestStack() as largest:
        value = orth_reg(pairs)
        torch.autograd.grad(value, leaves_of(pairs))
        orth_reg_grad_(pairs, 0.1)
    assert most / 2 < largest.nbytes <= most


def test_of_what_is_stacked_only_slopes_are_kept_for_the_backward():
    pairs = orth_pairs()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        orth_reg(pairs)
    own = {t.data_ptr() for t in leaves_of(pairs)}
    beside = sum(t.numel() for t in kept if t.data_ptr() not in own)
    assert 0 < beside <= sum(2 * a.shape[0] ** 2 for a, _ in pairs)


@pytest.mark.parametrize("squared", [False, True], ids=["peft", "paper"])
def test_orth_reg_grad_adds_the_same_gradient(squared):
    pairs = orth_pairs()
    leaves = [t for pair in pairs for t in pair]
    value = orth_reg(pairs, 0.3, squared)
    expected = torch.autograd.grad(value, leaves)
    before = [torch.randn_like(t) for t in leaves]
    for t, g in zip(leaves[1:], before[1:], strict=True):
        t.grad = g.clone()
    actual = orth_reg_grad_(pairs, 0.3, squared)
    torch.testing.assert_close(actual, value.detach())
    assert not actual.requires_grad
    torch.testing.assert_close(leaves[0].grad, expected[0])
    for t, g, e in zip(leaves[1:], before[1:], expected[1:], strict=True):
        torch.testing.assert_close(t.grad, g + e)


@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("squared", [False, True])
def test_orth_reg_grad_into_scaled_gradients(squared, as_tensor):
    pairs = orth_pairs()
    leaves = [t for pair in pairs for t in pair]
    expected = torch.autograd.grad(orth_reg(pairs, 0.3, squared), leaves)
    scale = torch.tensor(1 / 1024) if as_tensor else 1 / 1024
    orth_reg_grad_(pairs, 0.3, squared, grad_scale=scale)
    torch.testing.assert_close([t.grad / 1024 for t in leaves], list(expected))


def test_orth_reg_grad_refuses_scales():
    pairs = orth_pairs()
    for scale, error, says in (
        ("1", TypeError, "grad_scale .*str"),
        (torch.ones(2), ValueError, r"grad_scale .*\(2,\)"),
        (torch.ones(1, device="meta"), ValueError, "grad_scale .*meta"),
    ):
        with pytest.raises(error, match=says):
            orth_reg_grad_(pairs, 0.3, grad_scale=scale)
    assert all(t.grad is None for pair in pairs for t in pair), "nothing was changed"


def test_orth_reg_grad_counts_once_under_accumulation():
    model = Mlp()
    (orth_reg(model, 0.5) + sum(model.loss(*batch(i)) / 4 for i in range(4))).backward()
    expected = [p.grad for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    for i in range(4):
        (model.loss(*batch(i)) / 4).backward()
    orth_reg_grad_(model, 0.5)
    torch.testing.assert_close([p.grad for p in model.parameters() if p.requires_grad], expected)


def test_orth_reg_grad_leaves_frozen_parameters_alone():
    pairs = orth_pairs()
    pairs[0][0].requires_grad_(False)
    orth_reg_grad_(pairs, 0.3)
    assert pairs[0][0].grad is None and pairs[0][1].grad is not None


def test_orth_reg_grad_where_all_of_one_shape_are_frozen():
    pairs = [adapter(3, 5, 4)[::2], adapter(3, 7, 6)[::2]]
    for parameter in pairs[0]:
        parameter.requires_grad_(False)
    orth_reg_grad_(pairs, 0.3)
    assert [p.grad is None for pair in pairs for p in pair] == [True, True, False, False]


class NoTensorTwice(TorchDispatchMode):
    """On a GPU an in-place foreach op works on all tensors of its list at once."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name.startswith("aten::_foreach") and func._schema.is_mutable:
            assert len({t.data_ptr() for t in args[0]}) == len(args[0])
        return func(*args, **(kwargs or {}))


def test_orth_reg_grad_of_a_shared_matrix_counts_both_of_its_pairs():
    A, B = adapter(3, 5, 4)[::2]
    other = adapter(3, 5, 6)[2]
    pairs = [(A, B), (A, other)]
    expected = torch.autograd.grad(orth_reg(pairs, 0.3), (A, B, other))
    with NoTensorTwice():
        orth_reg_grad_(pairs, 0.3)
    torch.testing.assert_close((A.grad, B.grad, other.grad), expected)


def test_orth_reg_takes_adapters():
    model = Mlp()
    adapters = find_adapters(model)
    assert torch.equal(orth_reg(adapters, 0.3), orth_reg(model, 0.3))
    pairs = [(a.lora_A, a.lora_B) for a in adapters]
    assert torch.equal(orth_reg_grad_(iter(adapters), 0.3), orth_reg(pairs, 0.3))


def test_dispatched_ops_of_the_regulariser_do_not_grow_with_the_model():
    totals = []
    for layers in (2, 72):
        model = nn.ModuleList(SVDLinear(8, 8, r=4) for _ in range(layers))
        adapters = find_adapters(model)
        leaves = [p for a in adapters for p in (a.lora_A, a.lora_B)]
        for p in leaves:
            p.grad = torch.zeros_like(p)
        with CountOps() as into_grad:
            orth_reg_grad_(adapters, 0.1)
        with CountOps() as through_autograd:
            torch.autograd.grad(orth_reg(adapters, 0.1), leaves)
        counts = (into_grad.counts, through_autograd.counts)
        assert not any(count["aten::_local_scalar_dense"] for count in counts)
        totals.append([count.total() for count in counts])
    assert totals[0] == totals[1]
    assert totals[0][0] <= 37 and totals[0][1] <= 62


def test_orth_reg_of_a_rank_zero_pair_is_zero():
    empty = (torch.zeros(0, 5, requires_grad=True), torch.zeros(4, 0, requires_grad=True))
    value = orth_reg([empty, (torch.eye(2), torch.eye(2))], 1.0)
    assert value.item() == 0.0
    assert [g.shape for g in torch.autograd.grad(value, empty)] == [(0, 5), (4, 0)]
    assert orth_reg_grad_([empty], 1.0).item() == 0.0


@pytest.mark.parametrize(
    ("pairs", "weight", "error", "says"),
    [
        (torch.ones(2, 2), 0.1, TypeError, "Tensor"),
        (3, 0.1, TypeError, "int"),
        ([], 0.1, ValueError, "empty"),
        (nn.Linear(3, 3), 0.1, ValueError, "no AdaLoRA adapter in this Linear"),
        ([torch.ones(2, 2)], 0.1, TypeError, r"\[0\]"),
        ([(torch.ones(2, 3), torch.ones(4, 3))], 0.1, ValueError, r"\(2, 3\) and \(4, 3\)"),
        ([(torch.ones(2, 3).int(), torch.ones(4, 2))], 0.1, TypeError, "int32"),
        ([(torch.ones(2, 3), torch.ones(4, 2, device="meta"))], 0.1, ValueError, "meta"),
        ([(torch.ones(2, 3), torch.ones(4, 2))], -1.0, ValueError, "weight .*-1"),
        ([(torch.ones(2, 3), torch.ones(4, 2))], "1", TypeError, "weight .*str"),
    ],
)
def test_orth_reg_refuses(pairs, weight, error, says):
    with pytest.raises(error, match=says):
        orth_reg(pairs, weight)
    with pytest.raises(error, match=says):
        orth_reg_grad_(pairs, weight)

"""What no op can serve is computed in plain PyTorch: torch.func, forward mode, double backward.

Each is compared with the same call of plain eager PyTorch, which is what PEFT's layers are.
"""

import pytest
import torch
import torch.autograd.forward_ad as fwd
import torch.autograd.functional as AF
import torch.nn.functional as F
from helpers import CountOps
from layer_cases import eager, random_case
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map

from adalora_kernels import orth_reg, reference, svd_delta, svd_linear
from adalora_kernels.fusing import why_plain

NAMES = ("x", "lora_A", "lora_E", "lora_B")


def case(**options):
    return random_case(lead=(2,), in_features=5, out_features=4, dtype=torch.float64, **options)


def functions(op="svd_linear", **options):
    """Ours and plain eager's, of (x, lora_A, lora_E, lora_B), and these."""
    c = case(**options)
    fixed = {k: c[k] for k in ("weight", "bias", "mask")}

    def ours(*tensors):
        given = dict(zip(NAMES, tensors, strict=True))
        if op == "svd_linear":
            return svd_linear(**given, **fixed, scaling=1.5)
        base = F.linear(given["x"], fixed["weight"], fixed["bias"])
        return svd_delta(base, **given, mask=fixed["mask"], scaling=1.5)

    def plain(*tensors):
        return eager(**dict(zip(NAMES, tensors, strict=True)), **fixed)

    return ours, plain, tuple(c[name] for name in NAMES)


def scalar(function):
    return lambda *tensors: function(*tensors).tanh().sum()


ALL = (0, 1, 2, 3)
TRANSFORMS = {
    "grad": lambda f, t: torch.func.grad(scalar(f), ALL)(*t),
    "vjp": lambda f, t: torch.func.vjp(scalar(f), *t)[1](torch.tensor(2.0).double()),
    "jvp": lambda f, t: torch.func.jvp(f, t, t),
    "jacrev": lambda f, t: torch.func.jacrev(f, ALL)(*t),
    "jacfwd": lambda f, t: torch.func.jacfwd(f, ALL)(*t),
    "hessian": lambda f, t: torch.func.hessian(scalar(f), ALL)(*t),
    "linearize": lambda f, t: torch.func.linearize(f, *t)[1](*t),
    "vmap_x": lambda f, t: torch.func.vmap(f, (0, None, None, None))(*t),
    "vmap_adapters": lambda f, t: torch.func.vmap(f)(*(torch.stack([s, 2 * s]) for s in t)),
    "per_sample": lambda f, t: torch.func.vmap(
        torch.func.grad(scalar(f), ALL), (0, None, None, None)
    )(*t),
    "functionalize": lambda f, t: torch.func.functionalize(f)(*t),
    "autograd_jacobian": lambda f, t: AF.jacobian(f, t),
    "autograd_jacobian_vectorized": lambda f, t: AF.jacobian(f, t, vectorize=True),
    "autograd_jacobian_forward": lambda f, t: AF.jacobian(
        f, t, vectorize=True, strategy="forward-mode"
    ),
    "autograd_hessian": lambda f, t: AF.hessian(scalar(f), t),
    "autograd_hessian_vectorized": lambda f, t: AF.hessian(scalar(f), t, vectorize=True),
    "autograd_hvp": lambda f, t: AF.hvp(scalar(f), t, t),
    "autograd_vhp": lambda f, t: AF.vhp(scalar(f), t, t),
    "autograd_jvp": lambda f, t: AF.jvp(f, t, t),
}


@pytest.mark.parametrize("op", ["svd_linear", "svd_delta"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_transforms(transform, op):
    ours, plain, tensors = functions(op, mask="mixed")
    torch.testing.assert_close(transform(ours, tensors), transform(plain, tensors))


@pytest.mark.parametrize("op", ["svd_linear", "svd_delta"])
def test_forward_mode(op):
    ours, plain, tensors = functions(op)
    tangents = []
    for function in (ours, plain):
        with fwd.dual_level():
            duals = [fwd.make_dual(t, t.cos()) for t in tensors]
            tangents.append(fwd.unpack_dual(function(*duals)).tangent)
    torch.testing.assert_close(*tangents)


def test_a_gradient_that_is_batched():
    ours, plain, tensors = functions()
    leaves = [t.requires_grad_() for t in tensors]
    g = torch.randn(3, 2, 4, dtype=torch.float64)
    results = [
        torch.autograd.grad(function(*leaves), leaves, g, is_grads_batched=True)
        for function in (ours, plain)
    ]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("randomness", ["different", "same"])
def test_dropout_under_vmap_is_that_of_torch(randomness):
    c = case()
    factors = (c["lora_A"], c["lora_E"], c["lora_B"])
    x = c["x"].expand(4, 2, 5)

    def run(x):
        return svd_linear(x, c["weight"], *factors, dropout_p=0.5)

    y = torch.func.vmap(run, randomness=randomness)(x)
    assert torch.equal(y[0], y[1]) == (randomness == "same")
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(run)(x)


@pytest.mark.parametrize("mask", [None, "mixed"], ids=["", "mask"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25], ids=["", "dropout"])
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
def test_double_backward_of_svd_linear(bias, dropout_p, mask):
    c = case(mask=mask, bias=bias)
    names = [name for name, t in c.items() if t is not None and name != "mask"]

    def run(*tensors):
        torch.manual_seed(3)
        given = {**c, **dict(zip(names, tensors, strict=True))}
        return svd_linear(**given, scaling=1.5, dropout_p=dropout_p)

    leaves = [c[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("mask", [None, "mixed"], ids=["", "mask"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25], ids=["", "dropout"])
def test_double_backward_of_svd_delta(dropout_p, mask):
    c = case(mask=mask)

    def run(base, *tensors):
        torch.manual_seed(3)
        given = dict(zip(NAMES, tensors, strict=True))
        return svd_delta(base, **given, mask=c["mask"], scaling=1.5, dropout_p=dropout_p)

    leaves = [t.requires_grad_() for t in (torch.randn(2, 4).double(), *(c[n] for n in NAMES))]
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


def test_third_derivative():
    ours, _, tensors = functions()
    leaves = [t.requires_grad_() for t in tensors]

    def gradient(*leaves):
        return torch.autograd.grad(scalar(ours)(*leaves), leaves, create_graph=True)

    assert torch.autograd.gradgradcheck(gradient, leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("op", ["svd_linear", "svd_delta"])
def test_gradients_are_the_same_with_and_without_create_graph(op, dtype):
    c = random_case(lead=(6, 5), dtype=dtype, adapter_dtype=torch.float32, mask="mixed")
    leaves = [c[name].requires_grad_() for name in NAMES]
    torch.manual_seed(3)
    options = {"mask": c["mask"], "dropout_p": 0.25}
    if op == "svd_linear":
        y = svd_linear(*leaves[:1], c["weight"], *leaves[1:], bias=c["bias"], **options)
    else:
        y = svd_delta(torch.randn(6, 5, 9).to(dtype), *leaves, **options)
    g = torch.randn_like(y)
    first = torch.autograd.grad(y, leaves, g, retain_graph=True)
    again = torch.autograd.grad(y, leaves, g, create_graph=True)
    tolerance = {torch.bfloat16: 0.05, torch.float32: 1e-5}[dtype]
    torch.testing.assert_close(first, tuple(t.detach() for t in again), rtol=0.02, atol=tolerance)
    assert [t.dtype for t in again] == [t.dtype for t in leaves]


@pytest.mark.parametrize("first_order", [False, True], ids=["", "detached"])
def test_two_inner_steps_of_maml(first_order):
    ours, plain, tensors = functions()
    results = []
    for function in (ours, plain):
        meta = [t.clone().requires_grad_() for t in tensors]
        fast = meta
        for _ in range(2):
            grads = torch.autograd.grad(scalar(function)(*fast), fast, create_graph=not first_order)
            fast = [t - 0.1 * g for t, g in zip(fast, grads, strict=True)]
        results.append(torch.autograd.grad(scalar(function)(*fast), meta))
    torch.testing.assert_close(*results)


class Wrapped(torch.Tensor):
    """A user's subclass: it knows PyTorch's own ops, and no others."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func.namespace != "aten":
            raise NotImplementedError(f"Wrapped has no {func}")
        args, kwargs = tree_map(lambda t: t.inner if type(t) is cls else t, (args, kwargs or {}))
        return func(*args, **kwargs)


@pytest.mark.parametrize("name", ["x", "weight", "lora_A", "lora_E", "lora_B", "bias"])
def test_tensor_subclasses(name):
    c = random_case()
    expected, base = svd_linear(**c, scaling=1.5), F.linear(c["x"], c["weight"], c["bias"])
    c[name] = Wrapped(c[name])
    torch.testing.assert_close(svd_linear(**c, scaling=1.5), expected)
    given = {k: c[k] for k in NAMES}
    torch.testing.assert_close(svd_delta(base, **given, scaling=1.5), expected)


@pytest.mark.parametrize("dropout_p", [0.0, 0.25], ids=["", "dropout"])
def test_nested_tensors(dropout_p):
    c = random_case()
    parts = [torch.randn(n, 13) for n in (3, 0, 4)]
    x = torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)
    y = svd_linear(**{**c, "x": x}, dropout_p=dropout_p)
    y.values().sum().backward()
    assert x.grad.shape == x.shape
    if not dropout_p:
        for part, result in zip(parts, y.unbind(), strict=True):
            torch.testing.assert_close(result, svd_linear(**{**c, "x": part}))


def ops_of(graph):
    return [str(n.target) for n in graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize("dropout_p", [0.0, 0.25], ids=["", "dropout"])
def test_graphs_that_stay_in_this_process_have_the_op(dropout_p):
    c = random_case()

    def run(x):
        return svd_linear(**{**c, "x": x}, dropout_p=dropout_p)

    graphs = []

    def backend(module, inputs):
        graphs.append(module.graph)
        return module

    torch.compile(run, fullgraph=True, backend=backend)(c["x"])
    graphs.append(make_fx(run)(c["x"]).graph)
    for graph in graphs:
        found = ops_of(graph)
        assert sum("svd_linear" in op for op in found) == 1, found
        assert not any("addmm" in op or "matmul" in op or op == "linear" for op in found), found
    with FakeTensorMode(), CountOps() as counted:
        fakes = {k: t if t is None else torch.empty(t.shape) for k, t in c.items()}
        assert svd_linear(**fakes, dropout_p=dropout_p).shape == (7, 9)
    assert counted.counts["adalora::svd_linear"] == 1


def test_torch_func_compiles():
    ours, plain, tensors = functions()

    def per_sample(function):
        return torch.func.vmap(torch.func.grad(scalar(function), ALL), (0, None, None, None))

    compiled = torch.compile(per_sample(ours), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), per_sample(plain)(*tensors))


def test_plain_tensors_outside_transforms_are_served():
    c = random_case()
    assert why_plain(*c.values(), nn.Parameter(c["x"]), None) is None


WHY = {
    "subclass": (lambda run, x: run(Wrapped(x)), "Wrapped is a tensor subclass"),
    "func": (lambda run, x: torch.func.vmap(run)(x), r"torch\.func"),
    "trace": (lambda run, x: torch.jit.trace(run, x), r"torch\.jit\.trace"),
    "create_graph": (
        lambda run, x: torch.autograd.grad(run(x.requires_grad_()).sum(), x, create_graph=True),
        "create_graph",
    ),
}


def forward_mode(run, x):
    with fwd.dual_level():
        return run(fwd.make_dual(x, x))


def export(run, x):
    module = nn.Module()
    module.forward = run
    return torch.export.export(module, (x,), strict=False)


@pytest.mark.parametrize("op", ["svd_linear", "svd_delta"])
@pytest.mark.parametrize(
    ("call", "says"),
    [*WHY.values(), (forward_mode, "forward-mode"), (export, r"torch\.export")],
    ids=[*WHY, "forward_mode", "export"],
)
def test_triton_by_name_is_refused_in_words(call, says, op):
    c = random_case()

    def run(x):
        given = {**c, "x": x, "impl": "triton"}
        if op == "svd_delta":
            base = F.linear(x, given.pop("weight"), given.pop("bias"))
            return svd_delta(base, **given)
        return svd_linear(**given)

    with pytest.raises(RuntimeError, match=f"impl='triton' cannot run: .*{says}"):
        call(run, c["x"])


@pytest.mark.parametrize("squared", [False, True], ids=["peft", "paper"])
@pytest.mark.parametrize("name", sorted(TRANSFORMS.keys() - {"vmap_x", "per_sample"}))
def test_transforms_of_the_regulariser(name, squared):
    transform = TRANSFORMS[name]
    tensors = tuple(torch.randn(4, 3, 4, dtype=torch.float64).unbind())

    def value(function):
        return lambda a, b, c, d: function([(a, b.T), (c, d.T)], 0.3, squared)

    actual, expected = (transform(value(f), tensors) for f in (orth_reg, reference.orth_reg))
    torch.testing.assert_close(actual, expected)

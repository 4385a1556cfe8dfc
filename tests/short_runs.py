"""Who goes the short way and who the long one: run on the CPU, and over the fake GPU.

    python tests/short_runs.py FILE

runs all scenarios over the fake GPU, in what has to be a fresh process, and writes into FILE what
each raised, as JSON; nothing if it passed.
"""

import contextlib
import itertools
import json
import sys
import threading
import traceback
from pathlib import Path

if __name__ == "__main__":
    from benchmarks import fake_gpu

    fake_gpu.install()

import pytest
import torch
import torch.autograd.forward_ad as fwd
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from adalora_kernels import SVDLinear, launching, svd_delta, svd_linear

DTYPE = torch.bfloat16 if __name__ == "__main__" else torch.float32
OPS = ("svd_linear", "svd_delta")
SHORT = {"svd_linear": "SvdLinearFunctionBackward", "svd_delta": "SvdDeltaFunctionBackward"}
NAMES = ("x", "weight", "lora_A", "lora_E", "lora_B")


def tensors(rows=65, columns=64, r=8):
    torch.manual_seed(3)
    shapes = ((rows, columns), (columns, columns), (r, columns), (r, 1), (columns, r))
    dtypes = (DTYPE, DTYPE, torch.float32, torch.float32, torch.float32)
    made = [torch.randn(s).to(d) for s, d in zip(shapes, dtypes, strict=True)]
    leaves = dict(zip(NAMES, made, strict=True))
    return {n: t if n == "weight" else t.requires_grad_() for n, t in leaves.items()}


def call(op, t, **options):
    if op == "svd_linear":
        return svd_linear(**t, **options)
    base = F.linear(t["x"].detach(), t["weight"])
    return svd_delta(base, *(t[n] for n in NAMES if n != "weight"), **options)


def gradients(y, t):
    wanted = [v for v in t.values() if v.requires_grad]
    made = torch.autograd.grad(y, wanted, torch.ones_like(y))
    assert [g.shape for g in made] == [v.shape for v in wanted]
    return made


def is_short(y, op="svd_linear"):
    return y.grad_fn.name() == SHORT[op]


def plain_calls():
    for op in OPS:
        for options in ({}, {"dropout_p": 0.1}, {"mask": torch.arange(8) % 2 == 0}):
            t = tensors()
            y = call(op, t, **options)
            assert is_short(y, op), options
            gradients(y, t)
            with torch.no_grad():
                assert call(op, t, **options).grad_fn is None
            with torch.inference_mode():
                assert call(op, t, **options).is_inference()


def numbers_that_are_not_floats_go_the_long_way():
    for op in OPS:
        for options in ({"scaling": 2}, {"dropout_p": torch.tensor(0.1)}):
            t = tensors()
            y = call(op, t, **options)
            assert not is_short(y, op)
            gradients(y, t)


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


class SeenFunctions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def modes_see_the_op():
    for op in OPS:
        t = tensors()
        with Seen() as seen:
            y = call(op, t)
        assert seen.names.count(f"adalora::{op}") == 1, seen.names
        with Seen() as seen:
            gradients(y, t)
        assert "adalora::svd_linear_backward" in seen.names
        y = call(op, t)  # The short way; its backward is seen all the same.
        assert is_short(y, op)
        with Seen() as seen:
            gradients(y, t)
        assert "adalora::svd_linear_backward" in seen.names
        with SeenFunctions() as seen:
            call(op, t)
        assert any(f"adalora.{op}" in name for name in seen.names), seen.names


def a_default_device_does_not_look_on():
    with torch.device("cpu"):
        t = tensors()
        for p in (0.0, 0.1):
            y = call("svd_linear", t, dropout_p=p)
            assert is_short(y)
            gradients(y, t)


def forward_mode_and_transforms_are_plain():
    t = {name: value.detach() for name, value in tensors().items()}
    with fwd.dual_level():
        t["x"] = fwd.make_dual(t["x"], t["x"])
        assert fwd.unpack_dual(call("svd_linear", t)).tangent is not None
    x = t.pop("x").detach()
    run = torch.func.grad(lambda x: call("svd_linear", {"x": x, **t}).float().sum())
    assert run(x).shape == x.shape


def autocast():
    """The fake GPU's tensors are on the CPU, but have the autocast of a GPU."""
    on_gpu = __name__ == "__main__"
    device, dtype = ("cuda", torch.float16) if on_gpu else ("cpu", torch.bfloat16)
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_dtype(device, dtype)
    for op in OPS:
        t = tensors()
        torch.set_autocast_enabled(device, True)
        y = call(op, t)
        torch.set_autocast_enabled(device, False)
        assert y.dtype == (dtype if op == "svd_linear" or not on_gpu else DTYPE)
        assert is_short(y, op) == on_gpu
        torch.set_autocast_enabled(device, True)
        made = gradients(y, t)  # Also where the backward is called inside the region.
        torch.set_autocast_enabled(device, False)
        assert [g.dtype for g in made] == [v.dtype for v in t.values() if v.requires_grad]
        assert call(op, t).dtype == DTYPE and is_short(call(op, t), op)
    torch.set_autocast_enabled(device, True)
    for name in ("x", "weight", "bias"):
        t = {n: v.detach() for n, v in tensors().items()}
        t[name] = torch.ones((64,) if name == "bias" else t[name].shape, dtype=torch.int64)
        for dtype in (torch.int64, torch.bool, torch.complex64):
            with pytest.raises(TypeError, match=f"{name} must be floating point, got {dtype}"):
                svd_linear(**t | {name: t[name].to(dtype)})
    torch.set_autocast_enabled(device, before[0])
    torch.set_autocast_dtype(device, before[1])


def compiled():
    for p in (0.0, 0.1):
        t = tensors()
        run = torch.compile(
            lambda *given, p=p: call(
                "svd_linear", dict(zip(NAMES, given, strict=True)), dropout_p=p
            ),
            fullgraph=True,
            backend="aot_eager_decomp_partition",
        )
        y = run(*t.values())
        assert y.shape == (65, 64)
        gradients(y, t)


class LooksOn(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def checkpointing():
    for reentrant in (False, True):
        t = tensors()
        run = lambda x, t=t: call("svd_linear", {**t, "x": x}, dropout_p=0.1).tanh()  # noqa: E731
        y = torch.utils.checkpoint.checkpoint(run, t["x"], use_reentrant=reentrant)
        y.float().sum().backward()
        assert all(v.grad is not None for n, v in t.items() if n != "weight")
    # What is computed again may go the other way than the forward did.
    for op, looked_on in itertools.product(OPS, ("forward", "backward")):
        t = tensors(rows=4)
        run = lambda x, t=t, op=op: call(op, {**t, "x": x}, dropout_p=0.1).tanh()  # noqa: E731
        with LooksOn() if looked_on == "forward" else contextlib.nullcontext():
            y = torch.utils.checkpoint.checkpoint(run, t["x"], use_reentrant=False)
        with LooksOn() if looked_on == "backward" else contextlib.nullcontext():
            gradients(y, t)


def create_graph_is_plain():
    for op in OPS:
        t = tensors()
        leaves = [v for v in t.values() if v.requires_grad]
        first = torch.autograd.grad(call(op, t, dropout_p=0.1).sum(), leaves, create_graph=True)
        torch.autograd.grad(sum(g.float().sum() for g in first), leaves)


def what_was_saved_and_then_written_to_is_refused():
    for name in NAMES:
        t = tensors()
        y = call("svd_linear", t)
        with torch.no_grad():
            t[name].add_(1)
        try:
            gradients(y, t)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
        else:
            raise AssertionError(f"{name} was written to, and nobody has seen it")


def hooks_of_saved_tensors():
    for op in OPS:
        for p in (0.0, 0.1):
            t, packed = tensors(), []

            def pack(value, packed=packed):
                packed.append(value.shape)
                return value.clone()

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
                y = call(op, t, dropout_p=p)
            assert is_short(y, op) and {(65, 64), (65, 8), (8, 1)} <= set(map(tuple, packed))
            gradients(y, t)
            with torch.autograd.graph.save_on_cpu():
                y = call(op, t, dropout_p=p)
            gradients(y, t)


def what_needs_no_gradient():
    for name in (*NAMES, "nothing"):
        t = tensors()
        for other, value in t.items():
            value.requires_grad_(other == name)
        y = call("svd_linear", t)
        if name == "nothing":
            assert not y.requires_grad
            continue
        assert is_short(y)
        gradients(y, t)
    t = tensors()
    bias = torch.zeros(64, dtype=DTYPE, requires_grad=True)
    y = call("svd_linear", t, bias=bias)
    assert torch.equal(
        torch.autograd.grad(y, bias, torch.ones_like(y))[0], torch.full_like(bias, 65)
    )


def a_gradient_that_is_none():
    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, g):
            return None

    for op in OPS:
        t = tensors()
        Nothing.apply(call(op, t)).sum().backward()
        assert all(v.grad is None or not v.grad.any() for v in t.values())


def threads():
    """Each calls layers of its own, and one backward is another thread's."""
    wrong = []

    def work():
        try:
            for _ in range(20):
                t = tensors()
                gradients(call("svd_linear", t, dropout_p=0.1), t)
        except BaseException as error:
            wrong.append(error)

    running = [threading.Thread(target=work) for _ in range(4)]
    t = tensors()
    y = call("svd_linear", t)
    running.append(threading.Thread(target=lambda: y.sum().backward()))
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert not wrong and t["x"].grad.shape == (65, 64), wrong


def layers():
    base = nn.Linear(64, 64, bias=True, dtype=DTYPE).requires_grad_(False)
    layer = SVDLinear.from_linear(base, 8, lora_dropout=0.1, adapter_dtype=torch.float32)
    x = tensors()["x"]
    assert is_short(layer(x))
    layer.lora_dropout = nn.Sequential(nn.Dropout(0.1))
    assert is_short(layer(x), "svd_delta")
    layer.lora_dropout = nn.Identity()
    handle = layer.lora_dropout.register_forward_hook(lambda *_: None)
    assert is_short(layer(x), "svd_delta")
    handle.remove()
    assert is_short(layer(x))
    layer(x).sum().backward()
    with torch.no_grad():
        layer.lora_A.set_(layer.lora_A[:3].clone())
        layer.lora_E.set_(layer.lora_E[:3].clone())
        layer.lora_B.set_(layer.lora_B[:, :3].clone())
    layer.zero_grad()
    layer(x).sum().backward()
    assert layer.lora_A.grad.shape == (3, 64)


def one_row_and_none():
    for rows in (0, 1):
        for op in OPS:
            t = tensors(rows)
            y = call(op, t, dropout_p=0.1)
            assert y.shape == (rows, 64)
            gradients(y, t)


SCENARIOS = {
    f.__name__: f
    for f in (
        *(plain_calls, numbers_that_are_not_floats_go_the_long_way, modes_see_the_op),
        *(a_default_device_does_not_look_on, forward_mode_and_transforms_are_plain, autocast),
        *(compiled, checkpointing, create_graph_is_plain, hooks_of_saved_tensors),
        *(what_was_saved_and_then_written_to_is_refused, what_needs_no_gradient),
        *(a_gradient_that_is_none, threads, layers, one_row_and_none),
    )
}


# What there is over the fake GPU only.


def _layer():
    base = nn.Linear(64, 64, bias=False, dtype=DTYPE).requires_grad_(False)
    return SVDLinear.from_linear(base, 8, lora_dropout=0.1, adapter_dtype=torch.float32)


def no_python_below_the_function():
    """Once there is a plan, nothing of Python is called before the forward ends."""
    from adalora_kernels import short

    forwards = {f.forward.__code__ for f in (short.SvdLinearFunction, short.SvdDeltaFunction)}
    for op in OPS:
        for p in (0.0, 0.1):
            t = tensors()
            call(op, t, dropout_p=p)
            called, inside = [], False

            def look(frame, event, _, called=called):
                nonlocal inside
                if frame.f_code in forwards:
                    inside = event == "call"
                elif inside and event == "call":
                    called.append(frame.f_code.co_name)

            sys.setprofile(look)
            try:
                call(op, t, dropout_p=p)
            finally:
                sys.setprofile(None)
            assert not called, called


def launches_of(run):
    with fake_gpu.recorded() as launches:
        run()
    return [launch.name.strip("_") for launch in launches]


def a_watcher_of_tritons_launches_sees_them():
    """It may begin at any time; the same is launched, by Triton."""
    from triton import knobs

    layer, x, seen = _layer(), tensors()["x"], []
    expected = launches_of(lambda: layer(x).sum().backward())
    hook = knobs.runtime.launch_enter_hook
    watch = lambda metadata: seen.append(metadata.get()["name"].strip("_"))  # noqa: E731
    hook.add(watch)
    try:
        assert launches_of(lambda: layer(x).sum().backward()) == expected == seen
        y = layer(x)
    finally:
        hook.remove(watch)
    seen.clear()
    y.sum().backward()
    layer(x)
    assert not seen and len(expected) == 6


def where_triton_cannot_run_nothing_is_launched():
    """On a GPU that is too old, or without Triton."""
    from adalora_kernels.kernels.svd_linear import plans

    before = launching.why_no_triton
    launching.why_no_triton = lambda device: "the GPU is too old"
    plans.forget_tables()
    try:
        for op, p in itertools.product(OPS, (0.0, 0.1)):
            t = tensors()
            with fake_gpu.recorded() as launches:
                y = call(op, t, dropout_p=p)
                made = gradients(y, t)
            assert not launches
            assert all(g.isfinite().all() for g in (y, *made))
    finally:
        launching.why_no_triton = before
        plans.forget_tables()


def what_the_library_does_not_serve_goes_the_long_way():
    t = tensors(r=257)
    y = call("svd_linear", t)
    assert not is_short(y)
    gradients(y, t)
    try:
        call("svd_linear", {**tensors(), "lora_E": torch.ones(7, 1)})
    except ValueError as error:
        assert "lora_E must be (r, 1) = (8, 1)" in str(error)
    else:
        raise AssertionError("a lora_E of another shape")


def the_ops_launch_by_the_library_too():
    t = tensors()
    expected = launches_of(lambda: gradients(call("svd_linear", t), t))
    missed = fake_gpu.counts()
    for options in ({"scaling": 1}, {"impl": "triton"}):
        y = call("svd_linear", t, **options)
        assert not is_short(y)
        assert launches_of(lambda y=y: gradients(y, t)) == expected[2:]
    assert fake_gpu.counts().errors == missed.errors


def tf32_is_used_as_it_is_allowed_at_the_time():
    """Also where what the base has made is all that is in float32."""
    t, matmul = tensors(), torch.backends.cuda.matmul
    base, before = F.linear(t["x"].detach(), t["weight"]).float(), matmul.fp32_precision
    found = []
    try:
        for matmul.fp32_precision in ("ieee", "tf32", "ieee"):
            with fake_gpu.recorded() as launches:
                y = svd_delta(base, *(t[n] for n in NAMES if n != "weight"))
                y.backward(torch.ones_like(y))
            functions = [launch.function for launch in launches]
            found.append((functions[:2], functions[2:]))
    finally:
        matmul.fp32_precision = before
    assert is_short(y, "svd_delta")
    assert found[0] == found[2]
    assert found[0][0] != found[1][0] and found[0][1] != found[1][1]


def the_report_says_who_launches():
    """And why it is not the library, where it is not."""
    from triton import knobs

    from adalora_kernels import ops

    def rows():
        return {row[1:] for row in ops.implementations("cuda") if row.op.startswith("svd_")}

    assert rows() == {("triton, launched by the compiled library", "")}
    hook, watch = knobs.runtime.launch_exit_hook, print
    hook.add(watch)
    try:
        ((name, why),) = rows()
    finally:
        hook.remove(watch)
    assert name == "triton, launched by Triton" and "somebody watches" in why


OVER_THE_FAKE_GPU = {
    f.__name__: f
    for f in (
        *(no_python_below_the_function, a_watcher_of_tritons_launches_sees_them),
        *(what_the_library_does_not_serve_goes_the_long_way, the_ops_launch_by_the_library_too),
        *(the_report_says_who_launches, where_triton_cannot_run_nothing_is_launched),
        tf32_is_used_as_it_is_allowed_at_the_time,
    )
}


def main(file):
    outcomes = {}
    for name, scenario in {**SCENARIOS, **OVER_THE_FAKE_GPU}.items():
        try:
            scenario()
            outcomes[name] = ""
        except BaseException:
            outcomes[name] = traceback.format_exc()
    Path(file).write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main(sys.argv[1])

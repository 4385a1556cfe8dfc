"""What tests/test_launcher.py asserts, run in one fresh process: scenarios by name.

    python tests/launcher_scenarios.py FILE NAME...

writes into FILE what each raised, as JSON; nothing if it passed.
"""

import ctypes
import itertools
import json
import random
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from launcher_captures import captured_first, captured_frozen, captured_later
from launcher_runs import (
    BF16,
    DROPOUT,
    F16,
    F32,
    PLAIN,
    Problem,
    backward,
    compare,
    compare_launches,
    fake_gpu,
    forget,
    forward,
    launched,
    library,
    tensors_of,
    torch,
)
from launcher_steps import accumulated, overlapping, planned
from launcher_threads import devices, fork, threads

from adalora_kernels.kernels.svd_linear import calls, plans

# Every path, and every argument that may be there or not.
FEW = (
    PLAIN,
    DROPOUT._replace(bias=True),
    PLAIN._replace(delta=True, p=0.1),
    PLAIN._replace(delta=True, base=F16, dtype=F32, need_dx=False),
    PLAIN._replace(leading=(2, 3, 5), bias=True),
    PLAIN._replace(dtype=F32),
    PLAIN._replace(K=37, N=51, R=3, p=0.1),
    PLAIN._replace(leading=(1,), x="wide"),
    PLAIN._replace(leading=(4, 6), x="transposed", weight="transposed", grad_y="transposed"),
    PLAIN._replace(grad_y="sum"),
    # What differs from PLAIN in strides alone.
    *(PLAIN._replace(**{name: "wide"}) for name in ("x", "weight", "grad_y")),
    PLAIN._replace(delta=True, p=0.1, grad_y="wide"),
    DROPOUT._replace(bias=True, small="second"),
    DROPOUT._replace(small="shifted"),
    DROPOUT._replace(delta=True, small="second"),
)
# K of several parts: the workspace of a forward.
LONG = PLAIN._replace(leading=(16, 20), K=2048, N=128)


def paths() -> None:
    """The launcher takes every path, and each is Triton's."""
    with planned("fused"):
        assert compare(PLAIN)[:2] == ["split", "gemm"]
    with planned("two_pass"):
        assert compare(PLAIN)[:2] == ["down", "gemm"]
    assert compare(PLAIN._replace(leading=(3, 5)))[:2] == ["down", "gemm"]
    for p, bias in ((0.0, False), (0.1, True)):
        with planned("cublas"):
            problem = PLAIN._replace(leading=(6, 20), p=p, bias=bias, x="wide")
            launched = ["down", "low_rank_add", "cublas"]
            launched += ["g_pass", "g_reduce", "x_pass", "cublas"]
            assert compare(problem) == launched


def few() -> None:
    for problem in FEW:
        compare(problem)
    compare(LONG)


def all_combinations() -> None:
    """Dtypes, paths, layouts and shapes, all that there is."""
    types = ((BF16, F32), (BF16, BF16), (F16, F32), (F16, F16), (F32, F32), (F32, BF16))
    for (dtype, adapter), delta, p in itertools.product(types, (False, True), (0.0, 0.1)):
        with_types = PLAIN._replace(dtype=dtype, adapter=adapter, delta=delta, p=p)
        for change in (
            {"bias": True, "mask": True, "leading": (150,)},
            {"K": 37, "N": 51, "R": 3},
            {"R": 33, "need_dx": False, "leading": (2, 2, 3)},
        ):
            compare(with_types._replace(**change))
    layouts = ("plain", "wide", "second", "shifted", "transposed", "expanded", "sum")
    for layout in layouts:
        for leading in ((1,), (80,), (4, 6), (3, 2, 5), (1, 1, 9), ()):
            for x, grad_y in ((layout, "plain"), ("plain", layout)):
                compare(PLAIN._replace(leading=leading, x=x, grad_y=grad_y))
        compare(PLAIN._replace(weight=layout, N=1, leading=(4, 6)))
        compare(PLAIN._replace(weight=layout, K=1, leading=(4, 6)))
        compare(PLAIN._replace(weight=layout))
        compare(DROPOUT._replace(small=layout, bias=True))
    for path, M in itertools.product(plans.PATHS, (1, 64, 300)):
        for p, bias in itertools.product((0.0, 0.1), (False, True)):
            with planned(path):
                compare(LONG._replace(leading=(M,), p=p, bias=bias))


def tf32() -> None:
    """Products of float32 may use TF32 or not, and have a plan for each."""
    for precision in ("ieee", "tf32", "ieee"):
        torch.backends.cuda.matmul.fp32_precision = precision
        compare(PLAIN._replace(dtype=F32))
        # What the base has made may be the only matrix in float32.
        compare(PLAIN._replace(delta=True, base=F32))


def forgotten() -> None:
    """A table that is written, as tuning does, counts in the next call."""
    t = tensors_of(PLAIN)
    forward(t, 0.0)
    before = library().adalora_plan_misses()
    forward(t, 0.0)
    assert library().adalora_plan_misses() == before
    plans.forget_tables()
    forward(t, 0.0)
    assert library().adalora_plan_misses() == before + 1


def dropout_rates() -> None:
    """All rates share a plan. Triton compiles some of them in, so its kernel may be another."""
    compare(DROPOUT)
    before = library().adalora_plan_misses()
    t = tensors_of(DROPOUT)
    for p in (0.1, 0.125, 0.5, 1e-9, 1 - 1e-9, 2**-16, 3 * 2**-17):
        with fake_gpu.recorded() as launches:
            forward(t, p)
        drop_below = min(round(p * 2**16), 2**16 - 1).to_bytes(4, "little")
        assert drop_below in launches[0].parameters, p
    assert library().adalora_plan_misses() == before


def random_shapes(layers: int, calls_of_each: int) -> None:
    """A hit launches what a fresh plan would, whatever the layer and the number of rows."""
    rng = random.Random(0)
    for _ in range(layers):
        layer = random_layer(rng)
        for _ in range(calls_of_each):
            leading = [rng.randint(1, 6) for _ in range(rng.randint(0, 2))]
            problem = layer._replace(leading=(*leading, rng.randint(1, 40)))
            hit = launched(problem)
            forget()
            for one, other in zip(hit, launched(problem), strict=True):
                compare_launches(problem, one, other)


def random_layer(rng: random.Random) -> Problem:
    dtype, adapter = rng.choice(((BF16, F32), (BF16, F32), (F16, F16), (F32, F32)))
    return Problem(
        K=rng.choice((rng.randint(1, 100), 64)),
        N=rng.choice((rng.randint(1, 100), 64)),
        R=rng.randint(1, 20),
        dtype=dtype,
        adapter=adapter,
        delta=rng.random() < 0.25,
        bias=rng.random() < 0.5,
        mask=rng.random() < 0.5,
        p=rng.choice((0.0, 0.1)),
        need_dx=rng.random() < 0.8,
        x=rng.choice(("plain", "plain", "wide", "shifted")),
        grad_y=rng.choice(("plain", "plain", "wide", "expanded")),
    )


def buckets() -> None:
    """A number of rows of a bucket that was planned for misses nothing, and launches its own."""
    for bucket in (range(33, 41), range(257, 321, 9)):
        for delta in (False, True):
            problem = LONG._replace(delta=delta, p=0.1)
            compare(problem._replace(leading=(bucket[-1],)))
            before = library().adalora_plan_misses()
            for M in bucket:
                compare(problem._replace(leading=(M,)))
            assert library().adalora_plan_misses() == before
    assert all(plans.rows_bucket(M) == 40 for M in range(33, 41)), "the first bucket is one"


def seeds() -> None:
    """The seed is the value that torch.randint would have drawn, and leaves its generator so."""
    t = tensors_of(DROPOUT) | {"seed": None}
    for _ in range(5):
        before = torch.get_rng_state()
        made = forward(t, 0.1)
        after = torch.get_rng_state()
        torch.set_rng_state(before)
        expected = torch.randint(2**63 - 1, (1,), dtype=torch.int64)
        assert torch.equal(made["seed"], expected) and torch.equal(torch.get_rng_state(), after)
    with fake_gpu.recorded() as launches:
        made = forward(t, 0.1)
    address = made["seed"].data_ptr().to_bytes(8, "little")
    assert address in launches[0].parameters
    assert forward(t, 0.0)["seed"] is None
    # One that was given is not returned, for it would be the same tensor.
    assert forward(tensors_of(DROPOUT), 0.1)["seed"] is None


def refused() -> None:
    """What does not fit is left to the long way, before anything is drawn or launched."""
    t = tensors_of(DROPOUT._replace(leading=(4, 5), bias=True))
    base = tensors_of(PLAIN._replace(leading=(4, 5), delta=True))["base"]
    wrong: dict[str, list[Any]] = {
        "x": [t["x"][..., :63], t["x"].double(), t["x"][:0], t["x"].to_sparse(), t["x"].to("meta")],
        "weight": [t["weight"].float(), t["weight"][:95], t["weight"][0], None],
        "bias": [t["bias"].float(), t["bias"][:95], t["bias"][None]],
        "base": [base],  # beside a weight
        "A": [t["A"][:7], t["A"].double(), t["A"].bfloat16(), t["A"][0], t["A"].new_ones(300, 64)],
        "E": [t["E"][:7], t["E"][:, 0], t["E"].double(), t["E"].int()],
        "B": [t["B"][:95], t["B"].bfloat16(), t["B"][:, :7]],
        "mask": [t["mask"].int(), t["mask"][:7], t["mask"][None]],
        "seed": [t["seed"].int(), torch.tensor([1, 2])],
        "h": [t["h"].bfloat16(), t["h"].flatten(0, 1), t["h"][..., :7], t["h"][:3]],
        "grad_y": [t["grad_y"].float(), t["grad_y"][..., :95], t["grad_y"].flatten(0, 1)],
    }
    state = torch.get_rng_state()
    with fake_gpu.recorded() as launches:
        for name, values in wrong.items():
            for value in values:
                changed = t | {name: value}
                if name not in ("h", "grad_y"):
                    changed["seed"] = changed["seed"] if name == "seed" else None
                    assert set(forward(changed, 0.1).values()) == {None}, (name, value)
                if name not in ("bias", "base", "weight") or value is not None:
                    changed = t | {name: value}
                    if name not in ("bias", "base"):
                        assert set(backward(changed, 0.1, True).values()) == {None}, (name, value)
        for p in (-0.1, 1.0, float("nan")):
            assert set(forward(t | {"seed": None}, p).values()) == {None}
        # A backward has the seed of its forward.
        assert set(backward(t | {"seed": None}, 0.1, True).values()) == {None}
    assert launches == [] and torch.equal(torch.get_rng_state(), state)


def errors() -> None:
    """What the driver refuses is an exception that names the call, and says why."""
    t = tensors_of(PLAIN)
    with fake_gpu.recorded() as launches:
        forward(t, 0.0)
    # Nobody knows any more what it takes, so that it cannot be recorded.
    function = ctypes.c_void_p(launches[0].function)
    fake_gpu._library().adalora_fake_declare(function, 0, None)
    with fake_gpu.recorded():
        found = [error_of(lambda: forward(t, 0.0))]
    assert "cuLaunchKernelEx failed: invalid resource handle (CUDA error 400)" in found[0]
    # A thread without a context asks for that of its device, and there are eight.
    fake_gpu.set_device(9)
    try:
        backward(t, 0.0, True)
        worker = threading.Thread(
            target=lambda: found.append(error_of(lambda: backward(t, 0.0, True)))
        )
        worker.start()
        worker.join()
    finally:
        fake_gpu.set_device(0)
    assert "cuDevicePrimaryCtxRetain failed: invalid argument (CUDA error 1)" in found[1]


def error_of(call: Any) -> str:
    try:
        call()
    except RuntimeError as error:
        return str(error)
    raise AssertionError("it raises nothing")


def none_served() -> None:
    """Where planning raises, nothing is launched, and the next call plans again."""
    t = tensors_of(PLAIN._replace(R=5))
    original = calls.forward_recipe

    def interrupted(call: Any) -> Any:
        raise KeyboardInterrupt

    forget()
    try:
        calls.forward_recipe = lambda call: 1 / 0
        assert set(forward(t, 0.0).values()) == {None}
        # Torch does not hand on what is no error; it must not be lost all the same.
        calls.forward_recipe = interrupted
        assert "planned, and this was interrupted" in error_of(lambda: forward(t, 0.0))
    finally:
        calls.forward_recipe = original
    assert forward(t, 0.0)["y"] is not None


SCENARIOS = {
    **{f.__name__: f for f in (paths, few, tf32, overlapping, accumulated, buckets, threads)},
    **{
        f.__name__: f
        for f in (dropout_rates, fork, devices, captured_first, captured_frozen, captured_later)
    },
    **{f.__name__: f for f in (seeds, refused, forgotten, none_served, all_combinations)},
    "random_60": lambda: random_shapes(3, 20),
    "random_1000": lambda: random_shapes(25, 40),
    "errors": errors,  # leaves a kernel behind that cannot be recorded any more
}


def main(file: str, *names: str) -> None:
    outcomes = {}
    for name in names:
        try:
            SCENARIOS[name]()
            outcomes[name] = ""
        except BaseException:
            outcomes[name] = traceback.format_exc()[-4000:]
        Path(file).write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main(*sys.argv[1:])

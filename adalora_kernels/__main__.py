"""`python -m adalora_kernels` prints the environment, what each op runs, and a self-check.

With --tune, on a GPU, it measures the paths of the layer op for given layers instead, and remembers
the fastest.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import __version__, functional, launching, ops, reference

if TYPE_CHECKING:
    from .kernels.svd_linear.plans import Plan
    from .kernels.tune import Call, Layer

_PACKAGES = ("torch", "triton", "peft", "transformers", "matplotlib")
_FACTORS = ("lora_A", "lora_E", "lora_B")
_MODEL_SHAPES = [(6, 48), (6, 1), (40, 6)] * 3  # the factors of three layers


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[str]:
    return ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]


def _describe(device: str) -> str:
    if device == "cpu":
        return f"{platform.machine()}, {torch.get_num_threads()} threads"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)}, sm_{major}{minor}"


def _relative_error(actual: Tensor, exact: Tensor) -> float:
    # A maximum over comparisons would let NaN through; a norm does not.
    return float((actual.double().cpu() - exact.cpu()).norm() / exact.norm().cpu())


class Check(NamedTuple):
    """The errors of one result of an op, relative to float64 on the CPU."""

    what: str
    error: float
    plain: float  # that of plain PyTorch, in the dtype and on the device of the op

    @classmethod
    def of(cls, what: str, actual: Tensor, plain: Tensor, exact: Tensor) -> Check:
        return cls(what, _relative_error(actual, exact), _relative_error(plain, exact))


def _random(shapes: Sequence[tuple[int, ...]], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def _run_layer(
    impl: functional.Impl, inputs: dict[str, Tensor], grad_y: Tensor
) -> dict[str, Tensor]:
    """Run `svd_linear` forward and backward; returns y and the gradients by name."""
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    op: Callable[..., Tensor] = functional.svd_linear
    y = op(**leaves, scaling=1.5, impl=impl)
    wanted = [leaves[name] for name in ("x", *_FACTORS)]
    grads = torch.autograd.grad(y, wanted, grad_y.to(y.dtype))
    return {"y": y.detach(), **dict(zip(("dx", "dA", "dE", "dB"), grads, strict=True))}


def _check_linear(device: str, dtype: torch.dtype) -> list[Check]:
    names = ("x", "weight", *_FACTORS, "grad_y")
    shapes = [(33, 48), (40, 48), (6, 48), (6, 1), (40, 6), (33, 40)]
    values = [t.to(dtype).double() for t in _random(shapes, seed=0)]
    inputs = dict(zip(names, values, strict=True))
    grad_y = inputs.pop("grad_y")
    moved = {name: t.to(device, dtype) for name, t in inputs.items()}
    exact = _run_layer("reference", inputs, grad_y)
    plain = _run_layer("reference", moved, grad_y.to(device))
    actual = _run_layer("auto", moved, grad_y.to(device))
    return [
        Check.of(f"svd_linear {name}", actual[name], plain[name], exact[name]) for name in exact
    ]


def _check_importance(device: str) -> Check:
    params, grads = _random(_MODEL_SHAPES, seed=1), _random(_MODEL_SHAPES, seed=2)

    def scores_of(update_: Callable[..., None], dtype: torch.dtype, where: str) -> Tensor:
        def moved(tensors: list[Tensor]) -> list[Tensor]:
            return [t.to(where, dtype) for t in tensors]

        averages = [[torch.zeros_like(p) for p in moved(params)] for _ in range(2)]
        scores = torch.zeros(18, dtype=dtype, device=where)
        skipped = torch.zeros(1, dtype=torch.int64, device=where)
        for _ in range(3):
            update_(moved(params), moved(grads), *averages, scores, skipped, 0.85, 0.85)
        return scores

    return Check.of(
        "importance_update_ scores",
        scores_of(torch.ops.adalora.importance_update_, torch.float32, device),
        scores_of(reference.importance_update_, torch.float32, device),
        scores_of(reference.importance_update_, torch.float64, "cpu"),
    )


def _check_orth_reg(device: str) -> Check:
    params = _random(_MODEL_SHAPES, seed=1)

    def gradients_of(orth_reg: Callable[..., Tensor], dtype: torch.dtype, where: str) -> Tensor:
        leaves = [p.to(where, dtype).requires_grad_() for p in params]
        lora_A, lora_B = leaves[0::3], leaves[2::3]
        penalty = orth_reg(list(zip(lora_A, lora_B, strict=True)), 1.0)
        return torch.cat([g.flatten() for g in torch.autograd.grad(penalty, lora_A + lora_B)])

    return Check.of(
        "orth_reg gradients",
        gradients_of(functional.orth_reg, torch.float32, device),
        gradients_of(reference.orth_reg, torch.float32, device),
        gradients_of(reference.orth_reg, torch.float64, "cpu"),
    )


def self_check(device: str) -> bool:
    """Print the error of every op beside that of plain PyTorch; returns whether all are small.

    A result is good if its error against float64 is at most twice that of plain PyTorch in the same
    dtype, plus one rounding step.
    """
    passed = True
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rows = _check_linear(device, dtype)
        if dtype == torch.float32:
            rows += [_check_importance(device), _check_orth_reg(device)]
        for what, error, plain in rows:
            good = error <= 2.0 * plain + torch.finfo(dtype).eps
            passed &= good
            print(
                f"  {what:26} {str(dtype).removeprefix('torch.'):9} error {error:.1e}  "
                f"plain PyTorch {plain:.1e}  {'ok' if good else 'TOO LARGE'}"
            )
    return passed


def report() -> int:
    """Print the report; returns 0 if the self-check passed on every device, else 1."""
    print(f"adalora_kernels {__version__}, Python {platform.python_version()}")
    print("  " + ", ".join(f"{package} {_version(package)}" for package in _PACKAGES))
    path, built_for, why_not = ops.library
    print(f"  compiled library: {f'for {built_for}, {path}' if path else f'none ({why_not})'}")
    why = launching.why_not_library()
    by = f"Triton, because {why}" if why else "the compiled library, in one call per layer"
    print(f"  kernels of a layer on a GPU are launched by {by}")
    passed = True
    for device in _devices():
        print(f"\n{device}: {_describe(device)}")
        for op, name, why in ops.implementations(device):
            print(f"  {op:22} {name}{f'; not faster because {why}' if why else ''}")
        passed &= self_check(device)
    print("\nself-check passed" if passed else "\nself-check FAILED")
    return 0 if passed else 1


def _shape(text: str) -> tuple[int, int]:
    """Parse "4096x14336"."""
    in_features, out_features = map(int, text.split("x"))
    return in_features, out_features


def tune(
    layers: Sequence[Layer],
    device: torch.device,
    *seconds: Callable[[Mapping[Plan, Sequence[Call]]], Mapping[Plan, float]],
) -> None:
    """Measure the layers on a GPU, print the fastest plans, and write them to the user's table."""
    from .kernels import tune
    from .kernels.svd_linear import plans

    for problem, plan, time in tune.tune(layers, device, *seconds):
        print(f"{tuple(problem)[1:]}: {plan.path} {tuple(plan.gemm)}, {time * 1e6:.1f} us")
        # At once, so that stopping early loses nothing.
        plans.write_table(plans.cache_path(), plans.device_of(device).name, {problem: plan})
    print(f"written to {plans.cache_path()}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m adalora_kernels", description=__doc__)
    add = parser.add_argument
    add("--tune", action="store_true", help="measure and remember, instead")
    shapes = [(4096, 4096), (4096, 14336), (14336, 4096)]
    add("--shapes", nargs="+", type=_shape, default=shapes, help="layers, in x out")
    rows = [1, 16, 64, 2048, 8192, 16384]
    add("--rows", nargs="+", type=int, default=rows, help="tokens per batch")
    add("--ranks", nargs="+", type=int, default=[16])
    add("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    return parser


def main(arguments: Sequence[str] = ()) -> int:
    """Run the command; returns its exit status."""
    options = _parser().parse_args(arguments)
    if not options.tune:
        return report()
    if not torch.cuda.is_available():
        print("--tune measures on an NVIDIA GPU, and torch finds none", file=sys.stderr)
        return 1
    from .kernels.tune import Layer

    dtype = getattr(torch, options.dtype)
    layers = [
        Layer(dtype, M, K, N, r)
        for (K, N), M, r in itertools.product(options.shapes, options.rows, options.ranks)
    ]
    tune(layers, torch.device("cuda", torch.cuda.current_device()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

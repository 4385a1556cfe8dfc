"""`python -m adalora_kernels`: the environment, what each op runs, and a numerical self-check.

With --tune, on a GPU: measure the paths of the layer op for given layers and remember the fastest.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import __version__, functional, ops, reference

if TYPE_CHECKING:
    from .kernels.tune import Call, Layer

_PACKAGES = ("torch", "triton", "peft", "transformers", "matplotlib")
_FACTORS = ("lora_A", "lora_E", "lora_B")


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


def _gradients(
    op: Callable[..., Tensor], inputs: dict[str, Tensor], grad_y: Tensor
) -> dict[str, Tensor]:
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    y = op(**leaves)
    wanted = [leaves[name] for name in ("x", *_FACTORS)]
    grads = torch.autograd.grad(y, wanted, grad_y.to(y.dtype))
    return {"y": y.detach(), **dict(zip(("dx", "dA", "dE", "dB"), grads, strict=True))}


def _check_linear(device: str, dtype: torch.dtype) -> Iterator[tuple[str, float, float]]:
    """(what, error of the op, error of plain autograd), against float64 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "x": (33, 48),
        "weight": (40, 48),
        "lora_A": (6, 48),
        "lora_E": (6, 1),
        "lora_B": (40, 6),
    }
    exact = {
        name: torch.randn(shape, generator=generator).to(dtype).double()
        for name, shape in shapes.items()
    }
    grad_y = torch.randn(33, 40, generator=generator).to(dtype).double()
    inputs = {name: t.to(device, dtype) for name, t in exact.items()}

    def op(impl: functional.Impl) -> Callable[..., Tensor]:
        return lambda **tensors: functional.svd_linear(**tensors, scaling=1.5, impl=impl)

    oracle = _gradients(op("reference"), exact, grad_y)
    plain = _gradients(op("reference"), inputs, grad_y.to(device))
    for name, actual in _gradients(op("auto"), inputs, grad_y.to(device)).items():
        yield (
            f"svd_linear {name}",
            _relative_error(actual, oracle[name]),
            _relative_error(plain[name], oracle[name]),
        )


def _check_model_ops(device: str) -> Iterator[tuple[str, float, float]]:
    """The same for the ops over whole models, in float32."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(6, 48), (6, 1), (40, 6)] * 3
    params = [torch.randn(shape, generator=generator) for shape in shapes]
    grads = [torch.randn(shape, generator=generator) for shape in shapes]

    def update(op: Callable[..., None], dtype: torch.dtype, where: str) -> Tensor:
        def moved(tensors: list[Tensor]) -> list[Tensor]:
            return [t.to(where, dtype) for t in tensors]

        averages = [[torch.zeros_like(p) for p in moved(params)] for _ in range(2)]
        scores = torch.zeros(18, dtype=dtype, device=where)
        skipped = torch.zeros(1, dtype=torch.int64, device=where)
        for _ in range(3):
            op(moved(params), moved(grads), *averages, scores, skipped, 0.85, 0.85)
        return scores

    def penalty_grads(orth_reg: Callable[..., Tensor], dtype: torch.dtype) -> Tensor:
        leaves = [p.to(device, dtype).requires_grad_() for p in params]
        matrices = leaves[0::3] + leaves[2::3]
        value = orth_reg(list(zip(leaves[0::3], leaves[2::3], strict=True)), 1.0)
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, matrices)])

    exact = update(reference.importance_update_, torch.float64, "cpu")
    plain = update(reference.importance_update_, torch.float32, device)
    actual = update(torch.ops.adalora.importance_update_, torch.float32, device)
    yield (
        "importance_update_ scores",
        _relative_error(actual, exact),
        _relative_error(plain, exact),
    )
    exact = penalty_grads(reference.orth_reg, torch.float64)
    plain = penalty_grads(reference.orth_reg, torch.float32)
    actual = penalty_grads(functional.orth_reg, torch.float32)
    yield "orth_reg gradients", _relative_error(actual, exact), _relative_error(plain, exact)


def self_check(device: str) -> bool:
    """Print every op's error against float64 beside plain PyTorch's; True if none is too large.

    The bound is twice the error of plain PyTorch in the same dtype, plus one rounding step.
    """
    passed = True
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rows = list(_check_linear(device, dtype))
        if dtype == torch.float32:
            rows += _check_model_ops(device)
        for what, error, plain in rows:
            good = error <= 2.0 * plain + torch.finfo(dtype).eps
            passed &= good
            print(
                f"  {what:26} {str(dtype).removeprefix('torch.'):9} error {error:.1e}  "
                f"plain PyTorch {plain:.1e}  {'ok' if good else 'TOO LARGE'}"
            )
    return passed


def report() -> int:
    """Print the report; 0 if the self-check passed on every device, else 1."""
    print(f"adalora_kernels {__version__}, Python {platform.python_version()}")
    print("  " + ", ".join(f"{package} {_version(package)}" for package in _PACKAGES))
    path, built_for, why_not = ops.library
    print(f"  compiled library: {f'for {built_for}, {path}' if path else f'none ({why_not})'}")
    passed = True
    for device in _devices():
        print(f"\n{device}: {_describe(device)}")
        for op, name, why in ops.implementations(torch.device(device).type):
            print(f"  {op:22} {name}{f'; not faster because {why}' if why else ''}")
        passed &= self_check(device)
    print("\nself-check passed" if passed else "\nself-check FAILED")
    return 0 if passed else 1


def _shape(text: str) -> tuple[int, int]:
    in_features, out_features = map(int, text.split("x"))
    return in_features, out_features


def tune(
    layers: Sequence[Layer], device: torch.device, *seconds: Callable[[Sequence[Call]], float]
) -> None:
    """Measure, print, and write the user's table."""
    from .kernels import tune
    from .kernels.svd_linear import plans

    for problem, plan, time in tune.tune(layers, device, *seconds):
        print(f"{tuple(problem)[1:]}: {plan.path} {tuple(plan.gemm)}, {time * 1e6:.1f} us")
        # At once, so that stopping early loses nothing.
        plans.write_table(plans.cache_path(), plans.device_of(device).name, {problem: plan})
    print(f"written to {plans.cache_path()}")


def main(arguments: Sequence[str] = ()) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m adalora_kernels", description=__doc__)
    parser.add_argument("--tune", action="store_true", help="measure and remember, instead")
    shapes = [(4096, 4096), (4096, 14336), (14336, 4096)]
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=_shape,
        default=shapes,
        help="layers, in x out",
    )
    rows = [1, 16, 64, 2048, 8192, 16384]
    parser.add_argument("--rows", nargs="+", type=int, default=rows, help="tokens per batch")
    parser.add_argument("--ranks", nargs="+", type=int, default=[16])
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    options = parser.parse_args(arguments)
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

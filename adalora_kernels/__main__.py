"""`python -m adalora_kernels`: the environment, what each op runs, and a numerical self-check."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from . import __version__, functional, ops, reference

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

    def penalty_grads(op: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype) -> Tensor:
        leaves = [p.to(device, dtype).requires_grad_() for p in params]
        norms, _ = op(leaves[0::3], leaves[2::3])
        matrices = leaves[0::3] + leaves[2::3]
        return torch.cat([g.flatten() for g in torch.autograd.grad(norms.sum(), matrices)])

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
    actual = penalty_grads(torch.ops.adalora.orth_reg, torch.float32)
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


def main() -> int:
    """Print the report; 0 if the self-check passed on every device, else 1."""
    print(f"adalora_kernels {__version__}, Python {platform.python_version()}")
    print("  " + ", ".join(f"{package} {_version(package)}" for package in _PACKAGES))
    passed = True
    for device in _devices():
        print(f"\n{device}: {_describe(device)}")
        for op, name, why in ops.implementations(torch.device(device).type):
            print(f"  {op:22} {name}; not faster because {why}")
        passed &= self_check(device)
    print("\nself-check passed" if passed else "\nself-check FAILED")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())

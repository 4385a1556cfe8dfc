"""The orthogonality regulariser of a whole model (paper, eq. 4)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from . import ops, reference
from .adapters import Adapter, find_adapters
from .checks import as_grad_scale, as_weight, check_floating, shape_of
from .distributed.layout import Layout
from .distributed.shards import any_dtensor, local_grads, local_tensors
from .fusing import why_plain

Pairs: TypeAlias = nn.Module | Iterable[tuple[Tensor, Tensor] | Adapter]

# The most that is stacked at a time: on a CPU about what stays in the cache between two products,
# elsewhere what keeps the memory bounded while there are few launches.
_STACK_BYTES = {"cpu": 2**20}
_LARGEST_STACK_BYTES = 2**26
# cuBLAS adds up a long, thin Bᵀ·B one after the other, with several times the error of what it does
# for a single matrix. So long are the sums that are made there and then added.
_SUM_LENGTH = {"cuda": 256}


def orth_reg(pairs_or_model: Pairs, weight: float = 0.1, squared: bool = False) -> Tensor:
    """The orthogonality regulariser (paper, eq. 4), differentiable.

    weight · mean over all lora_A, lora_B of ‖G - I‖_F (loralib, PEFT), or the paper's
    weight · Σ ‖G - I‖²_F if `squared`; G = A·Aᵀ or Bᵀ·B. It can be differentiated any number of
    times, and transformed by `torch.func`.

    Args:
        pairs_or_model: (lora_A (r, in), lora_B (out, r)) pairs of floating point tensors on one
            device; adapters, such as those of a `RankAllocator`; or a model in which
            `find_adapters` finds them, which takes time. Rank 0 counts as norm 0.
        weight: the coefficient, ≥ 0.

    Returns:
        A scalar on the adapters' device, float32 (float64 for float64 adapters).

    Raises:
        TypeError: not a model or pairs of floating point tensors, or weight is not a number.
        ValueError: no pair at all, shapes or devices that do not fit, or a negative weight.
    """
    lora_A, lora_B = _pairs(pairs_or_model)
    weight = as_weight("weight", weight)
    is_sharded = any_dtensor(lora_A + lora_B)
    if not is_sharded and why_plain(*lora_A, *lora_B) is not None:
        return reference.orth_reg(zip(lora_A, lora_B, strict=True), weight, squared)
    function = ShardedOrthRegFunction if is_sharded else OrthRegFunction
    apply: Callable[..., Tensor] = function.apply
    total = apply(len(lora_A), squared, *lora_A, *lora_B)
    return _coefficient(weight, squared, len(lora_A)) * total


@torch.no_grad()
def orth_reg_grad_(
    pairs_or_model: Pairs,
    weight: float,
    squared: bool = False,
    *,
    grad_scale: float | Tensor | None = None,
) -> Tensor:
    """Add the gradient of `orth_reg` straight into the `.grad` of the adapters.

    To be called once per optimizer step, after the last backward and before clipping: the
    regulariser then counts once under gradient accumulation, DDP and activation checkpointing,
    and no autograd graph is built. Of sharded adapters (DTensors) each process adds to what it
    holds, so that all have to call this: one all-reduce of the products (r, r), and before it, if
    rows of lora_A are divided, one all-gather of these. With a GradScaler, call
    `scaler.unscale_(optimizer)` first, or give grad_scale.

    Args, raises: those of `orth_reg`. Parameters that need no gradient are left out.
        grad_scale: what ∂L/∂w is of the gradients; 1 / 1024 if the loss was multiplied by 1024. A
            number, or one float32 on the adapters' device. None: 1.

    Returns:
        The value of the regulariser, a scalar on the adapters' device; nothing is read back.
    """
    lora_A, lora_B = _pairs(pairs_or_model)
    weight = as_weight("weight", weight)
    scale = as_grad_scale(grad_scale, lora_A[0].device)
    coefficient = _coefficient(weight, squared, len(lora_A))
    if any_dtensor(lora_A + lora_B):
        return coefficient * _add_sharded_gradients_(
            lora_A + lora_B, len(lora_A), squared, coefficient, scale
        )
    return coefficient * _add_gradients_(lora_A + lora_B, len(lora_A), squared, coefficient, scale)


class OrthRegFunction(torch.autograd.Function):
    """The sum over all matrices of ‖G - I‖_F, or of ‖G - I‖²_F if `squared`.

    The arguments are the number of lora_A, `squared`, all lora_A and all lora_B. Of what the
    forward has made only the slopes (n, r, r) are kept: the backward stacks the matrices again.
    """

    @staticmethod
    def forward(ctx: Any, count: int, squared: bool, *matrices: Tensor) -> Tensor:
        """The sum, a scalar; matrices (r, in) and (out, r) are floating point, on one device."""
        ctx.count, ctx.squared = count, squared
        total, slopes = _total(matrices, count, squared)
        ctx.save_for_backward(*matrices, *slopes)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of all matrices, in their shapes and dtypes, times `grad`, a scalar."""
        matrices = ctx.saved_tensors[: len(ctx.needs_input_grad) - 2]
        # Where the backward is differentiated itself, the slopes must depend on the matrices.
        is_constant = not torch.is_grad_enabled()
        slopes = ctx.saved_tensors[len(matrices) :] if is_constant else None
        return None, None, *_gradients(matrices, ctx.count, ctx.squared, grad, slopes)


def _coefficient(weight: float, squared: bool, count: int) -> float:
    """The factor of the sum over the matrices of `count` pairs."""
    return weight if squared else weight / (2 * count)


@ops.outside_autocast
def _total(matrices: Sequence[Tensor], count: int, squared: bool) -> tuple[Tensor, list[Tensor]]:
    """The sum, and the slope of each stack."""
    total, slopes = _zero(matrices), []
    for stack in _stacks(matrices, count):
        penalty, slope = _penalty(stack.products(), squared)
        total = total + penalty
        slopes.append(slope)
    return total, slopes


@ops.outside_autocast
def _gradients(
    matrices: Sequence[Tensor],
    count: int,
    squared: bool,
    grad: Tensor,
    slopes: Sequence[Tensor] | None,
) -> list[Tensor]:
    """The gradients of `_total` times `grad`, each in the shape and dtype of its matrix."""
    # Matrices of rank 0 are in no stack.
    gradients = [torch.zeros_like(m) if m.numel() == 0 else m for m in matrices]
    for k, stack in enumerate(_stacks(matrices, count)):
        slope = _penalty(stack.products(), squared)[1] if slopes is None else slopes[k]
        for i, gradient in zip(stack.members, stack.gradients(slope * grad), strict=True):
            gradients[i] = gradient.to(matrices[i].dtype)
    return gradients


@ops.outside_autocast
def _add_gradients_(
    matrices: list[Tensor], count: int, squared: bool, coefficient: float, scale: Tensor | None
) -> Tensor:
    """Add coefficient / scale times the gradients of `_total` to `.grad`, and return `_total`."""
    total = _zero(matrices)
    for stack in _stacks(matrices, count):
        penalty, slope = _penalty(stack.products(), squared)
        total = total + penalty
        slope = slope * coefficient
        if scale is not None:
            slope = slope / scale
        _add_to_grad_([matrices[i] for i in stack.members], stack.gradients(slope))
    return total


class ShardedOrthRegFunction(torch.autograd.Function):
    """As `OrthRegFunction`, of matrices of which some are DTensors; differentiable once.

    It has the gradients of what this process holds from the forward, so that processes need not
    talk again.
    """

    @staticmethod
    def forward(ctx: Any, count: int, squared: bool, *matrices: Tensor) -> Tensor:
        """The sum over the matrices of all processes, the same scalar on each of them."""
        layout = ctx.layout = Layout(matrices)
        total, gradients = _sharded_total(matrices, layout, count, squared)
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of what this process holds, as DTensors where the matrices are some."""
        gradients = (g.mul(grad).to(g.dtype) for g in ctx.saved_tensors)
        return None, None, *(ctx.layout.like(g, i) for i, g in enumerate(gradients))


@ops.outside_autocast
@torch.no_grad()
def _sharded_total(
    tensors: Sequence[Tensor],
    layout: Layout,
    count: int,
    squared: bool,
    factor: Tensor | float | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """The sum over all matrices, and its gradients, times `factor`, of what this process holds."""
    dims = [0] * count + [1] * (len(tensors) - count)
    matrices = layout.gather_vectors(local_tensors(tensors), dims)
    products = [_zero(matrices).view(1, 1)[:0, :0]] * len(matrices)  # of those of rank 0
    for stack in _stacks(matrices, count):
        for i, product in zip(stack.members, stack.products().unbind(), strict=True):
            products[i] = product
    total, slopes = _penalties(layout.sum_products(products, dims), squared)
    gradients = list(local_tensors(tensors))  # of rank 0 there is nothing else
    for stack in _stacks(matrices, count):
        slope = torch.stack([slopes[i] for i in stack.members])
        if factor is not None:
            slope = slope * factor
        for i, gradient in zip(stack.members, stack.gradients(slope), strict=True):
            piece, dim = layout.pieces[i], dims[i]
            gradients[i] = gradient.narrow(dim, piece.offset[dim], piece.size[dim])
    return total, gradients


def _penalties(products: list[Tensor], squared: bool) -> tuple[Tensor, list[Tensor]]:
    """The sum over all matrices, and the slope of each, from the products (r, r) of each.

    In the same order on all processes, whose parts may have different shapes.
    """
    total, slopes = _zero(products), list(products)
    by_rank: dict[int, list[int]] = defaultdict(list)
    for i, product in enumerate(products):
        by_rank[len(product)].append(i)
    for members in by_rank.values():
        penalty, slope = _penalty(torch.stack([products[i] for i in members]), squared)
        total = total + penalty
        for i, own in zip(members, slope.unbind(), strict=True):
            slopes[i] = own
    return total, slopes


def _add_sharded_gradients_(
    matrices: list[Tensor], count: int, squared: bool, coefficient: float, scale: Tensor | None
) -> Tensor:
    """`_add_gradients_`, of matrices of which some are DTensors."""
    factor = coefficient if scale is None else coefficient / scale
    total, gradients = _sharded_total(matrices, Layout(matrices), count, squared, factor)
    _add_to_grad_(matrices, gradients)
    return total


def _zero(matrices: Sequence[Tensor]) -> Tensor:
    dtypes = [m.dtype for m in matrices]
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    return torch.zeros((), dtype=wide, device=matrices[0].device)


def _add_to_grad_(parameters: list[Tensor], gradients: list[Tensor]) -> None:
    """Add to the `.grad` of those that need one; it is made where it is missing."""
    if not all([p.requires_grad for p in parameters]):
        needed = [i for i, p in enumerate(parameters) if p.requires_grad]
        if not needed:
            return  # `_foreach_add_` takes no empty list.
        parameters, gradients = ([each[i] for i in needed] for each in (parameters, gradients))
    grads = [_grad_of(p) for p in parameters]
    if len(set(map(id, parameters))) == len(parameters):
        torch._foreach_add_(grads, gradients)
        return
    # All additions of `_foreach_add_` may happen at once, so a shared parameter is not for it.
    for grad, gradient in zip(grads, gradients, strict=True):
        grad.add_(gradient)


def _grad_of(parameter: Tensor) -> Tensor:
    grad = parameter.grad
    if grad is None:
        grad = parameter.grad = torch.zeros_like(parameter)
    if type(grad) is not Tensor:
        (local,) = local_grads([parameter])
        return grad if local is None else local
    return grad


class _Stack(NamedTuple):
    """Matrices of one shape and dtype.

    Attributes:
        members: which ones they are of all lora_A and lora_B.
        matrices: (n, r, length) or (n, length, r), in float32 or float64.
        vectors_dim: 1 or 2, where the vectors that should be orthonormal are counted.
        transposed: whether the matrices are the members' transposes.
    """

    members: list[int]
    matrices: Tensor
    vectors_dim: int
    transposed: bool

    def products(self) -> Tensor:
        """A·Aᵀ or Bᵀ·B of each, (n, r, r)."""
        if self.vectors_dim == 1:
            return torch.bmm(self.matrices, self.matrices.mT)
        n, length, r = self.matrices.shape
        part = _SUM_LENGTH.get(self.matrices.device.type, 0)
        if not part or length % part or length == 0:
            return torch.bmm(self.matrices.mT, self.matrices)
        parts = self.matrices.reshape(n * (length // part), part, r)
        return torch.bmm(parts.mT, parts).view(n, -1, r, r).sum(1)

    def gradients(self, slope: Tensor) -> list[Tensor]:
        """Those of the members, given the slope (n, r, r) of `_penalty`, which is symmetric."""
        first = self.vectors_dim == 1
        product = torch.bmm(slope, self.matrices) if first else torch.bmm(self.matrices, slope)
        return list((product.mT if self.transposed else product).unbind())


def _stacks(matrices: Sequence[Tensor], count: int) -> Iterator[_Stack]:
    """Stacks of all matrices but those of rank 0, the first `count` being lora_A."""
    groups: dict[tuple[int, bool, torch.Size, torch.dtype], list[int]] = defaultdict(list)
    for i, m in enumerate(matrices[:count]):
        groups[1, False, m.shape, m.dtype].append(i)
    for i, m in enumerate(matrices[count:], count):
        # What is copied anyway is copied into rows: long sums over them are more accurate.
        is_contiguous = m.is_contiguous()
        groups[2 if is_contiguous else 1, not is_contiguous, m.shape, m.dtype].append(i)
    limit = _STACK_BYTES.get(matrices[0].device.type, _LARGEST_STACK_BYTES)
    for (vectors_dim, transposed, shape, dtype), group in groups.items():
        if shape[1 if transposed else vectors_dim - 1] == 0:
            continue
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        most = max(1, limit // max(1, shape.numel() * wide.itemsize))
        for start in range(0, len(group), most):
            members = group[start : start + most]
            parts = [matrices[i].mT if transposed else matrices[i] for i in members]
            # A single one is worked on where it lies, unless it has to be copied into rows.
            lies = len(parts) == 1 and not transposed
            together = parts[0].unsqueeze(0) if lies else torch.stack(parts)
            yield _Stack(members, together.to(wide), vectors_dim, transposed)


def _penalty(products: Tensor, squared: bool) -> tuple[Tensor, Tensor]:
    """The sum of ‖G - I‖_F or ‖G - I‖²_F of the G in `products`, and its slope (n, r, r).

    `products` is overwritten.

    The gradient is slope·rows: 2·(G - I)·rows / ‖G - I‖_F, taken as 0 where the norm is 0, or
    4·(G - I)·rows.
    """
    products.diagonal(dim1=1, dim2=2).sub_(1.0)
    residual = products
    if squared:
        return residual.square().sum(), 4.0 * residual
    norm = torch.linalg.vector_norm(residual, dim=(1, 2), keepdim=True)
    return norm.sum(), residual * (2.0 / norm.masked_fill(norm == 0, torch.inf))


def _pairs(pairs_or_model: Pairs) -> tuple[list[Tensor], list[Tensor]]:
    if isinstance(pairs_or_model, nn.Module):
        adapters = find_adapters(pairs_or_model)
        if not adapters:
            raise ValueError(f"no AdaLoRA adapter in this {type(pairs_or_model).__name__}")
        pairs_or_model = adapters
    elif isinstance(pairs_or_model, Tensor) or not isinstance(pairs_or_model, Iterable):
        raise TypeError(
            "pairs_or_model must be a torch.nn.Module or (lora_A, lora_B) pairs, "
            f"got {type(pairs_or_model).__name__}"
        )
    lora_A: list[Tensor] = []
    lora_B: list[Tensor] = []
    device = None
    for i, pair in enumerate(pairs_or_model):
        a: Tensor
        b: Tensor
        if isinstance(pair, Adapter):
            a, _, b = pair.parameters
        elif isinstance(pair, tuple | list) and len(pair) == 2:
            a, b = pair
            _check_pair(i, a, b)
            device = a.device if device is None else device
            if a.device != device or b.device != device:
                raise ValueError(
                    f"pairs_or_model[{i}] must be on {device} like the first pair, "
                    f"got {a.device} and {b.device}"
                )
        else:
            raise TypeError(f"pairs_or_model[{i}] must be (lora_A, lora_B), got {pair!r:.80}")
        lora_A.append(a)
        lora_B.append(b)
    if not lora_A:
        raise ValueError("pairs_or_model is empty")
    return lora_A, lora_B


def _check_pair(i: int, lora_A: Tensor, lora_B: Tensor) -> None:
    check_floating(**{f"pairs_or_model[{i}][0]": lora_A, f"pairs_or_model[{i}][1]": lora_B})
    if lora_A.dim() != 2 or lora_B.dim() != 2 or lora_A.shape[0] != lora_B.shape[1]:
        raise ValueError(
            f"pairs_or_model[{i}] must be lora_A (r, in) and lora_B (out, r), "
            f"got shapes {shape_of(lora_A)} and {shape_of(lora_B)}"
        )

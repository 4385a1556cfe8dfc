"""The functional API: validates once, then calls the ops.

Shapes throughout: x (..., in), weight (out, in), lora_A (r, in), lora_E (r, 1), lora_B (out, r).
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops, reference, short
from .checks import as_float, check_floating, shape_of
from .distributed.shards import is_dtensor
from .fusing import TRACED, autocast_dtype, why_plain
from .orthogonality import orth_reg, orth_reg_grad_

Impl: TypeAlias = Literal["auto", "reference", "triton", "cuda"]
"""Who computes an op; see `svd_linear`."""

__all__ = ["Impl", "orth_reg", "orth_reg_grad_", "svd_delta", "svd_linear"]


def svd_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_E: Tensor,
    lora_B: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    impl: Impl = "auto",
) -> Tensor:
    """Apply a frozen linear layer and its AdaLoRA update (paper, eq. 3) in one op.

    y = x·weightᵀ + bias + scaling · ((dropout(x)·lora_Aᵀ) ⊙ (lora_E ⊙ mask))·lora_Bᵀ

    Args:
        x: (..., in), any strides; floating point. Under autocast x, weight and bias are cast as
            `F.linear` casts them; the adapter matrices stay in their own dtype.
        weight: (out, in), the dtype of x, any strides. Normally frozen.
        lora_A: right singular vectors Q, (r, in). All three adapter tensors may be wider than x
            (float32 over a bfloat16 base, PEFT's default); the low-rank term is computed in the
            wider dtype.
        lora_E: singular values Λ, (r, 1). A 0 in it still gets a gradient.
        lora_B: left singular vectors P, (out, r), the dtype of lora_A.
        bias: (out,), the dtype of x.
        mask: (r,) bool. False drops a triplet: it adds nothing and gets no gradient.
        scaling: factor of the low-rank term (lora_alpha / (ranknum + 1e-5) in the layers). This
            and dropout_p may be any real number, NumPy's and 0-d tensors' included; a tensor on a
            device is read, and gets no gradient.
        dropout_p: probability of dropping an entry of x on its way to lora_A, in [0, 1). Always
            applied when positive; a layer passes 0 in evaluation.
        impl: "auto" takes the fastest implementation for the device of x, and plain PyTorch
            where no op can serve the call: for tensor subclasses (torchao's, NestedTensor; but of
            the DTensors of tensor parallelism, column-wise or row-wise, the op takes the local
            shards), under transforms of `torch.func`, in forward-mode AD, and for
            `torch.jit.trace` and `torch.export`, whose files then run without this package.
            "reference" is plain PyTorch recorded by autograd; its dropout is that of the kernels
            on every device, for equal seeds. "triton" is taken literally, backward included, and
            never replaced (except for tensors without entries, for which nothing is launched).
            Its kernels need an NVIDIA GPU of compute capability 8.0 or later, or, on a CPU and
            slowly, TRITON_INTERPRET=1 in the environment; and r ≤ 256 in at most float32. "cuda"
            is not there yet.

    Returns:
        y: (..., out) in the dtype of x, on its device. All tensors must be on one device. But for
        "triton", its gradient can be differentiated again (`create_graph=True`): the dropout stays
        that of the forward.

    Raises:
        TypeError: an argument that has to be a floating point tensor (mask: bool) is not, or
            scaling or dropout_p is not a number.
        ValueError: a shape, dtype or device that does not fit, dropout_p outside [0, 1), or an
            unknown impl.
        RuntimeError: an impl that cannot run here; the message says why.
    """
    if impl == "auto":
        y = short.layer(x, weight, bias, None, lora_A, lora_E, lora_B, mask, scaling, dropout_p)
        if y is not None:
            return y
    check_floating(x=x, weight=weight, lora_A=lora_A, lora_E=lora_E, lora_B=lora_B, bias=bias)
    dtype = autocast_dtype(x.device.type)
    if dtype is not None:
        x, weight = _cast(x, dtype), _cast(weight, dtype)
        bias = None if bias is None else _cast(bias, dtype)
    why = why_plain(x, weight, bias, lora_A, lora_E, lora_B, mask)
    _check_impl(impl, why)
    scaling, dropout_p = _numbers(scaling, dropout_p)
    if why is not TRACED:
        _check_base(x, weight, bias)
        out_features, in_features = weight.shape
        _check_adapter(x, lora_A, lora_E, lora_B, mask, in_features, out_features)
        if lora_A.shape[0] == 0:
            return F.linear(x, weight, bias)
    if why is not None and impl == "auto":
        if is_dtensor(lora_A):
            tensors = x, weight, bias, None, lora_A, lora_E, lora_B, mask
            y = _on_shards(*tensors, scaling, dropout_p)
            if y is not None:
                return y
        base = F.linear(x, weight, bias)
        return _plain_delta(base, x, lora_A, lora_E, lora_B, mask, scaling, dropout_p)
    seed = ops.dropout_seed(x) if dropout_p > 0.0 else None
    if impl == "reference":
        y, _ = ops.outside_autocast(reference.svd_linear)(
            x, weight, bias, lora_A, lora_E, lora_B, mask, scaling, dropout_p, seed
        )
    else:
        y, _ = torch.ops.adalora.svd_linear(
            x, weight, bias, lora_A, lora_E, lora_B, mask, scaling, dropout_p, seed, impl
        )
    return y


def svd_delta(
    base_output: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_E: Tensor,
    lora_B: Tensor,
    *,
    mask: Tensor | None = None,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    impl: Impl = "auto",
) -> Tensor:
    """Add the AdaLoRA update to the output of an opaque base layer (quantised, Conv1D, anything).

    base_output + scaling · ((dropout(x)·lora_Aᵀ) ⊙ (lora_E ⊙ mask))·lora_Bᵀ

    Args:
        base_output: (..., out), what the base layer made of x; floating point. Not written to.
        x: (..., in), any floating dtype; cast to the autocast dtype under autocast.

    The other arguments, and what is raised, are those of `svd_linear`.

    Returns:
        The sum, (..., out) in the dtype of base_output.
    """
    if impl == "auto":
        y = short.layer(
            x, None, None, base_output, lora_A, lora_E, lora_B, mask, scaling, dropout_p
        )
        if y is not None:
            return y
    check_floating(base_output=base_output, x=x, lora_A=lora_A, lora_E=lora_E, lora_B=lora_B)
    dtype = autocast_dtype(x.device.type)
    if dtype is not None:
        x = _cast(x, dtype)
    why = why_plain(base_output, x, lora_A, lora_E, lora_B, mask)
    _check_impl(impl, why)
    scaling, dropout_p = _numbers(scaling, dropout_p)
    if why is not TRACED:
        _check_base_output(base_output, x)
        in_features = x.shape[-1] if x.dim() else 0
        out_features = base_output.shape[-1] if base_output.dim() else 0
        _check_adapter(x, lora_A, lora_E, lora_B, mask, in_features, out_features)
        if lora_A.shape[0] == 0:
            return base_output
    if why is not None and impl == "auto":
        if is_dtensor(lora_A):
            tensors = x, None, None, base_output, lora_A, lora_E, lora_B, mask
            y = _on_shards(*tensors, scaling, dropout_p)
            if y is not None:
                return y
        return _plain_delta(base_output, x, lora_A, lora_E, lora_B, mask, scaling, dropout_p)
    seed = ops.dropout_seed(x) if dropout_p > 0.0 else None
    if impl == "reference":
        y, _ = ops.outside_autocast(reference.svd_delta)(
            base_output, x, lora_A, lora_E, lora_B, mask, scaling, dropout_p, seed
        )
    else:
        y, _ = torch.ops.adalora.svd_delta(
            base_output, x, lora_A, lora_E, lora_B, mask, scaling, dropout_p, seed, impl
        )
    return y


# Whether shapes fit is not asked while `torch.jit.trace` records: sizes are tensors then, and each
# comparison warns that it is not recorded. What does not fit is an error of PyTorch's there.


def _check_base(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if weight.dim() != 2:
        raise ValueError(f"weight must be (out, in), got shape {shape_of(weight)}")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is None:
            continue
        if t.dtype != x.dtype:
            raise ValueError(f"{name} must have the dtype of x, got {t.dtype} and {x.dtype}")
        if t.device != x.device:
            raise ValueError(f"{name} must be on the device of x, got {t.device} and {x.device}")
    if bias is not None and bias.shape != (weight.shape[0],):
        raise ValueError(f"bias must be (out,) = ({weight.shape[0]},), got shape {shape_of(bias)}")


def _check_base_output(base_output: Tensor, x: Tensor) -> None:
    if base_output.dim() != x.dim() or base_output.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            "base_output must have the leading dimensions of x, "
            f"got shape {shape_of(base_output)} for x of shape {shape_of(x)}"
        )
    if base_output.device != x.device:
        raise ValueError(
            f"base_output must be on the device of x, got {base_output.device} and {x.device}"
        )


def _check_adapter(
    x: Tensor,
    lora_A: Tensor,
    lora_E: Tensor,
    lora_B: Tensor,
    mask: Tensor | None,
    in_features: int,
    out_features: int,
) -> None:
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"x must be (..., in) with in = {in_features}, got shape {shape_of(x)}")
    if lora_A.dim() != 2 or lora_A.shape[1] != in_features:
        raise ValueError(
            f"lora_A must be (r, in) with in = {in_features}, got shape {shape_of(lora_A)}"
        )
    r = lora_A.shape[0]
    if lora_E.shape != (r, 1):
        raise ValueError(f"lora_E must be (r, 1) = ({r}, 1), got shape {shape_of(lora_E)}")
    if lora_B.shape != (out_features, r):
        raise ValueError(
            f"lora_B must be (out, r) = ({out_features}, {r}), got shape {shape_of(lora_B)}"
        )
    if lora_B.dtype != lora_A.dtype:
        raise ValueError(
            f"lora_B must have the dtype of lora_A, got {lora_B.dtype} and {lora_A.dtype}"
        )
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask must be a bool tensor, got {kind}")
        if mask.shape != (r,):
            raise ValueError(f"mask must be (r,) = ({r},), got shape {shape_of(mask)}")
    for name, t in (("lora_A", lora_A), ("lora_E", lora_E), ("lora_B", lora_B), ("mask", mask)):
        if t is not None and t.device != x.device:
            raise ValueError(f"{name} must be on the device of x, got {t.device} and {x.device}")


def _numbers(scaling: float, dropout_p: float) -> tuple[float, float]:
    """Return scaling and dropout_p as plain floats, checked."""
    if type(scaling) is not float:
        scaling = as_float("scaling", scaling)
    if type(dropout_p) is not float:
        dropout_p = as_float("dropout_p", dropout_p)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    return scaling, dropout_p


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast t as autocast casts an argument of `F.linear`: float64 is left alone."""
    return t if t.dtype == torch.float64 else t.to(dtype)


def _check_impl(impl: str, why_not: str | None) -> None:
    """Raise if `impl` is unknown, or if it names an op's and `why_not` says why none can serve.

    Whether "triton" can run here is for the op to find out.
    """
    if impl not in ("auto", "reference", "triton", "cuda"):
        raise ValueError(f"impl must be 'auto', 'reference', 'triton' or 'cuda', got {impl!r}")
    if impl == "cuda":
        raise RuntimeError("impl='cuda' cannot run: this version has no CUDA C++ kernels")
    if impl == "triton" and why_not is not None:
        raise RuntimeError(f"impl='triton' cannot run: {why_not}")


def _on_shards(*arguments: Any) -> Tensor | None:
    """Compute y of DTensors on the local shards; None if that is not how it is computed.

    The arguments are those of `short.layer`.
    """
    if why_plain() is not None:  # whatever the tensors are
        return None
    from .distributed.local_layer import on_shards

    return on_shards(_seeded, ops.dropout_seed, *arguments)


def _seeded(x: Tensor, weight: Tensor | None, bias: Tensor | None, base: Any, *rest: Any) -> Tensor:
    """`svd_linear`, or `svd_delta` where a base is given, with the seed of the dropout if any.

    `rest` is A, E, B, mask, scaling, dropout_p and the seed, as the ops take them.
    """
    *factors, mask, scaling, _, seed = rest
    if weight is None:
        if seed is None:
            return svd_delta(base, x, *factors, mask=mask, scaling=scaling)
        y, _ = torch.ops.adalora.svd_delta(base, x, *rest)
    else:
        if seed is None:
            return svd_linear(x, weight, *factors, bias=bias, mask=mask, scaling=scaling)
        y, _ = torch.ops.adalora.svd_linear(x, weight, bias, *rest)
    return y  # type: ignore[no-any-return]


def _plain_delta(
    base_output: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_E: Tensor,
    lora_B: Tensor,
    mask: Tensor | None,
    scaling: float,
    dropout_p: float,
) -> Tensor:
    """`svd_delta` in ops of PyTorch's own, dropout included, for callers that no op can serve."""
    dropped = F.dropout(x, dropout_p) if dropout_p > 0.0 else x
    y, _ = ops.outside_autocast(reference.svd_delta)(
        base_output, dropped, lora_A, lora_E, lora_B, mask, scaling, 0.0, None
    )
    return y

"""This package computes svd_linear and svd_delta, forward and backward, with Triton kernels.

Shapes throughout: x (M, K), weight (N, K), A (R, K), E (R, 1), B (N, R), mask (R,), y and grad_y
(M, N), h (M, R). e = scaling · E ⊙ mask, h = dropout(x)·Aᵀ, u = grad_y·B, and grad_h = u ⊙ e.

What a call launches is a recipe (`kernels/recipe.py`). Both launchers get it in the same way:

    given = operands(x=x, weight=weight, bias=bias, base=base, A=A, E=E, B=B, mask=mask, seed=seed,
                     h=h, grad_y=grad_y)      # what is not None, as rows and contiguous
    call = call_of(given, need_dx)            # dict[str, Tensor], bool -> Call, hashable
    recipe = recipe_of(call)                  # Call -> Recipe, cached until plans.forget_tables()

A call with grad_y is a backward; a forward has weight (svd_linear) or base (svd_delta). The
scalars are "scaling", "drop_below" = min(round(p·2¹⁶), 2¹⁶ - 1) and "keep_scale" = 1 / (1 - p).
`plans.when_forgotten(clear)` has `forget_tables` also clear what was made from recipes.

`forward_recipe` (forward.py) asks `plans.choose` once for one of three paths:
"two_pass" launches the down projection (h), then the GEMM over [x | h ⊙ e]·[weight | B]ᵀ (gemm.py).
With few rows the GEMM starts before h is there, and waits for it where it adds the low-rank term.
"fused" launches a small kernel that splits A into parts of the type of x, then the GEMM, some of
whose programs make h for all: those with one tile less than the others, if there are enough.
"cublas" launches the down projection, a kernel that writes the low-rank term and the bias to y, and
cuBLAS, which adds x·weightᵀ to that in place. The backward (backward.py) makes grad_h and the
adapter's gradients from one read of grad_y and one of x, and dx by "two_pass" or "cublas" with
operands exchanged, [grad_y | grad_h]·[weightᵀ | Aᵀ]ᵀ; what takes the place of h is there already.

Sums over programs go through a workspace and are added in a fixed order, so that results are
bitwise reproducible. The forward saves h, which the backward does not compute again. Apart from y
and dx, nothing of M rows is allocated but parts of h and u, which are R columns wide.

Adapters may be float32 over half-precision x. Products with them are then exact up to float32
rounding: gradients of float32 parameters must not be worse than eager's.
"""

from .calls import call_of, operands, recipe_of, svd_delta_fwd, svd_linear_bwd, svd_linear_fwd

__all__ = ["call_of", "operands", "recipe_of", "svd_delta_fwd", "svd_linear_bwd", "svd_linear_fwd"]

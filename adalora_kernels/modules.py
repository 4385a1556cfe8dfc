"""SVDLinear: the adapter's parameters and one functional call; and helpers over whole models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import as_float, as_int
from .distributed.shards import is_dtensor, whole_tensor
from .functional import svd_delta, svd_linear
from .fusing import fused_dropout_p, is_exporting, is_plain_tensor, parameter_of
from .merging import Merge
from .reference import effective_E
from .starts import check_start, start_


class SVDLinear(nn.Linear):
    """A linear layer with a frozen weight and an AdaLoRA adapter (paper, eq. 3).

    Constructor, parameter names, initialisation and `state_dict` are those of the authors'
    loralib. Parameters: weight (out, in), or (in, out) if fan_in_fan_out; bias (out,) or None; and
    for r > 0 lora_A (r, in), lora_E (r, 1), lora_B (out, r), ranknum (1,).

    Evaluation mode merges the adapter into the weight if `merge_weights`, whether `eval()` is
    called on this layer or on a parent; training mode restores the original weight exactly,
    because it was kept. `state_dict()` always holds the unmerged weight.

    What is in lora_A, lora_E and lora_B is what the layer computes, in evaluation, too: if they
    are written to (an average swapped in, an optimizer step), `forward` leaves the merged weight
    aside until `eval()` or `merge()` has merged anew. On a CPU it sees every write. Elsewhere it
    sees those that raise a tensor's version: call `eval()` once more after writing through
    `.data` (as diffusers' EMAModel and Lightning's WeightAveraging do) or with a fused optimizer. A
    merged weight takes no gradient to the adapter: differentiate in training mode, or give
    merge_weights=False.

    The weight may be of a tensor subclass (torchao's, one's own). It is then the base of
    `svd_delta`, it is never merged, and evaluation mode leaves it as it is. DTensors, which
    `adalora_kernels.distributed` makes of a layer, are never merged either. A `lora_dropout` that
    has hooks, or was replaced by another module, is called.

    Args:
        in_features, out_features: sizes of x and y.
        r: the initial rank; 0 gives a plain `nn.Linear` with a trainable weight.
        lora_alpha: `scaling` is lora_alpha / (r + 1e-5), or r / (r + 1e-5) for lora_alpha ≤ 0.
        lora_dropout: probability of dropping an entry of x on its way to lora_A, in [0, 1).
        fan_in_fan_out: the weight is stored (in, out), as in GPT-2's Conv1D.
        merge_weights: merge in evaluation mode.
        bias, device, dtype: as in `nn.Linear`, for all parameters.
        start: what `reset_parameters` makes of the adapter. "paper" is loralib's: lora_E is 0,
            lora_A and lora_B are normal with deviation 0.02. "lora" is LoRA's: lora_A is
            Kaiming-uniform, lora_B is 0, lora_E is 1. The adapter adds exactly 0 with either
            (docs/recipe.md).

    Numbers may be NumPy's or 0-d tensors.

    Attributes:
        r: the number of triplets now stored; `RankAllocator.shrink` lowers it.
        ranknum: the rank that `scaling` is for. Never changes, so neither does the function.
        scaling: the factor of the low-rank term, a float.
        merged: whether `weight` holds the adapter, too.
        start: "paper" or "lora".

    Raises:
        TypeError, ValueError: r is not a whole number ≥ 0, lora_alpha is not a number, or
            lora_dropout is not in [0, 1), or start is neither "paper" nor "lora".
    """

    start = "paper"  # of layers that an earlier version has pickled
    takes_dtensors = True  # so `distributed.ColwiseAdaLora` and RowwiseAdaLora may shard it

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        start: str = "paper",
    ) -> None:
        start = check_start(start)
        r, lora_alpha, lora_dropout = _adapter_options(r, lora_alpha, lora_dropout)
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.fan_in_fan_out = fan_in_fan_out
        self._add_adapter(r, lora_alpha, lora_dropout, merge_weights, self.weight.dtype, start)
        # A second time, now with the adapter: this is loralib's order, so equal seeds give equal
        # parameters.
        self.reset_parameters()
        if fan_in_fan_out:
            self.weight.data = self.weight.data.T

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        merge_weights: bool = True,
        adapter_dtype: torch.dtype | None = None,
        start: str = "paper",
    ) -> SVDLinear:
        """Make an SVDLinear over the very weight and bias of `linear`; nothing large is copied.

        Args:
            linear: a floating point `nn.Linear`, also one whose weight is of a tensor subclass
                with a floating dtype; its weight is frozen if r > 0.
            r, lora_alpha, lora_dropout, merge_weights, start: as in the constructor.
            adapter_dtype: dtype of lora_A, lora_E, lora_B; that of the weight by default.

        Raises:
            TypeError: `linear` is not an nn.Linear, has a quantised weight, or is an SVDLinear.
            ValueError: as in the constructor.
        """
        if not isinstance(linear, nn.Linear) or isinstance(linear, SVDLinear):
            raise TypeError(f"linear must be a plain torch.nn.Linear, got {type(linear).__name__}")
        if not linear.weight.is_floating_point():
            raise TypeError(f"linear must have a floating point weight, got {linear.weight.dtype}")
        start = check_start(start)
        r, lora_alpha, lora_dropout = _adapter_options(r, lora_alpha, lora_dropout)
        layer = cls.__new__(cls)
        nn.Linear.__init__(layer, linear.in_features, linear.out_features, False, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.fan_in_fan_out = False
        dtype = adapter_dtype or linear.weight.dtype
        layer._add_adapter(r, lora_alpha, lora_dropout, merge_weights, dtype, start)
        layer._reset_adapter()
        return layer.train(linear.training)

    def _add_adapter(
        self,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        merge_weights: bool,
        dtype: torch.dtype,
        start: str,
    ) -> None:
        self.r, self.start = r, start
        self.lora_alpha = lora_alpha
        self.lora_dropout = nn.Dropout(lora_dropout) if lora_dropout > 0.0 else nn.Identity()
        self.merge_weights = merge_weights
        self.merged = False
        # No buffer: one that comes and goes with the mode upsets whoever iterates over buffers.
        self._merge: Merge | None = None
        if r == 0:
            return
        options: dict[str, Any] = {"device": self.weight.device, "dtype": dtype}
        self.lora_A = nn.Parameter(torch.zeros(r, self.in_features, **options))
        self.lora_E = nn.Parameter(torch.zeros(r, 1, **options))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, r, **options))
        self.ranknum = nn.Parameter(torch.full((1,), float(r), **options), requires_grad=False)
        self.weight.requires_grad = False
        self._set_scaling(float(r))

    def _set_scaling(self, ranknum: float) -> None:
        numerator = float(self.lora_alpha) if self.lora_alpha > 0 else ranknum
        self.scaling = numerator / (ranknum + 1e-5)

    def reset_parameters(self) -> None:
        """Initialise the weight as `nn.Linear`, and the adapter by its `start`."""
        super().reset_parameters()
        self._reset_adapter()

    def _reset_adapter(self) -> None:
        if hasattr(self, "lora_A"):
            start_(*self._factors, self.start)

    @property
    def _factors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.lora_A, self.lora_E, self.lora_B

    def forward(self, x: Tensor) -> Tensor:
        """Return y (..., out) for x (..., in); see `adalora_kernels.svd_linear`."""
        weight, bias, has_adapter = parameter_of(self, "weight"), parameter_of(self, "bias"), False
        if self._merge is not None:
            has_adapter = self._takes_merged_weight(self._merge)
            weight = weight if has_adapter else self._merge.original
        weight = weight.T if self.fan_in_fan_out else weight
        if has_adapter or self.r == 0:
            return F.linear(x, weight, bias)
        factors = (
            parameter_of(self, "lora_A"),
            parameter_of(self, "lora_E"),
            parameter_of(self, "lora_B"),
        )
        dropout: Any = self._modules["lora_dropout"]
        dropout_p = fused_dropout_p(dropout)
        if dropout_p is not None and (is_plain_tensor(weight) or is_dtensor(weight)):
            return svd_linear(
                x, weight, *factors, bias=bias, scaling=self.scaling, dropout_p=dropout_p
            )
        base = F.linear(x, weight, bias)
        if dropout_p is None:
            x, dropout_p = dropout(x), 0.0
        return svd_delta(base, x, *factors, scaling=self.scaling, dropout_p=dropout_p)

    def _takes_merged_weight(self, merge: Merge) -> bool:
        """Whether `forward` multiplies with the merged weight alone."""
        if torch.compiler.is_compiling():
            # What is compiled can't look at versions or values, and runs for long. What is
            # exported is the layer as it is now.
            return is_exporting()
        # Another tensor in the place of the parameter (functional_call, a replica of
        # DataParallel) is what `named_parameters` gave, merged.
        replaced = self.weight is not merge.parameters[0]
        return replaced or merge.is_current(self.weight, *self._factors)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """Return what the adapter adds to the weight, in its layout and in the wider dtype."""
        e = effective_E(self.lora_E, None, self.scaling, self.lora_A.dtype)
        dtype = torch.promote_types(self.weight.dtype, self.lora_A.dtype)
        delta = self.lora_B.to(dtype) @ (self.lora_A * e.unsqueeze(1)).to(dtype)
        return delta.T if self.fan_in_fan_out else delta

    @torch.no_grad()
    def merge(self) -> None:
        """Add the adapter to the weight and keep the original beside it. Idempotent.

        A merged layer is merged anew if something was written to its parameters.

        Raises:
            TypeError: the weight or the adapter is of a tensor subclass, or the weight is computed
                from other parameters.
        """
        if self.r > 0:
            self._check_mergeable()
            parameters = (self.weight, *self._factors)
            merge = self._merge
            if merge and merge.is_current(*parameters) and merge.has_values_of(*parameters):
                return
            self.unmerge()
            original = self.weight.data
            # Also in inference mode, whose tensors can't take part in a training later.
            with torch.inference_mode(self.weight.is_inference()):
                self.weight.data = (original + self.delta_weight()).to(original.dtype)
                self._merge = Merge.of(original, *parameters)
        self.merged = True

    def _is_mergeable(self) -> bool:
        """Whether the weight is a parameter, not computed from others (weight_norm, pruning)."""
        if self.r == 0:
            return True
        tensors = (self._parameters.get("weight"), *self._factors)
        return all(t is not None and is_plain_tensor(t) for t in tensors)

    def _check_mergeable(self) -> None:
        if not self._is_mergeable():
            kinds = ", ".join(type(t).__name__ for t in (self.weight, *self._factors))
            raise TypeError(
                "only a layer whose weight is a parameter of its own can be merged, and no tensor "
                f"of a subclass: weight, lora_A, lora_E and lora_B are {kinds}"
            )

    def unmerge(self) -> None:
        """Put the original weight back, bit for bit. Idempotent.

        Raises:
            TypeError: the merged weight was replaced by a tensor subclass (quantised).
        """
        if self._merge is not None:
            self._check_mergeable()
            self.weight.data = self._merge.original
            self._merge = None
        self.merged = False

    def train(self, mode: bool = True) -> SVDLinear:
        """Training mode unmerges; evaluation mode merges if `merge_weights`."""
        super().train(mode)
        if mode:
            self.unmerge()
        elif self.merge_weights and self._is_mergeable():
            self.merge()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SVDLinear:
        """Move or cast the original weight, which `.to()` and its like don't see, and merge it."""
        merged = self._unmerge_if_merged()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if merged:
            self.merge()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what was copied or unpickled; versions and addresses are new."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self._unmerge_if_merged():
            self.merge()

    def _unmerge_if_merged(self) -> bool:
        merged = self._merge is not None and self._is_mergeable()
        if merged:
            self.unmerge()
        return merged

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._merge is not None:
            destination[f"{prefix}weight"] = self._merge.original

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        merged = self.merged
        self.unmerge()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        # DeepSpeed's ZeRO stage 3 leaves nothing of it here, and no values in a state.
        if self.r > 0 and not self.ranknum.is_meta and self.ranknum.numel() == 1:
            self._set_scaling(float(whole_tensor(self.ranknum)))
        if merged:
            self.merge()

    def extra_repr(self) -> str:
        """Show the arguments that differ from layer to layer."""
        adapter = f", r={self.r}, lora_alpha={self.lora_alpha}, merged={self.merged}"
        transposed = ", fan_in_fan_out=True" if self.fan_in_fan_out else ""
        return super().extra_repr() + adapter + transposed


def _adapter_options(r: int, lora_alpha: float, lora_dropout: float) -> tuple[int, float, float]:
    """Return r, lora_alpha and lora_dropout as plain numbers, checked."""
    r, lora_alpha = as_int("r", r, 0), as_float("lora_alpha", lora_alpha)
    lora_dropout = as_float("lora_dropout", lora_dropout)
    if not 0.0 <= lora_dropout < 1.0:
        raise ValueError(f"lora_dropout must be in [0, 1), got {lora_dropout}")
    return r, lora_alpha, lora_dropout


def _check_bias(bias: str) -> None:
    if bias not in ("none", "all", "lora_only"):
        raise ValueError(f"bias must be 'none', 'all' or 'lora_only', got {bias!r}")


def mark_only_lora_as_trainable(model: nn.Module, bias: str = "none") -> None:
    """Freeze every parameter of `model` but the adapters (loralib's convention: "lora_" in name).

    Args:
        model: any module tree.
        bias: which biases become trainable: "none", "all", or "lora_only" (those of SVDLinear).

    Raises:
        ValueError: an unknown `bias`.
    """
    _check_bias(bias)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.requires_grad = bias == "all" and "bias" in name
    if bias == "lora_only":
        for module in model.modules():
            if isinstance(module, SVDLinear) and module.bias is not None:
                module.bias.requires_grad = True


def lora_state_dict(model: nn.Module, bias: str = "none") -> dict[str, Tensor]:
    """Return the adapter part of `model.state_dict()`, with loralib's keys.

    It has one thing more: the ranknum of a layer that was shrunk, because the scaling of such a
    layer can no longer be told from its rank.

    Args:
        model: any module tree.
        bias: which biases to include: "none", "all", or "lora_only" (those beside an adapter).

    Raises:
        ValueError: an unknown `bias`.
    """
    _check_bias(bias)
    state = model.state_dict()
    lora = {key for key in state if "lora_" in key}
    keys = set(lora)
    if bias == "all":
        keys |= {key for key in state if "bias" in key}
    elif bias == "lora_only":
        keys |= {key.split("lora_")[0] + "bias" for key in lora}
    for key in lora:
        ranknum = key.removesuffix("lora_E") + "ranknum"
        if ranknum in state and float(whole_tensor(state[ranknum])) != state[key].shape[0]:
            keys.add(ranknum)
    return {key: value for key, value in state.items() if key in keys}

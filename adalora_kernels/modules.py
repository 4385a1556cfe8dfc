"""SVDLinear: the adapter's parameters and one functional call; and helpers over whole models."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .functional import svd_linear
from .reference import effective_E


class SVDLinear(nn.Linear):
    """A linear layer with a frozen weight and an AdaLoRA adapter (paper, eq. 3).

    Constructor, parameter names, initialisation and `state_dict` are those of the authors'
    loralib. Parameters: weight (out, in), or (in, out) if fan_in_fan_out; bias (out,) or None; and
    for r > 0 lora_A (r, in), lora_E (r, 1), lora_B (out, r), ranknum (1,).

    Evaluation mode merges the adapter into the weight if `merge_weights`, whether `eval()` is
    called on this layer or on a parent; training mode restores the original weight exactly,
    because it was kept. `state_dict()` always holds the unmerged weight.

    Args:
        in_features, out_features: sizes of x and y.
        r: the initial rank; 0 gives a plain `nn.Linear` with a trainable weight.
        lora_alpha: `scaling` is lora_alpha / (r + 1e-5), or r / (r + 1e-5) for lora_alpha ≤ 0.
        lora_dropout: probability of dropping an entry of x on its way to lora_A, in [0, 1).
        fan_in_fan_out: the weight is stored (in, out), as in GPT-2's Conv1D.
        merge_weights: merge in evaluation mode.
        bias, device, dtype: as in `nn.Linear`, for all parameters.

    Attributes:
        r: the number of triplets now stored; `RankAllocator.shrink` lowers it.
        ranknum: the rank that `scaling` is for. Never changes, so neither does the function.
        scaling: the factor of the low-rank term, a float.

    Raises:
        TypeError, ValueError: r is not an int ≥ 0, or lora_dropout is not in [0, 1).
    """

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
    ) -> None:
        _check_adapter_options(r, lora_dropout)
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.fan_in_fan_out = fan_in_fan_out
        self._add_adapter(r, lora_alpha, lora_dropout, merge_weights, self.weight.dtype)
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
    ) -> SVDLinear:
        """Make an SVDLinear over the very weight and bias of `linear`; nothing large is copied.

        Args:
            linear: a floating point `nn.Linear`; its weight is frozen if r > 0.
            r, lora_alpha, lora_dropout, merge_weights: as in the constructor.
            adapter_dtype: dtype of lora_A, lora_E, lora_B; that of the weight by default.

        Raises:
            TypeError: `linear` is not an nn.Linear, has a quantised weight, or is an SVDLinear.
            ValueError: as in the constructor.
        """
        if not isinstance(linear, nn.Linear) or isinstance(linear, SVDLinear):
            raise TypeError(f"linear must be a plain torch.nn.Linear, got {type(linear).__name__}")
        if not linear.weight.is_floating_point():
            raise TypeError(f"linear must have a floating point weight, got {linear.weight.dtype}")
        _check_adapter_options(r, lora_dropout)
        layer = cls.__new__(cls)
        nn.Linear.__init__(layer, linear.in_features, linear.out_features, False, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.fan_in_fan_out = False
        layer._add_adapter(
            r, lora_alpha, lora_dropout, merge_weights, adapter_dtype or linear.weight.dtype
        )
        layer._reset_adapter()
        return layer.train(linear.training)

    def _add_adapter(
        self,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        merge_weights: bool,
        dtype: torch.dtype,
    ) -> None:
        self.r = r
        self.lora_alpha = lora_alpha
        self.lora_dropout = nn.Dropout(lora_dropout) if lora_dropout > 0.0 else nn.Identity()
        self.merge_weights = merge_weights
        self.merged = False
        self._mask: Tensor | None
        self._original_weight: Tensor | None
        self.register_buffer("_mask", None, persistent=False)
        self.register_buffer("_original_weight", None, persistent=False)
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
        """Initialise as loralib: lora_E zero, lora_A and lora_B normal with deviation 0.02."""
        super().reset_parameters()
        self._reset_adapter()

    def _reset_adapter(self) -> None:
        if hasattr(self, "lora_A"):
            nn.init.zeros_(self.lora_E)
            nn.init.normal_(self.lora_A, mean=0.0, std=0.02)
            nn.init.normal_(self.lora_B, mean=0.0, std=0.02)

    @property
    def mask(self) -> Tensor:
        """The mask is (r,) bool on the layer's device, all true until `set_mask` is given one."""
        if self._mask is not None:
            return self._mask
        return torch.ones(self.r, dtype=torch.bool, device=self.weight.device)

    def set_mask(self, mask: Tensor | None, key: str | None = None) -> None:
        """Drop the triplets where `mask` (r,) bool is false; None drops none."""
        self._mask = mask

    def forward(self, x: Tensor) -> Tensor:
        """Return y (..., out) for x (..., in); see `adalora_kernels.svd_linear`."""
        weight = self.weight.T if self.fan_in_fan_out else self.weight
        if self.merged or self.r == 0:
            return F.linear(x, weight, self.bias)
        dropout = self.lora_dropout
        return svd_linear(
            x,
            weight,
            self.lora_A,
            self.lora_E,
            self.lora_B,
            bias=self.bias,
            mask=self._mask,
            scaling=self.scaling,
            dropout_p=dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0,
        )

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """Return what the adapter adds to the weight, in its layout and in the wider dtype."""
        e = effective_E(self.lora_E, self._mask, self.scaling, self.lora_A.dtype)
        dtype = torch.promote_types(self.weight.dtype, self.lora_A.dtype)
        delta = self.lora_B.to(dtype) @ (self.lora_A * e.unsqueeze(1)).to(dtype)
        return delta.T if self.fan_in_fan_out else delta

    @torch.no_grad()
    def merge(self) -> None:
        """Add the adapter to the weight and keep the original beside it. Idempotent."""
        if self.merged:
            return
        if self.r > 0:
            original = self.weight.data
            self.weight.data = (original + self.delta_weight()).to(original.dtype)
            self._original_weight = original
        self.merged = True

    def unmerge(self) -> None:
        """Put the original weight back, bit for bit. Idempotent."""
        if self._original_weight is not None:
            self.weight.data = self._original_weight
            self._original_weight = None
        self.merged = False

    def train(self, mode: bool = True) -> SVDLinear:
        """Training mode unmerges; evaluation mode merges if `merge_weights`."""
        super().train(mode)
        if mode:
            self.unmerge()
        elif self.merge_weights:
            self.merge()
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._original_weight is not None:
            destination[f"{prefix}weight"] = self._original_weight

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        merged = self.merged
        self.unmerge()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if self.r > 0 and not self.ranknum.is_meta:
            self._set_scaling(float(self.ranknum))
        if merged:
            self.merge()

    def extra_repr(self) -> str:
        """Show the arguments that differ from layer to layer."""
        adapter = f", r={self.r}, lora_alpha={self.lora_alpha}, merged={self.merged}"
        transposed = ", fan_in_fan_out=True" if self.fan_in_fan_out else ""
        return super().extra_repr() + adapter + transposed


def _check_adapter_options(r: int, lora_dropout: float) -> None:
    if isinstance(r, bool) or not isinstance(r, int):
        raise TypeError(f"r must be an int, got {type(r).__name__}")
    if r < 0:
        raise ValueError(f"r must be at least 0, got {r}")
    if not 0.0 <= lora_dropout < 1.0:
        raise ValueError(f"lora_dropout must be in [0, 1), got {lora_dropout}")


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
        if ranknum in state and float(state[ranknum]) != state[key].shape[0]:
            keys.add(ranknum)
    return {key: value for key, value in state.items() if key in keys}

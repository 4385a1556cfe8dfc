"""PEFT's AdaLoRA layers with our forward."""

from __future__ import annotations

from typing import Any

from peft.import_utils import is_bnb_4bit_available, is_bnb_available
from peft.tuners.adalora import SVDLinear, SVDQuantLinear
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.adalora.layer import SVDConv2d as PeftSVDConv2d
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .. import functional
from ..distributed.shards import is_dtensor, whole_tensor
from ..fusing import fused_dropout_p, is_plain_tensor, is_unhooked, parameter_of
from .saving import fit_rows_


class ReadingLayer:
    """A PEFT layer that has fewer triplets takes a file that has zeros for the others."""

    def _load_from_state_dict(
        self: Any, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for adapter_name, lora_E in self.lora_E.items():
            fit_rows_(state_dict, prefix, adapter_name, len(lora_E))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)  # type: ignore[misc]


class FusedLayer(ReadingLayer):
    """The forward of a PEFT layer over `functional.svd_linear` and `svd_delta`."""

    # ranknum + 1e-5 as floats: read from the device once, not in every forward.
    _ranknums: dict[str, float]
    takes_dtensors = True  # so `distributed.ColwiseAdaLora` and RowwiseAdaLora may shard it

    def _scaling_of(self: Any, adapter_name: str) -> float:
        ranknums = self._ranknums
        if adapter_name not in ranknums:
            ranknums[adapter_name] = float(whole_tensor(self.ranknum[adapter_name].detach())) + 1e-5
        return self.scaling[adapter_name] / ranknums[adapter_name]

    def _factors_of(self: Any, adapter_name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return lora_A, lora_E and lora_B of one adapter."""
        modules = self._modules
        try:
            return (
                modules["lora_A"]._parameters[adapter_name],
                modules["lora_E"]._parameters[adapter_name],
                modules["lora_B"]._parameters[adapter_name],
            )
        except KeyError:  # Where something else stands in for a parameter, attributes find it.
            return (
                self.lora_A[adapter_name],
                self.lora_E[adapter_name],
                self.lora_B[adapter_name],
            )

    def update_layer(self: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's; it makes a new ranknum, whose value the caller may still change."""
        self._ranknums.pop(adapter_name, None)
        super().update_layer(adapter_name, *args, **kwargs)  # type: ignore[misc]

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """PEFT's forward, with the base layer and the adapter in one op where that is possible."""
        # Modules and parameters are read from where nn.Module keeps them: its attributes take ten
        # times as long. Nothing is remembered, so nothing has to be kept up to date.
        modules = self._modules
        dropouts = modules["lora_dropout"]._modules
        adapters = modules["lora_A"]
        active = self.active_adapter
        if isinstance(active, str):
            names = [active] if active in adapters else []
        else:
            names = [name for name in active if name in adapters]
        if self.disable_adapters or self.merged_adapters or not names:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        base = modules["base_layer"]
        dropout_p = fused_dropout_p(dropouts[names[0]])
        product = None if args or kwargs else _product_of(base)
        if dropout_p is not None and product is not None:
            name = names.pop(0)
            weight, bias = product
            A, E, B = self._factors_of(name)
            scaling = self._scaling_of(name)
            result = functional.svd_linear(
                x, weight, A, E, B, bias=bias, scaling=scaling, dropout_p=dropout_p
            )
        else:
            result = base(x, *args, **kwargs)
        for name in names:
            result = self._add_adapter(name, result, x)
        return result

    def _add_adapter(self: Any, adapter_name: str, result: Tensor, x: Tensor) -> Tensor:
        factors = self._factors_of(adapter_name)
        dropout = self._modules["lora_dropout"]._modules[adapter_name]
        dropout_p = fused_dropout_p(dropout)
        if dropout_p is None:
            # What is called sees what it sees in PEFT.
            x = dropout(self._cast_input_dtype(x, factors[0].dtype))
            dropout_p = 0.0
        scaling = self._scaling_of(adapter_name)
        return functional.svd_delta(result, x, *factors, scaling=scaling, dropout_p=dropout_p)

    def _load_from_state_dict(
        self: Any, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for adapter_name, own in self.ranknum.items():
            ranknum = state_dict.get(f"{prefix}ranknum.{adapter_name}")
            # In a state of DeepSpeed's ZeRO stage 3 there are no values.
            if ranknum is not None and not ranknum.is_meta and ranknum.numel() == 1:
                self._ranknums[adapter_name] = float(whole_tensor(ranknum).to(own.dtype)) + 1e-5
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class FusedSVDLinear(FusedLayer, SVDLinear):
    """PEFT's SVDLinear with our forward."""


class FusedSVDQuantLinear(FusedLayer, SVDQuantLinear):
    """PEFT's layer over GPTQ's, with our forward."""


class SVDConv2d(ReadingLayer, PeftSVDConv2d):
    """PEFT's layer over Conv2d, which keeps its forward."""


_OUR_CLASSES: dict[type, type] = {
    SVDLinear: FusedSVDLinear,
    SVDQuantLinear: FusedSVDQuantLinear,
    PeftSVDConv2d: SVDConv2d,
}

if is_bnb_available():
    from peft.tuners.adalora import SVDLinear8bitLt

    class FusedSVDLinear8bitLt(FusedLayer, SVDLinear8bitLt):
        """PEFT's layer over bitsandbytes' 8-bit ones, with our forward."""

    _OUR_CLASSES[SVDLinear8bitLt] = FusedSVDLinear8bitLt

if is_bnb_4bit_available():
    from peft.tuners.adalora import SVDLinear4bit

    class FusedSVDLinear4bit(FusedLayer, SVDLinear4bit):
        """PEFT's layer over bitsandbytes' 4-bit ones, with our forward."""

    _OUR_CLASSES[SVDLinear4bit] = FusedSVDLinear4bit


def adalora_layers(root: nn.Module) -> dict[str, AdaLoraLayer]:
    """PEFT's AdaLoRA layers in `root` by name, whether ours or as PEFT has made them."""
    return {name: m for name, m in root.named_modules() if isinstance(m, AdaLoraLayer)}


def swap_forward(layer: Any) -> None:
    """Make a layer of PEFT's one of ours, in place; without effect if there is no such class."""
    ours = _OUR_CLASSES.get(type(layer))
    if ours is None:
        return
    layer.__class__ = ours
    if not issubclass(ours, FusedLayer):
        return
    layer._ranknums = {}
    for adapter_name, ranknum in layer.ranknum.items():
        if not ranknum.is_meta:
            layer._scaling_of(adapter_name)


def freeze_ranknums(root: nn.Module) -> None:
    """Keep the optimizer away from ranknum, which is a constant.

    PEFT makes it trainable when it casts an adapter to another dtype or moves it.
    """
    for layer in adalora_layers(root).values():
        for ranknum in layer.ranknum.values():
            ranknum.requires_grad_(False)


def _product_of(base: Any) -> tuple[Tensor, Tensor | None] | None:
    """Return weight (out, in) and bias of `base` if base(x) is nothing but their product with x.

    It is not where the layer is of a subclass, hooked or patched. Its weight must be plain, too:
    what a tensor subclass (torchao's, a user's) makes of x is for the subclass to say. A DTensor's
    product `functional.svd_linear` knows.
    """
    if type(base) not in (nn.Linear, Conv1D) or not is_unhooked(base):
        return None
    weight, bias = parameter_of(base, "weight"), parameter_of(base, "bias")
    if not (is_plain_tensor(weight) or is_dtensor(weight)) or not weight.is_floating_point():
        return None
    return weight.T if type(base) is Conv1D else weight, bias

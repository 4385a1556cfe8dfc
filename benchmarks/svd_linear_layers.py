"""One AdaLoRA layer: its inputs, its providers, and what their results have to be.

The providers are the frozen layer, PEFT's, the authors' formula, and all of ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adalora_kernels
import adalora_kernels.peft
from adalora_kernels.kernels.svd_linear import plans
from adalora_kernels.ops import dropout_seed
from benchmarks.harness import check, kind_of
from benchmarks.whole_models import with_adapters

ALPHA = 16
BASELINE, PEFT, COMPILED, LORALIB = "F.linear", "PEFT", "PEFT compiled", "loralib"
LAYER, APPLIED, AUTO = "SVDLinear", "peft.apply", "auto"
FORWARD, BACKWARD = "forward", "forward + backward"
# No measured table is for that name: the plans are those of the arithmetic, whatever was tuned.
GOAL_GPU = plans.Device("H200, by arithmetic", "sm_90", 132)


@dataclass(frozen=True)
class Layer:
    """One layer at one number of rows, in one direction.

    Attributes:
        on_gpu: ours are the paths of the Triton kernels by name, over float32 adapters (PEFT's
            default); otherwise our layers, and all adapters have the dtype of x.
        compiled: torch.compile is one of the providers; on a GPU loralib, and PEFT and "auto" over
            adapters in the dtype of x, are others.
        counted: memory and ops are looked at, too, which takes its time.
    """

    K: int
    N: int
    M: int
    r: int
    direction: str = BACKWARD
    dropout: float = 0.0
    dtype: torch.dtype = torch.bfloat16
    on_gpu: bool = True
    compiled: bool = False
    counted: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        adapters, dtype = (str(d).removeprefix("torch.") for d in (self.adapters, self.dtype))
        sizes = {"M": self.M, "K": self.K, "N": self.N, "r": self.r, "dropout": self.dropout}
        return {**sizes, "dtype": dtype, "layer": {"bias": self.bias, "adapters": adapters}}

    @property
    def bias(self) -> bool:
        """DeBERTa's layers and MiniLM's have one, Llama's have none."""
        return self.K < 4096

    @property
    def scaling(self) -> float:
        return ALPHA / (self.r + 1e-5)

    @property
    def adapters(self) -> torch.dtype:
        """The dtype of lora_A, lora_E and lora_B, unless the provider's name says another one."""
        return torch.float32 if self.on_gpu else self.dtype

    def in_dtype(self, provider: str) -> str:
        """Name a provider over adapters in the dtype of x."""
        kind = "bf" if self.dtype == torch.bfloat16 else "fp"
        return f"{provider} {kind}{8 * self.dtype.itemsize}"

    @property
    def paths(self) -> list[str]:
        """The paths of our kernels that this layer can take."""
        product, r_pad = "y" if self.direction == FORWARD else "dx", plans.padded_rank(self.r)
        problem = plans.Problem(self.dtype, self.M, self.K, self.N, r_pad, product)
        return [path for path in plans.PATHS if plans.is_allowed(path, GOAL_GPU, problem)]

    @property
    def providers(self) -> list[str]:
        compiled = [COMPILED] if self.compiled else []
        if not self.on_gpu:
            return [BASELINE, PEFT, *compiled, LORALIB, LAYER, APPLIED]
        paths = [] if self.dropout else self.paths
        narrow = [self.in_dtype(AUTO), self.in_dtype(PEFT), LORALIB] if compiled else []
        return [BASELINE, AUTO, *paths, PEFT, *compiled, *narrow]


@dataclass(frozen=True)
class Inputs:
    """What one call reads: x, the gradient of y, the frozen layer, and the adapters by dtype.

    All `layers`, of the providers that have one, share the weight, the bias and the adapters.
    """

    x: Tensor
    g: Tensor
    linear: nn.Linear
    factors: Mapping[torch.dtype, Sequence[nn.Parameter]]
    layers: Mapping[str, nn.Module]


def make_inputs(layer: Layer, device: torch.device) -> Inputs:
    """Make a random set of inputs."""
    new = partial(torch.randn, dtype=layer.dtype, device=device)
    linear = nn.Linear(layer.K, layer.N, bias=layer.bias, device="meta").requires_grad_(False)
    linear.weight = nn.Parameter(new(layer.N, layer.K).div_(math.sqrt(layer.K)), False)
    linear.bias = nn.Parameter(new(layer.N), False) if layer.bias else None
    values = [0.1 * new(*s) for s in ((layer.r, layer.K), (layer.r, 1), (layer.N, layer.r))]
    dtypes = {layer.adapters, layer.dtype}
    factors = {dtype: [nn.Parameter(v.to(dtype, copy=True)) for v in values] for dtype in dtypes}
    wide = {PEFT: layer.adapters, APPLIED: layer.adapters}
    of_layers = {**wide, LAYER: layer.dtype, layer.in_dtype(PEFT): layer.dtype}
    layers = {
        name: _adapted(name, layer, linear, factors[dtype])
        for name, dtype in of_layers.items()
        if name in layer.providers
    }
    x = new(layer.M, layer.K).requires_grad_()
    return Inputs(x, new(layer.M, layer.N), linear, factors, layers)


def _adapted(name: str, layer: Layer, linear: nn.Linear, factors: Any) -> Any:
    """Make the layer of a provider, over shared factors."""
    if name == LAYER:
        ours = adalora_kernels.SVDLinear.from_linear(linear, layer.r, ALPHA, layer.dropout)
        ours.lora_A, ours.lora_E, ours.lora_B = factors
        return ours
    options = {"init_r": layer.r, "lora_alpha": ALPHA, "lora_dropout": layer.dropout}
    model = with_adapters(nn.Sequential(linear), ["0"], **options)
    if factors[0].dtype == layer.dtype:
        # PEFT's default is float32; this is what `autocast_adapter_dtype=False` gives.
        model.to(layer.dtype)
    made = model.base_model.model[0]
    for factor, parameter in zip(("lora_A", "lora_E", "lora_B"), factors, strict=True):
        getattr(made, factor)["default"] = parameter
    if name == APPLIED:
        adalora_kernels.peft.apply(model)
    return made


@dataclass(frozen=True)
class Provider:
    """One way to compute y, over factors in the dtype `adapters`; None for the frozen layer."""

    forward: Callable[[Inputs], Tensor]
    adapters: torch.dtype | None = None

    def call(self, direction: str, inputs: Inputs) -> list[Tensor]:
        """Compute [y], and backward [y, dx, dA, dE, dB], for the frozen layer [y, dx].

        PEFT's `ranknum`, which happens to be trainable on a GPU, is left out, to PEFT's advantage.
        """
        y = self.forward(inputs)
        if direction == FORWARD:
            return [y]
        factors = () if self.adapters is None else inputs.factors[self.adapters]
        return [y, *torch.autograd.grad(y, [inputs.x, *factors], inputs.g)]


@cache
def _compiled(backend: str) -> Callable[[nn.Module, Tensor], Tensor]:
    return torch.compile(lambda layer, x: layer(x), backend=backend, dynamic=False)


def providers_of(layer: Layer, device: torch.device) -> dict[str, Provider]:
    """Make the providers by name, the baseline first."""
    wide, narrow = layer.adapters, layer.dtype

    def of_layer(name: str, adapters: torch.dtype) -> Provider:
        return Provider(lambda inputs: inputs.layers[name](inputs.x), adapters)

    def ours(path: str, adapters: torch.dtype) -> Provider:
        return Provider(partial(_ours, layer, path, adapters), adapters)

    # With the cases for a GPU on a CPU only the code is tried.
    compiled = _compiled("eager" if layer.on_gpu and device.type != "cuda" else "inductor")
    providers = {
        BASELINE: Provider(lambda inputs: inputs.linear(inputs.x)),
        PEFT: of_layer(PEFT, wide),
        layer.in_dtype(PEFT): of_layer(layer.in_dtype(PEFT), narrow),
        COMPILED: Provider(lambda inputs: compiled(inputs.layers[PEFT], inputs.x), wide),
        LORALIB: Provider(partial(_loralib, layer), narrow),
        LAYER: of_layer(LAYER, narrow),
        APPLIED: of_layer(APPLIED, wide),
        layer.in_dtype(AUTO): ours(AUTO, narrow),
        **{path: ours(path, wide) for path in (AUTO, *plans.PATHS)},
    }
    return {name: providers[name] for name in layer.providers}


def _loralib(layer: Layer, inputs: Inputs) -> Tensor:
    """Compute y as the authors do, who have no adapters in another dtype than the weight's."""
    A, E, B = inputs.factors[layer.dtype]
    y: Tensor = inputs.linear(inputs.x)
    x = F.dropout(inputs.x, layer.dropout, inputs.linear.training) if layer.dropout else inputs.x
    y += x @ (A * E).T @ B.T * ALPHA / (layer.r + 1e-5)
    return y


def _ours(layer: Layer, path: str, adapters: torch.dtype, inputs: Inputs) -> Tensor:
    """Compute y by the functional API, or by the op, since the API knows no paths."""
    x, weight, bias = inputs.x, inputs.linear.weight, inputs.linear.bias
    factors = inputs.factors[adapters]
    if path == AUTO:
        options: Any = {"scaling": layer.scaling, "dropout_p": layer.dropout}
        return adalora_kernels.svd_linear(x, weight, *factors, bias=bias, **options)
    options = (None, layer.scaling, 0.0, None, path)
    return torch.ops.adalora.svd_linear(x, weight, bias, *factors, *options)[0]


class Check:
    """Holds providers to what the definition gives, for all sets of inputs together.

    Ours are held to the rule of design.md, section 7, for y and every gradient. The others have to
    be the same function; dropout, of which they draw masks of their own, is turned off in them.
    """

    def __init__(self, layer: Layer, inputs: Sequence[Inputs]) -> None:
        self.layer, self.inputs = layer, inputs
        self.plain = cache(self._plain)

    def __call__(self, name: str, provider: Provider) -> None:
        """Raise what is wrong with a provider."""
        if provider.adapters is None:
            return  # The frozen layer, which is another function.
        theirs = kind_of(name) == "theirs"
        # Not all layers: in evaluation ours may merge their adapters into the weight.
        modules = nn.ModuleList(one.linear for one in self.inputs)
        layer = PEFT if name == COMPILED else name
        modules.extend(one.layers[layer] for one in self.inputs if layer in one.layers)
        modules.train(not theirs)
        try:
            actual = self._pooled(partial(provider.call, self.layer.direction))
        finally:
            modules.train()
        exact = self.plain(self.layer.adapters, not theirs, torch.float64)
        # Of an error in float64 an oracle in float64 knows nothing.
        by_rule = not theirs and self.layer.dtype != torch.float64
        eager = self.plain(provider.adapters, True, None) if by_rule else [None] * len(exact)
        whats = ("y", "dx", "dA", "dE", "dB")
        for what, *results in zip(whats, actual, exact, eager, strict=False):
            check(what, *results)

    def _pooled(self, results: Callable[[Inputs], Sequence[Tensor]]) -> list[Tensor]:
        """Put each result of all sets of inputs into one vector; all are seeded alike."""
        found = []
        for one in self.inputs:
            torch.manual_seed(1)
            found.append(results(one))
        same = zip(*found, strict=True)
        return [torch.cat([tensor.detach().flatten() for tensor in each]) for each in same]

    def _plain(self, adapters: Any, dropped: bool, dtype: torch.dtype | None) -> list[Tensor]:
        """What a provider has to give, by autograd on the definition, in `dtype` if given."""

        def results(one: Inputs) -> list[Tensor]:
            tensors = (one.linear.weight, one.linear.bias, one.g, one.x, *one.factors[adapters])
            copies = (None if t is None else t.detach().to(dtype or t.dtype) for t in tensors)
            weight, bias, g, *leaves = copies
            x, A, E, B = (t.requires_grad_() for t in leaves)
            into_A = x.to(A.dtype)
            if self.layer.dropout and dropped:
                into_A = into_A * _dropout_mask(self.layer.dropout, one.x.detach())
            options: Any = {"scaling": self.layer.scaling, "impl": "reference"}
            y = adalora_kernels.svd_delta(F.linear(x, weight, bias), into_A, A, E, B, **options)
            return [y, *torch.autograd.grad(y, [x, A, E, B], g)]

        return self._pooled(results)


def _dropout_mask(p: float, x: Tensor) -> Tensor:
    """Find out what the seed drops from x: with ones for x and unit matrices, y shows it."""
    torch.manual_seed(1)
    K, kept, seed = x.shape[1], [], dropout_seed(x)
    ones, op = torch.ones_like(x), torch.ops.adalora.svd_linear
    # The kernels take at most 256 ranks.
    for unit in torch.eye(K, dtype=x.dtype, device=x.device).split(256):
        r = len(unit)
        E, B, weight = unit.new_ones(r, 1), torch.eye(r).to(unit), unit.new_zeros(r, K)
        kept.append(op(ones, weight, None, unit, E, B, None, 1.0, p, seed)[0] != 0)
    mask = torch.cat(kept, 1)
    rate = 1 - float(mask.double().mean())
    if abs(rate - p) > 5 * math.sqrt(p * (1 - p) / mask.numel()):
        raise ArithmeticError(f"dropout {p} drops {rate:.3f}")
    return mask / (1 - p)

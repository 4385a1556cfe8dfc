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
from peft.tuners.adalora.layer import SVDLinear as PeftSVDLinear
from torch import Tensor, nn

import adalora_kernels
import adalora_kernels.peft
from benchmarks.adapted_models import with_adapters
from benchmarks.harness import check, kind_of

try:
    from adalora_kernels.kernels.svd_linear import plans
except ImportError:  # Where the kernels of a layer are one module.
    from adalora_kernels.kernels import plans

ALPHA = 16
BASELINE, PEFT, COMPILED, LORALIB = "F.linear", "PEFT", "PEFT compiled", "loralib"
REFERENCE, LAYER, APPLIED, AUTO = "reference.py", "SVDLinear", "peft.apply", "auto"
FORWARD, BACKWARD = "forward", "forward + backward"
# The few entries of dE in a single set of inputs say too little about an error.
_LEAST_CHECKED_RANKS = 8
_LARGEST_RANK = 256


@dataclass(frozen=True)
class Layer:
    """One layer at one number of rows, in one direction.

    Attributes:
        on_gpu: ours are the paths of the Triton kernels by name, over float32 adapters (PEFT's
            default); otherwise our layers, and all adapters have the dtype of x.
        compiled: torch.compile is one of the providers.
        counted: memory and ops are looked at, too, which takes its time.
        narrow: PEFT and "auto" take part over adapters in the dtype of x, too.
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
    narrow: bool = True

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
        """The paths of our kernels that this layer can take; one_pass is one of the forward."""
        few = self.M <= plans.ONE_PASS_ROWS and self.r <= plans.ONE_PASS_RANKS
        one_pass = few and self.dtype != torch.float32 and self.direction == FORWARD
        return [path for path in plans.PATHS if one_pass or path != "one_pass"]

    @property
    def providers(self) -> list[str]:
        compiled = [COMPILED] if self.compiled else []
        if not self.on_gpu:
            return [BASELINE, PEFT, *compiled, LORALIB, REFERENCE, LAYER, APPLIED]
        if self.dropout:
            return [BASELINE, AUTO, PEFT]
        narrow = [self.in_dtype(AUTO), self.in_dtype(PEFT)] if self.narrow else []
        others = [*compiled, LORALIB, REFERENCE] if compiled else []
        return [BASELINE, AUTO, *self.paths, PEFT, *narrow, *others]


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
    narrow, names = layer.in_dtype(PEFT), (PEFT, layer.in_dtype(PEFT), APPLIED, LAYER)
    layers = {}
    for name in (name for name in names if name in layer.providers):
        dtype = layer.dtype if name in (narrow, LAYER) else layer.adapters
        layers[name] = _adapted(name, layer, linear, factors[dtype])
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
    if type(made) is not PeftSVDLinear:
        raise TypeError(f"the provider is a {type(made).__name__}, not PEFT's SVDLinear")
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

    def of_layer(name: str, adapters: torch.dtype) -> Provider:
        return Provider(lambda inputs: inputs.layers[name](inputs.x), adapters)

    def functional(impl: str, adapters: torch.dtype) -> Provider:
        return Provider(partial(_functional, layer, impl, adapters), adapters)

    wide, narrow = layer.adapters, layer.dtype
    # With the cases for a GPU on a CPU only the code is tried.
    compiled = _compiled("eager" if layer.on_gpu and device.type != "cuda" else "inductor")
    providers = {
        BASELINE: Provider(lambda inputs: inputs.linear(inputs.x)),
        PEFT: of_layer(PEFT, wide),
        layer.in_dtype(PEFT): of_layer(layer.in_dtype(PEFT), narrow),
        COMPILED: Provider(lambda inputs: compiled(inputs.layers[PEFT], inputs.x), wide),
        LORALIB: Provider(partial(_loralib, layer), narrow),
        REFERENCE: functional("reference", wide),
        LAYER: of_layer(LAYER, narrow),
        APPLIED: of_layer(APPLIED, wide),
        AUTO: functional("auto", wide),
        layer.in_dtype(AUTO): functional("auto", narrow),
        **{path: Provider(partial(_by_path, layer, path), wide) for path in plans.PATHS},
    }
    return {name: providers[name] for name in layer.providers}


def _loralib(layer: Layer, inputs: Inputs) -> Tensor:
    """Compute y as the authors do, who have no adapters in another dtype than the weight's."""
    A, E, B = inputs.factors[layer.dtype]
    y: Tensor = inputs.linear(inputs.x)
    x = F.dropout(inputs.x, layer.dropout, inputs.linear.training) if layer.dropout else inputs.x
    y += x @ (A * E).T @ B.T * ALPHA / (layer.r + 1e-5)
    return y


def _functional(layer: Layer, impl: Any, adapters: torch.dtype, inputs: Inputs) -> Tensor:
    tensors = (inputs.x, inputs.linear.weight, *inputs.factors[adapters])
    options: Any = {"scaling": layer.scaling, "dropout_p": layer.dropout, "impl": impl}
    return adalora_kernels.svd_linear(*tensors, bias=inputs.linear.bias, **options)


def _by_path(layer: Layer, path: str, inputs: Inputs) -> Tensor:
    """Ask the op, since the functional API knows no paths."""
    linear, factors = inputs.linear, inputs.factors[layer.adapters]
    tensors = (inputs.x, linear.weight, linear.bias, *factors, None)
    y: Tensor = torch.ops.adalora.svd_linear(*tensors, layer.scaling, 0.0, None, path)[0]
    return y


def checked_sets(layer: Layer) -> int:
    """How many sets of inputs a `Check` has to be given."""
    return max(2 if layer.on_gpu else 1, math.ceil(_LEAST_CHECKED_RANKS / layer.r))


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
        impl = "" if theirs else "reference" if name == REFERENCE else "auto"
        self._train(PEFT if name == COMPILED else name, not theirs)
        try:
            actual = self._pooled(partial(_seeded, provider, self.layer.direction))
        finally:
            self._train(PEFT if name == COMPILED else name, True)
        exact = self.plain(self.layer.adapters, impl, torch.float64)
        # Of an error in float64 an oracle in float64 knows nothing.
        by_rule = impl and self.layer.dtype != torch.float64
        eager = self.plain(provider.adapters, impl, None) if by_rule else [None] * len(exact)
        for what, *results in zip(
            ("y", "dx", "dA", "dE", "dB"), actual, exact, eager, strict=False
        ):
            check(what, *results)

    def _train(self, name: str, on: bool) -> None:
        # Not all layers: in evaluation ours may merge their adapters into the weight.
        for one in self.inputs:
            for module in filter(None, (one.linear, one.layers.get(name))):
                module.train(on)

    def _pooled(self, results: Callable[[Inputs], Sequence[Tensor]]) -> list[Tensor]:
        """Put each result of all sets of inputs into one vector."""
        drawn = zip(*map(results, self.inputs), strict=True)
        return [torch.cat([t.detach().flatten() for t in same]) for same in drawn]

    def _plain(self, adapters: Any, impl: str, dtype: torch.dtype | None) -> list[Tensor]:
        """What a provider has to give, by autograd on the definition, in `dtype` if given."""

        def results(one: Inputs) -> list[Tensor]:
            tensors = (one.linear.weight, one.linear.bias, one.g, one.x, *one.factors[adapters])
            copies = (None if t is None else t.detach().to(dtype or t.dtype) for t in tensors)
            weight, bias, g, *leaves = copies
            x, A, E, B = (t.requires_grad_() for t in leaves)
            dropped = x.to(A.dtype)
            if self.layer.dropout and impl:
                dropped = dropped * _dropout_mask(self.layer.dropout, one.x.detach(), impl)
            options: Any = {"scaling": self.layer.scaling, "impl": "reference"}
            base = F.linear(x, weight, bias)
            y = adalora_kernels.svd_delta(base, dropped, A, E, B, **options)
            return [y, *torch.autograd.grad(y, [x, A, E, B], g)]

        return self._pooled(results)


def _seeded(provider: Provider, direction: str, inputs: Inputs) -> list[Tensor]:
    torch.manual_seed(1)
    return provider.call(direction, inputs)


def _dropout_mask(p: float, x: Tensor, impl: Any) -> Tensor:
    """Find out what the seed drops from x: with ones for x and unit matrices, y shows it."""
    K, kept = x.shape[1], []
    for first in range(0, K, _LARGEST_RANK):
        r = min(_LARGEST_RANK, K - first)
        unit = torch.eye(r, dtype=x.dtype, device=x.device)
        A, E, weight = F.pad(unit, (first, K - first - r)), unit[:, :1] * 0 + 1, x.new_zeros(r, K)
        torch.manual_seed(1)
        options: Any = {"dropout_p": p, "impl": impl}
        kept.append(adalora_kernels.svd_linear(x * 0 + 1, weight, A, E, unit, **options) != 0)
    mask = torch.cat(kept, 1)
    rate = 1 - float(mask.double().mean())
    if abs(rate - p) > 5 * math.sqrt(p * (1 - p) / mask.numel()):
        raise ArithmeticError(f"dropout {p} drops {rate:.3f}")
    return mask / (1 - p)

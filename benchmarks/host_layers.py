"""What the host spends on adapted layers: who provides them, and what their results have to be.

Over the fake GPU (fake_gpu.py) ours launch by the whole real path, and nothing is computed. PyTorch
and PEFT run on the CPU there, with tensors so small that only their calls count (NOTES.md).
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import adalora_kernels
import adalora_kernels.peft
from adalora_kernels import launching
from adalora_kernels.adapters import find_adapters
from benchmarks import fake_gpu
from benchmarks.bench_train_step import LLAMA, llama
from benchmarks.harness import Call, check
from benchmarks.whole_models import with_adapters

FROZEN, LORA, ADALORA = "frozen nn.Linear", "PEFT LoRA", "PEFT AdaLoRA"
APPLIED, LAYER, BY_TRITON = "peft.apply", "SVDLinear", "peft.apply, Triton's launcher"
OURS = (APPLIED, LAYER, BY_TRITON)
FORWARD, BACKWARD, NO_GRAD = "forward", "forward + backward", "forward without grad"
FAKE, CPU, GPU = "fake GPU", "CPU", "GPU"
ALPHA = 16
# What one of our layers launches in its forward and in its backward, at the sizes below.
LAUNCHES = (2, 4)
_BLOCKS = 4
_PACKAGE = str(Path(adalora_kernels.__file__).parent)
ADAPTED = _BLOCKS * len(LLAMA.target_modules)


@dataclass(frozen=True)
class Host:
    """One layer, or a tiny Llama with all its linear layers adapted, and where it runs."""

    on: str
    direction: str
    dropout: float = 0.0
    rows: int = 0
    columns: int = 0
    llama: bool = False

    @property
    def r(self) -> int:
        """PEFT's default for LoRA; that of the Llama is what its rows were first measured with."""
        return 40 if self.llama else 8

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the frozen layers; the adapters are in float32, which is PEFT's default."""
        return torch.float32 if self.on == CPU else torch.bfloat16

    def size(self, name: str) -> tuple[int, int]:
        """Say how many rows and columns a provider gets; y has as many."""
        if self.on == FAKE:
            # More than MOST_FEW_ROWS, so that a layer of ours takes the path of many rows.
            return (65, 64) if name in OURS else (2, 8)
        return self.rows, self.columns

    @property
    def providers(self) -> list[str]:
        names = [FROZEN, LORA, ADALORA, APPLIED, LAYER, BY_TRITON]
        left_out = {BY_TRITON} if self.on == CPU else {LAYER} if self.llama else set()
        return [name for name in names if name not in left_out]


class Provider(NamedTuple):
    """A layer, or a model from its embeddings on, with the input and the gradient of its output.

    `trained` are the parameters that get gradients. Of a layer there are also the frozen one and
    the factors: lora_A, lora_E (but for LoRA) and lora_B.
    """

    forward: Callable[[Tensor], Tensor]
    x: Tensor
    g: Tensor
    trained: Sequence[Tensor]
    linear: Any = None
    factors: Sequence[Tensor] = ()

    def call(self, direction: str) -> None:
        """Do what is timed; gradients are dropped, so that the next call makes new ones."""
        if direction == NO_GRAD:
            with torch.no_grad():
                self.forward(self.x)
        elif direction == FORWARD:
            self.forward(self.x)
        else:
            self.forward(self.x).backward(self.g)
            for tensor in (self.x, *self.trained):
                tensor.grad = None


def make(host: Host, name: str, device: torch.device) -> Provider:
    """Make a provider; those of one size have equal weights, inputs and adapters."""
    torch.manual_seed(0)
    return (_llama if host.llama else _layer)(host, name, device)


def _adapted(host: Host, name: str, model: nn.Module, targets: list[str]) -> Any:
    if name == FROZEN:
        return model.requires_grad_(False)
    options: Any = {"lora_alpha": ALPHA, "lora_dropout": host.dropout}
    if name == LORA:
        config = LoraConfig(r=host.r, target_modules=targets, **options)
        return get_peft_model(model, config).base_model.model
    made = with_adapters(model, targets, init_r=host.r, target_r=host.r // 2, **options)
    if name in (APPLIED, BY_TRITON):
        adalora_kernels.peft.apply(made)
    return made.base_model.model


def _provider(forward: Any, x: Tensor, model: nn.Module, **rest: Any) -> Provider:
    trained = [p for p in model.parameters() if p.requires_grad]
    y = forward(x)
    torch.manual_seed(1)
    return Provider(forward, x.requires_grad_(), torch.randn_like(y), trained, **rest)


def _layer(host: Host, name: str, device: torch.device) -> Provider:
    rows, K = host.size(name)
    linear = nn.Linear(K, K, bias=False, device=device, dtype=host.dtype).requires_grad_(False)
    new = partial(torch.randn, device=device)
    x = new(rows, K, dtype=host.dtype)
    A, E, B = (0.1 * new(*shape) for shape in ((host.r, K), (host.r, 1), (K, host.r)))
    if name == LAYER:
        options: Any = {"lora_dropout": host.dropout, "adapter_dtype": torch.float32}
        layer: Any = adalora_kernels.SVDLinear.from_linear(linear, host.r, ALPHA, **options)
    else:
        layer = _adapted(host, name, nn.Sequential(linear), ["0"]).train()[0]
    factors, values = [p for found in find_adapters(layer) for p in found.parameters], (A, E, B)
    if name == LORA:  # The same function, with E in A.
        factors, values = [p for p in layer.parameters() if p.requires_grad], (A * E, B)
    for factor, value in zip(factors, values, strict=name != FROZEN):
        factor.data.copy_(value)
    return _provider(layer, x, layer, linear=linear, factors=factors)


def _llama(host: Host, name: str, device: torch.device) -> Provider:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": _BLOCKS}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 16}
    tiny = llama("tiny", **sizes)
    model = _adapted(
        host, name, tiny.model(tiny.config).to(device, host.dtype), tiny.target_modules
    )
    model.train()
    embedded = torch.randn(1, 4, 16, device=device, dtype=host.dtype)
    return _provider(lambda x: model(inputs_embeds=x).logits, embedded, model)


def through_triton(call: Call) -> object:
    """Call it with Triton's own launcher in the place of the compiled library's."""
    asked = launching.why_not_library
    launching.why_not_library = lambda: "a bench wants Triton's launcher"
    try:
        return call()
    finally:
        launching.why_not_library = asked


class CheckNumbers:
    """Holds the providers to the definition in float64, ours to twice the error of PEFT's AdaLoRA.

    LoRA, which has lora_E in its lora_A, has y and the gradients of x and lora_B in common with
    them. The frozen layer is another function.
    """

    def __init__(self, host: Host, model: Provider) -> None:
        self.eager: Sequence[Any] = ()
        x, g, w, *factors = (
            t.detach().double() for t in (model.x, model.g, model.linear.weight, *model.factors)
        )
        leaves = [t.requires_grad_() for t in (x, *factors)]
        options: Any = {"scaling": ALPHA / (host.r + 1e-5), "impl": "reference"}
        y = adalora_kernels.svd_linear(x, w, *factors, **options)
        self.exact = [y, *torch.autograd.grad(y, leaves, g)]

    def __call__(self, name: str, provider: Provider) -> None:
        """Raise what is wrong with a provider."""
        if name == FROZEN:
            return
        y = provider.forward(provider.x)
        wanted = [provider.x, *provider.factors]
        actual = [y, *torch.autograd.grad(y, wanted, provider.g)]
        found = dict(zip(("y", "dx", "dA", "dE", "dB"), self.exact, strict=True))
        if name == LORA:
            del found["dA"], found["dE"], actual[2]
        eager = self.eager if name in OURS else [None] * len(actual)
        for what, one, plain in zip(found, actual, eager, strict=True):
            check(what, one, found[what], plain)
        self.eager = actual if name == ADALORA else self.eager


class CheckLaunches:
    """Holds the providers over the fake GPU to their launches and to the shapes of results."""

    def __init__(self, host: Host) -> None:
        self.layers = ADAPTED if host.llama else 1

    def __call__(self, name: str, provider: Provider) -> None:
        """Raise what is wrong with a provider."""
        run = through_triton if name == BY_TRITON else lambda call: call()
        found = [fake_gpu.counts()]
        y: Any = run(partial(provider.forward, provider.x))
        found.append(fake_gpu.counts())
        run(partial(y.backward, provider.g))
        found.append(fake_gpu.counts())
        for n, (before, after) in zip(LAUNCHES, pairwise(found), strict=True):
            launches, wanted = after.launches - before.launches, n * self.layers * (name in OURS)
            if launches != wanted or after.errors != before.errors:
                raise ArithmeticError(f"{launches} launches instead of {wanted}, or one failed")
        for tensor in (provider.x, *provider.trained):
            if tensor.grad is None or tensor.grad.shape != tensor.shape:
                raise ArithmeticError("a gradient is missing, or not of its tensor's shape")
            tensor.grad = None


def python_calls(call: Call) -> int:
    """Count the calls of Python functions that an autograd.Function of ours makes in a call.

    What is below it is what a launch costs in Python.
    """
    depth = count = 0

    def look(frame: Any, event: str, _: object) -> None:
        nonlocal depth, count
        if event not in ("call", "return"):
            return
        code = frame.f_code
        ours = code.co_varnames[:1] == ("ctx",) and code.co_filename.startswith(_PACKAGE)
        if event == "call":
            count += depth > 0
            depth += ours or depth > 0
        elif depth:
            depth -= 1

    sys.setprofile(look)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count


def plan_misses() -> int | None:
    """How often the compiled library asked for a plan; None if it is not what launches."""
    if launching.why_not_library() is not None:
        return None
    return int(ctypes.CDLL(str(launching.library.path)).adalora_plan_misses())

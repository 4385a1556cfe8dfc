"""What several test files need: random adapters, the error rule, counting, and reading of files."""

import json
from collections import Counter

import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from adalora_kernels import SVDLinear


def adapter(r, in_features, out_features, dtype=torch.float64, requires_grad=True):
    """Random (lora_A, lora_E, lora_B)."""
    shapes = ((r, in_features), (r, 1), (out_features, r))
    return tuple(torch.randn(s, dtype=dtype).requires_grad_(requires_grad) for s in shapes)


def assert_as_good_as_eager(actual, eager, oracle, name=""):
    """Design, section 7: at most twice the error of plain eager, plus one rounding step."""
    assert actual.shape == oracle.shape and actual.dtype == eager.dtype, name
    exact = oracle.double()
    error = (actual.double() - exact).norm()
    allowed = 2 * (eager.double() - exact).norm() + torch.finfo(eager.dtype).eps * exact.norm()
    assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


class CountOps(TorchDispatchMode):
    """Counts dispatched ops by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


class Mlp(nn.Module):
    """Three SVDLinear layers; a regression loss."""

    def __init__(self, r=6, dtype=torch.float32, **options):
        super().__init__()
        sizes = ((16, 24), (24, 20), (20, 8))
        self.layers = nn.ModuleList(SVDLinear(i, o, r=r, dtype=dtype, **options) for i, o in sizes)

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = torch.tanh(layer(x))
        return self.layers[-1](x)

    def loss(self, x, target):
        return (self(x) - target).square().mean()


def batch(step, dtype=torch.float32):
    """The training batch of one step: the same for everybody who asks."""
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(32, 16, generator=generator)
    return x.to(dtype), torch.randn(32, 8, generator=generator).to(dtype)


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def triplets_in(state):
    """How many triplets of each layer are there, in what PEFT saves: the others are all 0."""
    if not isinstance(state, dict):  # a folder
        config = json.loads((state / "adapter_config.json").read_text())
        assert config["rank_pattern"] is None
        state = load_file(state / "adapter_model.safetensors")
    layers = {name.partition(".lora_E")[0] for name in state if ".lora_E" in name}
    result = {}
    for layer in layers:
        name = next(name for name in state if name.startswith(f"{layer}.lora_E"))
        a, e, b = (
            state[name.replace("lora_E", factor)] for factor in ("lora_A", "lora_E", "lora_B")
        )
        there = (a != 0).any(1) | (e != 0).any(1) | (b != 0).any(0)
        # What is there is there as a whole.
        assert torch.equal(there, (a != 0).any(1)) and torch.equal(there, (b != 0).any(0))
        result[layer.removeprefix("base_model.model.")] = int(there.sum())
    return result

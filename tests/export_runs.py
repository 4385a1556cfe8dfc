"""Models with adapters, trained or filled, and what is written of them: for tests of `export`."""

import copy
import json

import pytest
import torch
from helpers import batch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import adalora_kernels.peft
from adalora_kernels.export import export_lora, load_adapter, save_adapter

STEPS = 30
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


class Net(nn.Module):
    def __init__(self, kind="linear"):
        super().__init__()
        torch.manual_seed(7)
        if kind == "conv2d":
            # The 16 inputs as 4 channels of 2x2 pixels.
            self.fc0, self.fc1 = nn.Conv2d(4, 6, (2, 1), padding=1), nn.Conv2d(6, 4, 3, padding=1)
            self.fc2 = nn.Linear(36, 8)
        else:
            for i, (n, m) in enumerate(((16, 24), (24, 20), (20, 8))):
                layer = Conv1D(m, n) if kind == "conv1d" else nn.Linear(n, m)
                setattr(self, f"fc{i}", layer)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        if isinstance(getattr(self.fc0, "base_layer", self.fc0), nn.Conv2d):
            x = x.reshape(-1, 4, 2, 2)
        x = torch.tanh(self.fc1(torch.tanh(self.fc0(x))))
        return self.norm(self.fc2(x.flatten(1)[:, :36]))


def config_of(kind="linear", **options):
    arguments = {
        "init_r": 6,
        "target_r": 2,
        "lora_alpha": 16,
        "total_step": STEPS,
        "tinit": 3,
        "tfinal": 5,
        "target_modules": ["fc0", "fc1", "fc2"],
        "fan_in_fan_out": kind == "conv1d",
        **options,
    }
    return AdaLoraConfig(**arguments)


def make(kind="linear", name="default", **options):
    """A plain PEFT model whose adapter does nothing yet."""
    return get_peft_model(Net(kind), config_of(kind, **options), adapter_name=name).train()


def fill(model, name="default", dead="fc1"):
    """What a pruned adapter is after training: `dead` has rank 0, the others 4 of 6."""
    torch.manual_seed(1)
    with torch.no_grad():
        for module_name, module in model.named_modules():
            if isinstance(getattr(module, "lora_E", None), nn.ParameterDict):
                e = nn.init.normal_(module.lora_E[name])
                nn.init.normal_(module.lora_A[name], std=0.3)
                nn.init.normal_(module.lora_B[name], std=0.3)
                e[1::3] = 0
                if module_name.endswith(dead):
                    e.zero_()
        for parameter_name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" not in parameter_name:
                parameter.add_(torch.randn_like(parameter))
    return model


def train(model, optimizer, allocator, steps):
    losses = []
    for step in steps:
        x, target = batch(step)
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        allocator.step(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def adamw(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def trained(upto=STEPS, **options):
    model = make(**options)
    allocator = adalora_kernels.peft.apply(model).allocator
    optimizer = adamw(model)
    train(model, optimizer, allocator, range(1, upto + 1))
    return model, allocator, optimizer


def logits(model, dtype=torch.float32):
    with torch.no_grad():
        return model.eval()(batch(0)[0].to(dtype))


def read(folder):
    return json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)


def loaded(folder, net=Net):
    """In plain PEFT."""
    return PeftModel.from_pretrained(net(), folder)


def assert_files_are_the_same_function(model, folder, other=None):
    """Both kinds of files in plain PEFT, and the first in `other` too."""
    expected = logits(model)
    save_adapter(model, folder / "a")
    export_lora(model, folder / "l")
    for name in ("a", "l"):
        torch.testing.assert_close(logits(loaded(folder / name)), expected)
    if other is not None:
        load_adapter(other, folder / "a")
        torch.testing.assert_close(logits(other), expected)


def snapshot(model, allocator=None):
    state = {} if allocator is None else allocator.state_dict()
    return copy.deepcopy((model.state_dict(), state))


def assert_same(before, after):
    for a, b in zip(before, after, strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            if key in ("names", "ranks") or not isinstance(value, torch.Tensor | list):
                assert b[key] == value, key
            else:
                torch.testing.assert_close(b[key], value, rtol=0, atol=0, equal_nan=True)


full = pytest.mark.full
VARIANTS = [
    {},
    pytest.param({"kind": "conv1d"}, marks=full),
    {"kind": "conv2d"},
    {"bias": "lora_only"},
    pytest.param({"bias": "all"}, marks=full),
    {"lora_alpha": 0},
    pytest.param({"modules_to_save": ["norm"]}, marks=full),
    {"modules_to_save": ["norm"], "bias": "all"},
    pytest.param({"target_modules": r"fc\d"}, marks=full),
]

"""PEFT's layers with our forward: dropout modules as users leave them, beside PEFT's own."""

import copy

import pytest
import torch
from helpers import batch
from peft import AdaLoraConfig, get_peft_model
from torch import nn

import adalora_kernels.peft


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.fc0, self.fc1 = nn.Linear(16, 24), nn.Linear(24, 8)

    def forward(self, x):
        return self.fc1(torch.tanh(self.fc0(x)))


def config(**options):
    return AdaLoraConfig(
        init_r=6, target_r=3, total_step=30, target_modules=["fc0", "fc1"], **options
    )


def make(dtype=torch.float32, **options):
    model = get_peft_model(Net().to(dtype), config(lora_dropout=0.5, **options)).train()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_E" in name:
            nn.init.normal_(parameter)
    return model


def both(model):
    """PEFT's model, and a copy that is ours."""
    ours = copy.deepcopy(model)
    adalora_kernels.peft.apply(ours)
    return model, ours


def run(model, dtype=torch.float32):
    model.zero_grad()
    torch.manual_seed(5)
    x, target = batch(1, dtype)
    y = model(x)
    (y - target).square().mean().backward()
    gradients = {
        n: p.grad for n, p in model.named_parameters() if "lora_" in n and p.grad is not None
    }
    return {"y": y.detach(), **gradients}


class Halve(nn.Module):
    def forward(self, x):
        return 0.5 * x


class Doubled(nn.Dropout):
    def forward(self, x):
        return 2 * super().forward(x)


def replace(model, module, name="default"):
    for layer in (model.base_model.model.fc0, model.base_model.model.fc1):
        layer.lora_dropout[name] = copy.deepcopy(module)


REPLACEMENTS = [Halve(), nn.AlphaDropout(0.5), Doubled(0.5), nn.Dropout(1.0), nn.Dropout1d(0.5)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("module", REPLACEMENTS, ids=lambda module: type(module).__name__)
def test_replaced_dropout_is_called(module, dtype):
    """What the seed makes of a dropout is PyTorch's, as in PEFT, because it is that module."""
    model = make(dtype)
    replace(model, module)
    theirs, ours = both(model)
    tolerance = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-3}
    torch.testing.assert_close(run(ours, dtype), run(theirs, dtype), **tolerance)


@pytest.mark.parametrize("train", [True, False])
def test_hooks_on_dropout_run_as_in_peft(train):
    """Forward and backward ones, in training and in evaluation: with what they see in PEFT."""
    seen = []
    for model in both(make(torch.bfloat16)):
        calls = []
        for layer in (model.base_model.model.fc0, model.base_model.model.fc1):
            dropout = layer.lora_dropout["default"]
            dropout.register_forward_pre_hook(lambda m, args, c=calls: c.append(args[0].detach()))
            dropout.register_forward_hook(lambda m, args, y, c=calls: c.append(y.detach()))
            dropout.register_full_backward_hook(lambda m, x, g, c=calls: c.append(g[0]))
        run(model.train(train), torch.bfloat16)
        seen.append(calls)
    theirs, ours = seen
    assert len(ours) == len(theirs) == 5  # x itself needs no gradient
    assert [t.dtype for t in ours] == [t.dtype for t in theirs]
    torch.testing.assert_close(ours, theirs, rtol=3e-2, atol=1e-2)


def test_a_hook_that_changes_what_dropout_returns():
    model = make()
    model.base_model.model.fc0.lora_dropout["default"].register_forward_hook(lambda m, x, y: y + 1)
    model.base_model.model.fc1.lora_dropout["default"].forward = lambda x: x - 1
    theirs, ours = both(model)
    torch.testing.assert_close(run(ours), run(theirs))


def test_a_hook_that_comes_and_goes():
    """It is asked in every call: a tool may look for one step only."""
    _, ours = both(make())
    expected, seen = run(ours), []
    dropout = ours.base_model.model.fc0.lora_dropout["default"]
    handle = dropout.register_forward_hook(lambda *_: seen.append(1))
    run(ours)
    handle.remove()
    assert seen == [1]
    torch.testing.assert_close(run(ours), expected)


@pytest.mark.parametrize("replaced", ["default", "other"])
def test_of_two_active_adapters_one_has_another_dropout(replaced):
    model = make()
    model.add_adapter("other", config(lora_dropout=0.0, inference_mode=True))
    nn.init.normal_(model.base_model.model.fc0.lora_E["other"])
    model.base_model.set_adapter(["default", "other"])
    replace(model, nn.Identity())
    replace(model, Halve(), replaced)
    theirs, ours = both(model)
    torch.testing.assert_close(run(ours), run(theirs))


def test_plain_dropout_stays_in_the_op():
    _, ours = both(make())
    with torch.profiler.profile() as profile:
        run(ours)
    names = [event.key for event in profile.key_averages()]
    assert "SvdLinearFunction" in names and "SvdLinearFunctionBackward" in names, names
    assert "aten::dropout" not in names


def test_ranknum_of_a_loaded_state_is_used():
    """The forward knows it as a number; it has to be the one that merging uses."""
    _, ours = both(make())
    ours.eval()
    state = ours.state_dict()
    for name in state:
        if "ranknum" in name:
            state[name] = torch.full((1,), 3.0)
    ours.load_state_dict(state)
    x, _ = batch(0)
    expected = ours(x)
    ours.merge_adapter()
    torch.testing.assert_close(ours(x), expected)


def test_nothing_is_registered_later_than_apply():
    model = make()
    allocator = adalora_kernels.peft.apply(model).allocator
    tables = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "__dict__")

    def registered():
        return {
            (name, table): sorted(getattr(module, table))
            for name, module in model.named_modules()
            for table in tables
            if "lora" in name or hasattr(module, "lora_A")
        }

    before = registered()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    allocator.attach(optimizer)
    for _ in range(30):
        run(model)
        optimizer.step()
        optimizer.zero_grad()
    assert allocator.frozen
    assert registered() == before

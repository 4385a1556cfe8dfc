"""Any AdaLoraConfig: the applied model computes, trains, saves and exports as plain PEFT's does."""

import copy
import re
import tempfile
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from helpers import assert_as_good_as_eager, triplets_in
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import AdaLoraConfig, LoraModel, PeftModel, get_peft_model
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.pytorch_utils import Conv1D

import adalora_kernels.peft
from adalora_kernels.export import export_lora, save_adapter

BATCH, IN, HIDDEN, OUT, CLASSES = 64, 8, 10, 6, 4


class Net(nn.Module):
    """Two layers of one kind that can be adapted, and a head that is not."""

    def __init__(self, kind, bias):
        super().__init__()
        if kind == "conv1d":
            self.fc0, self.fc1 = Conv1D(HIDDEN, IN), Conv1D(OUT, HIDDEN)
        else:
            self.fc0 = nn.Linear(IN, HIDDEN, bias=bias)
            self.fc1 = nn.Linear(HIDDEN, OUT, bias=bias)
        self.head = nn.Linear(OUT, CLASSES)

    def forward(self, x, labels=None):
        logits = self.head(torch.tanh(self.fc1(torch.tanh(self.fc0(x)))))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


@st.composite
def cases(draw):
    """(options of the net, options of the AdaLoraConfig, steps to train, seed)."""
    kind = draw(st.sampled_from(["linear", "conv1d"]))
    total_step = draw(st.integers(2, 8))
    tinit = draw(st.integers(0, total_step - 1))
    tfinal = draw(st.integers(0, total_step - 1 - tinit))
    init_r = draw(st.integers(1, 8))
    net = {
        "kind": kind,
        "bias": draw(st.booleans()),
        "dtype": draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16])),
    }
    config = {
        "init_r": init_r,
        "target_r": draw(st.integers(0, init_r + 2)),
        "lora_alpha": draw(st.sampled_from([0, 1, 16, 0.3, 2.5, 13.7])),
        "lora_dropout": draw(st.sampled_from([0.0, 0.3])),
        "bias": draw(st.sampled_from(["none", "all", "lora_only"])),
        "tinit": tinit,
        "tfinal": tfinal,
        "deltaT": draw(st.integers(1, 3)),
        "total_step": total_step,
        "orth_reg_weight": draw(st.sampled_from([0.0, 0.1, 0.5])),
        "beta1": draw(st.sampled_from([0.5, 0.85])),
        "beta2": draw(st.sampled_from([0.5, 0.85])),
        "fan_in_fan_out": kind == "conv1d",
        "target_modules": draw(st.sampled_from([["fc0", "fc1"], ["fc1"], "fc."])),
    }
    return net, config, draw(st.integers(1, total_step)), draw(st.integers(0, 10_000))


def base_model(kind, bias, dtype):
    torch.manual_seed(0)
    return Net(kind, bias).to(dtype)


def make(net, config, seed):
    """A plain PEFT model whose adapters already do something."""
    model = get_peft_model(base_model(**net), AdaLoraConfig(**config))
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_E" in name:
            # Some singular values are 0 without having been pruned.
            nn.init.normal_(p, std=0.5).data *= torch.rand_like(p) < 0.8
        elif "lora_" in name:
            nn.init.normal_(p, std=0.3)
    return model


def batch(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH, IN, generator=generator).to(dtype)
    return x, torch.randint(0, CLASSES, (BATCH,), generator=generator)


def logits_of(model, x):
    with torch.no_grad():
        return model.eval()(x).logits


def loss_and_gradients(model, x, labels):
    model.train()
    # Without a task_type PEFT's own model(...) bypasses the regulariser.
    loss = model.base_model(x, labels=labels).loss
    loss.backward()
    # PEFT's ranknum becomes trainable where the adapter is cast to another dtype; ours never does.
    gradients = {
        n: p.grad for n, p in model.named_parameters() if p.grad is not None and "ranknum" not in n
    }
    model.zero_grad()
    return loss.detach(), gradients


def assert_as_good(actual, eager, oracle, name):
    """The rule of errors; in float64, where the oracle is no better, plain closeness."""
    if eager.dtype == torch.float64:
        assert (actual - oracle).norm() <= 1e-13 * oracle.norm(), name
    else:
        assert_as_good_as_eager(actual, eager, oracle, name)


def together(gradients, oracle):
    """One vector to which every layer contributes as much as every other.

    A gradient of a single entry, as that of lora_E at rank 1, may by chance be exact in eager.
    """
    squares = defaultdict(float)
    for name, exact in oracle.items():
        squares[layer_of(name)] += exact.square().sum()
    scales = {layer: square.sqrt().clamp(min=1e-30) for layer, square in squares.items()}
    return torch.cat([gradients[n].double().flatten() / scales[layer_of(n)] for n in oracle])


def layer_of(name):
    return re.split(r"\.(?:lora_|base_layer|bias)", name)[0]


def plain_copy(model, net, config, dtype=None):
    """Plain PEFT with the parameters of `model`, in its own dtypes or in another."""
    twin = make(net, config, 0)
    if dtype is not None:
        twin = twin.to(dtype)
    twin.load_state_dict(model.state_dict())
    return twin


def train(model, steps, dtype, seed):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model.train()
    for step in range(1, steps + 1):
        x, labels = batch(seed + step, dtype)
        model.base_model(x, labels=labels).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()


def load_in_plain_peft(folder, net):
    base = base_model(**net)
    if net["dtype"] == torch.bfloat16:
        # Over a bfloat16 base PEFT rounds a pruned adapter, saved in float32, as it loads it.
        base = base.float()
    model = PeftModel.from_pretrained(base, folder)
    assert not any("adalora_kernels" in type(m).__module__ for m in model.modules())
    return model


def assert_same_function(model, x, expected):
    """In float64, so that only what the parameters say is compared."""
    tolerance = 1e-12 if next(model.parameters()).dtype == torch.float64 else 1e-6
    logits = logits_of(model.double(), x.double())
    assert (logits - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("examples", [20, pytest.param(200, marks=pytest.mark.full)])
def test_any_config(examples):
    checks = list(HealthCheck)
    options = {"deadline": None, "derandomize": True, "suppress_health_check": checks}
    settings(max_examples=examples, **options)(given(cases())(check_config))()


def check_config(case):
    net, config, steps, seed = case
    dtype = net["dtype"]
    x, labels = batch(seed, dtype)
    theirs, ours = (make(net, config, seed) for _ in range(2))
    exact = plain_copy(theirs, net, config, torch.float64)
    report = adalora_kernels.peft.apply(ours)
    assert report.left == {} and report.swapped

    # Function, loss and gradients.
    oracle = logits_of(exact, x.double())
    assert_as_good(logits_of(ours, x), logits_of(theirs, x), oracle, "logits")
    if config["lora_dropout"] == 0.0:
        results = [loss_and_gradients(m, x.to(d), labels) for m, d in
                   ((ours, dtype), (theirs, dtype), (exact, torch.float64))]  # fmt: skip
        (loss, gradients), (eager_loss, eager), (exact_loss, exact_gradients) = results
        # A single number, which eager PyTorch may by chance have exactly: no rule of errors here.
        assert (loss - exact_loss).abs() <= 4 * torch.finfo(eager_loss.dtype).eps * exact_loss
        assert gradients.keys() == eager.keys()
        for name, gradient in gradients.items():
            assert gradient.dtype == eager[name].dtype, name
        for kind in {g.dtype for g in eager.values()}:
            oracle = {n: g for n, g in exact_gradients.items() if eager[n].dtype == kind}
            vectors = [together(g, oracle) for g in (gradients, eager, oracle)]
            # In the dtype of the gradients, as the rule wants it.
            assert_as_good(vectors[0].to(kind), vectors[1].to(kind), vectors[2], kind)

    # Training spends the budget exactly.
    train(ours, steps, dtype, seed)
    allocator = report.allocator
    schedule = allocator.schedule
    masked = [schedule.budget(step) for step in range(1, steps + 1) if schedule.masks_at(step)]
    budget = masked[-1] if masked else schedule.init_budget
    assert sum(allocator.ranks().values()) == budget
    if config["target_r"] >= config["init_r"]:
        assert budget == schedule.init_budget
    twin = plain_copy(ours, net, config)
    exact = logits_of(copy.deepcopy(twin).double(), x.double())
    assert_as_good(logits_of(ours, x), logits_of(twin, x), exact, "trained logits")

    # Saved, and loaded in plain PEFT.
    alive = sum(int((p != 0).sum()) for n, p in ours.named_parameters() if "lora_E" in n)
    with tempfile.TemporaryDirectory() as folder:
        for save in (type(ours).save_pretrained, save_adapter):
            path = Path(folder) / save.__name__
            save(ours, path)
            loaded = load_in_plain_peft(path, net)
            assert_same_function(loaded, x, exact)
            # Nothing is left out but what is pruned and adds nothing.
            stored = sum(triplets_in(loaded.state_dict()).values())
            assert alive <= stored <= max(alive, budget)
        if alive:
            export_lora(ours, Path(folder) / "lora")
            loaded = load_in_plain_peft(Path(folder) / "lora", net)
            assert type(loaded.base_model) is LoraModel
            assert_same_function(loaded, x, exact)

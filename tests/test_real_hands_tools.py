"""Averages of weights, quantised bases, files and numbers around an AdaLoRA model.

Plain PEFT and ours run the same script side by side, wherever PEFT is right; where it is not, the
test says so.
"""

import copy

import numpy as np
import pytest
import torch
from hands import (
    STEPS,
    TARGET,
    adamw,
    adapted,
    adapted_net,
    both_sides,
    config,
    enabled,
    end_step,
    llama,
    logits,
    perturbed,
    rank,
    take_over,
    tokens,
    train,
    trainable,
)
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from torch import nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_avg_fn, update_bn
from transformers import AutoModelForCausalLM

from adalora_kernels.peft import apply

# Averages of weights: nothing appears or vanishes in the middle of a run


def train_net(side, model, optimizer, after_step):
    for step in range(1, STEPS + 1):
        x = torch.randn(16, 8)
        nn.functional.cross_entropy(model(x), torch.randint(0, 2, (16,))).backward()
        optimizer.step()
        end_step(side, model, step, optimizer)
        after_step(step)


@both_sides
@pytest.mark.parametrize("use_buffers", [True, False])
def test_averaged_model(side, use_buffers):
    """SWA and EMA with torch's own class, made before the ranks are final."""
    model = adapted_net()
    optimizer = adamw(model)
    take_over(side, model, optimizer)
    average = AveragedModel(model, avg_fn=get_ema_avg_fn(0.5), use_buffers=use_buffers)
    schedule = SWALR(optimizer, swa_lr=5e-3)

    def after_step(step):
        average.update_parameters(model)
        schedule.step()

    train_net(side, model, optimizer, after_step)
    assert rank(model) == 4
    update_bn([torch.randn(16, 8) for _ in range(3)], average)
    means = dict(average.module.named_buffers())
    assert means["base_model.model.norm.running_mean"].abs().max() < 0.5
    # A pruned value decays in the average, as any that jumps.
    expected = {n: p for n, p in model.named_parameters() if "lora_E" in n}
    for name, parameter in average.module.named_parameters():
        if name in expected:
            assert (parameter - expected[name]).abs().max() < 0.1


@both_sides
def test_names_and_shapes_stay_the_same_for_the_whole_run(side):
    """What an EMA by hand, a logger or a checker of checkpoints iterates over."""
    model = adapted_net()
    optimizer = adamw(model)
    take_over(side, model, optimizer)

    def look():
        tensors = (model.named_parameters(), model.named_buffers(), model.state_dict().items())
        shapes = [{n: (tuple(t.shape), t.dtype) for n, t in group} for group in tensors]
        return shapes, {id(p) for p in model.parameters()}, [n for n, _ in model.named_modules()]

    before, seen = look(), []
    train_net(side, model, optimizer, lambda step: seen.append(look()))
    assert all(now == before for now in seen)


@both_sides
def test_an_average_in_a_copy_is_merged_and_used(side):
    """timm's ModelEma: a deep copy whose state dict follows by lerp; at the end it is served."""
    model = adapted()
    optimizer = adamw(model)
    take_over(side, model, optimizer)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    for step in range(1, STEPS + 1):
        train(side, model, optimizer, [step])
        live = model.state_dict()
        for name, tensor in average.state_dict().items():
            if tensor.is_floating_point():
                tensor.lerp_(live[name], 0.5)
    expected = logits(average)
    torch.testing.assert_close(logits(copy.deepcopy(average).merge_and_unload()), expected)
    assert 0 < (logits(model) - expected).abs().max() < 0.1


# Base weights of other kinds


class Int8(torch.Tensor):
    """A weight in int8 that is dequantised where it is used; it knows nothing of our ops."""

    @staticmethod
    def __new__(cls, q, scale):
        return torch.Tensor._make_wrapper_subclass(cls, q.shape, dtype=scale.dtype)

    def __init__(self, q, scale):
        self.q, self.scale = q, scale

    @classmethod
    def of(cls, weight):
        scale = weight.abs().amax(1, keepdim=True) / 127
        return cls((weight / scale).round().to(torch.int8), scale)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is nn.functional.linear:
            x, weight, *bias = args
            return nn.functional.linear(x, weight.q * weight.scale, *bias)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].q, args[0].scale)
        raise NotImplementedError(f"Int8 has no {func}")


def quantised(how):
    base = llama().requires_grad_(False)
    if how == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(base, Int8WeightOnlyConfig(), lambda module, name: name.endswith("_proj"))
        return base
    for name, module in base.named_modules():
        if name.endswith("_proj"):
            module.weight = nn.Parameter(Int8.of(module.weight.data), requires_grad=False)
    return base


@both_sides
@pytest.mark.parametrize("how", ["torchao", "subclass"])
def test_a_base_weight_that_is_a_tensor_subclass(side, how):
    model = get_peft_model(quantised(how), config())
    optimizer = adamw(model)
    take_over(side, model, optimizer)
    train(side, model, optimizer)
    assert rank(model) == TARGET


@pytest.mark.parametrize("how", ["torchao", "subclass"])
def test_both_sides_agree_over_a_tensor_subclass(how):
    theirs, ours = (perturbed(get_peft_model(quantised(how), config())) for _ in range(2))
    apply(ours)
    for model in (theirs, ours):
        model(**tokens(1)).loss.backward()
    torch.testing.assert_close(logits(ours), logits(theirs))
    for a, b in zip(trainable(ours), trainable(theirs), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


# Files, where other loaders read them


def test_adapters_load_where_peft_does_not_ours(tmp_path):
    """transformers' own loaders refuse the smaller ranks that PEFT writes."""
    llama().save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config())
    optimizer = adamw(model, lr=2e-2)
    take_over("ours", model, optimizer)
    train("ours", model, optimizer)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    by_hand = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    by_hand.load_adapter(tmp_path / "adapter")
    loaded = {
        "AutoModel": AutoModelForCausalLM.from_pretrained(tmp_path / "adapter"),
        "load_adapter": by_hand,
        "AutoPeftModel": AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"),
        "PeftModel": PeftModel.from_pretrained(llama(), tmp_path / "adapter"),
    }
    with enabled():
        loaded["enabled"] = PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    for name, other in loaded.items():
        torch.testing.assert_close(logits(other), expected, msg=name)
        assert rank(other) == TARGET, name


def test_a_saved_adapter_is_trained_further_ours(tmp_path):
    """Its budget counts from the ranks that it has; PEFT's drops every triplet here."""
    model = adapted()
    optimizer = adamw(model)
    take_over("ours", model, optimizer)
    train("ours", model, optimizer)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True).train()
    loaded.peft_config["default"].target_r = 2
    optimizer = adamw(loaded)
    allocator = take_over("ours", loaded, optimizer)
    assert allocator.summary()["init_budget"] == allocator.summary()["total_rank"] == TARGET
    train("ours", loaded, optimizer, seed=100)
    assert rank(loaded) == 8


# Numbers as scripts have them


@both_sides
@pytest.mark.parametrize(
    "options",
    [
        {"total_step": np.int64(12)},
        {"total_step": 24 / 2},
        {"total_step": np.float32(12)},
        {"total_step": torch.tensor(12)},
        {"tinit": 0.2 * 10},
        {"target_r": np.int64(3)},
        {"target_r": 3.0},
        {"tfinal": np.int32(3), "deltaT": np.uint8(1)},
        {"beta1": np.float32(0.85), "orth_reg_weight": torch.tensor(0.5)},
        {"lora_alpha": np.int64(8), "lora_dropout": np.float64(0.1)},
    ],
    ids=str,
)
def test_numbers_in_the_config(side, options, tmp_path):
    model = adapted(**options)
    optimizer = adamw(model)
    take_over(side, model, optimizer)
    train(side, model, optimizer)
    assert rank(model) == TARGET
    if side == "ours":  # PEFT's JSON can't hold all of them.
        model.save_pretrained(tmp_path)
        PeftModel.from_pretrained(llama(), tmp_path)


@both_sides
@pytest.mark.parametrize("number", [np.int64, torch.tensor, float], ids=lambda n: n.__name__)
def test_step_numbers(side, number):
    model = adapted()
    optimizer = adamw(model)
    if side == "ours":
        apply(model)
    for step in range(1, STEPS + 1):
        model(**tokens(step)).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(number(step))
        optimizer.zero_grad()
    assert rank(model) == TARGET


@pytest.mark.parametrize(
    "options",
    [
        {"total_step": 12.5},
        {"tinit": True},
        {"target_r": float("nan")},
        {"deltaT": np.float32(0.5)},
    ],
    ids=str,
)
def test_numbers_that_are_none_ours(options):
    model = adapted(**options)
    with pytest.raises((TypeError, ValueError), match=next(iter(options))):
        apply(model)

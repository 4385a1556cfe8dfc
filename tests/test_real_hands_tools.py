"""Averages of weights, offloaded activations and numbers around an AdaLoRA model.

Plain PEFT and ours run the same script side by side, wherever PEFT is right; where it is not, the
test says so.
"""

import contextlib
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
    end_step,
    llama,
    logits,
    perturbed,
    rank,
    take_over,
    tokens,
    train,
)
from helpers import trainable
from peft import PeftModel
from torch import nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_avg_fn, update_bn

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


# Activations


@both_sides
@pytest.mark.parametrize("how", ["save_on_cpu", "checkpointing"])
def test_activations_are_kept_elsewhere(side, how):
    """Offloaded to the host, or computed again: the gradients stay the same bits."""
    model = perturbed(adapted(lora_dropout=0.2))
    take_over(side, model)
    results = []
    for elsewhere in (False, True):
        context = contextlib.nullcontext()
        if elsewhere and how == "save_on_cpu":
            context = torch.autograd.graph.save_on_cpu()
        elif elsewhere:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        torch.manual_seed(5)
        with context:
            loss = model(**tokens(1)).loss
        loss.backward()
        results.append([p.grad.clone() for p in trainable(model)])
        model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


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

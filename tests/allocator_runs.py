"""Trainings that the tests of the allocator have in common."""

import torch
from helpers import Mlp, batch, trainable

from adalora_kernels import RankAllocator, orth_reg

STEPS = 40


def train(model, optimizer, allocator, steps, orth=0.1):
    """Losses of the given steps."""
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = model.loss(*batch(step))
        (loss + orth_reg(model, orth) if orth else loss).backward()
        optimizer.step()
        allocator.step(step)
        losses.append(loss.item())
    return losses


def setup(seed=0, optimizer=torch.optim.AdamW, lr=5e-3, **options):
    torch.manual_seed(seed)
    model = Mlp(lora_alpha=16)
    arguments = {"target_r": 3, "total_step": STEPS, "tinit": 5, "tfinal": 10, **options}
    allocator = RankAllocator(model, **arguments)
    return model, optimizer(trainable(model), lr=lr), allocator


def alive(model):
    return int(sum((layer.lora_E != 0).sum() for layer in model.layers))


def attached_setup(optimizer="adamw", **options):
    """As `setup`, with the allocator attached and an orthogonality weight of 0.1."""
    model, _, allocator = setup(orth_reg_weight=0.1, **options)
    kinds = {
        "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
        "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    }
    made = kinds[optimizer](trainable(model))
    allocator.attach(made)
    return model, made, allocator

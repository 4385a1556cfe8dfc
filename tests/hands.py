"""What the tests of real use share: a small Llama with AdaLoRA, its training, and what to look at.

A `side` is "peft" or "ours": the same script with plain PEFT, and with this package.
"""

import contextlib
import copy

import pytest
import torch
from helpers import trainable
from peft import AdaLoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from adalora_kernels.peft import apply, disable, enable

MATRICES, ALL, TARGET, STEPS, FINAL = 4, 24, 12, 12, 9
both_sides = pytest.mark.parametrize("side", ["peft", "ours"])
# Where PEFT's side takes seconds.
both_sides_slowly = pytest.mark.parametrize(
    "side", [pytest.param("peft", marks=pytest.mark.full), "ours"]
)


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 64}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **sizes, **heads, **special))


def config(**options):
    """Four matrices, 24 triplets, of which 12 are left in step 9 of 12."""
    arguments = {
        "task_type": "CAUSAL_LM",
        "init_r": 6,
        "target_r": 3,
        "tinit": 2,
        "tfinal": 3,
        "total_step": STEPS,
        "target_modules": ["q_proj", "v_proj"],
    }
    return AdaLoraConfig(**{**arguments, **options})


def adapted(**options):
    return get_peft_model(llama(), config(**options)).train()


def perturbed(model):
    """The model with other singular values than 0."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_E" in name:
                parameter.normal_()
    return model


class Net(nn.Module):
    """Two layers with batch normalisation, which has buffers, between them."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 2)

    def forward(self, x):
        return self.b(torch.relu(self.norm(self.a(x))))


def adapted_net(**options):
    """A PeftModel over a `Net`: 2 matrices, 8 triplets, of which 4 are left."""
    torch.manual_seed(0)
    sizes = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 4, "total_step": STEPS}
    arguments = {**sizes, "target_modules": ["a", "b"], **options}
    return get_peft_model(Net(), AdaLoraConfig(**arguments))


def tokens(seed, size=4):
    ids = torch.randint(3, 64, (size, 12), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def adamw(model, lr=1e-2):
    return torch.optim.AdamW(trainable(model), lr=lr)


@contextlib.contextmanager
def enabled():
    enable()
    try:
        yield
    finally:
        disable()


def take_over(side, model, *optimizers):
    """What our users add to a script. Returns the allocator, for PEFT None."""
    if side == "peft":
        return None
    allocator = apply(model).allocator
    for optimizer in optimizers:
        allocator.attach(optimizer)
    return allocator


def end_step(side, model, step, optimizer):
    """What follows `optimizer.step()`: PEFT has to be told of the step, an attached one not."""
    if side == "peft":
        model.base_model.update_and_allocate(step)
    optimizer.zero_grad()


def train(side, model, optimizer, steps=range(1, STEPS + 1), seed=0):
    """Train on an attached optimizer, or with PEFT's documented loop; return the losses."""
    losses = []
    for step in steps:
        loss = model(**tokens(seed + step)).loss
        loss.backward()
        optimizer.step()
        end_step(side, model, step, optimizer)
        losses.append(loss.item())
    return losses


def train_attached(model, loss):
    """Train on what `loss()` returns, with an allocator that the optimizer steps; return that."""
    optimizer = adamw(model, lr=2e-2)
    allocator = take_over("ours", model, optimizer)
    model.train()
    for _ in range(STEPS):
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
    allocator.detach()
    model.eval()
    return allocator


def singular_values(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_E" in n}


def ranks(model):
    """Triplets alive in each matrix, counted in lora_E."""
    return {name: int(values.count_nonzero()) for name, values in singular_values(model).items()}


def rank(model):
    return sum(ranks(model).values())


@torch.no_grad()
def logits(model):
    """The function of a model, whatever mode it is in."""
    was_training = model.training
    model.eval()
    result = model(input_ids=tokens(99)["input_ids"]).logits
    model.train(was_training)
    return result


def assert_one_function(model, expected, folder, tolerance=1e-5):
    """What the model computes, its merged weights and its saved file compute are `expected`."""
    from peft import PeftModel

    model.save_pretrained(folder)
    saved = PeftModel.from_pretrained(llama(), folder)
    merged = copy.deepcopy(model).merge_and_unload()
    for name, what in {"forward": model, "saved": saved, "merged": merged}.items():
        difference = (logits(what) - expected).abs().max().item()
        assert difference <= tolerance, f"{name}: {difference}"

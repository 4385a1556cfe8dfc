"""DDP over experts that are asked now and then, which test_real_hands_runs.py runs."""

import torch
import torch.distributed as dist
from hands import STEPS, adamw, perturbed, singular_values, take_over
from peft import AdaLoraConfig, get_peft_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class Routed(nn.Module):
    """Two processes ask different experts in every third step; the last is never asked."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x, expert):
        return self.experts[expert](x)


def routed():
    """Which triplets of each expert are left."""
    process = dist.get_rank()
    options = {"init_r": 4, "target_r": 2, "tfinal": 3, "total_step": STEPS, "tinit": 1}
    torch.manual_seed(0)
    model = get_peft_model(
        Routed(), AdaLoraConfig(target_modules=["experts.0", "experts.1", "experts.2"], **options)
    )
    perturbed(model)
    optimizer = adamw(model)
    take_over("ours", model, optimizer)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    for step in range(1, STEPS + 1):
        expert = process if step % 3 == 1 else step % 2
        wrapped(torch.randn(4, 8), expert).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {n: (v != 0).flatten().tolist() for n, v in singular_values(model).items()}

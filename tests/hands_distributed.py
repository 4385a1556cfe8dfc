"""Two forked processes of `test_real_hands_runs.py`: DDP over experts that are asked now and then.

The argument is a file for the rendezvous. Process 0 prints JSON: the pattern of each.
"""

import json
import sys
import warnings

import torch
import torch.distributed as dist
from hands import STEPS, adamw, perturbed, singular_values, take_over
from peft import AdaLoraConfig, get_peft_model
from torch import nn
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel


class Routed(nn.Module):
    """Two processes ask different experts in every third step; the last is never asked."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x, expert):
        return self.experts[expert](x)


def train(process):
    """Which triplets of each expert are left."""
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


def main(process, rendezvous):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=process, world_size=2)
    torch.manual_seed(process)
    patterns = [None, None]
    dist.all_gather_object(patterns, train(process))
    if process == 0:
        print(json.dumps(patterns))
    dist.destroy_process_group()


if __name__ == "__main__":
    # Forked, because the imports take most of the time.
    start_processes(main, args=(sys.argv[1],), nprocs=2, start_method="fork")

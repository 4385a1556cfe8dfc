"""Two forked processes of `test_real_hands_runs.py`: FSDP1, and DDP with an expert now and then.

The argument is a file for the rendezvous. Process 0 prints JSON.
"""

import json
import sys
import warnings

import torch
import torch.distributed as dist
from hands import STEPS, adamw, adapted, end_step, perturbed, rank, singular_values, take_over
from peft import AdaLoraConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel


class Routed(nn.Module):
    """Two processes ask different experts in every third step; the last is never asked."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x, expert):
        return self.experts[expert](x)


def ddp(side, process):
    options = {"init_r": 4, "target_r": 2, "tfinal": 3, "total_step": STEPS, "tinit": 1}
    torch.manual_seed(0)
    model = get_peft_model(
        Routed(), AdaLoraConfig(target_modules=["experts.0", "experts.1", "experts.2"], **options)
    )
    perturbed(model)
    if side == "peft":  # It needs a gradient for every one.
        model.base_model.model.experts[2].requires_grad_(False)
    optimizer = adamw(model)
    take_over(side, model, optimizer)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    for step in range(1, STEPS + 1):
        expert = process if step % 3 == 1 else step % 2
        wrapped(torch.randn(4, 8), expert).square().mean().backward()
        optimizer.step()
        end_step(side, model, step, optimizer)
    return {n: (v != 0).flatten().tolist() for n, v in singular_values(model).items()}


def fsdp1(side, process):
    model = adapted()
    allocator = take_over(side, model)
    sharded = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = adamw(sharded)
    if allocator is not None:
        allocator.attach(optimizer)
    return rank(sharded)


def outcome(what, *arguments):
    try:
        return what(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def main(process, rendezvous):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=process, world_size=2)
    torch.manual_seed(process)
    report = {"ddp": outcome(ddp, "ours", process), "fsdp1": outcome(fsdp1, "ours", process)}
    everybody = [None, None]
    dist.all_gather_object(everybody, report)
    if process == 0:
        print(json.dumps(everybody))
    dist.destroy_process_group()


if __name__ == "__main__":
    # Forked, because the imports take most of the time.
    start_processes(main, args=(sys.argv[1],), nprocs=2, start_method="fork")

"""One of two processes that test_fsdp.py starts: what an allocator says under FSDP1.

Arguments: the rank, a file for the rendezvous, "ours" or "peft". Prints JSON: by sharding and
call, the error.
"""

import json
import os
import sys
import warnings

import torch
import torch.distributed as dist
from helpers import Mlp, batch
from torch.distributed.fsdp import FullyShardedDataParallel

from adalora_kernels import RankAllocator


def our_model():
    model = Mlp()
    return model, RankAllocator(model, target_r=3, total_step=10)


def pefts_model():
    from peft import AdaLoraConfig, get_peft_model

    from adalora_kernels.peft import apply

    config = AdaLoraConfig(
        init_r=6, target_r=3, total_step=10, target_modules=[f"layers.{i}" for i in range(3)]
    )
    model = get_peft_model(Mlp(r=0), config)
    return model, apply(model).allocator


def shard(model, kind):
    options = {"use_orig_params": kind != "flat", "device_id": torch.device("cpu")}
    if kind == "flat":
        # FSDP has them alike in this form.
        model.requires_grad_(True)
    if kind == "by_layer":
        layers = [m for m in model.modules() if hasattr(m, "lora_A")]
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if any(child is layer for layer in layers):
                    setattr(parent, name, FullyShardedDataParallel(child, **options))
    return FullyShardedDataParallel(model, **options)


def attempt(function, *arguments):
    try:
        function(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def main(rank, rendezvous, which):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=2)
    report = {}
    kinds = ["orig_params", "by_layer", "flat"]
    for kind in [k for k in kinds if which == "ours" or k != "flat"]:
        model, allocator = our_model() if which == "ours" else pefts_model()
        sharded = shard(model, kind)
        optimizer = torch.optim.AdamW([p for p in sharded.parameters() if p.requires_grad])
        calls = {
            "attach": (allocator.attach, optimizer),
            "step": (allocator.step, 1),
            "advance": (allocator.advance, 1),
            "update": (allocator.update,),
            "skip": (allocator.skip, 1),
            "restart": (allocator.restart,),
            "new": (lambda m=sharded: RankAllocator(m, target_r=3, total_step=10),),
        }
        errors = {name: attempt(*call) for name, call in calls.items()}
        sharded(batch(1)[0]).square().mean().backward()
        errors |= {f"{name} with gradients": attempt(*call) for name, call in calls.items()}
        report[kind] = errors
        assert allocator.global_step == 0 and allocator.summary()["step"] == 0
    print(json.dumps(report), flush=True)
    dist.barrier()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(int(sys.argv[1]), *sys.argv[2:])
    # Without the interpreter's shutdown: see ddp_training.py.
    os._exit(0)

"""What an allocator says under FSDP1, which test_fsdp.py asks on two processes."""

import torch
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


def errors(which):
    """By sharding and call, the error; `which` is "ours" or "peft"."""
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
        said = {name: attempt(*call) for name, call in calls.items()}
        sharded(batch(1)[0]).square().mean().backward()
        said |= {f"{name} with gradients": attempt(*call) for name, call in calls.items()}
        report[kind] = said
        assert allocator.global_step == 0 and allocator.summary()["step"] == 0
    return report

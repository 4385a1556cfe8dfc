"""What `test_distributed_layouts.py` runs in processes: layouts that nobody has told us of."""

import warnings

import torch
import torch.distributed as dist
from helpers import Mlp, batch, trainable
from replicas_runs import error_of, result_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from adalora_kernels import RankAllocator, SVDLinear

SCHEDULE = {"target_r": 3, "total_step": 12, "tinit": 2, "tfinal": 3}


class Block(Mlp):
    """The same network behind a frozen layer that has no adapter."""

    def __init__(self):
        super().__init__(dtype=torch.float64)
        self.frozen = nn.Linear(16, 16, dtype=torch.float64).requires_grad_(False)

    def forward(self, x):
        return super().forward(self.frozen(x))


def adapters_of(model):
    return {p for m in model.modules() if isinstance(m, SVDLinear) for p in trainable(m)}


def mesh():
    return init_device_mesh("cpu", (dist.get_world_size(),))


def made(shard, when, sync=False):
    """Shard a model "before" attach or "after" it; what attach says, and then the first step."""
    torch.manual_seed(0)
    model = Block()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    allocator = RankAllocator(model, check_replicas=sync, **SCHEDULE)
    if when == "before":
        model = shard(model)
    said = error_of(allocator.attach, optimizer, sync_gradients=sync)
    if said != "no error":
        assert not allocator.attached
        return said
    if when == "after":
        model = shard(model)
    for step in range(1, 13):
        own = 0 if shard is tensor_parallel else 100 * dist.get_rank()
        x, target = batch(step + own, torch.float64)
        (model(x) - target).square().mean().backward()
        said = error_of(optimizer.step)
        if said != "no error":
            return said
        optimizer.zero_grad()
    hashes = [None] * dist.get_world_size()
    dist.all_gather_object(hashes, result_of(model, allocator)["hash"])
    return "trained alike" if len(set(hashes)) == 1 else "trained apart"


def fsdp2_ignoring(model):
    return fully_shard(model, mesh=mesh(), ignored_params=adapters_of(model))


def fsdp2_of_another_layer(model):
    fully_shard(model.frozen, mesh=mesh())
    return model


def fsdp1_ignoring(model):
    return FullyShardedDataParallel(
        model,
        ignored_states=list(adapters_of(model)),
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )


def fsdp1_of_another_layer(model):
    model.frozen = FullyShardedDataParallel(model.frozen, device_id=torch.device("cpu"))
    return model


def fsdp1(model):
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


def tensor_parallel(model):
    """Each process has the same gradients of what is whole: nothing has to be averaged."""
    return parallelize_module(
        model, mesh(), {"frozen": ColwiseParallel(output_layouts=Replicate())}
    )


def injected_afterwards():
    """PEFT's adapters in a model that has been sharded before."""
    from peft import AdaLoraConfig, get_peft_model

    from adalora_kernels.peft import apply

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8))
    fully_shard(net, mesh=mesh())
    config = AdaLoraConfig(init_r=6, target_r=3, tfinal=3, total_step=12, target_modules=["0", "2"])
    model = get_peft_model(net, config)
    return error_of(apply(model).attach, torch.optim.AdamW(trainable(model)))


def beside_trained_shards():
    """Whole adapters that are synced, and a bias that FSDP2 has sharded, of one optimizer."""
    torch.manual_seed(0)
    model = Block()
    model.frozen.bias.requires_grad_()
    fsdp2_ignoring(model)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, foreach=False)
    said = error_of(RankAllocator(model, **SCHEDULE).attach, optimizer, sync_gradients=True)
    for step in range(1, 13):
        x, target = batch(step + 100 * dist.get_rank(), torch.float64)
        (model(x) - target).square().mean().backward()
        said = said if said != "no error" else error_of(optimizer.step)
        optimizer.zero_grad()
    return said


def layouts():
    """By layout: what is said, or how it has been trained."""
    warnings.simplefilter("ignore")
    said = {"injected": injected_afterwards()}
    shards = (fsdp2_ignoring, fsdp2_of_another_layer, fsdp1_ignoring, fsdp1_of_another_layer, fsdp1)
    for shard in shards:
        for when in ("before", "after"):
            said[f"{shard.__name__} {when}"] = made(shard, when)
    for shard in (fsdp2_ignoring, fsdp1_ignoring):
        said[f"{shard.__name__} synced"] = made(shard, "after", sync=True)
    said["beside trained shards"] = beside_trained_shards()
    said["tensor_parallel"] = made(tensor_parallel, "after")
    said["fsdp2_ignoring synced before"] = made(fsdp2_ignoring, "before", sync=True)
    return said


def stages(kind):
    """What each process is told at each step of an optimizer, where each trains what it has."""
    rank = dist.get_rank()
    torch.manual_seed(rank)
    whole = Mlp(dtype=torch.float64)
    extra = nn.ModuleDict({"extra": SVDLinear(16, 8, r=6, dtype=torch.float64)})
    models = [whole]
    if kind == "pipeline":
        models = [nn.ModuleDict({f"layers_{rank}": whole.layers[0]})]
    elif kind == "one more" and rank == 1:
        models = [extra, whole]
    elif kind == "one alone" and rank == 0:
        models = []
    optimizers = []
    for model in models:
        optimizers.append(torch.optim.AdamW(trainable(model)))
        RankAllocator(model, **SCHEDULE).attach(optimizers[-1])
    dist.barrier()  # In a pipeline the stages wait for each other's activations.
    said = []
    for optimizer in [*optimizers, *optimizers]:
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.randn_like(p)
        said.append(error_of(optimizer.step))
    dist.barrier()  # What the next kind announces is not of this one.
    return said


def all_stages():
    """By kind of training."""
    return {kind: stages(kind) for kind in ("alike", "one alone", "one more", "pipeline")}


def deepspeed_afterwards(own_optimizer):
    """What each stage of ZeRO says when DeepSpeed comes after `attach`."""
    import deepspeed

    said = {}
    for stage in (1, 2, 3):
        torch.manual_seed(0)
        model = Mlp()
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        RankAllocator(model, **SCHEDULE).attach(optimizer)
        config = {
            "train_micro_batch_size_per_gpu": 32,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
        }
        if own_optimizer:
            options = {"lr": 1e-2, "torch_adam": True}
            config["optimizer"] = {"type": "AdamW", "params": options}
            given = {"model_parameters": trainable(model)}
        else:
            given = {"optimizer": optimizer}
        engine, *_ = deepspeed.initialize(model=model, config=config, **given)
        x, target = batch(1)
        engine.backward((engine(x) - target).square().mean())
        said[stage] = error_of(engine.step)
    return said

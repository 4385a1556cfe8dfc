"""Trainings with sharded adapters, which test_distributed_shards.py runs on several processes."""

import hashlib

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from adalora_kernels import RankAllocator, SVDLinear
from adalora_kernels.distributed import shard_placement

STEPS = 30
MICRO_BATCHES = 4  # of every step, over all processes


class Block(nn.Module):
    """Two adapted layers and one that is trained as it is; recomputed in the backward, or not."""

    def __init__(self, width, hidden, r, dtype):
        super().__init__()
        self.up = SVDLinear(width, hidden, r=r, bias=True, dtype=dtype)
        self.norm = nn.LayerNorm(hidden, dtype=dtype)
        self.down = SVDLinear(hidden, width, r=r, dtype=dtype)
        self.is_checkpointed = False

    def _forward(self, x):
        return x + self.down(torch.tanh(self.norm(self.up(x))))

    def forward(self, x):
        if self.is_checkpointed:
            return checkpoint(self._forward, x, use_reentrant=False)
        return self._forward(x)


class Net(nn.Module):
    """Two blocks, and a head of three outputs: on four processes one has none of its lora_B."""

    def __init__(self, r=6, dtype=torch.float64):
        super().__init__()
        self.blocks = nn.ModuleList(Block(8, 12, r, dtype) for _ in range(2))
        self.head = SVDLinear(8, 3, r=r, dtype=dtype)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def batches(step, dtype=torch.float64):
    """The micro-batches of a step, the same for everybody who asks."""
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(MICRO_BATCHES, 5, 8, generator=generator, dtype=torch.float64).to(dtype)
    target = torch.randn(MICRO_BATCHES, 5, 3, generator=generator, dtype=torch.float64).to(dtype)
    return list(zip(x, target, strict=True))


def net(**options):
    """The model at its start; a lora_E of 0 would have no scores for a while."""
    torch.manual_seed(0)
    model = Net(**options)
    for name, parameter in model.named_parameters():
        if "lora_E" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def allocator_of(model, **options):
    schedule = {"target_r": 3, "total_step": STEPS, "tinit": 4, "tfinal": 8, "deltaT": 3}
    return RankAllocator(model, orth_reg_weight=0.1, **{**schedule, **options})


def adamw(model):
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=2e-2, foreach=False)


def mesh_of(kind):
    world = dist.get_world_size()
    if kind == "hsdp":
        return init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh("cpu", (world,))


def shard(model, kind="fsdp", placement="rows", policy="none"):
    """Hand-written FSDP2: each block and the rest."""
    options = {"mesh": mesh_of(kind)}
    if placement == "in":
        options["shard_placement_fn"] = shard_placement(model)
    if policy == "offload":
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    if policy == "mixed":
        options["mp_policy"] = MixedPrecisionPolicy(
            param_dtype=torch.float32, reduce_dtype=torch.float64
        )
    for block in model.blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def train(model, optimizer, allocator, steps, share=1, rank=0, before_step=None):
    """Each process has its share of the micro-batches of a step, one after the other."""
    for step in steps:
        own = batches(step)[rank::share]
        for i, (x, target) in enumerate(own):
            if share > 1:
                model.set_requires_gradient_sync(i == len(own) - 1)
            ((model(x) - target).square().mean() / len(own)).backward()
        if before_step is not None:
            before_step(step)
        optimizer.step()
        optimizer.zero_grad()


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach().clone()


def outcome(model, allocator):
    """All trained parameters and the pattern; what each process holds, too, as a hash."""
    parameters = {n: whole(p.detach()) for n, p in model.named_parameters() if p.requires_grad}
    mask, scores = allocator._state.mask, allocator._state.scores
    digest = hashlib.sha256()
    for tensor in [*parameters.values(), mask, scores]:
        digest.update(tensor.contiguous().numpy().tobytes())
    return {
        "parameters": parameters,
        "pattern": allocator.rank_pattern,
        "scores": allocator.scores(),
        "summary": allocator.summary(),
        "orth_reg": float(allocator.orth_reg),
        "hash": digest.hexdigest(),
    }


def alone(steps=STEPS, compiled=False):
    """The same training in one process, without torch.distributed."""
    model = net()
    allocator, optimizer = allocator_of(model), adamw(model)
    allocator.attach(optimizer)
    train(model, optimizer, allocator, range(1, steps + 1))
    return outcome(model, allocator)


def sharded(
    kind="fsdp", placement="rows", policy="none", checkpointed=False, compiled=False, attach="after"
):
    """The same training, sharded; `attach` before or after that."""
    model = net()
    for block in model.blocks:
        block.is_checkpointed = checkpointed
    allocator = allocator_of(model)
    if attach == "before":
        optimizer = adamw(model)
        names = {id(p): n for n, p in model.named_parameters()}
        allocator.attach(optimizer)
    shard(model, kind, placement, policy)
    if attach == "before":  # as accelerate does it
        (group,) = optimizer.param_groups
        now = dict(model.named_parameters())
        group["params"] = [now[names[id(p)]] for p in group["params"]]
    else:
        optimizer = adamw(model)
        allocator.attach(optimizer)
    if compiled:
        for block in model.blocks:
            block.compile(backend="aot_eager")
    world, rank = dist.get_world_size(), dist.get_rank()
    train(model, optimizer, allocator, range(1, STEPS + 1), world, rank)
    return outcome(model, allocator)

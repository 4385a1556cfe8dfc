"""What `test_distributed_pipeline.py` runs: a pipeline of torch's, and the same in one process."""

import math

import torch
import torch.distributed as dist
from helpers import batch, trainable
from replicas_runs import error_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

from adalora_kernels import RankAllocator, SVDLinear
from adalora_kernels.distributed.shards import local_tensors, whole_tensor

STEPS = 30
SCHEDULE = {"target_r": 3, "total_step": STEPS, "tinit": 4, "tfinal": 6, "deltaT": 2}
WIDTHS = [16, 24, 20, 24, 20, 16, 8]
RANKS = [6, 5, 6, 4, 6, 7]
SPARE = 2  # the layer whose stage also has an adapter that nobody uses
MICRO_BATCHES = 4


class Layers(nn.Module):
    """Some of the layers in a row."""

    def __init__(self, numbers):
        super().__init__()
        self.layers = nn.ModuleDict()
        for i in range(len(RANKS)):
            layer = SVDLinear(WIDTHS[i], WIDTHS[i + 1], r=RANKS[i], dtype=torch.float64)
            spare = SVDLinear(4, 4, r=3, dtype=torch.float64)  # For the same random numbers.
            if i in numbers:
                self.layers[str(i)] = layer
                if i == SPARE:
                    self.spare = spare

    def forward(self, x):
        for name, layer in self.layers.items():
            x = layer(x) if int(name) == len(RANKS) - 1 else torch.tanh(layer(x))
        return x


def loss_of(output, target):
    return (output - target).square().mean()


def numbers_of(rank, world):
    """The layers of a stage: the first stages have one more where they can't be equal."""
    return [list(part) for part in torch.arange(len(RANKS)).tensor_split(world)][rank]


def train(world, rank, attached=True, group=None, replicas=None, half=None, mesh=None):
    """Train as one stage of `world`, or the whole in one process (rank None).

    With `replicas`, a process group, or a `mesh` over which FSDP2 shards the stage, over one half
    of the micro-batches.
    """
    torch.manual_seed(0)
    numbers = range(len(RANKS)) if rank is None else numbers_of(rank, world)
    model = Layers(numbers)
    if mesh is not None:
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(trainable(model), lr=5e-3)
    allocator = RankAllocator(
        model,
        orth_reg_weight=0.1 if attached else 0.0,
        process_group=group,
        check_replicas=replicas or False,
        **SCHEDULE,
    )
    if attached:
        allocator.attach(optimizer, sync_gradients=replicas or False)
    schedule = None
    if rank is not None:
        stage = PipelineStage(model, rank, world, torch.device("cpu"), group=group)
        count = MICRO_BATCHES if half is None else MICRO_BATCHES // 2
        schedule = ScheduleGPipe(stage, count, loss_fn=loss_of)
    budgets, skipped = [], 0
    for step in range(1, STEPS + 1):
        data = batch(step, torch.float64)
        if half is not None:
            data = [t.chunk(2)[half] for t in data]
        run(model, schedule, rank, world, *data)
        if replicas is not None:
            allocator.sync_gradients()  # The schedule has divided the gradients after its backward.
        optimizer.step()
        if not attached:
            if step == 9 and "4" in model.layers and half != 0:
                # Seen by one process of the stage that has it, and skipped by all.
                local_tensors([model.layers["4"].lora_A.grad])[0][:1, 0] = math.inf
            budgets.append(allocator.step(step))
        optimizer.zero_grad()
        skipped = allocator.summary()["skipped_steps"]
    summary = allocator.summary()
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    return {
        "values": {n: whole_tensor(p) for n, p in trained.items()},
        "pattern": allocator.rank_pattern,
        "budgets": budgets,
        "skipped": skipped,
        "orth_reg": None if allocator.orth_reg is None else allocator.orth_reg.item(),
        "summary": {k: summary[k] for k in ("init_budget", "target_budget", "budget", "untrained")},
    }


def run(model, schedule, rank, world, x, target):
    if schedule is None:
        for part, wanted in zip(x.chunk(MICRO_BATCHES), target.chunk(MICRO_BATCHES), strict=True):
            (loss_of(model(part), wanted) / MICRO_BATCHES).backward()
        return
    inputs = [x] if rank == 0 else []
    schedule.step(*inputs, **({"target": target} if rank == world - 1 else {}))


def train_stages(cases):
    rank, world = dist.get_rank(), dist.get_world_size()
    return {
        case: train(world, rank, attached=case == "attached", group=dist.group.WORLD)
        for case in cases
    }


def train_replicas_of_stages():
    """Two pipelines of two stages, each over half of the data."""
    rank = dist.get_rank()
    pipelines = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    replicas = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
    half, stage = divmod(rank, 2)
    return {"attached": train(2, stage, group=pipelines[half], replicas=replicas[stage], half=half)}


def train_sharded_stages(cases):
    """Two stages, each sharded over two processes, of which each has half of the data."""
    stage, half = divmod(dist.get_rank(), 2)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stage", "shard"))
    group, mesh = mesh["stage"].get_group(), mesh["shard"]
    return {
        case: train(2, stage, case == "attached", group=group, half=half, mesh=mesh)
        for case in cases
    }


def pefts_stages():
    """The budgets of PEFT's models that share one, and which triplets live at the end."""
    from peft import AdaLoraConfig, get_peft_model

    from adalora_kernels.peft import apply

    torch.manual_seed(0)
    own, rank = nn.ModuleDict(), dist.get_rank()
    for i in (rank, rank + 10):
        own[f"layer{i}"] = nn.Linear(16, 16)
    schedule = {"tinit": 2, "tfinal": 3, "total_step": 12}
    config = AdaLoraConfig(init_r=6, target_r=3, target_modules=list(own), **schedule)
    model = get_peft_model(Row(own), config)
    allocator = apply(model, process_group=dist.group.WORLD).allocator
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    allocator.attach(optimizer)
    targets = [allocator.schedule.target_budget]
    for step in range(1, 13):
        # The first process has far larger gradients, and so keeps more.
        (model(batch(step)[0]).square().mean() * (100.0 if rank == 0 else 1.0)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 6:
            state = allocator.state_dict()
            allocator.detach()
            allocator.load_state_dict(state)
            allocator.attach(optimizer)
            targets.append(allocator.schedule.target_budget)
    return targets, sum(allocator.ranks().values())


class Row(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x):
        for layer in self.layers.values():
            x = torch.tanh(layer(x))
        return x


def mistakes():
    """What is said of each way to use `process_group` wrongly."""
    rank, world = dist.get_rank(), dist.get_world_size()
    everyone = dist.group.WORLD
    model = Layers(numbers_of(rank, world))
    said = {
        "the same": error_of(RankAllocator, Layers(range(3)), process_group=everyone, **SCHEDULE),
        "compared": error_of(
            RankAllocator, model, process_group=everyone, check_replicas=True, **SCHEDULE
        ),
        "no group": error_of(RankAllocator, model, process_group="all", **SCHEDULE),
    }
    allocator = RankAllocator(model, process_group=everyone, **SCHEDULE)
    optimizer = torch.optim.AdamW(trainable(model))
    said["synced"] = error_of(allocator.attach, optimizer, sync_gradients=True)
    said["updated"] = error_of(allocator.update)
    # Trainings that have nothing to do with each other say so.
    own = dist.new_group([rank], use_local_synchronization=True)
    allocator = RankAllocator(model, process_group=own, **SCHEDULE)
    allocator.attach(optimizer)
    dist.barrier()
    for p in trainable(model):
        p.grad = torch.randn_like(p)
    said["alone"] = error_of(optimizer.step)
    said["budget alone"] = allocator.schedule.target_budget == 3 * len(allocator.adapters)
    return said

"""What `test_distributed_pipeline.py` runs: a pipeline of torch's, and the same in one process."""

import math

import torch
import torch.distributed as dist
from helpers import batch, trainable
from replicas_runs import error_of
from torch import nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

from adalora_kernels import RankAllocator, SVDLinear

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


def train(world, rank, attached=True, group=None):
    """Train as one stage of `world`, or the whole in one process (rank None)."""
    torch.manual_seed(0)
    numbers = range(len(RANKS)) if rank is None else numbers_of(rank, world)
    model = Layers(numbers)
    optimizer = torch.optim.AdamW(trainable(model), lr=5e-3)
    allocator = RankAllocator(
        model, orth_reg_weight=0.1 if attached else 0.0, process_group=group, **SCHEDULE
    )
    if attached:
        allocator.attach(optimizer)
    schedule = None
    if rank is not None:
        stage = PipelineStage(model, rank, world, torch.device("cpu"))
        schedule = ScheduleGPipe(stage, MICRO_BATCHES, loss_fn=loss_of)
    budgets, skipped = [], 0
    for step in range(1, STEPS + 1):
        run(model, schedule, rank, world, *batch(step, torch.float64))
        optimizer.step()
        if not attached:
            if step == 9 and "4" in model.layers:
                # Seen by the stage that has it, and skipped by all.
                model.layers["4"].lora_A.grad[0, 0] = math.inf
            budgets.append(allocator.step(step))
        optimizer.zero_grad()
        skipped = allocator.summary()["skipped_steps"]
    summary = allocator.summary()
    return {
        "values": {n: p.detach() for n, p in model.named_parameters() if p.requires_grad},
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

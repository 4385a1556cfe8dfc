"""Trainings in which one process is killed, and which go on from their last checkpoint."""

import os
import signal
from pathlib import Path

import replicas_runs
import shards_runs
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers import trainable
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from adalora_kernels import RankAllocator

STEPS = 30
SAVED_EVERY = 5


class Death:
    """Kills the last process at one place of one step, as if its machine had gone.

    Args:
        at: (place, step); None for a process that lives.
    """

    def __init__(self, at):
        self._at, self.step = at, 0

    def __call__(self, place):
        if self._at == (place, self.step) and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)


def last_checkpoint(folder):
    """The step of the last whole one, 0 if there is none. Its `.metadata` is written last."""
    return max((int(path.parent.name) for path in Path(folder).glob("*/.metadata")), default=0)


def train_sharded(folder, die=None):
    """FSDP2, from the last checkpoint in `folder` to the end; saves there every few steps."""
    model = shards_runs.net()
    allocator = shards_runs.allocator_of(model)
    shards_runs.shard(model)
    optimizer = shards_runs.adamw(model)

    def state():
        model_state, optimizer_state = get_state_dict(model, optimizer)
        return {"model": model_state, "optimizer": optimizer_state, "allocator": allocator}

    begun = last_checkpoint(folder)
    if begun:
        loaded = state()
        dcp.load(loaded, checkpoint_id=f"{folder}/{begun}")
        states = {"model_state_dict": loaded["model"], "optim_state_dict": loaded["optimizer"]}
        set_state_dict(model, optimizer, **states)
    allocator.attach(optimizer)
    death = Death(die)
    model.head.register_forward_hook(lambda *_: death("forward"))
    for step in range(begun + 1, STEPS + 1):
        death.step = step
        shards_runs.train(model, optimizer, allocator, [step], lambda _: death("step"))
        if step % SAVED_EVERY == 0:
            death("save")
            dcp.save(state(), checkpoint_id=f"{folder}/{step}")
    return {"begun": begun, "hash": shards_runs.outcome(model, allocator)["hash"]}


def train_replicas(folder, die=None):
    """Whole copies with `sync_gradients`; the first process saves, and all load."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model = replicas_runs.make("mlp")
    allocator = RankAllocator(model, orth_reg_weight=0.1, **replicas_runs.SCHEDULE)
    optimizer = torch.optim.AdamW(trainable(model), lr=5e-3)
    parts = {"model": model, "optimizer": optimizer, "allocator": allocator}
    path, begun = Path(folder, "last.pt"), 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        begun = saved.pop("step")
        for name, state in saved.items():
            parts[name].load_state_dict(state)
    allocator.attach(optimizer, sync_gradients=True)
    death = Death(die)
    for step in range(begun + 1, STEPS + 1):
        death.step = step
        list(replicas_runs.losses_of(model, step, world))[rank]().backward()
        death("step")
        optimizer.step()
        optimizer.zero_grad()
        if step % SAVED_EVERY == 0 and rank == 0:
            state = {name: part.state_dict() for name, part in parts.items()}
            torch.save(state | {"step": step}, f"{path}.part")
            os.replace(f"{path}.part", path)
    return {"begun": begun, "hash": replicas_runs.result_of(model, allocator)["hash"]}


def go_on(kind, folder, other_folder):
    """The training that was killed, and then one from its beginning to its end."""
    train = {"sharded": train_sharded, "replicas": train_replicas}[kind]
    return train(folder), train(other_folder)

"""DDP with reentrant checkpointing, which test_allocator.py runs on two processes."""

import torch
import torch.distributed as dist
from helpers import Mlp, batch, trainable
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from adalora_kernels import RankAllocator, orth_reg_grad_


class Checkpointed(Mlp):
    """The same network, every layer recomputed in the backward."""

    def forward(self, x):
        x = x.detach().requires_grad_()
        for layer in self.layers[:-1]:
            x = checkpoint(lambda t, layer=layer: torch.tanh(layer(t)), x, use_reentrant=True)
        return checkpoint(self.layers[-1], x, use_reentrant=True)


def train(model, forward, micro_batches, steps=12):
    """`micro_batches(step)` are accumulated; returns the allocator."""
    optimizer = torch.optim.AdamW(trainable(model), lr=5e-3)
    allocator = RankAllocator(model, target_r=3, total_step=steps, tinit=2, tfinal=2)
    for step in range(1, steps + 1):
        batches = micro_batches(step)
        for x, target in batches:
            ((forward(x) - target).square().mean() / len(batches)).backward()
        orth_reg_grad_(model, 0.1)
        optimizer.step()
        allocator.step(step)
        optimizer.zero_grad()
    return allocator


def halves(step):
    x, target = batch(step)
    return list(zip(x.chunk(2), target.chunk(2), strict=True))


def agreement(start):
    """The final ranks here, and of the same training in one process with accumulation.

    Also their difference, and a checksum of the adapters.
    """
    torch.manual_seed(0)
    model = Checkpointed(start=start)
    parallel = DistributedDataParallel(model)
    allocator = train(parallel, parallel, lambda step: [halves(step)[dist.get_rank()]])
    torch.manual_seed(0)
    alone = Checkpointed(start=start)
    expected = train(alone, alone, halves)
    ours, theirs = (torch.cat([p.detach().flatten() for p in trainable(m)]) for m in (model, alone))
    return {
        "ranks": allocator.ranks(),
        "expected": expected.ranks(),
        "difference": ((ours - theirs).norm() / theirs.norm()).item(),
        "checksum": ours.double().sum().item(),
    }

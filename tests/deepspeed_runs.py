"""What runs in the processes of test_distributed_deepspeed.py: trainings with DeepSpeed's engine.

Each compares itself with a training in one process over the same micro-batches, without DeepSpeed.
"""

import copy
import hashlib
import os

os.environ |= {"DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"}

import deepspeed
import torch
import torch.distributed as dist
from helpers import Mlp, batch, trainable

from adalora_kernels import RankAllocator, SVDLinear

STEPS = 30
SCHEDULE = {"target_r": 3, "total_step": STEPS, "tinit": 6, "tfinal": 8, "deltaT": 2}
# DeepSpeed compiles this for CPUs when it is first used; torch.distributed does the same.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def micro_batches(step, count):
    """The batch of a step in `count` parts, in the order of the ranks."""
    x, target = batch(step)
    return list(zip(x.chunk(count), target.chunk(count), strict=True))


def make_model(kind="plain"):
    """Three layers of rank 6; "unused" has one more, and in "frozen" the second is not trained."""
    torch.manual_seed(0)
    model = Mlp(r=6)
    if kind == "unused":
        model.unused = SVDLinear(8, 12, r=4)
    if kind == "frozen":
        model.layers[1].requires_grad_(False)
    return model


def make_optimizer(model):
    """AdamW with two groups, so that DeepSpeed makes two flat tensors."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in named if ("lora_B" in n) == is_B], "lr": lr}
        for is_B, lr in ((True, 2e-3), (False, 5e-3))
    ]
    # DeepSpeed takes no gradient for one of 0, and so lets unused weights decay.
    return torch.optim.AdamW(groups, weight_decay=0.0 if hasattr(model, "unused") else 0.01)


def config_of(stage, accumulate=1, zero=None, **more):
    world = dist.get_world_size()
    return {
        "train_batch_size": world * accumulate,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulate,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, **(zero or {})},
        **more,
    }


def start(model, config):
    if "fp16" in config:
        # DeepSpeed takes no CPU to be able to do it.
        deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    optimizer = make_optimizer(model)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=copy.deepcopy(config))[0]


def run(engine, first, last, accumulate=1):
    """Take the steps from `first` to `last`."""
    rank, world = dist.get_rank(), dist.get_world_size()
    for step in range(first, last + 1):
        for x, target in micro_batches(step, world * accumulate)[rank::world]:
            dtype = next(engine.module.parameters()).dtype
            loss = (engine(x.to(dtype)).float() - target).square().mean()
            engine.backward(loss)
            engine.step()


def alone(kind, world, accumulate, clip, weight, first=1):
    """The same training in one process, which begins with the batch of step `first`."""
    model = make_model(kind)
    optimizer = make_optimizer(model)
    allocator = RankAllocator(model, orth_reg_weight=weight, **SCHEDULE)
    allocator.attach(optimizer)
    for step in range(first, STEPS + 1):
        parts = micro_batches(step, world * accumulate)
        for x, target in parts:
            ((model(x) - target).square().mean() / len(parts)).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(trainable(model), clip)
        optimizer.step()
        optimizer.zero_grad()
    return model, allocator


def values_of(model):
    """All trained values of a model, flat, also where they are in parts."""
    parameters = trainable(model)
    with deepspeed.zero.GatheredParameters(parameters):
        return torch.cat([p.detach().float().flatten() for p in parameters])


def report(model, allocator, expected=None):
    """How a training has ended: a digest of all values, ranks and scores, and what is expected."""
    values, scores = values_of(model), allocator.state_dict()["scores"]
    pattern = [flag for flags in allocator.rank_pattern.values() for flag in flags]
    content = values.numpy().tobytes() + bytes(pattern) + scores.numpy().tobytes()
    result = {
        "digest": hashlib.sha256(content).hexdigest(),
        "ranks": allocator.ranks(),
        "summary": allocator.summary(),
    }
    if expected is not None:
        other, reference = expected
        theirs, their_scores = values_of(other), reference.state_dict()["scores"]
        result["expected"] = reference.summary()
        result["same_pattern"] = reference.rank_pattern == allocator.rank_pattern
        result["difference"] = ((values - theirs).norm() / theirs.norm()).item()
        result["scores"] = ((scores - their_scores).norm() / their_scores.norm()).item()
        result["orth_reg"] = (allocator.orth_reg or 0) - (reference.orth_reg or 0)
    return result


def train(stage, kind="plain", accumulate=1, clip=None, weight=0.1, **more):
    """A whole training; `more` is of DeepSpeed's config."""
    model = make_model(kind)
    allocator = RankAllocator(model, orth_reg_weight=weight, **SCHEDULE)
    if clip is not None:
        more["gradient_clipping"] = clip
    engine = start(model, config_of(stage, accumulate, **more))
    allocator.attach(engine)
    run(engine, 1, STEPS, accumulate)
    skipped = engine.skipped_steps
    expected = alone(kind, dist.get_world_size(), accumulate, clip, weight, 1 + skipped)
    return report(model, allocator, expected) | {"skipped": skipped}


def resume(stage, folder, at=15, **more):
    """Train to step `at`, save through the engine, and let new objects go on from there, too."""
    results = []
    for is_resumed in (False, True):
        model = make_model()
        allocator = RankAllocator(model, orth_reg_weight=0.1, **SCHEDULE)
        engine = start(model, config_of(stage, **more))
        allocator.attach(engine)
        if is_resumed:
            _, client_state = engine.load_checkpoint(folder)
            allocator.load_state_dict(client_state["allocator"])
        else:
            run(engine, 1, at)
            engine.save_checkpoint(folder, client_state={"allocator": allocator.state_dict()})
        run(engine, at + 1, STEPS)
        results.append(report(model, allocator))
    return results


def sent(stage):
    """What is sent in one step, as DeepSpeed counts it: [op, bytes, calls], ours and its own."""
    counts = {}
    for attached in (False, True):
        model = make_model()
        allocator = RankAllocator(model, orth_reg_weight=0.1, **SCHEDULE)
        engine = start(model, config_of(stage))
        if attached:
            allocator.attach(engine)
        run(engine, 1, 2)
        for step in (3, 8, 24):  # not pruning, pruning, final
            allocator.global_step = step - 1
            if step == 24:
                allocator.frozen = True
                allocator._state.drop_averages()
            deepspeed.comm.configure(enabled=True, prof_all=True, verbose=False)
            logger = deepspeed.comm.comm.comms_logger
            logger.comms_dict.clear()
            run(engine, step, step)
            counts[attached, step] = {
                (op, size): entry[0]
                for op, sizes in logger.comms_dict.items()
                for size, entry in sizes.items()
            }
    return counts

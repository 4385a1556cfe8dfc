"""What runs in the processes of test_distributed_deepspeed.py: trainings with DeepSpeed's engine.

Each compares itself with a training in one process over the same micro-batches.
"""

import copy
import hashlib
import os

os.environ |= {"DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"}

import deepspeed
import torch
import torch.distributed as dist
from helpers import Mlp, batch, trainable

from adalora_kernels import RankAllocator

STEPS = 30
SCHEDULE = {"target_r": 3, "total_step": STEPS, "tinit": 6, "tfinal": 8, "deltaT": 2}


def micro_batches(step, count):
    """The batch of a step in `count` parts, in the order of the ranks."""
    x, target = batch(step)
    return list(zip(x.chunk(count), target.chunk(count), strict=True))


def make_model(**options):
    torch.manual_seed(0)
    return Mlp(r=6, **options)


def config_of(stage, accumulate=1, **more):
    world = dist.get_world_size()
    config = {
        "train_batch_size": world * accumulate,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulate,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, **more.pop("zero", {})},
        **more,
    }
    return config


def optimizer_of(model):
    return torch.optim.AdamW(trainable(model), lr=5e-3)


def start(model, config):
    if "fp16" in config:
        # DeepSpeed trusts no CPU with it; ours can.
        deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer_of(model), config=copy.deepcopy(config)
    )
    return engine


def run(engine, first, last, accumulate=1):
    """Take the steps from `first` to `last`."""
    rank, world = dist.get_rank(), dist.get_world_size()
    for step in range(first, last + 1):
        parts = micro_batches(step, world * accumulate)
        for x, target in parts[rank::world]:
            dtype = next(engine.module.parameters()).dtype
            loss = (engine(x.to(dtype)).float() - target).square().mean()
            engine.backward(loss)
            engine.step()


def alone(world, accumulate=1, clip=None, weight=0.1, steps=STEPS):
    """The same training in one process."""
    model = make_model()
    optimizer = optimizer_of(model)
    allocator = RankAllocator(model, orth_reg_weight=weight, **SCHEDULE)
    allocator.attach(optimizer)
    for step in range(1, steps + 1):
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
    values = values_of(model)
    pattern = [flag for flags in allocator.rank_pattern.values() for flag in flags]
    averages = allocator.state_dict()
    digest = hashlib.sha256(values.numpy().tobytes() + bytes(pattern))
    digest.update(averages["scores"].numpy().tobytes())
    result = {
        "step": allocator.global_step,
        "digest": digest.hexdigest(),
        "ranks": allocator.ranks(),
        "summary": allocator.summary(),
        "finite": bool(values.isfinite().all()),
    }
    if expected is not None:
        other, reference = expected
        theirs = values_of(other)
        result["difference"] = ((values - theirs).norm() / theirs.norm()).item()
        result["expected"] = reference.ranks()
        mine, scores = averages["scores"], reference.state_dict()["scores"]
        result["scores"] = ((mine - scores).norm() / scores.norm()).item()
        result["same_pattern"] = reference.rank_pattern == allocator.rank_pattern
    return result


def train(stage, accumulate=1, clip=None, weight=0.1, compare=True, **more):
    """A whole training; `more` is of DeepSpeed's config."""
    model = make_model()
    allocator = RankAllocator(model, orth_reg_weight=weight, **SCHEDULE)
    if clip is not None:
        more["gradient_clipping"] = clip
    engine = start(model, config_of(stage, accumulate, **more))
    allocator.attach(engine)
    run(engine, 1, STEPS, accumulate)
    expected = None
    if compare:
        expected = alone(dist.get_world_size(), accumulate, clip, weight)
    return report(model, allocator, expected) | {"skipped": engine.skipped_steps}


def resume(stage, folder, at=15, **more):
    """Train to step `at`, save through the engine, and let new objects go on from there."""
    config = config_of(stage, **more)
    results = []
    for _ in ("saved", "resumed"):
        model = make_model()
        allocator = RankAllocator(model, orth_reg_weight=0.1, **SCHEDULE)
        engine = start(model, config)
        if not results:
            allocator.attach(engine)
            run(engine, 1, at)
            engine.save_checkpoint(folder, client_state={"allocator": allocator.state_dict()})
            run(engine, at + 1, STEPS)
        else:
            allocator.attach(engine)
            _, client_state = engine.load_checkpoint(folder)
            allocator.load_state_dict(client_state["allocator"])
            run(engine, at + 1, STEPS)
        results.append(report(model, allocator))
    return results


def hf(stage, folder, steps=12, resume_at=None, precision=None, plain=False, **options):
    """A Trainer with the callback; returns the run's report, and what it has saved."""
    import trainer_runs
    from adalora_kernels.peft import allocator_of
    from transformers import TrainingArguments, Trainer, default_data_collator
    from adalora_kernels.trainer import AdaLoraCallback

    world = dist.get_world_size()
    config = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "LOCAL_WORLD_SIZE": str(world)}
    def trainer():
        args = TrainingArguments(
            output_dir=folder, use_cpu=True, disable_tqdm=True, per_device_train_batch_size=2,
            max_steps=steps, learning_rate=1e-2, lr_scheduler_type="constant",
            train_sampling_strategy="sequential", logging_steps=1, report_to="none", deepspeed=config,
            dataloader_pin_memory=False, **options)
        model = trainer_runs.make(total_step=None)
        return Trainer(model, args, train_dataset=trainer_runs.rows(steps * 2 * world),
            data_collator=default_data_collator, callbacks=[AdaLoraCallback()])
    t = trainer()
    t.train(**({"resume_from_checkpoint": f"{folder}/checkpoint-{resume_at}"} if resume_at else {}))
    t.save_model(folder + "/final")
    return report(t.model, allocator_of(t.model)) | {"logs": t.state.log_history[-3:]}

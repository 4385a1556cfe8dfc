"""What runs in the processes of test_distributed_deepspeed.py: trainings with DeepSpeed's engine.

Each compares itself with a training in one process over the same micro-batches, without DeepSpeed.
"""

import copy
import hashlib
import os

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


def alone(kind, world, accumulate, clip, weight, first=1, **options):
    """The same training in one process, which begins with the batch of step `first`."""
    model = make_model(kind)
    optimizer = make_optimizer(model)
    allocator = RankAllocator(model, orth_reg_weight=weight, **SCHEDULE, **options)
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


def live_in(model):
    """How many triplets of what is trained are not 0, in the parameters themselves."""
    named = model.named_parameters()
    lora_E = [p for n, p in named if "lora_E" in n and p.requires_grad]
    with deepspeed.zero.GatheredParameters(lora_E):
        return sum(int((p != 0).sum()) for p in lora_E)


def report(model, allocator, expected=None):
    """How a training has ended: a digest of all values, ranks and scores, and what is expected."""
    values, scores = values_of(model), allocator.state_dict()["scores"]
    pattern = [flag for flags in allocator.rank_pattern.values() for flag in flags]
    content = values.numpy().tobytes() + bytes(pattern) + scores.numpy().tobytes()
    result = {
        "digest": hashlib.sha256(content).hexdigest(),
        "ranks": allocator.ranks(),
        "summary": allocator.summary(),
        "live": live_in(model),
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


def train(stage, kind="plain", accumulate=1, clip=None, weight=0.1, importance="paper", **more):
    """A whole training; `more` is of DeepSpeed's config."""
    model = make_model(kind)
    options = {"importance": importance}
    allocator = RankAllocator(model, orth_reg_weight=weight, **SCHEDULE, **options)
    if clip is not None:
        more["gradient_clipping"] = clip
    engine = start(model, config_of(stage, accumulate, **more))
    allocator.attach(engine)
    run(engine, 1, STEPS, accumulate)
    skipped = engine.skipped_steps
    if skipped:
        allocator.skip(allocator.global_step)  # As the Trainer's callback does after each.
    world = dist.get_world_size()
    expected = alone(kind, world, accumulate, clip, weight, 1 + skipped, **options)
    return report(model, allocator, expected) | {"skipped": skipped}


def train_each(cases):
    """`train` for each (stage, options)."""
    return {name: train(stage, **options) for name, (stage, options) in cases.items()}


def resume(stages, folder, at=15, **more):
    """`resume_one` for each stage."""
    return {stage: resume_one(stage, f"{folder}/{stage}", at, **more) for stage in stages}


def resume_one(stage, folder, at, **more):
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


def refusals():
    """What is said to setups that can't work, by name; and what the allocator is like after it."""
    messages = {}

    def note(name, function, *arguments):
        try:
            function(*arguments)
        except (ValueError, RuntimeError, TypeError) as error:
            messages[name] = f"{type(error).__name__}: {error}"
        else:
            messages[name] = "no error"

    def prepare(name, config, change=None):
        model = make_model()
        if change is not None:
            change(model)
        allocator = RankAllocator(model, **SCHEDULE)
        engine = start(model, config)
        note(name, allocator.attach, engine)
        messages[name] += ", attached" if allocator.attached else ""
        return allocator, engine

    bf16 = {"bf16": {"enabled": True}}
    prepare("stage 0 in half precision", config_of(0, **bf16))
    prepare("BF16_Optimizer", config_of(1, **bf16, data_types={"grad_accum_dtype": "fp32"}))
    prepare("round robin", config_of(2, zero={"round_robin_gradients": True}))
    prepare("float64", config_of(2), lambda model: model.double())
    prepare("stage 0", config_of(0))
    allocator, engine = prepare("stage 3", config_of(3))
    note("twice", allocator.attach, engine)
    note("synced", lambda: allocator.attach(engine, sync_gradients=True))
    note("by hand", allocator.step, 1)
    allocator.frozen = True
    note("shrink", allocator.shrink)
    note("too late", lambda: RankAllocator(engine.module, **SCHEDULE))
    state = allocator.state_dict()
    allocator.detach()
    note("state before attach", allocator.load_state_dict, state)
    note("no engine", allocator.attach, engine.module)
    model = make_model()
    allocator = RankAllocator(model, **SCHEDULE)
    only = torch.optim.AdamW(trainable(model.layers[0]))
    note(
        "not all",
        lambda: allocator.attach(
            deepspeed.initialize(model=model, optimizer=only, config=config_of(2))[0]
        ),
    )
    inference = deepspeed.initialize(model=make_model(), config=config_of(3))[0]
    note("no optimizer", RankAllocator(make_model(), **SCHEDULE).attach, inference)
    return messages


def by_accelerate(stage):
    """A hand-written loop with Accelerate, which gives what it has prepared to `attach`."""
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin

    os.environ["LOCAL_WORLD_SIZE"] = str(dist.get_world_size())
    model, rank, world = make_model(), dist.get_rank(), dist.get_world_size()
    config = config_of(stage, 2, gradient_clipping=0.05)
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
    allocator = RankAllocator(model, orth_reg_weight=0.1, **SCHEDULE)
    prepared, optimizer = accelerator.prepare(model, make_optimizer(model))
    allocator.attach(optimizer)
    for step in range(1, STEPS + 1):
        for x, target in micro_batches(step, 2 * world)[rank::world]:
            with accelerator.accumulate(prepared):
                accelerator.backward((prepared(x) - target).square().mean())
                optimizer.step()
                optimizer.zero_grad()
    return report(model, allocator, alone("plain", world, 2, 0.05, 0.1))

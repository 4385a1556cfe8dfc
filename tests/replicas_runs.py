"""What `test_distributed_replicas.py` runs in several processes, and in one to compare with."""

import contextlib
import hashlib

import torch
import torch.distributed as dist
from helpers import Mlp, batch, trainable
from shards_runs import device
from torch import nn

from adalora_kernels import RankAllocator, SVDLinear

STEPS = 30
SCHEDULE = {"target_r": 3, "total_step": STEPS, "tinit": 4, "tfinal": 6, "deltaT": 2}
WEIGHT = 0.1


class Routed(nn.Module):
    """Experts, of which a call uses one, and a last one that nobody asks."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(SVDLinear(16, 8, r=6, dtype=torch.float64) for _ in range(4))

    def loss(self, x, target, expert):
        return (self.experts[expert](x) - target).square().mean()


class Mixed(nn.Module):
    """Adapters of two dtypes, and a trained head without any."""

    def __init__(self):
        super().__init__()
        self.first = SVDLinear(16, 24, r=6, dtype=torch.float64)
        self.second = SVDLinear(24, 20, r=6, dtype=torch.float32)
        self.head = nn.Linear(20, 8, dtype=torch.float64)

    def loss(self, x, target):
        hidden = torch.tanh(self.first(x)).float()
        return (self.head(torch.tanh(self.second(hidden)).double()) - target).square().mean()


def parts(step, count):
    """The batch of a step in `count` equal parts."""
    x, target = (t.to(device()) for t in batch(step, torch.float64))
    return list(zip(x.chunk(count), target.chunk(count), strict=True))


def losses_of(model, step, count):
    """The losses of the parts of a step, whose mean is that of the step."""
    for i, (x, target) in enumerate(parts(step, count)):
        if isinstance(model, Routed):
            # One part of two asks an expert that no other asks, the others none in some steps.
            expert = i % 3 if step % 3 else 0
            yield lambda x=x, target=target, expert=expert: model.loss(x, target, expert)
        else:
            yield lambda x=x, target=target: model.loss(x, target)


def make(kind, noise=0):
    """A model whose base weights are the same in each process, and whose others are unless told."""
    torch.manual_seed(0)
    if kind == "routed":
        model = Routed()
    else:
        model = Mixed() if kind == "mixed" else Mlp(dtype=torch.float64)
    with torch.no_grad():
        for p in trainable(model):
            p += noise
    return model.to(device())


def train(kind, world, rank, accumulate=1, clip=False, closure=False, explicit=False, noise=0):
    """Train as one of `world` processes, or alone on what they all have (rank None).

    Returns the parameters, the ranks, and how many collectives were called per step.
    """
    model = make(kind, noise)
    options = {"lr": 0.01, "max_iter": 3} if closure else {"lr": 5e-3}
    optimizer = (torch.optim.LBFGS if closure else torch.optim.AdamW)(trainable(model), **options)
    allocator = RankAllocator(
        model, orth_reg_weight=WEIGHT, check_replicas=rank is not None, **SCHEDULE
    )
    allocator.attach(optimizer, sync_gradients=rank is not None)
    for step in range(1, STEPS + 1):
        losses = list(losses_of(model, step, world * accumulate))
        own = losses if rank is None else losses[rank * accumulate : (rank + 1) * accumulate]

        def accumulated(own=own):
            optimizer.zero_grad()
            total = 0.0
            for loss in own:
                part = loss() / len(own)
                part.backward()
                total = total + part.detach()
            return total

        with counted() as counts:
            if closure:
                optimizer.step(accumulated)
            else:
                accumulated()
                if explicit and rank is not None:
                    allocator.sync_gradients()
                if clip:
                    nn.utils.clip_grad_norm_(model.parameters(), 0.05)
                optimizer.step()
    return result_of(model, allocator) | {"collectives": dict(counts)}


def result_of(model, allocator):
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    values = {n: p.cpu().clone() for n, p in trained.items()}
    mask = allocator._state.mask.cpu()
    everything = b"".join(t.numpy().tobytes() for t in [*values.values(), mask])
    return {
        "values": values,
        "ranks": allocator.ranks(),
        "hash": hashlib.sha256(everything).hexdigest(),
        "untrained": allocator.summary()["untrained"],
        "step": allocator.global_step,
    }


@contextlib.contextmanager
def counted():
    """Count the calls of collectives by name."""
    counts = {}
    names = ["all_reduce", "all_gather", "broadcast"]
    originals = {name: getattr(dist, name) for name in names}

    def counting(name):
        def call(*args, **kwargs):
            counts[name] = counts.get(name, 0) + 1
            return originals[name](*args, **kwargs)

        return call

    for name in names:
        setattr(dist, name, counting(name))
    try:
        yield counts
    finally:
        for name in names:
            setattr(dist, name, originals[name])


# One start of processes serves many cases, because it takes most of the time.
CASES = {
    "plain": {"kind": "mlp"},
    "accumulated": {"kind": "mlp", "accumulate": 2},
    "clipped": {"kind": "mlp", "accumulate": 2, "clip": True, "explicit": True},
    "routed": {"kind": "routed"},
    "routed_accumulated": {"kind": "routed", "accumulate": 2, "explicit": True},
    "mixed": {"kind": "mixed"},
    "closure": {"kind": "mlp", "closure": True},
}


def train_cases(names):
    """Each case as one of the processes, which begin with different values."""
    rank, world = dist.get_rank(), dist.get_world_size()
    return {n: train(world=world, rank=rank, noise=rank, **CASES[n]) for n in names}


def error_of(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def one_step(model, optimizer, step=1):
    model.loss(*batch(step, torch.float64)).backward()
    optimizer.step()
    optimizer.zero_grad()


def attached(sync, optimizer=torch.optim.AdamW, **options):
    model = make("mlp")
    optimizer = optimizer(trainable(model), lr=1e-2, **options)
    allocator = RankAllocator(model, **SCHEDULE)
    allocator.attach(optimizer, sync_gradients=sync)
    return model, optimizer, allocator


def mistakes():
    """What is said of each way to use `sync_gradients` and `check_replicas` wrongly."""
    rank = dist.get_rank()
    errors = {}

    model, optimizer, _ = attached(True)
    model.loss(*batch(rank, torch.float64)).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    errors["clipped before"] = error_of(optimizer.step)

    model, optimizer, allocator = attached(True)
    model.loss(*batch(rank, torch.float64)).backward()
    allocator.sync_gradients()
    model.loss(*batch(rank, torch.float64)).backward()
    errors["backward after"] = error_of(optimizer.step)

    model, optimizer, _ = attached(True, fused=True)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model.loss(*batch(rank, torch.float64))).backward()
    errors["scaler"] = error_of(scaler.step, optimizer)

    model = make("mlp" if rank else "routed")
    optimizer = torch.optim.AdamW(trainable(model))
    allocator = RankAllocator(model, **SCHEDULE)
    errors["others"] = error_of(allocator.attach, optimizer, sync_gradients=True)
    errors["still detached"] = allocator.attached

    # One entry of one process drifts, after the first comparison.
    model, optimizer, allocator = attached(False)
    allocator.check_replicas = True
    for step in range(1, 25):
        if step == 3 and rank == 1:
            with torch.no_grad():
                model.layers[1].lora_A[0, 0] += 0.5
        errors[f"drift {step}"] = error_of(one_step, model, optimizer, step)
        if "no error" not in errors[f"drift {step}"]:
            break
    return errors


def none_anywhere():
    """Steps in which no process has a gradient of an adapter."""
    model, optimizer, allocator = attached(True)
    one_step(model, optimizer)
    before = result_of(model, allocator)
    optimizer.zero_grad()
    optimizer.step()
    after = result_of(model, allocator)
    return before["hash"] == after["hash"], all(p.grad is None for p in trainable(model))


def peft_model():
    from peft import AdaLoraConfig, get_peft_model

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8))
    schedule = {"tinit": 2, "tfinal": 3, "total_step": 12}
    config = AdaLoraConfig(init_r=6, target_r=3, target_modules=["0", "2"], **schedule)
    return get_peft_model(net, config)


def peft_that_drifts():
    """PEFT's model under DDP, of which one process has changed a value on its own."""
    from torch.nn.parallel import DistributedDataParallel

    from adalora_kernels.peft import apply

    model = peft_model()
    report = apply(model, check_replicas=True)
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    report.attach(optimizer)
    said = []
    for step in range(1, 13):
        if step == 4 and dist.get_rank() == 1:
            with torch.no_grad():
                report.allocator.adapters[1].lora_A[0, 0] += 0.5
        x, target = batch(step + 100 * dist.get_rank())
        (wrapped(x) - target).square().mean().backward()
        said.append(error_of(optimizer.step))
        optimizer.zero_grad()
    return said


def trainer_with_checkpointing(folder):
    """The Trainer under DDP with reentrant checkpointing (docs/scaling.md); the final ranks."""
    from peft import AdaLoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    from adalora_kernels.peft import allocator_of, apply
    from adalora_kernels.trainer import AdaLoraCallback

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=99, num_hidden_layers=2, **sizes))
    schedule = {"tinit": 2, "tfinal": 3, "total_step": 12}
    targets = ["q_proj", "v_proj", "up_proj"]
    config = AdaLoraConfig(
        task_type="CAUSAL_LM", init_r=6, target_r=3, target_modules=targets, **schedule
    )
    model = get_peft_model(llama, config)
    apply(model, check_replicas=True)
    data = [{"input_ids": t, "labels": t} for t in torch.randint(0, 99, (96, 16))]
    args = TrainingArguments(
        folder,
        max_steps=12,
        per_device_train_batch_size=4,
        use_cpu=True,
        ddp_backend="gloo",
        save_strategy="no",
        report_to=[],
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": True},
        ddp_find_unused_parameters=False,
    )
    trainer = Trainer(model, args, train_dataset=data, callbacks=[AdaLoraCallback()])
    trainer.train()
    allocator = allocator_of(model)
    return type(trainer.model_wrapped).__name__, result_of(model, allocator)

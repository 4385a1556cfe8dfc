"""The training of shards_runs.py through Accelerate, and PEFT's through transformers' Trainer."""

import os

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType
from shards_runs import MICRO_BATCHES, STEPS, adamw, batches, net, outcome, train
from shards_runs import allocator_of as made_for
from torch.distributed.fsdp import fully_shard
from trainer_runs import STEPS as TRAINER_STEPS
from trainer_runs import collated, make, rows, save_every, trainer_of
from transformers import Trainer

from adalora_kernels.export import export_lora, load_adapter, load_state, save_adapter, save_state
from adalora_kernels.peft import allocator_of, apply


def told_of_fsdp(accelerator, block, **options):
    """Shard each block. Accelerate takes FSDP only where there are accelerators.

    So on CPUs it is told afterwards, by what it would have set; everything else is its own.
    """
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[block],
        **options,
    )
    for state in (accelerator.state, PartialState()):
        state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    assert accelerator.is_fsdp2
    return accelerator


class CpuFsdpTrainer(Trainer):
    """A Trainer whose accelerator is told to take FSDP, as in `told_of_fsdp`."""

    saves_whole = False

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        whole = "FULL_STATE_DICT" if self.saves_whole else "SHARDED_STATE_DICT"
        told_of_fsdp(self.accelerator, "LlamaDecoderLayer", state_dict_type=whole)
        self.is_fsdp_enabled = True


def with_trainer(out, saves=None, checkpoint=None, saves_whole=False):
    """PEFT's AdaLoRA on a tiny Llama, in float64; saved by the Trainer, and exported."""
    os.environ["LOCAL_WORLD_SIZE"] = str(dist.get_world_size())
    model = make(dtype=torch.float64)
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    options = {"data": rows(TRAINER_STEPS * 4), "accumulation": 1, "max_grad_norm": 0.0}
    if saves is not None:
        options |= save_every(saves)
    CpuFsdpTrainer.saves_whole = saves_whole
    sharded = dist.get_world_size() > 1
    if not sharded:
        options["accumulation"] = 2
    trainer = trainer_of(model, out, cls=CpuFsdpTrainer if sharded else Trainer, **options)
    trainer.train(resume_from_checkpoint=checkpoint)
    allocator = allocator_of(model)
    trainer.save_model(os.path.join(out, "saved"))
    for name, function in (("compact", save_adapter), ("lora", export_lora)):
        function(model, os.path.join(out, name))
    save_adapter(model, os.path.join(out, "full"), full_rank=True)
    return outcome(model, allocator) | {"logs": trainer.state.log_history}


def fully_sharded(model):
    """FSDP2 by hand, on each of Llama's layers and on the rest."""
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def pefts_loop(out, is_sharded=True):
    """The loop of PEFT's documentation: the regulariser in the loss, the allocator by hand.

    Then what it has written is loaded into another model.
    """
    model = make(dtype=torch.float64)
    model.double()
    allocator = apply(model).allocator
    share, rank = 1, 0
    if is_sharded:
        fully_sharded(model)
        share, rank = dist.get_world_size(), dist.get_rank()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, foreach=False)
    data = collated(rows(TRAINER_STEPS * 4))
    for step in range(1, TRAINER_STEPS + 1):
        own = data[2 * (step - 1) : 2 * step][rank::share]
        for batch in own:
            (model(**batch).loss / len(own)).backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    allocator.orth_reg = torch.zeros(())
    before = outcome(model, allocator)
    save_adapter(model, out, full_rank=True)
    dist.barrier()
    other = make(dtype=torch.float64, seed=2)
    other.double()
    if is_sharded:
        fully_sharded(other)
    allocator = apply(other).allocator
    load_adapter(other, out)
    allocator.orth_reg = torch.zeros(())
    assert outcome(other, allocator)["hash"] == before["hash"]
    return before


def registered(folder, outputs):
    """`register_for_checkpointing`: what Accelerate writes holds one process's shards.

    Returns the error of loading it, and whether the allocator is as it was; then the same with
    what `save_state` writes, which is whole.
    """
    os.environ["LOCAL_WORLD_SIZE"] = str(dist.get_world_size())
    model = net(outputs=outputs)
    allocator, optimizer = made_for(model), adamw(model)
    accelerator = told_of_fsdp(Accelerator(cpu=True), "Block")
    model, optimizer = accelerator.prepare(model, optimizer)
    allocator.attach(optimizer)
    train(model, optimizer, allocator, range(1, 8))
    accelerator.register_for_checkpointing(allocator)
    accelerator.save_state(folder)
    save_state(allocator, os.path.join(folder, "allocator.safetensors"))
    accelerator.wait_for_everyone()
    before = outcome(model, allocator)["hash"]
    error = None
    try:
        accelerator.load_state(folder)
    except ValueError as raised:
        error = str(raised)
    unchanged = outcome(model, allocator)["hash"] == before
    allocator.load_state_dict(load_state(os.path.join(folder, "allocator.safetensors")))
    return {"error": error, "same": [unchanged, outcome(model, allocator)["hash"] == before]}


def with_accelerate(attach="before", **options):
    """The same training with `accelerator.prepare`, attached before it or after."""
    model = net()
    allocator, optimizer = made_for(model), adamw(model)
    if attach == "before":
        allocator.attach(optimizer)
    os.environ["LOCAL_WORLD_SIZE"] = str(dist.get_world_size())
    accumulated = MICRO_BATCHES // dist.get_world_size()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulated)
    told_of_fsdp(accelerator, "Block", **options)
    model, optimizer = accelerator.prepare(model, optimizer)
    if attach == "after":
        allocator.attach(optimizer)
    world, rank = dist.get_world_size(), dist.get_rank()
    for step in range(1, STEPS + 1):
        for x, target in batches(step)[rank::world]:
            with accelerator.accumulate(model):
                accelerator.backward((model(x) - target).square().mean())
                optimizer.step()
                optimizer.zero_grad()
    return outcome(model, allocator)

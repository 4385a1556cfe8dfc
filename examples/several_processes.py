"""Train AdaLoRA in several processes: DDP or FSDP2 by hand, or whatever Accelerate is told to use.

torchrun --standalone --nproc-per-node 2 examples/several_processes.py --engine fsdp2

docs/scaling.md has the other command lines. It runs on CPUs as well as on NVIDIA GPUs, one for each
process, and downloads nothing: a tiny Llama with random weights learns which token follows which.
"""

import argparse
import os
import warnings
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from peft import AdaLoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

import adalora_kernels.peft
from adalora_kernels import export
from adalora_kernels.distributed import shard_placement

TOKENS, LENGTH, BATCH = 64, 32, 16  # BATCH is that of all processes together.
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GPU = torch.cuda.is_available()


def base_model() -> LlamaForCausalLM:
    """Return the model to adapt. Every process makes the same one: the seed is the same."""
    torch.manual_seed(0)
    sizes = {"vocab_size": TOKENS, "hidden_size": 64, "intermediate_size": 128}
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.1}
    return LlamaForCausalLM(LlamaConfig(use_cache=False, **sizes, **shape))


def batch_of(seed: int, rank: int = 0, world: int = 1) -> Tensor:
    """Return this process's share of a batch: after token t comes 5·t + 3, modulo TOKENS."""
    tokens = torch.randint(TOKENS, (BATCH, 1), generator=torch.Generator().manual_seed(seed))
    rows = [tokens]
    for _ in range(LENGTH - 1):
        rows.append((5 * rows[-1] + 3) % TOKENS)
    return torch.cat(rows, 1)[rank::world]


@torch.no_grad()
def fixed_loss(model: nn.Module, device: torch.device) -> float:
    """Return the loss over a batch that is always the same. With FSDP2 all processes call this."""
    tokens = batch_of(seed=0).to(device)
    logits = model.eval()(input_ids=tokens).logits  # Without labels: see the end of main.
    model.train()
    return cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).item()


def start() -> torch.device:
    """Let the processes that torchrun has started find each other; return this one's device."""
    if GPU:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if GPU else "gloo")
    return torch.device("cuda", torch.cuda.current_device()) if GPU else torch.device("cpu")


def distribute(engine: str, model: Any) -> nn.Module:
    """Wrap the adapted model in DDP, or divide it in place with FSDP2."""
    if engine == "ddp":
        return DistributedDataParallel(model)
    placement = shard_placement(model)  # A regulariser (orth_reg_weight > 0) then gathers nothing.
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, shard_placement_fn=placement)
    return fully_shard(model, shard_placement_fn=placement)


def main() -> None:
    """Train, save the adapter, and load it in plain PEFT."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", choices=["ddp", "fsdp2", "accelerate"], default="ddp")
    parser.add_argument("--out", default="build/several_processes", help="folder of the adapter")
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", module=r"(peft|transformers)\b")
    # Without cpu=True, Accelerate's processes would each train alone where there is no GPU.
    accelerator = Accelerator(cpu=not GPU) if args.engine == "accelerate" else None
    device = accelerator.device if accelerator else start()
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    # 1. The model, and the adapters' start: by the seed of base_model, the same everywhere.
    schedule = {"tinit": args.steps // 10, "tfinal": args.steps * 2 // 5, "total_step": args.steps}
    ranks = {"init_r": 6, "target_r": 4, "lora_alpha": 16, "orth_reg_weight": 0.0}
    kind = {"task_type": "CAUSAL_LM", "target_modules": ALL_LINEAR}
    model: Any = get_peft_model(base_model().to(device), AdaLoraConfig(**kind, **ranks, **schedule))
    allocator = adalora_kernels.peft.apply(model, start="lora", check_replicas=True).allocator
    assert allocator is not None
    # 2. The engine. Accelerate comes later, because it takes the optimizer as well.
    if accelerator is None:
        model = distribute(args.engine, model)
    # 3. The optimizer, after FSDP2, which puts other parameters into the model.
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer: Any = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    # 4. From here on optimizer.step() does all of AdaLoRA.
    allocator.attach(optimizer)
    if accelerator is not None:
        model, optimizer = accelerator.prepare(model, optimizer)
    torch.manual_seed(1 + rank)  # For dropout, where there is some: different in each process.

    losses = [fixed_loss(model, device)]
    for step in range(1, args.steps + 1):
        tokens = batch_of(step, rank, world).to(device)
        loss = model(input_ids=tokens, labels=tokens).loss
        accelerator.backward(loss) if accelerator else loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    losses.append(fixed_loss(model, device))

    # What is sharded is brought together by all processes, and the first one writes it.
    if allocator.is_sharded or rank == 0:
        export.save_adapter(model, args.out)
    if rank == 0:
        before, after = losses
        print(f"{world} processes on {device.type}: loss {before:.4f}, after training {after:.4f}")
        print(allocator.summary(), allocator.ranks(), sep="\n")
        # Plain PEFT computes a regulariser wherever there are labels, and fails without training.
        plain = PeftModel.from_pretrained(base_model(), args.out, torch_device="cpu")
        loss_there = fixed_loss(plain, torch.device("cpu"))
        print(f"loss in plain PEFT, from {args.out}: {loss_there:.4f}")
    if dist.is_initialized():
        # gloo's threads need Python to let go of what they have sent: nobody ends just after that.
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

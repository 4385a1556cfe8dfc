"""Trainings under tensor parallelism, in processes of test_distributed_tensor_parallel.py."""

import hashlib
import json
from pathlib import Path

import parallel_layers_runs
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from parallel_layers_runs import relative, whole
from peft import AdaLoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from transformers import LlamaConfig, LlamaForCausalLM

import adalora_kernels.peft
from adalora_kernels import RankAllocator, SVDLinear, export
from adalora_kernels.distributed import (
    ColwiseAdaLora,
    ReplicatedAdaLora,
    RowwiseAdaLora,
    adalora_plan,
    layout,
)

STEPS = 30


def several(functions):
    """The results of several functions, by name: one start of processes for all."""
    return {
        name: (globals().get(name) or getattr(parallel_layers_runs, name))(**arguments)
        for name, arguments in functions.items()
    }


def adapters_that_came_late(folder):
    """The errors of attach where the base layers have been sharded before they had adapters."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if dist.get_rank() == 0:
        a_llama()[0].unload().save_pretrained(folder)
    dist.barrier()
    options = AdaLoraConfig(init_r=6, target_r=3, total_step=9, target_modules=["q_proj", "o_proj"])
    by_transformers = LlamaForCausalLM.from_pretrained(folder, tp_plan="auto")
    by_torch = LlamaForCausalLM.from_pretrained(folder)
    plan = {"layers.*.self_attn.q_proj": ColwiseParallel()}
    parallelize_module(by_torch.model, mesh, plan)
    report = []
    for llama in (by_transformers, by_torch):
        allocator = adalora_kernels.peft.apply(get_peft_model(llama, options)).allocator
        trained = [p for p in llama.parameters() if p.requires_grad]
        try:
            allocator.attach(torch.optim.SGD(trained, lr=0.1))
        except ValueError as error:
            report.append(str(error))
    return report


def a_llama():
    """A Llama with PEFT's adapters in all its linear layers, taken over; the same everywhere."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        attn_implementation="eager",
    )
    llama = LlamaForCausalLM(config)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    schedule = {"target_r": 3, "tinit": 4, "tfinal": 8, "deltaT": 3, "total_step": STEPS}
    options = AdaLoraConfig(
        task_type="CAUSAL_LM",
        init_r=6,
        lora_alpha=12,
        lora_dropout=0.0,
        target_modules=names,
        orth_reg_weight=0.1,
        **schedule,
    )
    model = get_peft_model(llama, options).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_E" in name:
                parameter.normal_(std=0.1)
    return model, adalora_kernels.peft.apply(model).allocator


def parallelize_llama(model, mesh):
    llama = model.get_base_model()
    plan = adalora_plan(llama.config.base_model_tp_plan)
    return parallelize_module(llama.model, mesh, plan)


def tokens(step, rows=4):
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randint(0, 64, (rows, 12), generator=generator)


def llama_gradients():
    """The relative errors of a Llama's loss and gradients from those of one process."""
    world = dist.get_world_size()
    single, parallel = a_llama()[0], a_llama()[0]
    parallelize_llama(parallel, init_device_mesh("cpu", (world,)))
    losses = []
    for model in (single, parallel):
        for step in (1, 2):  # The second one adds up.
            loss = model.get_base_model()(tokens(step), labels=tokens(step)).loss
            loss.backward()
        losses.append(loss.item())
    expected = dict(single.named_parameters())
    errors = {
        name: relative(whole(p.grad), expected[name].grad)
        for name, p in parallel.named_parameters()
        if p.requires_grad
    }
    return {"losses": losses, "errors": errors}


class Net(nn.Module):
    """Layers of ours: column-wise, row-wise and a head that is not shared out; uneven sizes."""

    def __init__(self):
        super().__init__()
        options = {"r": 6, "dtype": torch.float64}
        self.up, self.down = SVDLinear(10, 15, **options), SVDLinear(15, 10, **options)
        self.head = SVDLinear(10, 3, bias=False, **options)

    def forward(self, x):
        return self.head(x + self.down(torch.tanh(self.up(x))))


def a_net():
    torch.manual_seed(0)
    model = Net()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_E" in name:
            nn.init.normal_(parameter, std=0.1)
    schedule = {"target_r": 3, "tinit": 4, "tfinal": 8, "deltaT": 3, "total_step": STEPS}
    return model, RankAllocator(model, orth_reg_weight=0.1, **schedule)


def parallelize_net(model, mesh):
    plan = {"up": ColwiseAdaLora(), "down": RowwiseAdaLora(), "head": ReplicatedAdaLora()}
    return parallelize_module(model, mesh, plan)


def loss_of(model, step, part=0, parts=1):
    """The loss of one of the parts of a step's batch."""
    if isinstance(model, Net):
        generator = torch.Generator().manual_seed(1000 + step)
        x = torch.randn(4, 5, 10, generator=generator, dtype=torch.float64)
        return model(x.chunk(parts)[part]).square().mean()
    ids = tokens(step).chunk(parts)[part]
    return model.get_base_model()(ids, labels=ids).loss


def a_training(kind, dp=1, alone=False, with_optimizer=True):
    """Model, allocator and optimizer: column-wise and row-wise, and FSDP2 along dp."""
    world = 1 if alone else dist.get_world_size()
    model, allocator = a_net() if kind == "net" else a_llama()
    if not alone:
        shape, names = ((dp, world // dp), ("dp", "tp")) if dp > 1 else ((world,), ("tp",))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        (parallelize_net if kind == "net" else parallelize_llama)(model, mesh["tp"])
        if dp > 1:
            root = model if kind == "net" else model.get_base_model()
            blocks = [model.up, model.down] if kind == "net" else root.model.layers
            for block in blocks:
                fully_shard(block, mesh=mesh["dp"])
            fully_shard(root, mesh=mesh["dp"])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-2)
    allocator.attach(optimizer)
    return model, allocator, optimizer


def train(model, optimizer, steps, dp=1, micro_batches=1):
    """Each process of dp has its micro-batches of a step."""
    first = dist.get_rank() * dp // dist.get_world_size() * micro_batches if dp > 1 else 0
    trained = [p for p in model.parameters() if p.requires_grad]
    sharded = model if isinstance(model, Net) else model.get_base_model()
    for step in steps:
        for i in range(micro_batches):
            if dp > 1:
                sharded.set_requires_gradient_sync(i == micro_batches - 1)
            loss = loss_of(model, step, first + i, dp * micro_batches)
            (loss / micro_batches).backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.1)
        optimizer.step()
        optimizer.zero_grad()


def outcome(model, allocator):
    """All adapters and the pattern; what this process has of them, too, as a hash."""
    parameters = {n: whole(p.detach()) for n, p in model.named_parameters() if p.requires_grad}
    digest = hashlib.sha256()
    for tensor in [*parameters.values(), allocator._state.mask, allocator._state.scores]:
        digest.update(tensor.contiguous().numpy().tobytes())
    return {
        "parameters": parameters,
        "pattern": {name: list(mask) for name, mask in allocator.rank_pattern.items()},
        "ranks": allocator.ranks(),
        "orth_reg": float(allocator.orth_reg),
        "hash": digest.hexdigest(),
    }


def sent_by_steps():
    """Whether steps prune, and the collectives of each, with how many numbers."""
    model, allocator, optimizer = a_training("net")
    sent = []

    def counted(name, own):
        def call(first, *tensors, **options):
            sent.append((name, (tensors[0] if tensors else first).numel()))
            return own(first, *tensors, **options)

        return call

    places = (dist, "all_reduce"), (layout, "_all_gather")
    originals = [getattr(module, name) for module, name in places]
    report = []
    for step in range(1, 10):
        loss_of(model, step).backward()
        for (module, name), own in zip(places, originals, strict=True):
            setattr(module, name, counted(name, own))
        optimizer.step()
        for (module, name), own in zip(places, originals, strict=True):
            setattr(module, name, own)
        optimizer.zero_grad()
        report.append((allocator.schedule.masks_at(step), sent[:]))
        sent.clear()
    return report


def training(kind, dp=1, micro_batches=1, recomputed=False):
    """What 30 steps make."""
    model, allocator, optimizer = a_training(kind, dp)
    if recomputed:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    train(model, optimizer, range(1, STEPS + 1), dp, micro_batches)
    return outcome(model, allocator)


def alone(kind):
    """The same in one process, without torch.distributed."""
    model, allocator, optimizer = a_training(kind, alone=True)
    train(model, optimizer, range(1, STEPS + 1))
    return outcome(model, allocator)


def _state(model, allocator, optimizer):
    parts = get_state_dict(model, optimizer)
    return {"model": parts[0], "optimizer": parts[1], "allocator": allocator.state_dict()}


def save(folder, kind="llama", step=15):
    """Half of a training, its checkpoint, and PEFT's files, which the first process writes."""
    model, allocator, optimizer = a_training(kind)
    train(model, optimizer, range(1, step + 1))
    dcp.save(_state(model, allocator, optimizer), checkpoint_id=f"{folder}/checkpoint")
    whole_state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if dist.get_rank() == 0:
        model.save_pretrained(f"{folder}/adapter", state_dict=whole_state)
    _export(model, f"{folder}/adapter")


def _export(model, path):
    export.save_adapter(model, f"{path}/compact")
    export.save_adapter(model, f"{path}/full", full_rank=True)
    export.export_lora(model, f"{path}/lora")


def _files(path):
    """The tensors of all files below a folder, and the ranks that its configs say."""
    found = {}
    for file in sorted(Path(path).rglob("*")):
        name = str(file.relative_to(path))
        if file.suffix == ".safetensors":
            found |= {f"{name}: {key}": tensor for key, tensor in load_file(file).items()}
        elif file.name == "adapter_config.json":
            found[name] = json.loads(file.read_text())["rank_pattern"]
    return found


def resume(folder, kind="llama", dp=1, alone=False, step=15):
    """The other half, by as many processes as there are, from that checkpoint."""
    model, allocator, optimizer = a_training(kind, dp, alone)
    state = _state(model, allocator, optimizer)
    dcp.load(state, checkpoint_id=f"{folder}/checkpoint")
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    allocator.load_state_dict(state["allocator"])
    train(model, optimizer, range(step + 1, STEPS + 1), dp)
    return outcome(model, allocator)


def checkpoints_of_one(folder):
    """Alone: the second half of the training from the checkpoint; what the files hold."""
    model, _, optimizer = a_training("llama", alone=True)
    train(model, optimizer, range(1, 16))
    model.save_pretrained(f"{folder}/expected")
    _export(model, f"{folder}/expected")
    loaded = PeftModel.from_pretrained(a_llama()[0].unload(), f"{folder}/adapter").double()
    again = PeftModel.from_pretrained(a_llama()[0].unload(), f"{folder}/expected").double()
    outputs = [m(tokens(1)).logits.detach() for m in (loaded, again)]
    return {
        "found": resume(folder, alone=True),
        "files": [_files(f"{folder}/adapter"), _files(f"{folder}/expected")],
        "outputs": outputs,
    }


def example(code):
    """Run an example of the documentation, and say what it has made of the ranks."""
    names = {"__name__": "__main__"}
    exec(compile(code, "example", "exec"), names)
    return names["allocator"].ranks(), names["allocator"].summary()["step"]

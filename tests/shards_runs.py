"""Trainings with sharded adapters, which test_distributed_shards.py runs on several processes."""

import hashlib

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

from adalora_kernels import RankAllocator, SVDLinear, orth_reg, orth_reg_grad_
from adalora_kernels.distributed import shard_placement
from benchmarks.traffic import CountSent

STEPS = 30
MICRO_BATCHES = 4  # of every step, over all processes


class Block(nn.Module):
    """Two adapted layers and one that is trained as it is; recomputed in the backward, or not."""

    def __init__(self, width, hidden, r, dtype):
        super().__init__()
        self.up = SVDLinear(width, hidden, r=r, bias=True, dtype=dtype)
        self.norm = nn.LayerNorm(hidden, dtype=dtype)
        self.down = SVDLinear(hidden, width, r=r, dtype=dtype)
        self.is_checkpointed = self.is_skipped = False

    def _forward(self, x):
        return x + self.down(torch.tanh(self.norm(self.up(x))))

    def forward(self, x):
        if self.is_skipped:
            return x
        if self.is_checkpointed:
            return checkpoint(self._forward, x, use_reentrant=False)
        return self._forward(x)


class Net(nn.Module):
    """Two blocks, and a head of three outputs.

    On four processes one has nothing of the head's lora_B, of any lora_A or lora_E (six triplets
    are 2, 2, 2 and 0); and 10 columns can't be divided evenly.
    """

    def __init__(self, r=6, dtype=torch.float64, outputs=3):
        super().__init__()
        self.blocks = nn.ModuleList(Block(8, 10, r, dtype) for _ in range(2))
        self.head = SVDLinear(8, outputs, r=r, dtype=dtype)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def device():
    """Where this process trains: on its GPU if the processes talk over NCCL."""
    is_nccl = dist.is_initialized() and dist.get_backend() == "nccl"
    return "cuda" if is_nccl else "cpu"


def batches(step, dtype=torch.float64):
    """The micro-batches of a step, the same for everybody who asks."""
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(MICRO_BATCHES, 5, 8, generator=generator, dtype=torch.float64)
    target = torch.randn(MICRO_BATCHES, 5, 3, generator=generator, dtype=torch.float64)
    return list(zip(x.to(device(), dtype), target.to(device(), dtype), strict=True))


def net(**options):
    """The model at its start; a lora_E of 0 would have no scores for a while."""
    torch.manual_seed(0)
    model = Net(**options)
    for name, parameter in model.named_parameters():
        if "lora_E" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.to(device())


def allocator_of(model, **options):
    schedule = {"target_r": 3, "total_step": STEPS, "tinit": 4, "tfinal": 8, "deltaT": 3}
    return RankAllocator(model, orth_reg_weight=0.1, **{**schedule, **options})


def adamw(model):
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=2e-2, foreach=False)


def mesh_of(kind):
    world = dist.get_world_size()
    if kind == "hsdp":
        return init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh(device(), (world,))


def shard(model, kind="fsdp", placement="rows", policy="none"):
    """Hand-written FSDP2: each block and the rest."""
    options = {"mesh": mesh_of(kind)}
    if placement == "in":
        options["shard_placement_fn"] = shard_placement(model)
    if policy == "offload":
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    if policy == "mixed":
        options["mp_policy"] = MixedPrecisionPolicy(
            param_dtype=torch.float32, reduce_dtype=torch.float64
        )
    for block in model.blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def train(model, optimizer, allocator, steps, before_step=None, between=None):
    """Each process has its share of the micro-batches of a step, one after the other."""
    share, rank = 1, 0
    if isinstance(model, FSDPModule):
        share, rank = dist.get_world_size(), dist.get_rank()
    for step in steps:
        own = batches(step, model.head.lora_A.dtype)[rank::share]
        for i, (x, target) in enumerate(own):
            if share > 1:
                model.set_requires_gradient_sync(i == len(own) - 1)
                if between == "unsharded":
                    model.set_reshard_after_backward(i == len(own) - 1)
            ((model(x)[..., :3] - target).square().mean() / len(own)).backward()
        if before_step is not None:
            before_step(step)
        optimizer.step()
        optimizer.zero_grad()
        if between == "evaluation":
            look(model, allocator)


@torch.no_grad()
def look(model, allocator):
    """Leave whole parameters in the model, as FSDP2 does after a forward; and ask the allocator."""
    model(batches(1)[0][0])
    if isinstance(model, FSDPModule):
        assert not hasattr(model.head.lora_A, "full_tensor")
    state = allocator.state_dict()
    allocator.load_state_dict(state)
    if isinstance(model, FSDPModule):  # The allocator knows better than to gather its averages.
        assert all(hasattr(a, "full_tensor") for a in allocator.state_dict()["exp_avg_ipt"])
    assert allocator.summary()["step"] == state["global_step"]


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach().clone()


def outcome(model, allocator):
    """All trained parameters and the pattern; what each process holds, too, as a hash."""
    parameters = {
        n.replace("_checkpoint_wrapped_module.", ""): whole(p.detach()).cpu()
        for n, p in model.named_parameters()
        if p.requires_grad
    }
    mask, scores = allocator._state.mask, allocator._state.scores
    digest = hashlib.sha256()
    for tensor in [*parameters.values(), mask, scores]:
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return {
        "parameters": parameters,
        "pattern": allocator.rank_pattern,
        "scores": allocator.scores(),
        "summary": allocator.summary(),
        "orth_reg": float(allocator.orth_reg),
        "hash": digest.hexdigest(),
    }


def alone(steps=STEPS, **options):
    """The same training in one process, without torch.distributed."""
    model = net()
    allocator, optimizer = allocator_of(model, **options), adamw(model)
    allocator.attach(optimizer)
    train(model, optimizer, allocator, range(1, steps + 1))
    return outcome(model, allocator)


def made(attach="after", **options):
    """A sharded model, its allocator and its optimizer; attached before sharding, or after."""
    kinds = {k: options.pop(k) for k in ("kind", "placement", "policy") if k in options}
    model = net()
    for block in model.blocks:
        block.is_checkpointed = options.get("checkpointed", False)
    if attach == "made":
        shard(model, **kinds)
    allocator = allocator_of(model, importance=options.get("importance", "paper"))
    if attach in ("after", "made"):
        if attach == "after":
            shard(model, **kinds)
        optimizer = adamw(model)
        allocator.attach(optimizer)
    else:
        optimizer = adamw(model)
        names = {id(p): n for n, p in model.named_parameters()}
        allocator.attach(optimizer)
        shard(model, **kinds)
        (group,) = optimizer.param_groups  # What follows is what accelerate does.
        now = dict(model.named_parameters())
        group["params"] = [now[names[id(p)]] for p in group["params"]]
    if options.get("compiled", False):
        for block in model.blocks:
            block.compile(backend="aot_eager")
    return model, allocator, optimizer


def sharded(cases=({},)):
    """The same training, sharded in each of some ways."""
    results = []
    for case in cases:
        between = case.pop("between", None)
        model, allocator, optimizer = made(**case)
        train(model, optimizer, allocator, range(1, STEPS + 1), between=between)
        results.append(outcome(model, allocator))
    return results


def with_inf(at=(3, 4, 9)):
    """A training in which the last process alone has a gradient of inf in some steps.

    Also whether the averages changed in each step, and the number of skipped ones after each.
    """
    model, allocator, optimizer = made()
    changed, skipped = [], []

    def before_step(step):
        before_step.averages = [a.clone() for a in allocator._state.exp_avg_unc]
        if step in at and dist.get_rank() == dist.get_world_size() - 1:
            model.blocks[1].up.lora_B.grad.to_local()[0, 1] = torch.inf

    def after_step(*_):
        pairs = zip(before_step.averages, allocator._state.exp_avg_unc, strict=True)
        changed.append(not all(torch.equal(a, b) for a, b in pairs))
        skipped.append(allocator.summary()["skipped_steps"])
        with torch.no_grad():  # The optimizer has no such check.
            for parameter in model.parameters():
                parameter.to_local().nan_to_num_(nan=0.1)

    optimizer.register_step_post_hook(after_step)
    train(model, optimizer, allocator, range(1, 12), before_step=before_step)
    return {"changed": changed, "skipped": skipped, "hash": outcome(model, allocator)["hash"]}


def save(folder, steps):
    """Train, and save with torch.distributed.checkpoint after some steps."""
    model, allocator, optimizer = made()
    for before, at in zip([0, *steps], [*steps, STEPS], strict=True):
        train(model, optimizer, allocator, range(before + 1, at + 1))
        if at in steps:
            model_state, optimizer_state = get_state_dict(model, optimizer)
            state = {"model": model_state, "optimizer": optimizer_state, "allocator": allocator}
            dcp.save(state, checkpoint_id=f"{folder}/{at}")
    return outcome(model, allocator)


def resume(folder, steps, is_sharded=True):
    """Load each of what `save` has written into a new model, and train to the end."""
    results = []
    for at in steps:
        model = net()
        allocator = allocator_of(model)
        if is_sharded:
            shard(model)
        optimizer = adamw(model)
        model_state, optimizer_state = get_state_dict(model, optimizer)
        state = {"model": model_state, "optimizer": optimizer_state, "allocator": allocator}
        # A final pattern has no averages; a new allocator looks for them.
        planner = DefaultLoadPlanner(allow_partial_load=at >= allocator.schedule.final_step)
        dcp.load(state, checkpoint_id=f"{folder}/{at}", planner=planner)
        set_state_dict(
            model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state
        )
        allocator.attach(optimizer)
        train(model, optimizer, allocator, range(at + 1, STEPS + 1))
        results.append(outcome(model, allocator))
    return results


def placements_on(mesh_dims, factor):
    """Placements of lora_A, lora_E or lora_B, as tensor parallel and FSDP2 have them, and odder."""
    from torch.distributed.tensor.placement_types import _StridedShard

    one, r = Replicate(), Shard(0)
    if mesh_dims == 1:
        return {
            0: [(r,), (Shard(1),), (one,)],
            1: [(r,), (one,), (one,)],
            2: [(r,), (Shard(1),), (r,)],
        }[factor]
    return {
        # FSDP2 alone, and beside tensor parallel by columns and by rows; then what nobody has.
        0: [(r, one), (r, one), (r, Shard(1)), (Shard(1), one), (one, r), (r, r)],
        1: [(r, one), (r, one), (r, one), (one, one), (one, r), (one, r)],
        2: [
            (r, one),
            (_StridedShard(0, split_factor=2), r),
            (r, one),
            (one, r),
            (Shard(1), r),
            (r, Shard(1)),
        ],
    }[factor]


def placed(cases):
    """What `placed_in` says of each case."""
    return [placed_in(*case) for case in cases]


def placed_in(mesh_dims, r):
    """Steps by hand on given gradients, with an adapter for each way of placing its factors.

    The same by a model without DTensors: the differences, and both patterns.
    """
    world = dist.get_world_size()
    shape = (world,) if mesh_dims == 1 else (2, world // 2)
    mesh = init_device_mesh("cpu", shape)
    ways = range(len(placements_on(mesh_dims, 0)))
    torch.manual_seed(0)
    plain = nn.ModuleList(SVDLinear(9, 7 + 4 * way, r=r, dtype=torch.float64) for way in ways)
    spread = nn.ModuleList(SVDLinear(9, 7 + 4 * way, r=r, dtype=torch.float64) for way in ways)
    factors = ("lora_A", "lora_E", "lora_B")
    for way in ways:
        for k, name in enumerate(factors):
            whole_one = getattr(plain[way], name)
            nn.init.normal_(whole_one)
            placements = placements_on(mesh_dims, k)[way]
            dtensor = distribute(whole_one.detach().clone(), mesh, placements)
            setattr(spread[way], name, nn.Parameter(dtensor))
    schedule = {"target_r": 2, "total_step": 9, "tinit": 1, "tfinal": 3, "deltaT": 2}
    schedule["target_total_rank"] = r * len(ways) // 3
    allocators = [RankAllocator(model, **schedule) for model in (plain, spread)]
    values = []
    for step in range(1, 10):
        for way in ways:
            for name in factors:
                one, other = getattr(plain[way], name), getattr(spread[way], name)
                one.grad = torch.randn_like(one)
                other.grad = distribute(one.grad.clone(), mesh, other.placements)
                one.data.add_(one.grad, alpha=-0.1)
                with torch.no_grad():
                    other.to_local().add_(other.grad.to_local(), alpha=-0.1)
        values.append(
            [orth_reg_grad_(model, 0.3, squared=step % 2 == 0) for model in (plain, spread)]
        )
        for way in ways:
            for name in factors:
                one, other = getattr(plain[way], name), getattr(spread[way], name)
                values.append([one.grad, whole_of(other.grad)])
        for allocator in allocators:
            allocator.step(step)
        if step == 3:  # from whole averages, all of which come to lie elsewhere
            allocators[1].load_state_dict(allocators[0].state_dict())
            averages = (allocator.state_dict()["exp_avg_unc"] for allocator in allocators)
            values += [[one, whole_of(other)] for one, other in zip(*averages, strict=True)]
    for way in ways:
        for name in factors:
            values.append([getattr(plain[way], name), whole_of(getattr(spread[way], name))])
    states = [allocator.state_dict() for allocator in allocators]
    values.append([state["scores"] for state in states])
    restored = RankAllocator(plain, **schedule)
    restored.load_state_dict(states[1])
    return {
        "error": max(float((a - b).norm() / a.norm().clamp_min(1)) for a, b in values),
        "patterns": [a.rank_pattern for a in (*allocators, restored)],
    }


def distribute(tensor, mesh, placements):
    """`distribute_tensor`, also for FSDP2's placement beside tensor parallel's."""
    if hasattr(placements[0], "split_factor"):
        inner = distribute_tensor(tensor, mesh, [Replicate(), placements[1]]).to_local()
        parts = inner.chunk(mesh.size(0), dim=0)
        local = parts[mesh.get_local_rank(0)].contiguous()
        return DTensor.from_local(
            local, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
        )
    return distribute_tensor(tensor, mesh, placements)


def whole_of(tensor):
    """The whole of a DTensor, from the parts and where torch says that they lie."""
    if not hasattr(tensor.placements[0], "split_factor"):
        return tensor.full_tensor().detach()
    mesh = tensor.device_mesh
    inner = [None] * mesh.size(0)
    dist.all_gather_object(inner, tensor.to_local().detach(), group=mesh.get_group(0))
    outer = [None] * mesh.size(1)
    dist.all_gather_object(outer, torch.cat(inner), group=mesh.get_group(1))
    return torch.cat(outer)


def by_hand(is_sharded=True):
    """`orth_reg` in the loss and `step` by hand, as in PEFT's documented loop."""
    model = net()
    allocator = allocator_of(model)
    if is_sharded:
        shard(model)
    optimizer = adamw(model)
    share, rank = (dist.get_world_size(), dist.get_rank()) if is_sharded else (1, 0)
    for step in range(1, STEPS + 1):
        for x, target in batches(step)[rank::share]:
            loss = (model(x) - target).square().mean() / (MICRO_BATCHES // share)
            (loss + orth_reg(model, 0.1) / (MICRO_BATCHES // share)).backward()
        optimizer.step()
        allocator.step(step)
        optimizer.zero_grad()
    allocator.orth_reg = orth_reg(model, 0.1).detach()
    return outcome(model, allocator)


def refused():
    """What is refused, by name: the error."""
    model, allocator, optimizer = made()
    train(model, optimizer, allocator, range(1, STEPS + 1))
    errors = {"shrink": error_of(allocator.shrink, optimizer)}
    shrunk = net()
    other = allocator_of(shrunk)
    other.load_state_dict({**allocator.state_dict(), "shrunk": True})
    before = other.state_dict()
    fresh = made()
    errors["load of a shrunk one"] = error_of(fresh[1].load_state_dict, before)
    mesh = init_device_mesh("cpu", (2,))
    for name, change in {
        "partial": lambda p: DTensor.from_local(p, mesh, [Partial()], run_check=False),
        "3-D": lambda p: distribute_tensor(p.unsqueeze(0), mesh, [Replicate()]),
    }.items():
        wrong = net()
        wrong.head.lora_B = nn.Parameter(change(wrong.head.lora_B.detach()))
        errors[name] = error_of(allocator_of, wrong)
    return errors


def refused_meshes():
    """Adapters on two meshes that divide four processes in different ways."""
    model = net()
    fully_shard(model.blocks[0], mesh=init_device_mesh("cpu", (4,)))
    fully_shard(model.blocks[1], mesh=mesh_of("hsdp"))
    return error_of(allocator_of, model)


def error_of(function, *arguments):
    try:
        function(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def partly_trained(is_sharded=True, dtype=torch.float64):
    """A block that is skipped has no gradients, and one adapter is frozen."""
    model = net(dtype=dtype)
    model.blocks[1].is_skipped = True
    model.blocks[0].down.lora_E.requires_grad_(False)
    allocator = allocator_of(model, state_dtype=torch.bfloat16)
    if is_sharded:
        shard(model)
    optimizer = adamw(model)
    allocator.attach(optimizer)
    train(model, optimizer, allocator, range(1, STEPS + 1))
    return outcome(model, allocator)


def sent(placement):
    """What is sent in each optimizer step, which has no collective of FSDP2's own."""
    model = net()
    allocator = allocator_of(model, deltaT=4)
    shard(model, placement=placement)
    # Adam's numbers of steps are on the CPU here, and read.
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    allocator.attach(optimizer)
    steps = []
    step = optimizer.step

    def recorded():
        with CountSent() as recorder:
            step()
        steps.append((recorder.sent, recorder.waits))

    optimizer.step = recorded
    train(model, optimizer, allocator, range(1, STEPS + 1))
    return steps

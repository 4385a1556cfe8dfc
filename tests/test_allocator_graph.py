"""The part of a step that a CUDA graph captures, and host syncs."""

import pytest
import torch
from allocator_runs import alive, setup
from helpers import Mlp, batch, trainable
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from adalora_kernels import (
    RankAllocator,
    SVDLinear,
    ops,
    orth_reg_grad_,
)


def test_advance_and_update_are_a_step():
    runs = []
    for apart in (False, True):
        model, optimizer, allocator = setup(deltaT=3)
        for step in range(1, 30):
            optimizer.zero_grad()
            model.loss(*batch(step)).backward()
            optimizer.step()
            if apart:
                budget = allocator.advance(step)
                allocator.update()
            else:
                budget = allocator.step(step)
            assert budget == allocator.schedule.budget(step)
        runs.append((*model.parameters(), *allocator.state_dict()["exp_avg_unc"]))
        assert allocator.summary()["total_rank"] == allocator.schedule.budget(27)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


class Record(TorchDispatchMode):
    """Keeps what is dispatched, as a CUDA graph does: ops and memory, none of the Python."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, result in self.calls:
            # Into the memory of the first time: that is what the next op reads.
            again = func(*args, **kwargs)
            tree_map(lambda old, new: old if old is None else old.copy_(new), result, again)


def test_a_recorded_update_follows_the_budget():
    def run(replays):
        model, optimizer, allocator = setup(deltaT=4)
        record = Record()
        for step in range(1, 30):
            optimizer.zero_grad(set_to_none=False)
            model.loss(*batch(step)).backward()
            optimizer.step()
            allocator.advance(step)
            if record.calls and replays:
                record.replay()
            else:
                with record:
                    allocator.update()
            yield allocator.rank_pattern, allocator.scores(), [p.clone() for p in trainable(model)]

    budgets = set()
    for eager, replayed in zip(run(False), run(True), strict=True):
        assert eager[0] == replayed[0]
        assert all(torch.equal(eager[1][name], replayed[1][name]) for name in eager[1])
        assert all(torch.equal(a, b) for a, b in zip(eager[2], replayed[2], strict=True))
        budgets.add(sum(map(sum, eager[0].values())))
    assert len(budgets) > 3


def test_a_recorded_update_follows_who_takes_part():
    def run(replays):
        model, optimizer, allocator = setup()
        nn.init.normal_(model.layers[1].lora_E)
        record = Record()
        for step in range(1, 30):
            model.layers[1].lora_E.requires_grad_(step < 10 or step > 20)
            optimizer.zero_grad(set_to_none=False)
            model.loss(*batch(step)).backward()
            optimizer.step()
            frozen = model.layers[1].lora_E.clone()
            allocator.advance(step)
            if record.calls and replays:
                record.replay()
            else:
                with record:
                    allocator.update()
            if 10 <= step <= 20:
                assert torch.equal(frozen, model.layers[1].lora_E)
            yield allocator.summary()["total_rank"], allocator.summary()["budget"], alive(model)

    ranks = [list(run(replays)) for replays in (False, True)]
    for both in ranks:
        assert all(total == budget for total, budget, _ in both)
        # Frozen, it keeps what it has: the others share what is theirs.
        assert both[14][0] < both[14][2] and both[28][0] == both[28][2]
    assert [r[1] for r in ranks[0]] == [r[1] for r in ranks[1]]


def captured(step):
    """`step` as a CUDA graph, after three runs of it on a side stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU (CUDA graphs)")
def test_a_captured_training_step_is_the_eager_one():
    def run(captures):
        torch.manual_seed(0)
        model = Mlp(lora_alpha=16).cuda()
        allocator = RankAllocator(model, target_r=3, total_step=70, tinit=10, tfinal=10, deltaT=10)
        optimizer = torch.optim.AdamW(trainable(model), lr=5e-3, capturable=True)
        x, target = (t.cuda() for t in batch(0))

        def step():
            optimizer.zero_grad(set_to_none=False)
            model.loss(x, target).backward()
            orth_reg_grad_(allocator.adapters, 0.1)
            optimizer.step()
            allocator.update()

        # Both do what capturing does first, so that they start alike.
        for p in trainable(model):
            p.grad = torch.zeros_like(p)
        allocator.advance(1)
        replay = captured(step) if captures else step
        if not captures:
            for _ in range(3):
                step()
        for number in range(2, 52):
            for buffer, t in zip((x, target), batch(number), strict=True):
                buffer.copy_(t)
            allocator.advance(number)
            replay()
            yield allocator.rank_pattern, [p.detach().clone() for p in trainable(model)]

    budgets = set()
    for eager, replayed in zip(run(False), run(True), strict=True):
        assert eager[0] == replayed[0]
        torch.testing.assert_close(eager[1], replayed[1], rtol=1e-6, atol=1e-7)
        budgets.add(sum(map(sum, eager[0].values())))
    assert len(budgets) > 3, "three changes of the budget"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("overflow", [False, True], ids=["finite", "overflow"])
def test_attached_under_a_scaler_does_not_sync(overflow):
    """A fused optimizer has GradScaler's scale and its verdict on the device; so have we."""
    model = nn.ModuleList(SVDLinear(40, 24, r=4) for _ in range(72)).cuda()
    allocator = RankAllocator(model, target_r=2, total_step=20, tfinal=5, orth_reg_weight=0.1)
    optimizer = torch.optim.AdamW(trainable(model), fused=True)
    allocator.attach(optimizer)
    for step in range(1, 4):
        for p in trainable(model):
            p.grad = torch.randn_like(p)
        optimizer.grad_scale = torch.full((), 1024.0, device="cuda")
        optimizer.found_inf = torch.full((), float(overflow), device="cuda")
        torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert allocator.summary()["skipped_steps"] == (3 if overflow else 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_step_and_regulariser_neither_sync_nor_launch_much():
    model = nn.ModuleList(SVDLinear(40, 24, r=4) for _ in range(72)).cuda()
    allocator = RankAllocator(model, target_r=2, total_step=20, tfinal=5)
    for p in trainable(model):
        p.grad = torch.randn_like(p)
    before = allocator.state_dict()

    def both(step):
        orth_reg_grad_(allocator.adapters, 0.1)
        allocator.step(step)

    both(1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        both(2)
        both(15)
        both(16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    allocator.load_state_dict(before)
    with torch.profiler.profile() as profile:
        both(3)
        torch.cuda.synchronize()
    names = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(names) <= 150, names
    if "cuda" in ops.library.device_types:
        # The gradients, the averages, and the scores.
        assert len([name for name in names if "adalora" in name]) == 3, names

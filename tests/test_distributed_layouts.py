"""Engines and layouts that would silently train something else are errors that say what to do."""

import importlib.util

import pytest
import torch
from helpers import Mlp, batch, trainable
from ranks import on_ranks

from adalora_kernels import RankAllocator

FSDP2 = ("ValueError: ", "FSDP2 (fully_shard)", "sync_gradients=True")
FSDP1 = ("ValueError: ", "FSDP1 (FullyShardedDataParallel)", "FSDP2 (fully_shard)")
# By layout and when the model was sharded.
SAID = {
    "injected": (*FSDP2, "before fully_shard"),
    "fsdp2_ignoring before": (*FSDP2, "ignored_params"),
    "fsdp2_ignoring after": (*FSDP2, "ignored_params"),
    "fsdp2_of_another_layer before": FSDP2,
    "fsdp2_of_another_layer after": FSDP2,
    "fsdp1_ignoring before": (*FSDP1, "sync_gradients=True"),
    "fsdp1_ignoring after": (*FSDP1, "sync_gradients=True"),
    "fsdp1_of_another_layer before": FSDP1,
    "fsdp1_of_another_layer after": FSDP1,
    "fsdp1 before": ("ValueError: ", "FullyShardedDataParallel (FSDP1)", "use fully_shard (FSDP2"),
    "fsdp1 after": ("ValueError: ", "FullyShardedDataParallel (FSDP1)", "use fully_shard (FSDP2"),
    "beside trained shards": ("no error",),
    "tensor_parallel": ("trained alike",),
    "fsdp2_ignoring synced": ("trained alike",),
    "fsdp2_ignoring synced before": ("trained alike",),
    "fsdp1_ignoring synced": ("trained alike",),
}


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.full)])
def test_adapters_whose_gradients_nobody_reduces_are_refused(world):
    for said in on_ranks(world, "layouts_runs:layouts"):
        assert said.keys() == SAID.keys()
        for layout, parts in SAID.items():
            assert all(part in said[layout] for part in parts), (layout, said[layout])


@pytest.mark.full
@pytest.mark.parametrize("world", [2, 4])
def test_stages_of_a_pipeline_are_told_from_replicas(world):
    for rank, said in enumerate(on_ranks(world, "layouts_runs:all_stages")):
        for errors in (said["alike"], said["one alone"], said["one more"]):
            assert set(errors) <= {"no error"}
        assert len(said["one more"]) == (4 if rank == 1 else 2)
        assert len(said["one alone"]) == (0 if rank == 0 else 2)
        assert len(said["pipeline"]) == 2  # It is said again to who goes on.
        for error in said["pipeline"]:
            assert error.startswith("ValueError: the process of rank ")
            assert "stages of a pipeline" in error and "process_group" in error
            assert f"layers_{rank}.lora_E" in error


def attached(**options):
    model = Mlp(dtype=torch.float64)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    allocator = RankAllocator(model, target_r=3, total_step=12, tinit=2, tfinal=3)
    allocator.attach(optimizer, **options)
    return model, optimizer, allocator


def step(model, optimizer, number=1):
    model.loss(*batch(number, torch.float64)).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_adapters_without_gradients_are_an_error_at_the_third_step():
    _, optimizer, allocator = attached()
    optimizer.step()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"has stepped 3 times, and no adapter has had a grad"):
        optimizer.step()
    assert allocator.global_step == 0


def test_steps_without_gradients_are_no_error_after_one_with_them():
    model, optimizer, allocator = attached()
    optimizer.step()
    step(model, optimizer)
    for _ in range(4):
        optimizer.step()
    assert allocator.global_step == 1


def test_frozen_adapters_have_no_gradients():
    model, optimizer, allocator = attached()
    for p in trainable(model):
        p.requires_grad_(False)
    for _ in range(4):
        optimizer.step()
    for p in optimizer.param_groups[0]["params"]:
        p.requires_grad_(True)
    step(model, optimizer)
    assert allocator.global_step == 1


def test_a_new_optimizer_has_steps_of_its_own():
    model, optimizer, allocator = attached()
    step(model, optimizer)
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    allocator.attach(optimizer)
    for _ in range(2):
        optimizer.step()
    with pytest.raises(RuntimeError, match="has stepped 3 times"):
        optimizer.step()


def test_an_optimizer_that_has_lost_the_adapters_is_an_error():
    model, optimizer, _ = attached()
    flat = torch.cat([p.detach().flatten() for p in trainable(model)])
    optimizer.param_groups[0]["params"] = [torch.nn.Parameter(flat)]
    with pytest.raises(ValueError, match=r"no longer has all trainable adapter parameters.*layers"):
        optimizer.step()


@pytest.mark.parametrize("mark", ["ds_id", "_hp_mapping", "param_idx_in_group"])
def test_what_deepspeed_leaves_on_parameters_is_seen(mark):
    """Before attach, and after it; the real DeepSpeed is in test_distributed_deepspeed.py."""
    model, optimizer, allocator = attached()
    setattr(model.layers[0].lora_A, mark, None)
    with pytest.raises(ValueError, match=r"DeepSpeed.*allocator.attach\(engine\) after deepspeed"):
        optimizer.step()
    allocator.detach()
    with pytest.raises(ValueError, match=r"DeepSpeed.*allocator.attach\(engine\) after deepspeed"):
        allocator.attach(optimizer)
    assert not allocator.attached


@pytest.mark.full
@pytest.mark.parametrize("own_optimizer", [False, True], ids=["given", "in_config"])
def test_deepspeed_that_comes_after_attach_is_an_error_at_the_first_step(own_optimizer):
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed: pip install deepspeed")
    arguments = {"own_optimizer": own_optimizer}
    for said in on_ranks(2, "layouts_runs:deepspeed_afterwards", arguments):
        for error in said.values():
            assert error.startswith("ValueError: ") and "DeepSpeed" in error
            assert "allocator.attach(engine) after deepspeed.initialize" in error

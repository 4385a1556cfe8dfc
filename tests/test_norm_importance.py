"""`importance="norm"`: triplets are compared by the norm of what they add to the weight."""

import copy

import pytest
import shards_runs
import test_distributed_shards
import torch
from allocator_runs import STEPS, alive, setup, train
from helpers import CountOps
from peft import AdaLoraConfig, get_peft_model
from torch import nn

from adalora_kernels import RankAllocator, importance, reference
from adalora_kernels.export import load_state, save_state
from adalora_kernels.peft import apply


def norms(model):
    """The Frobenius norm of each triplet's lora_B · lora_E · lora_A, written out."""
    return torch.stack(
        [
            torch.linalg.matrix_norm(torch.outer(layer.lora_B[:, i], layer.lora_A[i]) * E)
            for layer in model.layers
            for i, E in enumerate(layer.lora_E.squeeze(1))
        ]
    ).detach()


def test_the_reference_is_the_norm_of_what_a_triplet_adds():
    model, *_ = setup()
    for layer in model.layers:
        nn.init.normal_(layer.lora_E)
    parameters = [p.detach() for layer in model.layers for p in layer_parameters(layer)]
    torch.testing.assert_close(reference.triplet_norms(parameters), norms(model))


def layer_parameters(layer):
    return layer.lora_A, layer.lora_E, layer.lora_B


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_squares_are_those_of_the_reference(dtype):
    torch.manual_seed(0)
    sizes = [(3, 8, 5), (3, 8, 5), (1, 7, 3), (0, 4, 4), (3, 8, 5)]
    parameters = [
        torch.randn(shape).to(dtype) for r, i, o in sizes for shape in ((r, i), (r, 1), (o, r))
    ]
    squares = importance.triplet_squares(parameters)
    expected = reference.triplet_norms([p.double() for p in parameters])
    A, E, B = (torch.cat(squares[k::3]) for k in range(3))
    assert A.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close((A * E * B).sqrt().double(), expected, rtol=2e-6, atol=0)


def test_the_largest_stay():
    model, optimizer, allocator = setup(importance="norm", deltaT=3)
    for step in range(1, allocator.schedule.final_step + 1):
        optimizer.zero_grad()
        model.loss(torch.randn(4, 16), torch.randn(4, 8)).backward()
        optimizer.step()
        before = norms(model)
        allocator.step(step)
        if allocator.schedule.masks_at(step):
            kept = torch.cat([torch.tensor(p) for p in allocator.rank_pattern.values()])
            assert int(kept.sum()) == allocator.schedule.budget(step)
            if not kept.all():
                assert before[kept].min() >= before[~kept].max()
    assert allocator.frozen and int(kept.sum()) == 9


def test_it_has_no_averages_and_a_step_that_does_not_prune_no_work():
    _, _, paper = setup()
    model, optimizer, allocator = setup(importance="norm", deltaT=7)
    assert paper._state.exp_avg_ipt and not allocator._state.exp_avg_ipt
    assert allocator.state_dict()["exp_avg_unc"] == []
    train(model, optimizer, allocator, [1])
    model.loss(torch.randn(4, 16), torch.randn(4, 8)).backward()
    with CountOps() as ops:
        allocator.step(2)
    assert not any("linalg" in name or "importance" in name for name in ops.counts), ops.counts


def test_a_captured_update_scores_by_it():
    model, optimizer, allocator = setup(importance="norm", deltaT=1)
    other = copy.deepcopy(model)
    twin = RankAllocator(
        other, importance="norm", target_r=3, total_step=STEPS, tinit=5, tfinal=10, deltaT=1
    )
    for step in range(1, 20):
        optimizer.zero_grad()
        model.loss(torch.randn(4, 16), torch.randn(4, 8)).backward()
        optimizer.step()
        for theirs, own in zip(other.parameters(), model.parameters(), strict=True):
            theirs.data.copy_(own.data)
            theirs.grad = None if own.grad is None else own.grad.clone()
        allocator.step(step)
        twin.advance(step)
        twin.update()
        assert twin.rank_pattern == allocator.rank_pattern
    assert alive(model) < 18


def test_a_run_goes_on_from_its_state(tmp_path):
    model, optimizer, allocator = setup(importance="norm")
    train(model, optimizer, allocator, range(1, 12))
    save_state(allocator, tmp_path / "state.safetensors")
    saved = load_state(tmp_path / "state.safetensors")
    again = copy.deepcopy(model)
    resumed = RankAllocator(
        again, importance="norm", target_r=3, total_step=STEPS, tinit=5, tfinal=10
    )
    resumed.load_state_dict(saved)
    assert resumed.rank_pattern == allocator.rank_pattern
    torch.testing.assert_close(resumed.state_dict()["scores"], allocator.state_dict()["scores"])
    _, _, paper = setup()
    before = copy.deepcopy(paper.state_dict())
    with pytest.raises(ValueError, match="importance 'norm', this one has 'paper'"):
        paper.load_state_dict(saved)
    assert paper.state_dict().keys() == before.keys() and paper.global_step == 0
    with pytest.raises(ValueError, match="importance 'paper', this one has 'norm'"):
        resumed.load_state_dict(before)


def test_it_is_one_of_two_and_chosen_before_a_run():
    for wrong in ("abs", None, 1):
        with pytest.raises(
            ValueError, match=f"importance must be 'paper' or 'norm', got {wrong!r}"
        ):
            setup(importance=wrong)
    model, optimizer, allocator = setup()
    allocator.importance = "norm"
    allocator.importance = "paper"
    train(model, optimizer, allocator, [1])
    with pytest.raises(RuntimeError, match=r"comes too late: at step 1 .* by 'paper'"):
        allocator.importance = "norm"
    assert allocator.importance == "paper"
    allocator.restart()
    allocator.importance = "norm"


def test_peft_models_have_it_by_apply():
    net = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
    config = AdaLoraConfig(init_r=6, target_r=3, tfinal=3, total_step=9, target_modules=["0", "2"])
    model = get_peft_model(net, config)
    with pytest.raises(ValueError, match="importance must be"):
        apply(model, importance="size")
    report = apply(model, start="lora", importance="norm")
    assert apply(model).allocator is report.allocator and report.allocator.importance == "norm"
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    report.attach(optimizer)
    for _ in range(9):
        model(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert report.allocator.frozen and report.allocator.summary()["total_rank"] == 6
    with pytest.raises(RuntimeError, match="too late"):
        apply(model, importance="paper")


@pytest.mark.full
def test_sharded_adapters_are_those_of_one_process():
    expected = shards_runs.alone(importance="norm")
    cases = [{"importance": "norm"}, {"importance": "norm", "placement": "in"}]
    test_distributed_shards.assert_all_same(4, cases, expected)

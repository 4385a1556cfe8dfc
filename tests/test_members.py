"""Which adapters and triplets take part: frozen and unused ones keep what they have."""

import copy
from dataclasses import replace

import pytest
import torch
from allocator_runs import alive, setup, train
from helpers import CountOps, Mlp, batch, trainable
from loralib_twin import TwinLinear
from torch import nn

from adalora_kernels import RankAllocator, SVDLinear, orth_reg_grad_


class Experts(Mlp):
    """Two more layers, of which a step uses those that it is told to."""

    def __init__(self):
        super().__init__(lora_alpha=16)
        self.experts = nn.ModuleList(SVDLinear(16, 16, r=6, lora_alpha=16) for _ in range(2))
        for layer in (*self.layers, *self.experts):
            nn.init.normal_(layer.lora_E)
        self.used = (0,)

    def forward(self, x):
        return super().forward(x + sum(self.experts[i](x) for i in self.used))


def experts(**options):
    torch.manual_seed(0)
    model = Experts()
    arguments = {"target_r": 3, "total_step": 20, "tinit": 2, "tfinal": 5, **options}
    return model, torch.optim.AdamW(trainable(model), lr=1e-2), RankAllocator(model, **arguments)


def values(module):
    return {name: p.detach().clone() for name, p in module.named_parameters() if "lora" in name}


def assert_unchanged(module, before):
    for name, value in values(module).items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("how", ["by_hand", "attached"])
def test_a_frozen_adapter_keeps_its_values_and_has_no_budget(how):
    model, _, allocator = setup(target_r=3)
    for layer in model.layers:
        nn.init.normal_(layer.lora_E)
    model.layers[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    if how == "attached":
        allocator.attach(optimizer)
    before = values(model.layers[0])
    for step in range(1, 41):
        model.loss(*batch(step)).backward()
        optimizer.step()
        if how == "by_hand":
            assert allocator.step(step) == allocator.summary()["budget"]
        optimizer.zero_grad()
        if allocator.schedule.masks_at(step):
            part = replace(allocator.schedule, init_budget=12, target_budget=6)
            assert sum(int((m.lora_E != 0).sum()) for m in model.layers[1:]) == part.budget(step)
    assert_unchanged(model.layers[0], before)
    summary = allocator.summary()
    assert summary["untrained"] == ["layers.0.lora_E"]
    assert summary["budget"] == summary["total_rank"] == summary["target_budget"] == 6
    assert summary["init_budget"] == 12 and summary["matrices"] == 2
    assert allocator.rank_pattern["layers.0.lora_E"] == [True] * 6
    assert allocator.highest_pruned_score() > 0
    allocator.shrink(None if how == "attached" else optimizer)
    assert_unchanged(model.layers[0], before)


def test_an_adapter_without_gradient_keeps_its_values_until_it_gets_one():
    model, optimizer, allocator = experts()
    assert allocator.summary()["untrained"] == [], "nobody has had a gradient"
    assert allocator.summary()["init_budget"] == 30
    before = values(model.experts[1])
    train(model, optimizer, allocator, range(1, 11), orth=0)
    assert_unchanged(model.experts[1], before)
    summary = allocator.summary()
    assert summary["untrained"] == ["experts.1.lora_E"]
    assert (summary["init_budget"], summary["target_budget"], summary["matrices"]) == (24, 12, 4)
    assert summary["total_rank"] == summary["budget"]
    model.used = (0, 1)
    train(model, optimizer, allocator, range(11, 21), orth=0)
    summary = allocator.summary()
    assert (summary["untrained"], summary["total_rank"], summary["target_budget"]) == ([], 15, 15)
    assert sum(allocator.ranks().values()) == 15


def test_an_expert_that_is_not_used_for_a_while_still_takes_part():
    model, optimizer, allocator = experts()
    model.used = (0, 1)
    train(model, optimizer, allocator, [1], orth=0)
    model.used = (0,)
    averages = allocator.state_dict()["exp_avg_ipt"]
    train(model, optimizer, allocator, range(2, 5), orth=0)
    assert allocator.summary()["untrained"] == []
    expert = slice(12, 15)
    assert all(map(torch.equal, averages[expert], allocator.state_dict()["exp_avg_ipt"][expert]))
    assert not torch.equal(averages[0], allocator.state_dict()["exp_avg_ipt"][0])
    train(model, optimizer, allocator, range(5, 21), orth=0)
    assert sum(allocator.ranks().values()) == 15


def test_an_expert_that_is_used_only_when_the_pattern_is_final_stays_whole():
    model, optimizer, allocator = experts()
    train(model, optimizer, allocator, range(1, 17), orth=0)
    assert allocator.frozen and allocator.summary()["total_rank"] == 12
    model.used = (0, 1)
    train(model, optimizer, allocator, range(17, 21), orth=0)
    assert allocator.ranks()["experts.1.lora_E"] == 6
    summary = allocator.summary()
    assert summary["total_rank"] == summary["budget"] == 18 and summary["untrained"] == []


def test_freezing_and_thawing_in_the_middle():
    model, optimizer, allocator = setup(target_r=3)
    train(model, optimizer, allocator, range(1, 8), orth=0)
    first = model.layers[0]
    first.requires_grad_(False)
    assert first.lora_E.grad is not None, "which must not teach anything"
    averages, before = allocator.state_dict()["exp_avg_ipt"], values(first)
    for step in range(8, 20):
        for p in trainable(model):
            p.grad = None
        model.loss(*batch(step)).backward()
        optimizer.step()
        with torch.no_grad():
            for name, p in first.named_parameters():
                if name in before:
                    p.copy_(before[name])  # AdamW has a stale gradient of it, too.
        allocator.step(step)
        assert_unchanged(first, before)
        summary = allocator.summary()
        assert summary["untrained"] == ["layers.0.lora_E"]
        assert summary["total_rank"] == summary["budget"], "its scores compete with nobody's"
    assert all(map(torch.equal, averages[:3], allocator.state_dict()["exp_avg_ipt"][:3]))
    for factor in (first.lora_A, first.lora_E, first.lora_B):
        factor.requires_grad_(True)
    train(model, optimizer, allocator, range(20, 41), orth=0)
    assert alive(model) == sum(allocator.ranks().values()) == 9
    assert allocator.summary()["untrained"] == []


def test_when_all_adapters_are_frozen_there_is_nothing_to_do():
    model, optimizer, allocator = setup(target_r=3)
    train(model, optimizer, allocator, range(1, 8), orth=0)
    before = values(model)
    for p in (parameters := trainable(model)):
        p.requires_grad_(False)
    assert allocator.step(8) == 0
    assert_unchanged(model, before)
    assert allocator.summary()["total_rank"] == allocator.summary()["matrices"] == 0
    for p in parameters:
        p.requires_grad_(True)
    train(model, optimizer, allocator, range(9, 41), orth=0)
    assert alive(model) == 9


def test_gradients_that_overflow_in_a_frozen_adapter_do_not_count():
    model, optimizer, allocator = setup()
    train(model, optimizer, allocator, range(1, 3))
    model.layers[0].lora_A.grad.fill_(torch.inf)
    model.layers[0].requires_grad_(False)
    before = allocator.scores()
    allocator.step(3)
    assert allocator.summary()["skipped_steps"] == 0
    assert not torch.equal(before["layers.1.lora_E"], allocator.scores()["layers.1.lora_E"])


def test_who_takes_part_costs_nothing_in_a_step():
    model, optimizer, allocator = experts(tfinal=5)
    model.experts[0].lora_E.requires_grad_(False)
    train(model, optimizer, allocator, range(1, 3), orth=0)
    for step in (3, 16):
        optimizer.zero_grad()
        model.loss(*batch(step)).backward()
        optimizer.step()
        with CountOps() as count:
            allocator.step(step)
        assert count.counts["aten::_local_scalar_dense"] == count.counts["aten::nonzero"] == 0
        assert count.counts.total() <= 18


@pytest.mark.parametrize("at", [3, 10, 17], ids=["initial", "budgeting", "final"])
def test_a_resumed_run_knows_who_takes_part(at):
    model, optimizer, allocator = experts()
    train(model, optimizer, allocator, range(1, at + 1), orth=0)
    states = copy.deepcopy([part.state_dict() for part in (model, optimizer, allocator)])
    train(model, optimizer, allocator, range(at + 1, 21), orth=0)
    second = experts()
    for part, state in zip(second, states, strict=True):
        part.load_state_dict(state)
    optimizer.zero_grad()
    assert second[2].summary()["untrained"] == ["experts.1.lora_E"]
    train(*second, range(at + 1, 21), orth=0)
    for a, b in zip(model.parameters(), second[0].parameters(), strict=True):
        assert torch.equal(a, b)
    assert second[2].rank_pattern == allocator.rank_pattern
    # In a state of before there was such a thing, all take part and all triplets are there.
    third = experts()[2]
    for key in ("had_gradient", "there", "restarted"):
        del states[2][key]
    third.load_state_dict(states[2])
    assert third.summary()["untrained"] == [] and third.schedule.init_budget == 30


@pytest.mark.parametrize(
    "change",
    [{"had_gradient": [True]}, {"there": torch.ones(3, dtype=torch.bool)}],
    ids=["had_gradient", "there"],
)
def test_a_state_of_other_members_is_refused(change):
    _, _, allocator = experts()
    with pytest.raises(ValueError, match=next(iter(change))):
        allocator.load_state_dict(allocator.state_dict() | change)


# What is there


def leave(layer, kept):
    """What a file of a pruned adapter has in the rows that were pruned: zeros everywhere."""
    with torch.no_grad():
        nn.init.normal_(layer.lora_E)
        gone = ~torch.tensor(kept)
        layer.lora_A[gone], layer.lora_E[gone], layer.lora_B[:, gone] = 0, 0, 0


def pruned_model():
    """12 of 18 triplets are there."""
    torch.manual_seed(0)
    model = Mlp(lora_alpha=16)
    for layer in model.layers:
        leave(layer, [True, False, True, False, True, True])
    return model


def test_triplets_that_are_all_zero_are_not_there():
    model = pruned_model()
    with torch.no_grad():
        # Each of these is enough to be there.
        model.layers[0].lora_A[1, 3], model.layers[1].lora_E[1], model.layers[2].lora_B[3, 1] = (
            1.0,
            1.0,
            1.0,
        )
    allocator = RankAllocator(model, target_r=3, total_step=40)
    assert allocator.schedule.init_budget == 15
    assert allocator.ranks() == dict.fromkeys((f"layers.{i}.lora_E" for i in range(3)), 5)
    assert allocator.summary()["total_rank"] == allocator.summary()["budget"] == 15


@pytest.mark.parametrize("attached", [False, True], ids=["by_hand", "attached"])
def test_a_training_goes_on_with_the_triplets_that_are_there(attached):
    model = pruned_model()
    reference = [(layer.lora_A[1].clone(), layer.lora_B[:, 3].clone()) for layer in model.layers]
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.1)
    options = {"target_r": 3, "total_step": 40, "tinit": 5, "tfinal": 10}
    allocator = RankAllocator(model, orth_reg_weight=0.1, **options)
    if attached:
        allocator.attach(optimizer)
    for step in range(1, 41):
        model.loss(*batch(step)).backward()
        if not attached:
            orth_reg_grad_(model, 0.1)
        optimizer.step()
        if not attached:
            allocator.step(step)
        optimizer.zero_grad()
        summary = allocator.summary()
        assert alive(model) <= summary["total_rank"] <= 12
        if allocator.schedule.masks_at(step):
            assert alive(model) == summary["total_rank"] == summary["budget"]
    assert alive(model) == 9
    for layer, (row, column) in zip(model.layers, reference, strict=True):
        assert torch.equal(layer.lora_A[1], row) and torch.equal(layer.lora_B[:, 3], column)


def test_weights_that_are_loaded_later_are_counted_when_somebody_says_so():
    model, source = Mlp(), pruned_model()
    allocator = RankAllocator(model, target_r=3, total_step=40, tinit=5)
    model.load_state_dict(source.state_dict())
    assert allocator.summary()["total_rank"] == 18
    allocator.count_triplets()
    assert allocator.summary()["total_rank"] == allocator.schedule.init_budget == 12
    model.load_state_dict(Mlp().state_dict())
    allocator.attach(torch.optim.SGD(trainable(model), lr=0.1))
    assert allocator.schedule.init_budget == 18
    model.loss(*batch(1)).backward()
    allocator.detach()
    allocator.step(1)
    model.load_state_dict(source.state_dict())
    allocator.count_triplets()
    assert allocator.summary()["total_rank"] == 18, "not in the middle of a run"


def test_values_that_nobody_has_counted_are_not_lost():
    model = pruned_model()
    allocator = RankAllocator(model, target_r=3, total_step=10, tfinal=3)
    with torch.no_grad():
        for layer in model.layers:
            layer.lora_E[1] = 1.0
    for p in trainable(model):
        p.grad = torch.ones_like(p)
    for step in range(1, 11):
        allocator.step(step)
    assert all(layer.lora_E[1] == 1.0 for layer in model.layers)
    allocator.shrink()
    assert all((layer.lora_E == 1.0).any() for layer in model.layers)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_model_that_waits_for_its_values_has_all_triplets(device):
    model = Mlp()
    with torch.no_grad():
        for p in trainable(model):
            p.zero_()
    allocator = RankAllocator(model.to(device), target_r=3, total_step=40)
    assert allocator.schedule.init_budget == 18


def test_a_layer_without_a_triplet_counts_as_a_matrix():
    """As PEFT counts it: what is to be left is target_r on average over all matrices."""
    model = nn.Sequential(SVDLinear(6, 6, r=4), TwinLinear(6, 6, r=4))
    leave(model[1], [False] * 4)
    for empty in (False, True):
        if empty:
            for factor, dim in (("lora_A", 0), ("lora_E", 0), ("lora_B", 1)):
                parameter = getattr(model[1], factor)
                parameter.grad, parameter.data = None, parameter.data.narrow(dim, 0, 0)
        allocator = RankAllocator(model, target_r=1, total_step=10)
        model[0](torch.randn(3, 6)).sum().backward()
        if not empty:
            model[1](torch.randn(3, 6)).sum().backward()
        allocator.step(1)
        summary = allocator.summary()
        assert (summary["init_budget"], summary["target_budget"]) == (4, 2)
        assert summary["untrained"] == [] and summary["matrices"] == 2

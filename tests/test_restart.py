"""A second run on a model that has been trained."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from allocator_runs import STEPS, alive, setup, train
from helpers import Mlp, batch, trainable
from torch import nn


def finished(**options):
    """Trained to the end: 9 of 18 triplets are alive."""
    model, optimizer, allocator = setup(**options)
    train(model, optimizer, allocator, range(1, STEPS + 1))
    assert allocator.frozen and alive(model) == 9
    return model, optimizer, allocator


def nonzero(model):
    return torch.cat([(layer.lora_E != 0).flatten() for layer in model.layers])


@pytest.mark.parametrize("new_optimizer", [False, True], ids=["same", "new"])
def test_a_new_run_begins_with_what_the_last_one_has_left(new_optimizer):
    model, optimizer, allocator = finished()
    kept = nonzero(model)
    allocator.restart()
    assert not allocator.frozen and allocator.global_step == 0
    assert not any(t.any() for t in allocator.state_dict()["exp_avg_ipt"])
    assert not any(score.any() for score in allocator.scores().values())
    allocator.schedule = replace(allocator.schedule, target_budget=5)
    if new_optimizer:
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        allocator.attach(optimizer)
    for step in range(1, STEPS + 1):
        if new_optimizer:
            model.loss(*batch(step)).backward()
            optimizer.step()
            optimizer.zero_grad()
        else:  # which still moves what has been pruned
            train(model, optimizer, allocator, [step])
        summary = allocator.summary()
        assert summary["init_budget"] == 9
        assert alive(model) <= summary["total_rank"] <= 9
        assert not (nonzero(model) & ~kept).any(), "what is gone stays at 0"
        if allocator.schedule.masks_at(step):
            assert alive(model) == summary["total_rank"] == summary["budget"]
    assert alive(model) == 5 and allocator.frozen


def test_a_target_that_has_been_reached_leaves_nothing_to_prune():
    model, optimizer, allocator = finished()
    allocator.restart()
    for step in range(1, STEPS + 1):
        train(model, optimizer, allocator, [step])
        assert allocator.summary()["budget"] == allocator.summary()["total_rank"] == 9
    assert alive(model) == 9


def test_adapters_that_have_been_initialised_again_have_all_triplets():
    model, _, allocator = finished()
    initial = Mlp().state_dict()
    model.load_state_dict(initial)
    allocator.restart()
    assert allocator.summary()["total_rank"] == allocator.schedule.init_budget == 18
    train(model, torch.optim.AdamW(trainable(model), lr=5e-3), allocator, range(1, STEPS + 1))
    assert alive(model) == 9


def test_an_adapter_that_was_not_used_in_the_last_run_is_whole_in_the_next():
    model, optimizer, allocator = setup(target_r=2)
    model.layers[1].requires_grad_(False)
    train(model, optimizer, allocator, range(1, STEPS + 1), orth=0)
    assert alive(model) == 4 and not model.layers[1].lora_E.any()
    for name, p in model.layers[1].named_parameters():
        p.requires_grad_(name.startswith("lora"))
    allocator.restart()
    assert allocator.summary()["total_rank"] == 4 + 6
    allocator.attach(optimizer)
    assert allocator.summary()["total_rank"] == 4 + 6
    for step in range(1, STEPS + 1):
        model.loss(*batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert alive(model) <= allocator.summary()["total_rank"] <= 10
    assert alive(model) == 6


def test_counting_after_the_first_step_of_the_optimizer_leaves_out_what_was_left_out():
    model, optimizer, allocator = finished()
    allocator.restart()
    for step in range(1, 8):
        optimizer.zero_grad()
        model.loss(*batch(step)).backward()
        optimizer.step()
        assert alive(model) == 18, "momentum and gradients move what is 0"
        allocator.count_triplets()
        allocator.step(step)
        assert allocator.schedule.init_budget == 9 >= alive(model)


def test_weights_that_are_loaded_after_a_restart_are_counted_in_attach():
    model, _, allocator = finished()
    allocator.restart()
    model.load_state_dict(Mlp().state_dict())
    model.zero_grad()
    allocator.attach(torch.optim.AdamW(trainable(model)))
    assert allocator.schedule.init_budget == 18


def test_a_restarted_run_is_resumed_bitwise():
    model, optimizer, allocator = finished()
    allocator.restart()
    train(model, optimizer, allocator, range(1, 4))
    second = setup(seed=99)
    for part, other in zip(second, (model, optimizer, allocator), strict=True):
        part.load_state_dict(copy.deepcopy(other.state_dict()))
    assert second[2].schedule.init_budget == 9
    for run in ((model, optimizer, allocator), second):
        train(*run, range(4, STEPS + 1))
    for a, b in zip(model.parameters(), second[0].parameters(), strict=True):
        assert torch.equal(a, b)
    assert alive(model) == 9


def test_a_final_allocator_whose_steps_begin_anew_restarts_by_itself():
    model, optimizer, allocator = finished()
    with pytest.warns(UserWarning, match=r"final.* step 1 comes again.*restart\(\)"):
        train(model, optimizer, allocator, [1])
    # The optimizer has just moved every lora_E, and what stands there counts.
    assert alive(model) == 18 == allocator.summary()["total_rank"] == allocator.summary()["budget"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, allocator, range(2, STEPS + 1))
    assert alive(model) == 9 and allocator.frozen
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, allocator, [35])  # final it stays, at any step that is
    with pytest.warns(UserWarning, match="step 7 comes again"):
        allocator.skip(7)
    assert not allocator.frozen and allocator.global_step == 7


def test_without_a_gradient_nothing_is_restarted():
    _, optimizer, allocator = finished()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="no adapter has a gradient"):
        allocator.step(1)
    assert allocator.frozen and allocator.global_step == STEPS


def test_what_was_cut_is_not_restarted():
    model, optimizer, allocator = finished()
    allocator.shrink(optimizer)
    with pytest.raises(RuntimeError, match=r"restart\(\) .*shrink\(\)"):
        allocator.restart()
    with pytest.raises(RuntimeError, match=r"restart\(\) .*shrink\(\)"):
        train(model, optimizer, allocator, [1])
    assert allocator.global_step == STEPS


@pytest.mark.parametrize("longer", [100, 41])
def test_a_budget_is_never_above_what_is_there(longer):
    model, optimizer, allocator = finished()
    allocator.set_total_step(longer)
    for step in range(STEPS + 1, STEPS + 4):
        optimizer.zero_grad()
        model.loss(*batch(step)).backward()
        optimizer.step()
        assert allocator.step(step) == 9
        summary = allocator.summary()
        assert summary["budget"] == summary["total_rank"] == alive(model) == 9
        assert summary["phase"] == "final"
    other = setup(seed=99)[2]
    other.set_total_step(longer)
    other.load_state_dict(allocator.state_dict())
    nn.init.zeros_(model.layers[0].lora_E)
    assert other.skip(STEPS + 4) == 9


def test_attaching_a_finished_allocator_says_that_it_is_final():
    model, _, allocator = finished()
    with pytest.warns(UserWarning, match=r"come to its end at step 40.*restart\(\)"):
        allocator.attach(torch.optim.AdamW(trainable(model)))
    allocator.detach()
    allocator.restart()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        allocator.attach(torch.optim.AdamW(trainable(model)))

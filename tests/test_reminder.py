"""Whoever trains the adapters is seen: the warning where an allocator is forgotten."""

import copy
import gc
import pickle
import warnings

import pytest
import torch
from allocator_runs import setup
from helpers import Mlp, batch, trainable
from sam import SAM
from torch import nn

import adalora_kernels.loralib as loralib
from adalora_kernels import RankAllocator

FORGOTTEN = "nobody has stepped the rank allocator"
ANOTHER = "only to another one"
GONE = "was attached to is gone"


@pytest.fixture
def said():
    """What has been warned of since the last look."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")

        def look():
            texts = [str(w.message) for w in caught if "AdaLoRA" in str(w.message)]
            caught.clear()
            return texts

        yield look
        assert look() == []


def make(seed=0):
    model, _, allocator = setup(seed, total_step=1000, tinit=2, tfinal=3)
    return model, torch.optim.AdamW(trainable(model), lr=1e-3), allocator


def steps(model, optimizer, count, after=lambda: None):
    for step in range(count):
        model.loss(*batch(step)).backward()
        optimizer.step()
        after()
        optimizer.zero_grad()


def counter(allocator):
    """The hand-written loop: the allocator's turn comes after the optimizer's."""
    return lambda: allocator.step(allocator.global_step + 1)


def test_a_forgotten_allocator_is_warned_of_once(said):
    model, optimizer, _allocator = make()
    steps(model, optimizer, 1)
    assert said() == []
    steps(model, optimizer, 1)
    (text,) = said()
    assert text.startswith("AdaLoRA is training as plain LoRA: ") and FORGOTTEN in text
    assert "attach(optimizer)" in text and "AdaLoraCallback" in text
    steps(model, optimizer, 5)
    assert said() == []


def test_what_runs_before_a_capture_is_no_lapse(said):
    """As before a CUDA graph is captured: one `advance`, and steps that end with `update`."""
    model, optimizer, allocator = make()
    allocator.advance(1)
    steps(model, optimizer, 4, allocator.update)
    assert said() == []
    steps(model, optimizer, 2)
    assert len(said()) == 1


def test_every_lapse_is_warned_of(said):
    model, optimizer, allocator = make()
    steps(model, optimizer, 3, counter(allocator))
    assert said() == []
    steps(model, optimizer, 3)
    assert len(said()) == 1
    steps(model, optimizer, 3, counter(allocator))
    assert said() == []
    steps(model, optimizer, 3)
    assert len(said()) == 1


@pytest.mark.parametrize("final", [False, True])
def test_whoever_steps_is_not_warned(said, final):
    model, optimizer, allocator = make()
    if final:
        allocator.set_total_step(12)
    allocator.attach(optimizer)
    steps(model, optimizer, 20)
    allocator.detach()
    steps(model, optimizer, 4, counter(allocator))
    # Accumulated gradients, skipped steps, and the two halves of one for a CUDA graph.
    for i in range(4):
        for _ in range(4):
            model.loss(*batch(i)).backward()
        optimizer.step()
        if i == 1:
            allocator.skip(allocator.global_step + 1)
        else:
            allocator.advance(allocator.global_step + 1)
            allocator.update()
        optimizer.zero_grad()


def test_under_a_grad_scaler_that_skips(said):
    for attached in (False, True):
        model, optimizer, allocator = make()
        if attached:
            allocator.attach(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for i in range(8):
            loss = model.loss(*batch(i))
            scaler.scale(loss * torch.inf if i in (2, 3, 4) else loss).backward()
            scaler.step(optimizer)
            scaler.update()
            if not attached:
                allocator.step(i + 1)
            optimizer.zero_grad()


def test_a_new_optimizer_for_each_phase(said):
    model, optimizer, allocator = make()
    allocator.attach(optimizer)
    steps(model, optimizer, 3)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3)
    assert not allocator.attached
    steps(model, optimizer, 3)
    (text,) = said()
    assert GONE in text and "attach(optimizer)" in text
    allocator.attach(optimizer)
    steps(model, optimizer, 3)
    assert said() == [] and allocator.global_step == 6


def test_an_optimizer_beside_the_one_that_is_attached(said):
    model, first, allocator = make()
    allocator.attach(first)
    second = torch.optim.SGD(trainable(model), lr=1e-3)
    steps(model, second, 3)
    (text,) = said()
    assert ANOTHER in text and "attach(optimizer) for each" in text
    allocator.attach(second)
    for _ in range(3):
        steps(model, first, 2)
        steps(model, second, 2)
    assert said() == [] and allocator.global_step == 12


def test_optimizers_that_live_for_one_step(said):
    model, _, _allocator = make()
    for _ in range(3):
        steps(model, torch.optim.AdamW(trainable(model), lr=1e-3), 1)
        gc.collect()
    assert len(said()) == 1


def test_two_optimizers_in_turn_that_nobody_is_attached_to(said):
    model, first, allocator = make()
    second = torch.optim.SGD(trainable(model), lr=1e-3)
    for _ in range(3):
        steps(model, first, 1, counter(allocator))
        steps(model, second, 1, counter(allocator))
    assert said() == []
    for _ in range(3):
        steps(model, first, 1)
        steps(model, second, 1)
    assert len(said()) == 1


def test_an_optimizer_of_something_else_may_step_as_it_likes(said):
    """The discriminator of a GAN, whose loss leaves gradients in the generator."""
    model, optimizer, allocator = make()
    critic = nn.Linear(8, 1)
    other = torch.optim.SGD(critic.parameters(), lr=0.1)
    for by_hand in (True, False):
        if not by_hand:
            allocator.attach(optimizer)
        for i in range(3):
            for _ in range(5):
                critic(model(batch(i)[0])).mean().backward()
                other.step()
                other.zero_grad()
            optimizer.zero_grad()
            steps(model, optimizer, 1, counter(allocator) if by_hand else lambda: None)


def test_an_optimizer_that_trains_no_lora_E_just_now(said):
    """It has the adapters, but their gradients are not made."""
    model, _, _allocator = make()
    head = nn.Linear(8, 1)
    optimizer = torch.optim.SGD([*trainable(model), *head.parameters()], lr=0.1)
    for i in range(4):
        with torch.no_grad():
            features = model(batch(i)[0])
        head(features).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert said() == []
    steps(model, optimizer, 2)
    assert len(said()) == 1


def test_parameters_that_come_later_are_seen(said):
    model, _, _allocator = make()
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    steps(model, optimizer, 3)
    optimizer.add_param_group({"params": trainable(model)})
    steps(model, optimizer, 3)
    assert len(said()) == 1


@pytest.mark.parametrize("attached", [False, True], ids=["by_hand", "attached"])
@pytest.mark.parametrize("form", ["halves", "closure"])
def test_sam(said, form, attached):
    model, _, allocator = make()
    optimizer = SAM(trainable(model), torch.optim.AdamW, lr=1e-3)
    if attached:
        allocator.attach(optimizer)
    for i in range(6):
        if form == "closure":
            model.loss(*batch(i)).backward()

            def closure(i=i):
                loss = model.loss(*batch(i))
                loss.backward()
                return loss

            optimizer.step(closure)
        else:
            model.loss(*batch(i)).backward()
            optimizer.first_step(zero_grad=True)
            model.loss(*batch(i)).backward()
            optimizer.second_step()
        if not attached:
            allocator.step(i + 1)
        optimizer.zero_grad()
    assert allocator.global_step == 6 and said() == []


def test_sam_without_anybody(said):
    model, _, _allocator = make()
    optimizer = SAM(trainable(model), torch.optim.AdamW, lr=1e-3)
    for i in range(4):
        model.loss(*batch(i)).backward()
        optimizer.first_step(zero_grad=True)
        model.loss(*batch(i)).backward()
        optimizer.second_step(zero_grad=True)
    assert len(said()) == 1


def test_two_models_do_not_disturb_each_other(said):
    (teacher, one, first), (student, two, second) = make(), make(seed=1)
    first.attach(one)
    for _ in range(3):
        steps(teacher, one, 1)
        steps(student, two, 1, counter(second))
    assert said() == []
    steps(student, two, 2)
    assert len(said()) == 1


def test_an_allocator_in_the_place_of_another_one(said):
    """An unused one of the same adapters, that a variable still holds, is no reason to warn."""
    model, optimizer, _unused = make()
    used = RankAllocator(model, target_r=3, total_step=100)
    steps(model, optimizer, 4, counter(used))
    used.attach(optimizer)
    steps(model, optimizer, 4)
    used.detach()
    assert said() == []
    steps(model, optimizer, 4)
    assert len(said()) == 1, "of both, once"


@pytest.mark.parametrize("copied", ["deepcopy", "pickle"])
def test_copies_are_expected_to_be_stepped_too(said, copied):
    model, optimizer, allocator = make()
    allocator.attach(optimizer)
    pair = (model, allocator)
    pair = copy.deepcopy(pair) if copied == "deepcopy" else pickle.loads(pickle.dumps(pair))
    model, allocator = pair
    assert not allocator.attached
    optimizer = torch.optim.AdamW(trainable(model))
    steps(model, optimizer, 3)
    assert [FORGOTTEN in text for text in said()] == [True]
    steps(model, optimizer, 3, counter(allocator))


def test_loralibs_allocator_is_one_too(said):
    model = Mlp()
    optimizer = torch.optim.AdamW(trainable(model))
    allocator = loralib.RankAllocator(model, 6, 3, 1, 1, 1, 0.85, 0.85, total_step=100)
    for step in range(1, 4):
        steps(model, optimizer, 1, lambda step=step: allocator.update_and_mask(model, step))
    assert said() == []
    steps(model, optimizer, 3)
    assert len(said()) == 1


def test_nothing_is_to_be_allocated_after_shrink(said):
    model, optimizer, allocator = make()
    allocator.set_total_step(12)
    allocator.attach(optimizer)
    steps(model, optimizer, 5)
    allocator.detach()
    steps(model, optimizer, 4, counter(allocator))
    allocator.shrink(optimizer)
    steps(model, optimizer, 5)


def test_adapters_that_have_been_deleted(said):
    model, _, _allocator = make()
    optimizer = torch.optim.AdamW(trainable(model))
    for layer in model.layers:
        del layer.lora_A, layer.lora_E, layer.lora_B
    other, other_optimizer, _other_allocator = make()
    steps(other, other_optimizer, 3)
    assert len(said()) == 1
    optimizer.step()


def test_what_is_gone_is_not_expected(said):
    model, optimizer, allocator = make()
    del allocator
    steps(model, optimizer, 4)


def test_a_step_costs_no_search():
    """Neither where all is well nor for other optimizers are parameters looked up again."""
    model, optimizer, allocator = make()
    critic = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    steps(model, optimizer, 1, counter(allocator))
    critic.step()

    class Counted(list):
        searches = 0

        def __iter__(self):
            Counted.searches += 1
            return super().__iter__()

    adapters = allocator.adapters
    for step in range(3):
        allocator.adapters = Counted(adapters)
        model.loss(*batch(step)).backward()
        optimizer.step()
        critic.step()
        critic.step()
        assert Counted.searches == 0
        allocator.step(step + 2)
        Counted.searches = 0

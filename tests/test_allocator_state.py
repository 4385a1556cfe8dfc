"""Saving the allocator, and going on from it."""

import copy
import io

import pytest
import torch
from allocator_runs import STEPS, setup, train


@pytest.mark.parametrize("at", [3, 17, 33], ids=["initial", "budgeting", "final"])
def test_resume_is_bitwise_the_uninterrupted_run(at):
    model, optimizer, allocator = setup(deltaT=2)
    expected = train(model, optimizer, allocator, range(1, STEPS + 1))

    first = setup(deltaT=2)
    losses = train(*first, range(1, at + 1))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first], file)
    # What happens to the first run after its checkpoint must not matter.
    train(*first, range(at + 1, at + 3))
    file.seek(0)
    second = setup(seed=99, deltaT=2)
    for part, state in zip(second, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    losses += train(*second, range(at + 1, STEPS + 1))
    assert losses == expected
    for a, b in zip(model.parameters(), second[0].parameters(), strict=True):
        assert torch.equal(a, b)
    assert second[2].rank_pattern == allocator.rank_pattern
    ours, theirs = second[2].state_dict(), allocator.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ("scores", "mask", "skipped"))


def test_a_saved_state_does_not_change_any_more():
    model, optimizer, allocator = setup()
    train(model, optimizer, allocator, range(1, 12))
    state = allocator.state_dict()
    other = setup(seed=99)
    other[2].load_state_dict(state)
    before = copy.deepcopy(state)
    train(model, optimizer, allocator, range(12, 15))
    train(*other, range(12, 15))
    for key in ("exp_avg_ipt", "exp_avg_unc", "scores", "mask", "skipped"):
        torch.testing.assert_close(state[key], before[key], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.pop("scores"), r"lacks \['scores'\]"),
        (lambda s: s.update(format=99), "format 99"),
        (lambda s: s.update(names=["a", "b", "c"]), "'a' where the model has 'layers.0.lora_E'"),
        (lambda s: s.update(names=s["names"][:2]), "2 of them where the model has 3"),
        (lambda s: s.update(ranks=[6, 6, 5]), r"ranks \[6, 6, 5\]"),
        (lambda s: s.update(scores=torch.zeros(5)), "scores"),
        (lambda s: s["exp_avg_ipt"].pop(), "exp_avg_ipt"),
    ],
)
def test_load_state_dict_refuses_and_changes_nothing(change, says):
    model, optimizer, allocator = setup()
    train(model, optimizer, allocator, range(1, 12))
    before, state = allocator.state_dict(), allocator.state_dict()
    change(state)
    with pytest.raises(ValueError, match=says):
        allocator.load_state_dict(state)
    with pytest.raises(TypeError, match="NoneType"):
        allocator.load_state_dict(None)
    after = allocator.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in ("scores", "mask", "skipped"))
    assert before["global_step"] == after["global_step"] == 11

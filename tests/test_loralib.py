"""The loralib API, step by step beside a twin of the authors' code."""

import itertools

import numpy as np
import pytest
import torch
from helpers import Mlp, batch
from loralib_twin import TwinAllocator, TwinLinear, twin_orth
from torch import nn

import adalora_kernels.loralib as loralib

STEPS = 30


def twin_model(dtype, **options):
    twin = Mlp(r=0)
    sizes = ((16, 24), (24, 20), (20, 8))
    twin.layers = nn.ModuleList(TwinLinear(i, o, r=6, **options) for i, o in sizes)
    return twin.to(dtype)


def models(dtype, **options):
    twin, ours = twin_model(dtype, **options), Mlp(dtype=dtype, **options)
    ours.load_state_dict(twin.state_dict())
    return twin, ours


def optimizer_of(model, kind):
    parameters = [p for p in model.parameters() if p.requires_grad]
    if kind == "sgd":
        return torch.optim.SGD(parameters, lr=0.2, momentum=0.9)
    return torch.optim.AdamW(parameters, lr=5e-3)


SCHEDULES = {"every-step": (1, 3, 5), "every-7th": (7, 5, 2), "no-warmup": (1, 0, 0)}
LAYERS = {
    "alpha": {"lora_alpha": 16},
    "no_alpha_no_bias": {"lora_alpha": 0, "bias": False},
    "fan_in_fan_out": {"fan_in_fan_out": True},
}
# Every value once; the other combinations take part in `make test-all`.
REPRESENTATIVE = {
    ("every-step", "alpha", torch.float32, "adamw"),
    ("every-7th", "no_alpha_no_bias", torch.float64, "sgd"),
    ("no-warmup", "fan_in_fan_out", torch.float64, "adamw"),
}


def combinations():
    for case in itertools.product(
        SCHEDULES, LAYERS, (torch.float32, torch.float64), ("adamw", "sgd")
    ):
        marks = () if case in REPRESENTATIVE else pytest.mark.full
        yield pytest.param(*case, marks=marks, id="-".join(map(str, case)))


@pytest.mark.parametrize(("schedule", "layer", "dtype", "kind"), list(combinations()))
def test_thirty_steps_follow_loralib(schedule, layer, dtype, kind):
    interval, tinit, tfinal = SCHEDULES[schedule]
    twin, ours = models(dtype, **LAYERS[layer])
    for model in (twin, ours):
        loralib.mark_only_lora_as_trainable(model)
    arguments = (3, tinit, tfinal, interval, 0.85, 0.85, STEPS)
    their_allocator = TwinAllocator(twin, *arguments)
    our_allocator = loralib.RankAllocator(ours, 6, *arguments)
    theirs, mine = optimizer_of(twin, kind), optimizer_of(ours, kind)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-9
    for step in range(1, STEPS + 1):
        x, target = batch(step, dtype)
        their_loss = twin.loss(x, target) + twin_orth(twin, 0.1)
        our_loss = ours.loss(x, target) + loralib.compute_orth_regu(ours, 0.1)
        torch.testing.assert_close(our_loss, their_loss, rtol=tolerance, atol=0)
        their_loss.backward()
        our_loss.backward()
        theirs.step()
        mine.step()
        expected = their_allocator.update_and_mask(step)
        budget, threshold = our_allocator.update_and_mask(ours, step)
        assert budget == expected[0]
        # The last budgeting step always prunes here; in loralib only where the interval divides it.
        if expected[1] is not None:
            assert threshold.item() == pytest.approx(expected[1], rel=1e-4, abs=0)
            for a, b in zip(twin.layers, ours.layers, strict=True):
                assert torch.equal(a.lora_E == 0, b.lora_E == 0), step
        theirs.zero_grad()
        mine.zero_grad()
    for (name, a), b in zip(twin.named_parameters(), ours.parameters(), strict=True):
        assert (a - b).norm() <= tolerance * a.norm(), name


def test_state_dict_goes_both_ways():
    torch.manual_seed(0)
    twin = TwinLinear(5, 4, r=3, lora_alpha=16)
    torch.manual_seed(0)
    ours = loralib.SVDLinear(5, 4, r=3, lora_alpha=16)
    assert list(ours.state_dict()) == list(twin.state_dict())
    for (name, a), b in zip(twin.state_dict().items(), ours.state_dict().values(), strict=True):
        assert torch.equal(a, b), f"{name}: equal seeds give equal parameters"
    torch.nn.init.normal_(ours.lora_E)
    twin.load_state_dict(ours.state_dict())
    x = torch.randn(7, 5)
    torch.testing.assert_close(ours(x), twin(x))
    # A checkpoint whose rank is not its ranknum: the function comes along.
    twin.ranknum.data.fill_(12.0)
    ours.load_state_dict(twin.state_dict())
    torch.testing.assert_close(ours(x), twin(x))


def test_lora_state_dict_and_trainable():
    model = Mlp()
    loralib.mark_only_lora_as_trainable(model)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"layers.{i}.lora_{f}" for i in range(3) for f in "AEB"
    }
    state = loralib.lora_state_dict(model)
    assert set(state) == {f"layers.{i}.lora_{f}" for i in range(3) for f in "AEB"}
    loralib.mark_only_lora_as_trainable(model, bias="lora_only")
    assert model.layers[0].bias.requires_grad and not model.layers[0].weight.requires_grad
    assert "layers.0.bias" in loralib.lora_state_dict(model, bias="lora_only")
    assert "layers.0.bias" in loralib.lora_state_dict(model, bias="all")
    loralib.mark_only_lora_as_trainable(model, bias="all")
    assert model.layers[0].bias.requires_grad
    for function in (loralib.mark_only_lora_as_trainable, loralib.lora_state_dict):
        with pytest.raises(ValueError, match="'some'"):
            function(model, bias="some")


class Writer:
    def __init__(self):
        self.scalars = {}

    def add_scalar(self, tag, value, step):
        self.scalars[tag, step] = value


def allocator(model, **options):
    arguments = {
        "lora_r": 6,
        "target_rank": 3,
        "init_warmup": 1,
        "final_warmup": 1,
        "mask_interval": 1,
        "beta1": 0.85,
        "beta2": 0.85,
        "total_step": 6,
        **options,
    }
    return loralib.RankAllocator(model, **arguments)


def test_tensorboard_logs():
    model, writer = Mlp(), Writer()
    ours = allocator(model, tb_writter=writer, tb_writter_loginterval=2)
    for step in range(1, 5):
        model.loss(*batch(step)).backward()
        ours.update_and_mask(model, step)
    assert {step for _, step in writer.scalars} == {2, 4}
    ranks = ours.get_rank_pattern()
    assert writer.scalars["Budget/total_rank", 4] == sum(ranks.values())
    assert writer.scalars["Ranknum/layers.0.lora_E", 4] == ranks["layers.0.lora_E"]
    sizes = (16 + 24, 24 + 20, 20 + 8)
    parameters = sum(r * s for r, s in zip(ranks.values(), sizes, strict=True))
    assert writer.scalars["Budget/sum_param", 4] == parameters
    orth = loralib.compute_orth_regu(model, 1.0).item()
    assert writer.scalars["train/orth_regu_loss", 4] == pytest.approx(orth)


def test_total_step_may_follow():
    model = Mlp()
    ours = allocator(model, total_step=None)
    model.loss(*batch(1)).backward()
    with pytest.raises(RuntimeError, match="set_total_step"):
        ours.update_and_mask(model, 1)
    with pytest.raises(ValueError, match="total_step=2"):
        ours.set_total_step(2)
    ours.set_total_step(6)
    assert ours.update_and_mask(model, 1) == (18, None)
    with pytest.raises(ValueError, match="model"):
        ours.update_and_mask(Mlp(), 2)


def test_target_total_rank():
    assert allocator(Mlp(), target_total_rank=7).allocator.schedule.target_budget == 7


def test_numbers_as_scripts_have_them():
    model = Mlp()
    numbers = {"lora_r": np.int64(6), "target_rank": 3.0, "total_step": torch.tensor(6)}
    ours = allocator(model, **numbers, beta1=np.float32(0.85), tb_writter_loginterval=2.0)
    assert ours.lora_init_rank == 6 and type(ours.total_step) is int
    for step in (np.int64(1), torch.tensor(2), 3.0):
        model.loss(*batch(1)).backward()
        ours.update_and_mask(model, step)
    ours.set_total_step(16 / 2)
    assert ours.total_step == 8 and type(ours.total_step) is int
    for wrong in ({"lora_r": "6"}, {"target_rank": True}):
        with pytest.raises(TypeError, match=next(iter(wrong))):
            allocator(Mlp(), **wrong)
    with pytest.raises(ValueError, match="tb_writter_loginterval"):
        allocator(Mlp(), tb_writter_loginterval=0)

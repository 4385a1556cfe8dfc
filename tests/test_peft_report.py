"""What the report of `apply` advises a new adapter: scaling, tinit and the regulariser."""

import math

import pytest
import torch
from test_peft import STEPS, adapter_parameters, make, train

import adalora_kernels
from adalora_kernels import launching
from adalora_kernels.adapters import find_adapters
from adalora_kernels.peft import apply
from adalora_kernels.peft.report import _notes_on_speed
from adalora_kernels.starts import slow_path


def notes_with(word, report):
    return [note for note in report.notes if word in note]


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ({"lora_alpha": 8, "init_r": 64, "target_r": 32}, r"0\.125, LoRA's 2 with the usual"),
        ({"lora_alpha": 64, "init_r": 64, "target_r": 4}, r"= 1, LoRA's 16 with the same"),
        ({"lora_alpha": 128, "init_r": 64, "target_r": 4}, r"= 2, LoRA's 32 with the same.* 16 ti"),
        ({"lora_alpha": 8, "init_r": 12, "target_r": 8}, None),
        ({"lora_alpha": 13, "init_r": 64, "target_r": 32}, None),
        ({"lora_alpha": 64, "init_r": 40, "target_r": 4}, None),
        ({"lora_alpha": 0, "init_r": 64, "target_r": 32}, None),
    ],
    ids=str,
)
@pytest.mark.parametrize("start", ["paper", "lora"])
def test_a_scaling_that_is_small(numbers, expected, start):
    notes = notes_with("scaling is", apply(make(**numbers), start=start))
    assert len(notes) == (expected is not None)
    if expected:
        with pytest.raises(AssertionError, match=expected):
            raise AssertionError(notes[0])


def test_the_regulariser_beside_the_start_of_lora():
    model = make(orth_reg_weight=0.1)
    assert not notes_with("start='lora' wants 0", apply(model))
    report = apply(model, start="lora")
    assert "orth_reg_weight is 0.1" in notes_with("start='lora' wants 0", report)[0]
    # It is so: lora_B has no gradient of it at 0.
    adapters = find_adapters(model, "default")
    adalora_kernels.orth_reg(adapters, 1.0).backward()
    assert not any(a.lora_B.grad.any() for a in adapters)
    report.allocator.config.orth_reg_weight = 0.0
    assert not notes_with("start='lora' wants 0", report)


def steps_for(rate):
    return math.ceil(slow_path(24) / rate)  # the widest layer of Net


def test_a_tinit_that_ends_too_early():
    model = make(tinit=10, total_step=STEPS)
    report = apply(model)
    (note,) = notes_with("tinit = 10 steps", report)
    assert f"at a usual learning rate of 0.001 it takes about {steps_for(1e-3)} until" in note
    assert note.endswith("apply(model, start='lora')")
    # As soon as the optimizer is known, so is its learning rate, before any warm-up.
    optimizer = torch.optim.AdamW(
        [{"params": list(adapter_parameters(model).values()), "lr": 5e-3}], lr=1.0
    )
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) / 10)
    report.attach(optimizer)
    (note,) = notes_with("tinit = 10 steps", report)
    assert f"at its learning rate of 0.005 it takes about {steps_for(5e-3)} until" in note
    # No longer than the adapter is new.
    train(model, optimizer, range(1, 3))
    assert report.notes == apply(model).notes == []


@pytest.mark.parametrize(
    ("options", "start", "optimizer"),
    [
        ({"tinit": 5}, "paper", lambda p: torch.optim.AdamW(p, lr=0.1)),
        ({"tinit": 0}, "lora", lambda p: torch.optim.AdamW(p, lr=1e-5)),
        ({"tinit": 0, "target_r": 6}, "paper", lambda p: torch.optim.AdamW(p, lr=1e-5)),
        ({"tinit": 0}, "paper", lambda p: torch.optim.SGD(p, lr=1e-5)),
        ({"tinit": 0}, "paper", lambda p: torch.optim.AdamW(p, lr=0.0)),
    ],
    ids=["long enough", "lora", "nothing is pruned", "no Adam", "no rate"],
)
def test_a_tinit_that_is_no_reason_for_a_note(options, start, optimizer):
    model = make(**options)
    report = apply(model, start=start)
    optimizer = optimizer(list(adapter_parameters(model).values()))
    report.attach(optimizer)
    assert steps_for(0.1) < 5 and not notes_with("tinit =", report)


def test_a_gpu_whose_kernels_no_library_launches(monkeypatch):
    monkeypatch.setattr(launching, "why_not_library", lambda: "nothing was compiled")
    assert not notes_with("launched by Triton", apply(make()))
    (note,) = _notes_on_speed({torch.device("cpu"), torch.device("cuda")})
    assert "launched by Triton" in note and note.endswith("nothing was compiled")
    monkeypatch.setattr(launching, "why_not_library", lambda: None)
    assert not list(_notes_on_speed({torch.device("cuda")}))

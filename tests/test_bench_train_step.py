"""The bench of whole training steps, on a model of two small layers."""

from functools import partial

import pytest
import torch

from benchmarks import bench_train_step as bench
from benchmarks import train_step_rivals as rivals
from benchmarks.contest import Context

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny():
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    llama = rivals.LLAMA
    make = partial(llama.make, **sizes)
    return rivals.Architecture("tiny", make, 64, llama.task_type, llama.target_modules, 64)


def trainees_of(tiny, device=CPU, names=None):
    names = names or (rivals.LORA, rivals.FROZEN, rivals.PEFT, rivals.APPLIED)
    return rivals.make_trainees(tiny, names, device, torch.float32)


def test_right_steps_are_not_refused(tiny):
    assert rivals.wrong_steps(trainees_of(tiny), tiny.batch(2, 16, CPU)) == {}


def no_regulariser(trainee):
    trainee.allocator.orth_reg_weight = 0.0


def half_a_loss(trainee):
    right = trainee.loss
    trainee.loss = lambda batch: right(batch) * 0.5


def another_scaling(trainee):
    layer = next(m for m in trainee.model.modules() if hasattr(m, "_ranknums"))
    layer._ranknums = {"default": 12.1}


@pytest.mark.parametrize("plant", [no_regulariser, half_a_loss, another_scaling])
def test_a_wrong_step_is_refused_and_not_timed(tiny, plant, monkeypatch):
    trainees = trainees_of(tiny)
    plant(trainees[rivals.APPLIED])
    monkeypatch.setattr(bench, "_trainees", lambda *_: trainees)
    case = bench.TrainStep(tiny, 2, 16, torch.float32)
    context = Context(CPU, smoke=True)
    outcome = bench.measure(case, context)
    assert set(outcome.refused) == {rivals.APPLIED} and outcome.refused[rivals.APPLIED].ours
    assert outcome.refused[rivals.APPLIED].why.startswith("ArithmeticError: peft.apply: ")
    assert set(outcome.samples) == set(trainees) - {rivals.APPLIED}
    assert rivals.APPLIED not in {row.rival for row in outcome.rows}


def test_the_parts_of_a_step_are_the_step(tiny):
    batch = tiny.batch(2, 16, CPU)
    for name, trainee in trainees_of(tiny).items():
        ends = []
        for step in (trainee.step, trainee.step_in_parts):
            trainee.reset()
            if trainee.optimizer is not None:
                trainee.optimizer.state.clear()
            with trainee.by_hand() if step == trainee.step_in_parts else torch.enable_grad():
                step(batch)
            ends.append([p.detach().clone() for p in trainee.trained])
        # AdamW's first step has nearly the sign of the gradient: equal but where that is rounding.
        for whole, parts in zip(*ends, strict=True):
            torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-6, msg=name)
        if trainee.allocator is not None:
            assert trainee.allocator.attached


def test_shares_are_of_one_step(tiny):
    batch = tiny.batch(2, 16, CPU)
    parts = {
        name: rivals.shares(trainee, batch, CPU) for name, trainee in trainees_of(tiny).items()
    }
    everyone = {rivals.LINEAR}
    adalora = {*everyone, rivals.OPTIMIZER, rivals.ALLOCATION, rivals.REGULARISER}
    assert {name: set(found) for name, found in parts.items()} == {
        rivals.FROZEN: everyone,
        rivals.LORA: {*everyone, rivals.OPTIMIZER},
        rivals.PEFT: adalora,
        rivals.APPLIED: adalora,
    }
    for found in parts.values():
        assert all(share > 0 for share in found.values()) and sum(found.values()) < 1


def test_the_cases_are_those_asked_for():
    on_gpu = bench.cases(Context(torch.device("cuda")))
    assert len({str(case) for case in on_gpu}) == len(on_gpu)
    first = on_gpu[0]
    assert first.architecture is rivals.LLAMA and first.dtype == torch.bfloat16
    assert rivals.CAPTURED in first.rivals and rivals.COMPILED in on_gpu[2].rivals
    for model in (rivals.LLAMA, rivals.DEBERTA):
        own = [case for case in on_gpu if case.architecture is model]
        assert {case.rows for case in own} == {1, 2, 4, 8, 16}
        assert {case.checkpointing for case in own} == {False, True}
    assert {case.tokens for case in on_gpu} == {512, 1024, 2048, 4096}
    on_cpu = bench.cases(Context(CPU))
    assert all(rivals.CAPTURED not in case.rivals for case in on_cpu)
    always = {rivals.FROZEN, rivals.LORA, rivals.PEFT, rivals.APPLIED}
    assert all(always <= set(case.rivals) for case in (*on_gpu, *on_cpu))


def test_the_models_are_those_they_are_named_after():
    with torch.device("meta"):
        llama, deberta = rivals.LLAMA.make(), rivals.DEBERTA.make()
    # As published: 1,235,814,400 with the tied embedding, and 184,423,682 with two labels.
    assert sum(p.numel() for p in llama.parameters()) == 1_235_814_400
    assert sum(p.numel() for p in deberta.parameters()) == 184_423_682


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: CUDA graphs")
def test_a_captured_step_is_right(tiny):
    device = torch.device("cuda")
    names = (rivals.PEFT, rivals.APPLIED, rivals.CAPTURED)
    trainees = trainees_of(tiny, device, names)
    assert rivals.wrong_steps(trainees, tiny.batch(2, 16, device)) == {}
    batch = tiny.batch(2, 16, device)
    losses = {name: [float(t.step(batch)) for _ in range(4)] for name, t in trainees.items()}
    assert losses[rivals.CAPTURED] == pytest.approx(losses[rivals.APPLIED], rel=1e-3)

"""Optimizers, and trainings that are run again.

Plain PEFT and ours run the same script side by side, wherever PEFT is right; where it is not, the
test says so.
"""

import warnings

import pytest
import torch
from hands import (
    STEPS,
    TARGET,
    adamw,
    adapted,
    both_sides,
    both_sides_slowly,
    end_step,
    rank,
    take_over,
    tokens,
    train,
)
from helpers import trainable
from peft.optimizers import create_loraplus_optimizer
from sam import SAM
from transformers import Trainer, TrainerCallback, TrainingArguments

from adalora_kernels.peft import allocator_of, apply
from adalora_kernels.trainer import AdaLoraCallback

# Whoever trains the adapters is seen


@both_sides
def test_an_optimizer_per_phase(side):
    """A restart of the learning rate, or a federated round: attached to each, in turn."""
    model = adapted()
    allocator = take_over(side, model)
    for phase in range(3):
        optimizer = adamw(model)
        if allocator is not None:
            assert not allocator.attached
            allocator.attach(optimizer)
        train(side, model, optimizer, range(4 * phase + 1, 4 * phase + 5))
        del optimizer
    assert rank(model) == TARGET


@both_sides
def test_the_two_half_steps_of_sam(side):
    """Its own `step` is never called; the steps are those of the optimizer inside."""
    model = adapted()
    sam = SAM(trainable(model), torch.optim.AdamW, lr=1e-2)
    take_over(side, model, sam)
    for step in range(1, STEPS + 1):
        model(**tokens(step)).loss.backward()
        sam.first_step(zero_grad=True)
        model(**tokens(step)).loss.backward()
        sam.second_step()
        end_step(side, model, step, sam)
    assert rank(model) == TARGET


class Lookahead:
    """As public implementations have it: no torch optimizer of its own, with plain dicts."""

    def __init__(self, optimizer, k=5, alpha=0.5):
        self.optimizer, self.k, self.alpha, self.steps = optimizer, k, alpha, 0
        self.param_groups, self.state = optimizer.param_groups, optimizer.state
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = {}, {}
        self.slow = [p.detach().clone() for g in self.param_groups for p in g["params"]]

    def zero_grad(self):
        self.optimizer.zero_grad()

    @torch.no_grad()
    def step(self):
        self.optimizer.step()
        self.steps += 1
        if self.steps % self.k == 0:
            fast = [p for g in self.param_groups for p in g["params"]]
            for p, slow in zip(fast, self.slow, strict=True):
                p.copy_(slow.lerp_(p, self.alpha))


@both_sides
@pytest.mark.parametrize("kind", ["lookahead", "lora_plus", "sgd"])
def test_other_optimizers(side, kind):
    model = adapted()
    optimizer = adamw(model)
    if kind == "lookahead":
        optimizer = Lookahead(optimizer)
    elif kind == "lora_plus":
        optimizer = create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=4
        )
    else:
        optimizer = torch.optim.SGD(trainable(model), lr=0.1, momentum=0.9, weight_decay=0.1)
    allocator = take_over(side, model, optimizer)
    train(side, model, optimizer)
    assert rank(model) == TARGET
    if side == "ours":
        assert allocator.global_step == STEPS


@both_sides
def test_optimizers_beside_that_of_the_adapters(side):
    """One for the head and one for the adapters; nobody is warned of the head's."""
    model = adapted(modules_to_save=["lm_head"])
    adapters = [p for n, p in model.named_parameters() if p.requires_grad and "lora_" in n]
    rest = [p for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n]
    optimizer, head = torch.optim.AdamW(adapters, lr=1e-2), torch.optim.SGD(rest, lr=1e-2)
    take_over(side, model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(1, STEPS + 1):
            model(**tokens(step)).loss.backward()
            head.step()
            optimizer.step()
            end_step(side, model, step, optimizer)
            head.zero_grad()
    assert rank(model) == TARGET


@both_sides
def test_lbfgs(side):
    """It evaluates its closure many times a step, and compares values with slopes."""
    model = adapted().double()
    optimizer = torch.optim.LBFGS(trainable(model), max_iter=4, line_search_fn="strong_wolfe")
    take_over(side, model, optimizer)

    def closure():
        optimizer.zero_grad()
        loss = model(**tokens(1)).loss
        loss.backward()
        return loss

    losses = []
    for step in range(1, STEPS + 1):
        losses.append(optimizer.step(closure).item())
        end_step(side, model, step, optimizer)
    assert rank(model) == TARGET
    # With the regulariser, which is 1.21 at first.
    assert losses[:3] == pytest.approx([5.3766, 4.7375, 4.2004], abs=1e-4)


def rows(count=24):
    return [{k: v[0] for k, v in tokens(i, 1).items()} for i in range(count)]


def run_trainer(model, folder, *callbacks, **options):
    arguments = {"max_steps": STEPS, "per_device_train_batch_size": 2, "logging_steps": 1}
    quiet = {"report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    args = TrainingArguments(folder, **{**arguments, **quiet, **options})
    trainer = Trainer(model, args, train_dataset=rows(), callbacks=list(callbacks))
    trainer.train()
    return trainer


# Train again


class CallPeft(TrainerCallback):
    """What users of PEFT write."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        model.update_and_allocate(state.global_step + 1)


@both_sides_slowly
def test_a_trainer_is_run_again(side, tmp_path):
    """A notebook's cell: a new Trainer on the model that the last one trained."""
    model = adapted()
    for _ in range(2):
        callback = AdaLoraCallback() if side == "ours" else CallPeft()
        trainer = run_trainer(model, tmp_path, callback)
        assert rank(model) == TARGET
    if side == "ours":
        logs = [log for log in trainer.state.log_history if "adalora/budget" in log]
        assert {(log["adalora/budget"], log["adalora/total_rank"]) for log in logs} == {(12, 12)}


@both_sides
def test_the_loops_cell_is_run_again(side):
    """Steps are counted from 1 again, with a new optimizer, and nobody attaches anything."""
    model = adapted()
    if side == "ours":
        apply(model)
    for run in range(2):
        optimizer = adamw(model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in range(1, STEPS + 1):
                model(**tokens(step + 100 * run)).loss.backward()
                optimizer.step()
                model.base_model.update_and_allocate(step)
                optimizer.zero_grad()
        assert rank(model) == TARGET
        assert any("AdaLoRA" in str(w.message) for w in caught) == (side == "ours" and run == 1)


@both_sides
def test_cells_in_the_wrong_order(side):
    """Apply and attach after some steps, apply twice, attach twice."""
    model = adapted()
    optimizer = adamw(model)
    train("peft", model, optimizer, range(1, 4))
    if side == "ours":
        allocator = apply(model).allocator
        assert apply(model).allocator is allocator is allocator_of(model)
        allocator.attach(optimizer)
        with pytest.raises(RuntimeError, match="attached"):
            allocator.attach(optimizer)
    train(side, model, optimizer, range(4, STEPS + 1))
    assert rank(model) == TARGET

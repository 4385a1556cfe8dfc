"""Optimizers, several models in one module, and trainings that are run again.

Plain PEFT and ours run the same script side by side, wherever PEFT is right; where it is not, the
test says so.
"""

import gc
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
    perturbed,
    rank,
    singular_values,
    take_over,
    tokens,
    train,
    trainable,
)
from peft.optimizers import create_loraplus_optimizer
from torch import nn
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


def test_another_optimizer_than_the_attached_one_warns_ours():
    model = adapted()
    allocator = take_over("ours", model, adamw(model))
    kept = adamw(model)
    allocator.attach(kept)
    train("ours", model, kept, range(1, 5))
    with pytest.warns(UserWarning, match="AdaLoRA") as caught:
        train("ours", model, adamw(model), range(5, 9))
    assert len([w for w in caught if "attach" in str(w.message)]) == 1
    assert allocator.global_step == 4


def test_an_optimizer_that_is_gone_is_not_attached_ours():
    model = adapted()
    optimizer = adamw(model)
    allocator = take_over("ours", model, optimizer)
    assert allocator.attached
    del optimizer
    gc.collect()
    assert not allocator.attached


class Sam(torch.optim.Optimizer):
    """Sharpness-aware minimisation as its public implementation has it."""

    def __init__(self, params, base, rho=0.05, **options):
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self):
        grads = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        norm = torch.stack([g.norm() for g in grads]).norm()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["old"] = p.clone()
                    p.add_(p.grad * (group["rho"] / (norm + 1e-12)))
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if "old" in self.state[p]:
                    p.copy_(self.state[p]["old"])
        self.base_optimizer.step()

    def step(self, closure=None):
        raise NotImplementedError("call first_step and second_step")


def train_with_sam(side, model, sam, steps):
    for step in steps:
        model(**tokens(step)).loss.backward()
        sam.first_step()
        model(**tokens(step)).loss.backward()
        sam.second_step()
        end_step(side, model, step, sam)


@both_sides
def test_the_two_half_steps_of_sam(side):
    model = adapted()
    sam = Sam(trainable(model), torch.optim.AdamW, lr=1e-2)
    take_over(side, model, sam.base_optimizer)
    train_with_sam(side, model, sam, range(1, STEPS + 1))
    assert rank(model) == TARGET


def test_sam_attached_at_its_outside_ours():
    """Its own `step` is never called; the steps are those of the optimizer inside."""
    model = adapted()
    sam = Sam(trainable(model), torch.optim.AdamW, lr=1e-2)
    allocator = take_over("ours", model, sam)
    train_with_sam("ours", model, sam, range(1, STEPS + 1))
    assert (rank(model), allocator.global_step) == (TARGET, STEPS)


class OverridesStep(torch.optim.AdamW):
    """PyTorch calls the step hooks twice here: of this `step`, and of the one inside."""

    def step(self, closure=None):
        return super().step(closure)


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
@pytest.mark.parametrize("kind", ["overrides_step", "lookahead", "lora_plus", "sgd"])
def test_other_optimizers(side, kind):
    model = adapted()
    optimizer = adamw(model)
    if kind == "overrides_step":
        optimizer = OverridesStep(trainable(model), lr=1e-2)
    elif kind == "lookahead":
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


# Every host in the tree


class Dual(nn.Module):
    """An encoder and a decoder, each a PEFT model of its own."""

    def __init__(self, **options):
        super().__init__()
        self.encoder, self.decoder = adapted(), adapted(**options)

    def forward(self, input_ids, labels):
        losses = [m(input_ids=input_ids, labels=labels).loss for m in (self.encoder, self.decoder)]
        return {"loss": sum(losses)}


@both_sides
def test_two_models_in_one_module(side):
    """Each has its own budget."""
    dual = Dual()
    optimizer = adamw(dual)
    halves = [dual.encoder, dual.decoder]
    if side == "ours":
        with pytest.raises(ValueError, match=r"encoder.*decoder"):
            apply(dual)
        assert not any(hasattr(half.base_model.rankallocator, "attached") for half in halves)
    for half in halves:
        take_over(side, half, optimizer)
    for step in range(1, STEPS + 1):
        dual(**tokens(step))["loss"].backward()
        optimizer.step()
        if side == "peft":
            for half in halves:
                half.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    assert [rank(half) for half in halves] == [TARGET, TARGET]


def test_one_of_two_models_is_for_inference_ours():
    """A frozen teacher inside the module that trains the student."""
    dual = Dual(inference_mode=True)
    perturbed(dual.decoder)
    teacher = singular_values(dual.decoder)
    optimizer = adamw(dual)
    report = apply(dual)
    assert len(report.swapped) == 8
    report.allocator.attach(optimizer)
    for step in range(1, STEPS + 1):
        dual(**tokens(step))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert rank(dual.encoder) == TARGET
    assert all(torch.equal(v, teacher[n]) for n, v in singular_values(dual.decoder).items())


def rows(count=24):
    return [{k: v[0] for k, v in tokens(i, 1).items()} for i in range(count)]


def run_trainer(model, folder, *callbacks, **options):
    arguments = {"max_steps": STEPS, "per_device_train_batch_size": 2, "logging_steps": 1}
    quiet = {"report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    args = TrainingArguments(folder, **{**arguments, **quiet, **options})
    trainer = Trainer(model, args, train_dataset=rows(), callbacks=list(callbacks))
    trainer.train()
    return trainer


def test_the_callback_names_both_models_ours(tmp_path):
    with pytest.raises(ValueError, match=r"encoder.*decoder"):
        run_trainer(Dual(), tmp_path, AdaLoraCallback())


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


def test_a_lower_target_is_reached_by_a_second_training_ours():
    """From the 12 triplets that are there to 8; those that were pruned stay out."""
    model = adapted()
    optimizer = adamw(model)
    allocator = take_over("ours", model, optimizer)
    train("ours", model, optimizer)
    gone = {name: values == 0 for name, values in singular_values(model).items()}
    model.peft_config["default"].target_r = 2
    allocator.restart()
    totals = []
    for step in range(1, STEPS + 1):
        train("ours", model, optimizer, [step], seed=100)
        totals.append(allocator.summary()["total_rank"])
        assert rank(model) == totals[-1]
    assert totals == sorted(totals, reverse=True) and totals[0] == TARGET
    assert all(not values[gone[name]].any() for name, values in singular_values(model).items())


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

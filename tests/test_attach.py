"""An allocator that optimizers step."""

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from allocator_runs import attached_setup
from helpers import CountOps, Mlp, batch, trainable
from sam import SAM
from torch import nn

from adalora_kernels import RankAllocator, orth_reg_grad_


@pytest.mark.parametrize(
    ("kind", "micro_batches"),
    [
        ("adamw", 4),
        ("fused", 1),
        pytest.param("sgd", 1, marks=pytest.mark.full),
        pytest.param("adamw", 1, marks=pytest.mark.full),
        pytest.param("fused", 4, marks=pytest.mark.full),
        pytest.param("sgd", 4, marks=pytest.mark.full),
    ],
)
def test_attached_is_the_loop_by_hand(kind, micro_batches):
    results = []
    for by_hand in (False, True):
        model, optimizer, allocator = attached_setup(kind)
        if by_hand:
            allocator.detach()
            assert not allocator.attached
        for step in range(1, allocator.schedule.total_step + 1):
            for i in range(micro_batches):
                (model.loss(*batch(100 * step + i)) / micro_batches).backward()
            if by_hand:
                orth_reg_grad_(model, 0.1)
            optimizer.step()
            if by_hand:
                allocator.step(step)
            optimizer.zero_grad()
        results.append((*model.parameters(), *allocator.state_dict()["exp_avg_ipt"]))
        assert allocator.frozen and allocator.global_step == allocator.schedule.total_step
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_attach_refuses():
    model, optimizer, allocator = attached_setup()
    with pytest.raises(RuntimeError, match=r"attached .*detach"):
        allocator.attach(optimizer)
    model.loss(*batch(1)).backward()
    with pytest.raises(RuntimeError, match=r"attached .*step\(\)"):
        allocator.step(1)
    allocator.detach()
    allocator.detach()
    with pytest.raises(TypeError, match=r"optimizer .*Mlp"):
        allocator.attach(model)
    few = torch.optim.SGD([model.layers[0].lora_A], lr=0.1)
    with pytest.raises(ValueError, match=r"optimizer .*layers\.0\.lora_E"):
        allocator.attach(few)
    few.step()
    assert allocator.global_step == 0 and not allocator.attached
    model.layers[0].lora_A.requires_grad_(False)
    allocator.attach(torch.optim.SGD(trainable(model), lr=0.1))


def test_an_optimizer_step_without_gradients_does_not_count():
    model, optimizer, allocator = attached_setup()
    optimizer.step()
    assert allocator.global_step == 0 and allocator.orth_reg is None
    assert all(p.grad is None for p in model.parameters())
    model.loss(*batch(1)).backward()
    optimizer.step()
    assert allocator.global_step == 1
    assert allocator.orth_reg > 0


def test_no_regulariser_at_weight_zero():
    model, optimizer, allocator = attached_setup()
    allocator.orth_reg_weight = 0.0
    model.loss(*batch(1)).backward()
    with CountOps() as ops:
        optimizer.step()
    assert ops.counts["aten::bmm"] == 0 and allocator.orth_reg is None
    assert ops.counts["adalora::importance_update_"] == 1
    allocator.orth_reg_weight = 0.1
    with CountOps() as ops:
        optimizer.step()
    assert ops.counts["aten::bmm"] > 0 and allocator.orth_reg > 0


@pytest.mark.parametrize("clip", [False, True], ids=["scaled", "unscaled"])
@pytest.mark.parametrize("kind", ["adamw", "fused"])
def test_attached_under_a_grad_scaler(kind, clip):
    """The same as without one; a step that overflows, outside the adapters, teaches nothing."""
    results = []
    for scaled in (False, True):
        model, optimizer, allocator = attached_setup(kind)
        other = nn.Parameter(torch.zeros(1))
        optimizer.add_param_group({"params": [other]})
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        for step in range(1, 13):
            loss = model.loss(*batch(step)) + 0 * other.sum()
            if step == 5:
                if not scaled:
                    continue
                loss = loss + torch.inf * other.sum()
            scaler.scale(loss).backward()
            if clip:
                scaler.unscale_(optimizer)
            before = copy.deepcopy(allocator.state_dict())
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if step == 5:
                after = allocator.state_dict()
                for key in ("exp_avg_ipt", "exp_avg_unc"):
                    assert all(map(torch.equal, before[key], after[key]))
        results.append([*model.parameters(), *allocator.state_dict()["exp_avg_ipt"]])
        # A scaler does not call the optimizer at all then, but for a fused one.
        counted = scaled and kind == "fused"
        assert allocator.summary()["skipped_steps"] == int(counted)
        assert allocator.global_step == (12 if counted else 11)
    if kind == "adamw":  # the budget of a fused one is a step ahead
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_copy_is_not_attached():
    model, optimizer, allocator = attached_setup()
    for copied in (copy.deepcopy(allocator), pickle.loads(pickle.dumps(allocator))):
        assert not copied.attached
    assert allocator.attached
    model.loss(*batch(1)).backward()
    optimizer.step()
    assert allocator.global_step == 1 and copied.global_step == 0


# Which optimizers


def one_step(model, optimizer, step=1):
    model.loss(*batch(step)).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_two_optimizers_in_turn_are_one_training():
    model, first, allocator = attached_setup(tinit=2, tfinal=3)
    allocator.set_total_step(12)
    second = torch.optim.SGD(trainable(model), lr=0.1)
    allocator.attach(second)
    for again in (first, second):
        with pytest.raises(RuntimeError, match="attached to this optimizer already"):
            allocator.attach(again)
    for step in range(1, 13):
        one_step(model, (first, second)[step % 2], step)
        assert allocator.global_step == step
    assert allocator.summary()["total_rank"] == 9 and allocator.frozen
    allocator.detach()
    one_step(model, first)
    one_step(model, second)
    assert allocator.global_step == 12 and not allocator.attached


def test_an_optimizer_that_is_gone_is_not_followed():
    model, optimizer, allocator = attached_setup()
    other = torch.optim.SGD(trainable(model), lr=0.1)
    allocator.attach(other)
    one_step(model, other)
    del optimizer
    assert allocator.attached
    del other
    assert not allocator.attached
    model.loss(*batch(2)).backward()
    allocator.step(2)  # by hand again, which is refused while an optimizer does it
    assert allocator.global_step == 2


def test_an_optimizer_keeps_the_allocator_that_nobody_else_has():
    model = Mlp()
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    RankAllocator(model, target_r=3, total_step=5).attach(optimizer)
    for step in range(1, 6):
        one_step(model, optimizer, step)
    assert sum(int((layer.lora_E != 0).sum()) for layer in model.layers) == 9


def test_an_optimizer_does_not_keep_a_model_that_keeps_its_allocator():
    class Kept(RankAllocator):
        _is_kept_by_model = True

    model = Mlp()
    model.allocator = Kept(model, target_r=3, total_step=5)
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    model.allocator.attach(optimizer)
    one_step(model, optimizer)
    assert model.allocator.global_step == 1
    weight = weakref.ref(model.layers[0].weight)
    gc.disable()
    try:
        del model
        assert weight() is None
    finally:
        gc.enable()
    optimizer.step()


class Wrapper:
    """As Accelerate's or Lightning's, but no optimizer itself."""

    def __init__(self, optimizer):
        self._optimizer = optimizer
        self.step, self.zero_grad = optimizer.step, optimizer.zero_grad


class Bare(torch.optim.Optimizer):
    """As Accelerate's: a subclass that torch has not initialised, and that has no hooks."""

    def __init__(self, optimizer):
        self.optimizer, self.param_groups = optimizer, optimizer.param_groups

    def step(self, closure=None):
        return self.optimizer.step(closure)

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)


@pytest.mark.parametrize("wrap", [Wrapper, Bare, lambda o: Wrapper(Bare(Bare(o)))])
def test_a_wrapper_is_looked_into(wrap):
    model, inner, allocator = attached_setup()
    allocator.detach()
    optimizer = wrap(inner)
    allocator.attach(optimizer)
    with pytest.raises(RuntimeError, match="already"):
        allocator.attach(inner)
    for step in range(1, 4):
        one_step(model, optimizer, step)
    assert allocator.global_step == 3 and allocator.follows(inner)


class Lookahead(torch.optim.Optimizer):
    """Goes back to slow weights in every other step, after what it wraps has stepped."""

    def __init__(self, inner):
        super().__init__(inner.param_groups, {})
        self.inner, self.param_groups, self.count = inner, inner.param_groups, 0
        self.slow = [p.detach().clone() for g in self.param_groups for p in g["params"]]

    def step(self, closure=None):
        loss = self.inner.step(closure)
        self.count += 1
        if self.count % 2 == 0:
            fast = [p for g in self.param_groups for p in g["params"]]
            with torch.no_grad():
                for p, slow in zip(fast, self.slow, strict=True):
                    slow.lerp_(p, 0.5)
                    p.copy_(slow)
        return loss


def test_a_wrapper_that_moves_the_weights_afterwards():
    model, inner, allocator = attached_setup(tinit=2, tfinal=3)
    allocator.set_total_step(12)
    allocator.detach()
    optimizer = Lookahead(inner)
    allocator.attach(optimizer)
    for step in range(1, 13):
        one_step(model, optimizer, step)
        assert allocator.global_step == step
        if allocator.schedule.masks_at(step):
            alive = sum(int((layer.lora_E != 0).sum()) for layer in model.layers)
            assert alive == allocator.summary()["total_rank"] == allocator.schedule.budget(step)


@pytest.mark.parametrize("form", ["halves", "closure"])
def test_sam_is_one_step_with_one_regulariser(form):
    """The same as the loop by hand around the base optimizer's step."""
    runs = []
    for by_hand in (False, True):
        model, _, allocator = attached_setup(tinit=2, tfinal=3)
        allocator.set_total_step(12)
        allocator.detach()
        optimizer = SAM(trainable(model), torch.optim.SGD, lr=0.1)
        if by_hand:
            # Where the weights are the model's own again.
            optimizer.base_optimizer.register_step_pre_hook(
                lambda *_, model=model: orth_reg_grad_(model, 0.1) and None
            )
        else:
            allocator.attach(optimizer)
        for step in range(1, 13):

            def closure(model=model, step=step):
                loss = model.loss(*batch(step))
                loss.backward()
                return loss

            model.loss(*batch(step)).backward()
            if form == "closure":
                optimizer.step(closure)
            else:
                optimizer.first_step(zero_grad=True)
                closure()
                optimizer.second_step()
            if by_hand:
                allocator.step(step)
            optimizer.zero_grad()
        runs.append((*model.parameters(), *allocator.scores().values()))
        assert allocator.global_step == 12 and allocator.summary()["total_rank"] == 9
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


class Overrides(torch.optim.AdamW):
    """PyTorch runs the hooks of this step, and of the one inside."""

    def step(self, closure=None):
        return super().step(closure)


def test_a_step_that_calls_another_is_one_step():
    torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])  # From now on AdamW's step has hooks.
    results = []
    for kind in (torch.optim.AdamW, Overrides):
        torch.manual_seed(0)
        model = Mlp()
        allocator = RankAllocator(model, target_r=3, total_step=12, tfinal=3, orth_reg_weight=0.1)
        optimizer = kind(trainable(model), lr=1e-2)
        allocator.attach(optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for step in range(1, 13):
                model.loss(*batch(step)).backward()
                optimizer.step()
                optimizer.zero_grad()
        assert allocator.global_step == 12
        results.append([p.detach() for p in trainable(model)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_a_step_that_calls_another_is_no_lapse():
    model = Mlp()
    allocator = RankAllocator(model, target_r=3, total_step=12, tfinal=3)
    optimizer = Overrides(trainable(model), lr=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(1, 4):
            model.loss(*batch(step)).backward()
            optimizer.step()
            allocator.step(step)
            optimizer.zero_grad()


def test_an_exception_in_a_step_does_not_end_the_counting():
    model = Mlp()
    allocator = RankAllocator(model, target_r=3, total_step=12, tfinal=3, orth_reg_weight=0.1)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    allocator.attach(optimizer)

    def fails():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="memory"):
        optimizer.step(fails)
    for step in range(1, 4):
        model.loss(*batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert allocator.global_step == 3 and allocator.orth_reg is not None


def test_gradients_that_are_gone_after_the_step_are_warned_of():
    model = Mlp()
    allocator = RankAllocator(model, target_r=3, total_step=12, tfinal=3)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    optimizer.register_step_post_hook(lambda *_: optimizer.zero_grad())
    allocator.attach(optimizer)
    model.loss(*batch(1)).backward()
    with pytest.warns(UserWarning, match="zero_grad"):
        optimizer.step()
    optimizer.step()  # Without any gradients there is nothing to warn of.

"""What a model leaves behind: nothing that refers to it, so that `del model` frees it at once."""

import copy
import gc
import io
import weakref

import pytest
import torch
from peft import PeftModel
from test_peft import batch, optimizer_of
from test_peft_models import HOW, LAYERS, STEPS, TARGET, config_of, injected, make, mixed, train

from adalora_kernels.adapters import find_adapters
from adalora_kernels.peft import allocator_of, apply


def attached(model):
    optimizer = optimizer_of(model, "adamw")
    apply(model).attach(optimizer)
    for step in range(1, STEPS + 1):
        x, labels = batch(step)
        model(x, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def trained_and(then, model, *arguments):
    train(model)
    return then(model, *arguments), model


def shrunk(model):
    report = apply(model)
    train(model)
    report.allocator.shrink()
    return report


# What is done with a new model, by hand as in PEFT, or with what only we have.
LIVES = {
    "made": lambda model, path: model,
    "trained": lambda model, path: trained_and(lambda model: None, model),
    "saved": lambda model, path: trained_and(PeftModel.save_pretrained, model, path),
    "copied": lambda model, path: trained_and(copy.deepcopy, model),
    "merged": lambda model, path: trained_and(lambda model: model.merge_and_unload(), model),
    "unloaded": lambda model, path: trained_and(lambda model: model.unload(), model),
}
OUR_LIVES = {
    "attached": lambda model, path: attached(model),
    "attached_merged": lambda model, path: (attached(model), model.merge_and_unload()),
    "shrunk": lambda model, path: shrunk(model),
}


def test_a_model_that_is_unloaded_leaves_its_optimizer():
    model, _optimizer = attached(make(config_of()))
    allocator = allocator_of(model)
    assert allocator.attached
    model.merge_and_unload()
    assert not allocator.attached
    model, _ = attached(make(config_of()))
    allocator = allocator_of(model)
    model.delete_adapter("default")
    assert not allocator.attached


@pytest.fixture
def without_gc():
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize(
    ("how", "life"),
    [
        *((how, life) for how in HOW for life in LIVES),
        *((how, life) for how in HOW[1:] for life in OUR_LIVES),
    ],
)
def test_a_model_is_freed_at_once(how, life, tmp_path, without_gc):
    model = make(config_of(), how)
    weights = [weakref.ref(p) for p in model.parameters()]
    what_it_has_become = (LIVES | OUR_LIVES)[life](model, tmp_path)
    assert any(weight() is not None for weight in weights)
    del model, what_it_has_become
    assert [weight for weight in weights if weight() is not None] == []


def test_who_keeps_an_allocator_keeps_no_base_model(without_gc):
    model = make(config_of())
    base = [
        weakref.ref(p)
        for name, p in model.named_parameters()
        if "lora_" not in name and "ranknum" not in name
    ]
    report = apply(model)
    allocator, (_, optimizer) = report.allocator, attached(model)
    del model, _
    assert [weight for weight in base if weight() is not None] == []
    assert report.allocator is allocator and optimizer.param_groups
    with pytest.raises(ValueError, match=r"the model of .* has been deleted"):
        _ = allocator.adapters[0].module


@pytest.mark.parametrize("how", ["apply", "enable"])
@pytest.mark.parametrize("wrap", [injected, mixed])
def test_a_model_of_another_kind_is_freed_at_once(wrap, how, without_gc):
    model = make(config_of(), how, wrap)
    optimizer = optimizer_of(model, "adamw")
    apply(model).attach(optimizer)
    x, labels = batch(1)
    model(x, labels=labels).loss.backward()
    optimizer.step()
    copied = copy.deepcopy(model)
    weights = [weakref.ref(p) for one in (model, copied) for p in one.parameters()]
    del model, optimizer, copied
    assert [weight for weight in weights if weight() is not None] == []


@pytest.mark.parametrize("how", ["apply", "enable"])
def test_the_methods_of_a_copy_are_its_own(how, tmp_path, without_gc):
    model = make(config_of(), how, injected)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), torch.load(file, weights_only=False)]
    pattern = {f"{name}.lora_E": [True, False] * 3 for name in LAYERS}
    for copied in copies:
        copied.resize_modules_by_rank_pattern(pattern, "default")
        assert [len(a.lora_E) for a in find_adapters(copied)] == [3, 3, 3]
        assert allocator_of(copied).schedule.init_budget == 9
        assert copied.update_and_allocate.__self__ is allocator_of(copied)
    assert [len(a.lora_E) for a in find_adapters(model)] == [6, 6, 6]
    del model
    assert train(*copies) == [TARGET, TARGET]

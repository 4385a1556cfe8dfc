"""Both callbacks' start="lora": what gets it, when, and what goes on with the values it has."""

import pytest
import torch
from lightning_runs import Module, fit, lightning_trainer
from peft import PeftModel
from peft.tuners.adalora.layer import AdaLoraLayer
from test_lightning_resume import Seeds
from trainer_runs import (
    STEPS,
    assert_at_target,
    assert_same_run,
    assert_saves_its_function,
    base_model,
    make,
    plain,
    save_every,
    snapshot,
    trainer_of,
)

import adalora_kernels.lightning
import adalora_kernels.trainer
from adalora_kernels.adapters import find_adapters
from adalora_kernels.peft import allocator_of
from adalora_kernels.starts import start_of

# Trained a little, and then loaded: some lora_E is not 0.
REFUSED = r"lora_E\.default has been trained or loaded: leave start out to go on"


def new(seed=1, **options):
    """A model as PEFT makes it: trainer_runs' has random values."""
    model = make(seed=seed, orth_reg_weight=0.0, lora_dropout=0.1, **options)
    for module in model.modules():
        if isinstance(module, AdaLoraLayer):
            module.reset_lora_parameters("default")
    return model


def start(model):
    return start_of(find_adapters(model, "default"))


def callback(**options):
    return adalora_kernels.trainer.AdaLoraCallback(start="lora", **options)


def lightning_callback(**options):
    return adalora_kernels.lightning.AdaLoraCallback(start="lora", **options)


def trainer(model, out, **options):
    return trainer_of(model, out, callbacks=[callback()], **options)


def test_the_model_has_the_start_when_the_trainer_is_made(tmp_path):
    model = new()
    one = trainer(model, tmp_path)
    assert start(model) == "lora"
    before = snapshot(model)
    trainer(model, tmp_path)  # a second one finds it there
    assert all(torch.equal(p, before[n]) for n, p in snapshot(model).items())
    one.train()
    assert start(model) is None
    assert_at_target(model)
    assert_saves_its_function(one, tmp_path / "saved")


def test_the_start_is_drawn_with_the_seed_of_the_trainer(tmp_path):
    models = []
    for seed in (3, 3, 4):  # as the processes of one training, and another training
        models.append(new())
        torch.manual_seed(len(models))
        trainer(models[-1], tmp_path, seed=seed)
    first, same, other = map(snapshot, models)
    A = next(name for name in first if "lora_A" in name)
    assert all(torch.equal(p, same[name]) for name, p in first.items())
    assert not torch.equal(first[A], other[A])


def test_by_default_the_start_is_pefts(tmp_path):
    model = new()
    before = snapshot(model)
    trainer_of(model, tmp_path)
    assert start(model) == "paper"
    assert all(torch.equal(p, before[n]) for n, p in snapshot(model).items())


@pytest.mark.parametrize("same_process", [False, True])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(same_process, tmp_path):
    expected = new()
    trainer(expected, tmp_path, **save_every(5)).train()
    # The same script again, in a new process or with the model that this one has trained.
    model = expected if same_process else new(seed=2)
    again = new() if same_process else expected
    if same_process:
        trainer(again, tmp_path / "other").train()
    trainer(model, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    if not same_process:
        assert_same_run(model, expected)
    assert_at_target(model)


def test_a_training_that_follows_another_one_goes_on(tmp_path):
    model = new()
    one = trainer(model, tmp_path)
    one.train()
    one.train()  # begins with the triplets that are there
    assert start(model) is None
    assert_at_target(model)
    trainer(model, tmp_path).train()  # of another Trainer, too
    assert_at_target(model)


def test_what_has_been_initialised_again_gets_the_start_again(tmp_path):
    model = new()
    one = trainer(model, tmp_path)
    one.train()
    for module in model.modules():
        if isinstance(module, AdaLoraLayer):
            module.reset_lora_parameters("default")
    seen = []
    model.register_forward_pre_hook(lambda *_: seen.append(start(model)))
    one.train()
    assert seen[0] == "lora" and seen[-1] is None
    assert_at_target(model)


def test_a_loaded_adapter_is_refused_when_the_training_begins(tmp_path):
    one = trainer(new(), tmp_path)
    one.train()
    one.save_model(tmp_path / "saved")
    model = PeftModel.from_pretrained(base_model(), tmp_path / "saved", is_trainable=True)
    before = snapshot(model)
    two = trainer(model, tmp_path)  # It might be resumed, or only evaluated.
    two.evaluate(eval_dataset=two.train_dataset)
    with pytest.raises(ValueError, match=REFUSED):
        two.train()
    assert all(torch.equal(p, before[n]) for n, p in snapshot(model).items())
    assert not allocator_of(model).attached
    frozen = PeftModel.from_pretrained(base_model(), tmp_path / "saved")
    trainer(frozen, tmp_path).evaluate(eval_dataset=two.train_dataset)


def test_a_model_of_model_init_gets_the_start(tmp_path):
    seen = []

    def model_init():
        model = new()
        model.register_forward_pre_hook(lambda *_: seen.append(start(model)))
        return model

    one = trainer_of(None, tmp_path, callbacks=[callback()], model_init=model_init)
    one.train()
    assert seen[0] == "lora"
    assert_at_target(one.model)


@pytest.mark.parametrize("make_callback", [callback, lightning_callback])
def test_a_start_is_for_models_of_pefts_and_has_two_names(make_callback):
    _, allocator = plain()
    with pytest.raises(ValueError, match="start='lora' is for a PEFT model that the callback"):
        make_callback(allocator=allocator)
    kind = type(make_callback())
    with pytest.raises(ValueError, match="start must be 'paper' or 'lora', got 'LoRA'"):
        kind(start="LoRA")
    assert kind(allocator, start="paper").start == kind().start == "paper"


# Lightning


def lightning_fit(model, out=None, steps=STEPS, every=None, **options):
    torch.manual_seed(5)
    callbacks = [lightning_callback(), Seeds()]
    one = lightning_trainer(out, callbacks=callbacks, every=every, max_steps=steps)
    fit(one, Module(model), **options)
    return model


def test_lightning_begins_with_the_start():
    model, seen = new(), []
    model.register_forward_pre_hook(lambda *_: seen.append(start(model)))
    lightning_fit(model)
    assert seen[0] == "lora" and seen[-1] is None
    assert_at_target(model)
    lightning_fit(model)  # goes on
    assert_at_target(model)


def test_lightning_resumes_bitwise(tmp_path):
    expected = lightning_fit(new(), tmp_path, every=5)
    model = new(seed=2)
    lightning_fit(model, ckpt_path=str(tmp_path / "step=5.ckpt"), weights_only=True)
    assert_same_run(model, expected)


def test_lightning_refuses_what_is_loaded():
    with pytest.raises(ValueError, match=REFUSED):
        lightning_fit(make())

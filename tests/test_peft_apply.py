"""What `apply` says: its report, its notes, and what it refuses."""

import numpy as np
import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.adalora import SVDLinear as PeftSVDLinear
from test_incumbent_defects import tiny_llama
from test_peft import Net, batch, enabled, make, optimizer_of, train, trained  # noqa: F401
from torch import nn

import adalora_kernels.peft
from adalora_kernels.export import save_adapter
from adalora_kernels.peft import allocator_of, apply

LAYERS = ["fc0", "fc1", "fc2"]


def inject(net, config):
    return inject_adapter_in_model(config, net)


@pytest.mark.parametrize("config", [LoraConfig, IA3Config])
@pytest.mark.parametrize("wrap", [get_peft_model, inject])
def test_another_kind_of_adapter(config, wrap):
    options = {"feedforward_modules": ["fc0"]} if config is IA3Config else {}
    config = config(target_modules=["fc0"], **options)
    model = wrap(Net(), config)
    message = rf"another kind \({type(config).__name__}\): .*use AdaLoraConfig"
    for peft_model in (model, nn.Sequential(model)):
        with pytest.raises(TypeError, match=message):
            apply(peft_model)


def test_a_prompt():
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = get_peft_model(tiny_llama().unload(), config)
    with pytest.raises(TypeError, match=r"PromptTuningConfig\): .*use AdaLoraConfig"):
        apply(model)


def test_a_model_whose_adapter_has_been_taken_out():
    model = make()
    apply(model)
    model.unload()
    with pytest.raises(TypeError, match="with an AdaLoraConfig, got PeftModel"):
        apply(model)


@pytest.mark.parametrize("wrong", [Net(), None, "model"], ids=["plain", "None", "str"])
def test_no_adapter(wrong):
    with pytest.raises(TypeError, match=f"AdaLoraConfig, got {type(wrong).__name__}"):
        apply(wrong)


def test_a_report_is_attached():
    model = make(tinit=3, tfinal=5)
    report = apply(model)
    optimizer = optimizer_of(model, "adamw")
    with pytest.raises(TypeError, match="optimizer must be"):
        report.attach(model)
    report.attach(optimizer)
    assert report.allocator.attached
    for step in range(1, 31):
        x, labels = batch(step)
        model(x, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert report.allocator.summary()["total_rank"] == 9


def test_a_report_without_an_allocator():
    report = apply(make(inference_mode=True))
    with pytest.raises(ValueError, match="no trainable AdaLoRA adapter"):
        report.attach(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1))
    assert report.notes == [] and "nothing to allocate" in str(report)


def notes_of(report):
    """Those that are not about the start of the adapters (test_peft_starts.py)."""
    return [note for note in report.notes if "tinit" not in note]


@pytest.mark.parametrize(
    ("target_r", "notes"),
    [
        (5, []),
        (6, ["target_r is 6, init_r 6"]),
        (8, ["target_r is 8, init_r 6: are they swapped?"]),
    ],
)
def test_a_target_that_prunes_nothing(target_r, notes):
    report = apply(make(target_r=target_r, task_type="FEATURE_EXTRACTION"))
    assert notes_of(report) == [f"nothing will be pruned, {note}" for note in notes]
    assert all(f"note: {note}" in str(report) for note in report.notes)
    # The notes are those of the moment.
    report.allocator.config.target_r = 2
    assert notes_of(report) == []


def test_the_note_on_the_task_type():
    model = make()
    report = apply(model)
    assert [note for note in report.notes if "task_type" in note and "hand-written loop" in note]
    optimizer = optimizer_of(model, "adamw")
    report.attach(optimizer)
    assert notes_of(report) == [] and "task_type" not in str(report)
    report.allocator.detach()
    assert len(notes_of(report)) == 1
    # There is nothing to bypass.
    assert notes_of(apply(make(orth_reg_weight=0.0))) == []
    assert notes_of(apply(make(task_type="FEATURE_EXTRACTION"))) == []
    assert notes_of(apply(make().base_model)) == []


def test_total_step_none():
    """PEFT's constructor refuses it, but not the config."""
    with pytest.raises(ValueError, match="total_step"):
        AdaLoraConfig(total_step=None)
    model = make(task_type="FEATURE_EXTRACTION")
    config = model.peft_config["default"]
    config.total_step = None
    report = apply(model)
    assert len(notes_of(report)) == 1 and "total_step is not known yet" in notes_of(report)[0]
    assert "budget 18 -> 9" in str(report)
    config.total_step = 30
    assert notes_of(report) == [] and report.allocator.schedule.total_step == 30
    assert (
        sum(map(sum, train(model, optimizer_of(model, "adamw"), range(1, 31))[1][-1].values())) == 9
    )


def test_only_what_is_trained_is_counted():
    model = make(task_type="FEATURE_EXTRACTION")
    for parameter in model.base_model.model.fc1.parameters():
        parameter.requires_grad_(False)
    report = apply(model)
    assert "budget 12 -> 6 triplets over 2 matrices" in str(report)
    assert len(notes_of(report)) == 1 and notes_of(report)[0].endswith("budget: fc1.lora_E.default")
    for parameter in model.base_model.model.fc1.parameters():
        parameter.requires_grad_(True)
    assert notes_of(report) == [] and "budget 18 -> 9 triplets over 3 matrices" in str(report)


# Files of pruned adapters


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "low_cpu_mem_usage"])
@pytest.mark.parametrize("save", [PeftModel.save_pretrained, save_adapter])
def test_training_goes_on_with_what_is_in_the_file(save, low_cpu_mem_usage, tmp_path, enabled):  # noqa: F811
    first = make(tinit=3, tfinal=5)
    trained(first)
    save(first, tmp_path)
    options = {"is_trainable": True, "low_cpu_mem_usage": low_cpu_mem_usage}
    torch.manual_seed(0)
    model = PeftModel.from_pretrained(Net(), tmp_path, **options).train()
    x, _ = batch(1)
    torch.testing.assert_close(model.eval()(x).logits, first.eval()(x).logits)
    allocator = allocator_of(model)
    assert allocator.schedule.init_budget == allocator.summary()["total_rank"] == 9
    model.peft_config["default"].target_r = 2
    assert "budget 9 -> 6 triplets" in str(apply(model))
    train(model.train(), optimizer_of(model, "adamw"), range(1, 31))
    assert allocator_of(model) is allocator and allocator.summary()["total_rank"] == 6


def test_weights_that_are_loaded_after_apply():
    first = make(tinit=3, tfinal=5)
    apply(first)
    trained(first)
    state = {name: value.clone() for name, value in get_peft_model_state_dict(first).items()}
    for applied in ("once", "twice"):
        model = make(tinit=3, tfinal=5, target_r=2)
        report = apply(model)
        set_peft_model_state_dict(model, state)
        if applied == "twice":
            assert apply(model).allocator is report.allocator
            assert "budget 9 -> 6 triplets" in str(report)
        budgets = []
        optimizer = optimizer_of(model, "adamw")
        for step in range(1, 31):
            train(model, optimizer, [step])
            budgets.append(report.allocator.summary()["budget"])
        assert budgets[0] == 9 and budgets[-1] == 6, applied


def test_layers_that_are_cut_need_a_new_optimizer():
    """Cutting makes new parameters; the report keeps its allocator, which leaves the old one."""
    model = make(tinit=3, tfinal=5)
    report = apply(model)
    old = optimizer_of(model, "adamw")
    report.attach(old)
    pattern = {f"{name}.lora_E": [True, False] * 3 for name in LAYERS}
    model.base_model.resize_modules_by_rank_pattern(pattern, "default")
    assert allocator_of(model) is report.allocator and not report.allocator.attached
    assert "budget 9 -> 9 triplets" in str(report)
    optimizer = optimizer_of(model, "adamw")
    report.attach(optimizer)
    model(*batch(1)).loss.backward()
    optimizer.step()
    old.step()
    assert report.allocator.global_step == 1


# A LoRA's rank_pattern


@pytest.mark.parametrize("pattern", [{"fc0": 4}, {"fc0": [2, 4]}, {"fc0": True}, [4, 4]], ids=str)
def test_ranks_in_rank_pattern_are_refused(pattern, enabled):  # noqa: F811
    message = "rank_pattern"
    options = {"total_step": 9, "target_modules": LAYERS}
    net = Net()
    for wrap in (get_peft_model, inject):
        with pytest.raises(ValueError, match=message):
            wrap(net, AdaLoraConfig(rank_pattern=pattern, **options))
        assert type(net.fc0) is nn.Linear, "nothing has been changed"
    model = get_peft_model(net, AdaLoraConfig(inference_mode=True, **options))
    with pytest.raises(ValueError, match=message):
        model.add_adapter("second", AdaLoraConfig(rank_pattern=pattern, **options))
    assert list(model.peft_config) == ["default"]
    adalora_kernels.peft.disable()
    if isinstance(pattern, dict):  # PEFT itself stumbles over the list
        model = make(rank_pattern=pattern)
        with pytest.raises(ValueError, match=message):
            apply(model)
        assert type(model.base_model.model.fc0) is PeftSVDLinear
    model = make()
    apply(model)
    with pytest.raises(ValueError, match=message):
        model.peft_config["default"].rank_pattern = pattern


def test_the_sentence_on_rank_pattern():
    with pytest.raises(ValueError) as caught:
        apply(make(rank_pattern={"fc0": 4}))
    for words in ("4 for 'fc0'", "list of bools", "LoraConfig", "init_r", "target_r"):
        assert words in str(caught.value)


@pytest.mark.parametrize("flags", [list, torch.tensor], ids=["list", "tensor"])
def test_a_pattern_of_flags_is_accepted(flags):
    pattern = {f"{name}.lora_E": flags([True, False] * 3) for name in LAYERS}
    assert len(apply(make(rank_pattern=pattern)).swapped) == 3


# Numbers as scripts have them


@pytest.mark.parametrize("ours", [False, True], ids=["peft", "ours"])
def test_numbers_of_other_types(ours):
    numbers = {"target_r": np.int64(3), "tinit": 0.3 * 10, "tfinal": 10 / 2, "deltaT": np.int32(1)}
    model = make(total_step=torch.tensor(30), **numbers)
    if ours:
        report = apply(model)
        assert "18 -> 9" in str(report)
    optimizer = optimizer_of(model, "adamw")
    for step in range(1, 31):
        x, labels = batch(step)
        model(x, labels=labels).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(np.int64(step) if step % 2 else torch.tensor(step))
        optimizer.zero_grad()
    config = model.peft_config["default"]
    assert sum(map(sum, config.rank_pattern.values())) == 9
    if ours:
        plain = {"total_step": 30, "tinit": 3, "tfinal": 5, "deltaT": 1}
        assert {name: getattr(config, name) for name in plain} == plain
        assert all(type(getattr(config, name)) is int for name in plain)
        config.target_r = np.float32(2)
        assert report.allocator.schedule.target_budget == 6

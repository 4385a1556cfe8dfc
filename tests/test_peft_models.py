"""Whose allocator it is: one for each model, whatever configs and modules models have in common."""

import contextlib
import copy
import dataclasses
import pickle

import pytest
import torch
from hands import enabled
from peft import (
    AdaLoraConfig,
    LoraConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.tuners.adalora import SVDLinear as PeftSVDLinear
from test_peft import Net, batch, optimizer_of
from torch import nn

from adalora_kernels.peft import allocator_of, apply

STEPS, ALL, TARGET = 12, 18, 9
LAYERS = ["fc0", "fc1", "fc2"]
full = pytest.mark.full


def config_of(**options):
    arguments = {"init_r": 6, "target_r": 3, "total_step": STEPS, "tinit": 2, "tfinal": 3}
    return AdaLoraConfig(**{**arguments, "target_modules": LAYERS, **options})


def make(config, how="apply", wrap=get_peft_model):
    """One more model of that config: PEFT's, or ours by `apply` or under `enable()`."""
    torch.manual_seed(0)
    with enabled() if how == "enable" else contextlib.nullcontext():
        model = wrap(Net(), config).train()
    if how == "apply":
        apply(model)
    return model


def injected(net, config):
    return inject_adapter_in_model(config, net)


def mixed(net, config):
    return get_peft_model(net, config, mixed=True)


def steps_of(model, steps=range(1, STEPS + 1), seed=0):
    """Train as by hand, one step for each `next`."""
    optimizer = optimizer_of(model, "adamw")
    owner = model.base_model if isinstance(model, PeftModel) else model
    for step in steps:
        x, labels = batch(step + seed)
        model(x, labels=labels).loss.backward()
        optimizer.step()
        owner.update_and_allocate(step)
        optimizer.zero_grad()
        yield step


def train(*models, steps=range(1, STEPS + 1)):
    """Train the models step by step in turn; the triplets that each has left."""
    for _ in zip(*(steps_of(m, steps, 50 * i) for i, m in enumerate(models)), strict=True):
        pass
    return [alive(model) for model in models]


def alive(model):
    return sum(int(p.count_nonzero()) for n, p in model.named_parameters() if "lora_E" in n)


HOW = ["peft", "apply", "enable"]


# One config, several models


@pytest.mark.parametrize("how", HOW)
def test_models_with_one_config(how):
    config = config_of()
    models = [make(config, how) for _ in range(2)]
    assert train(*models) == [TARGET, TARGET]
    patterns = [model.peft_config["default"].rank_pattern for model in models]
    # Only one of PEFT's two patterns is that of its model.
    assert (patterns[0] == patterns[1]) == (how == "peft")
    if how != "peft":
        allocators = [allocator_of(model) for model in models]
        assert [a.rank_pattern for a in allocators] == patterns
        assert [model.base_model.rankallocator for model in models] == allocators


@pytest.mark.parametrize("how", ["apply", "enable"])
@pytest.mark.parametrize("wrap", [injected, mixed])
def test_injected_and_mixed_adapters_with_one_config(wrap, how):
    """PEFT has no allocator for either."""
    config = config_of()
    models = [make(config, how, wrap) for _ in range(2)]
    if wrap is mixed:
        models = [apply(model) and model.base_model.model for model in models]
    assert train(*models) == [TARGET, TARGET]
    assert allocator_of(models[0]) is not allocator_of(models[1])


@pytest.mark.parametrize("how", HOW)
def test_a_model_per_fold(how, tmp_path):
    config = config_of()
    before = copy.deepcopy(vars(config))
    for fold in range(3):
        model = make(config, how)
        assert train(model) == [TARGET]
        model.save_pretrained(tmp_path / str(fold))
    assert type(config) is AdaLoraConfig
    changed = {name for name, value in vars(config).items() if value != before[name]}
    assert changed == ({"rank_pattern"} if how == "peft" else set())


@pytest.mark.parametrize("init_lora_weights", [True, False])
def test_apply_to_a_model_whose_config_plain_peft_has_used(init_lora_weights):
    """The final rank_pattern in it is that of the first model."""
    config = config_of(init_lora_weights=init_lora_weights)
    train(make(config, "peft"))
    assert config.rank_pattern is not None
    assert train(make(config)) == [TARGET]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("first", ["untrained", "trained"])
def test_a_config_from_another_model(first, how):
    one = make(config_of(), how)
    if first == "trained":
        train(one)
    other = make(one.peft_config["default"], how)
    assert train(other) == [TARGET]
    if first == "untrained":
        assert train(one) == [TARGET]
    assert sum(map(sum, other.peft_config["default"].rank_pattern.values())) == TARGET
    if how != "peft":
        assert allocator_of(one) is not allocator_of(other)
        assert one.peft_config["default"].allocator is allocator_of(one)


@pytest.mark.parametrize("how", ["apply", "enable"])
def test_a_second_adapter_with_one_config(how):
    config, models = config_of(), []
    for _ in range(2):
        model = make(config_of(inference_mode=True), how)
        with enabled() if how == "enable" else contextlib.nullcontext():
            model.add_adapter("second", config)
        model.set_adapter("second")
        models.append(model)
    assert train(*models) == [TARGET, TARGET]


@pytest.mark.parametrize("how", HOW)
def test_deep_copies(how):
    model = make(config_of(), how)
    first = copy.deepcopy(model)
    assert train(model, first) == [TARGET, TARGET]
    model = make(config_of(), how)
    train(model, steps=range(1, 7))
    second = copy.deepcopy(model)
    rest = range(7, STEPS + 1)
    assert train(model, second, steps=rest) == [TARGET, TARGET]
    if how != "peft":
        for one in (first, second, model):
            allocator = allocator_of(one)
            assert one.peft_config["default"].allocator is allocator
            assert [a.module for a in allocator.adapters] == [
                getattr(one.base_model.model, name) for name in LAYERS
            ]


@pytest.mark.parametrize("how", HOW)
def test_the_same_network_is_wrapped_again(how):
    config = config_of()
    model = make(config, how)
    train(model)
    net = model.unload()
    assert train(make(config, how, lambda _, config: get_peft_model(net, config))) == [TARGET]


def test_the_network_of_a_mixed_model_is_wrapped_again():
    """PEFT's class takes the layers out of it, and leaves what we have put into it."""
    model = make(config_of(), wrap=mixed)
    net = model.unload()
    assert allocator_of(net) is None
    again = make(config_of(), wrap=lambda _, config: get_peft_model(net, config))
    assert train(again) == [TARGET]


@pytest.mark.parametrize("how", HOW)
def test_another_models_config_for_inference(how, tmp_path):
    one = make(config_of(), how)
    train(one)
    config = one.peft_config["default"]
    config.inference_mode, config.rank_pattern = True, None
    other = make(config, how)
    assert not any(p.requires_grad for p in other.parameters())
    other.save_pretrained(tmp_path)
    for name, value in PeftModel.from_pretrained(Net(), tmp_path).named_parameters():
        if "lora_" in name:
            assert torch.equal(value, other.get_parameter(name)), name


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("on", ["user's", "model's"])
def test_total_step_is_set_later_on_either_config(on, how):
    config = config_of()
    models = [make(config, how) for _ in range(2)]
    (config if on == "user's" else models[0].peft_config["default"]).total_step = 8
    # As in PEFT, both models go by it.
    assert train(*models, steps=range(1, 9)) == [TARGET, TARGET]
    assert config.total_step == models[1].peft_config["default"].total_step == 8


def test_what_is_set_on_an_allocator_is_not_for_other_models():
    config = config_of()
    one, other = (make(config) for _ in range(2))
    configs = [model.peft_config["default"] for model in (one, other)]
    allocator = allocator_of(one)
    allocator.set_total_step(40)
    allocator.orth_reg_weight = 0.25
    allocator.schedule = dataclasses.replace(allocator.schedule, tinit=4)
    names = ("total_step", "tinit", "orth_reg_weight")
    mine, others = (40, 4, 0.25), (STEPS, 2, 0.5)
    assert tuple(getattr(configs[0], name) for name in names) == mine
    for unchanged in (config, configs[1]):
        assert tuple(getattr(unchanged, name) for name in names) == others
    assert allocator_of(other).schedule.total_step == STEPS
    for copied in (copy.copy(configs[0]), pickle.loads(pickle.dumps(configs[0]))):
        assert tuple(getattr(copied, name) for name in names) == mine
    # Whoever is given the first model's config gets what can be read there.
    assert allocator_of(make(configs[0])).schedule.total_step == 40
    config.total_step = 50  # the last word
    assert configs[0].total_step == configs[1].total_step == 50
    assert [allocator_of(m).schedule.total_step for m in (one, other)] == [50, 50]
    assert allocator.schedule.tinit == 4
    configs[0].tinit = 2
    assert allocator.schedule.tinit == 2


def test_a_copy_of_a_run_that_continues_a_pruned_adapter():
    """Its rank_pattern is over the triplets of the first run, of which this run has a part."""
    first = [True, False, True, False, True, False]
    pattern = {f"{name}.lora_E": first for name in LAYERS}
    model = make(config_of(target_r=1, rank_pattern=pattern), "peft")
    model.base_model.resize_modules_by_rank_pattern(pattern, "default")
    apply(model)
    assert allocator_of(model).schedule.init_budget == 9
    assert train(model) == [3]
    found = model.peft_config["default"].rank_pattern
    assert {len(alive) for alive in found.values()} == {6}
    assert sum(map(sum, found.values())) == 3
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied.peft_config["default"].rank_pattern == found


# Several models in one module


class Dual(nn.Module):
    def __init__(self, how="peft", enc=None, dec=None):
        super().__init__()
        self.enc = make(enc or config_of(), how)
        self.dec = make(dec or config_of(), how)

    def forward(self, x, labels):
        return self.enc(x, labels=labels).loss + self.dec(x, labels=labels).loss


def train_dual(dual, allocators=()):
    optimizer = torch.optim.AdamW([p for p in dual.parameters() if p.requires_grad], lr=5e-3)
    for allocator in allocators:
        allocator.attach(optimizer)
    for step in range(1, STEPS + 1):
        dual(*batch(step)).backward()
        optimizer.step()
        for model in () if allocators else (dual.enc, dual.dec):
            model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    return alive(dual.enc), alive(dual.dec)


def test_several_trained_models_in_one_module():
    assert train_dual(Dual()) == (TARGET, TARGET)  # PEFT
    dual = Dual()
    with pytest.raises(ValueError, match="'enc', 'dec'"):
        apply(dual)
    assert type(dual.enc.base_model.model.fc0) is PeftSVDLinear, "nothing has been changed"
    reports = [apply(dual.enc), apply(dual.dec)]
    with pytest.raises(ValueError, match="'enc', 'dec'"):
        allocator_of(dual)
    assert train_dual(dual, [report.allocator for report in reports]) == (TARGET, TARGET)
    assert train_dual(Dual("enable")) == (TARGET, TARGET)


def test_adapters_injected_into_parts_of_one_module():
    parts = nn.ModuleDict({name: make(config_of(), "peft", injected) for name in ("a", "b")})
    with pytest.raises(ValueError, match="'a', 'b'"):
        apply(nn.Sequential(parts)[0])
    for part in parts.values():
        apply(part)
    assert train(*parts.values()) == [TARGET, TARGET]


@pytest.mark.parametrize("teacher", ["inference_mode", "frozen"])
def test_a_teacher_beside_the_model_that_is_trained(teacher):
    dual = Dual(enc=config_of(inference_mode=teacher == "inference_mode"))
    dual.enc.requires_grad_(False)
    report = apply(dual)
    assert report.swapped == [f"{model}.{name}" for model in ("enc", "dec") for name in LAYERS]
    assert report.allocator is allocator_of(dual) is allocator_of(dual.dec)
    swapped = nn.ModuleDict({"dec": dual.dec, "enc": dual.enc})
    assert apply(swapped).allocator is allocator_of(swapped) is report.allocator
    before = copy.deepcopy(dual.enc.state_dict())
    train_dual(dual, [report.allocator])
    assert alive(dual.dec) == TARGET
    assert all(torch.equal(v, before[k]) for k, v in dual.enc.state_dict().items())


def test_a_model_inside_another_kind_of_peft_model():
    inner = make(config_of(target_modules=["fc0", "fc1"]), "peft", injected)
    net = nn.ModuleDict({"inner": inner, "head": nn.Linear(8, 8)})
    outer = get_peft_model(net, LoraConfig(target_modules=["head"]))
    report = apply(outer)
    assert report.swapped == ["fc0", "fc1"] and allocator_of(outer) is report.allocator
    assert allocator_of(inner) is report.allocator


def test_nothing_is_changed_if_one_of_several_models_cannot_be_taken():
    dual = Dual(enc=config_of(inference_mode=True))
    dual.dec.peft_config["default"].tinit = -1
    with pytest.raises(ValueError, match="tinit"):
        apply(dual)
    for model in (dual.enc, dual.dec):
        assert type(model.base_model.model.fc0) is PeftSVDLinear
        assert type(model.peft_config["default"]) is AdaLoraConfig

"""start="lora" in PEFT's models: `apply`, `enable`, loading, and saving."""

import math

import pytest
import torch
from helpers import triplets_in
from peft import (
    AdaLoraConfig,
    LoraConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.tuners.adalora import AdaLoraModel
from peft.tuners.adalora.layer import AdaLoraLayer
from test_peft import STEPS, Net, adapter_parameters, batch, make, optimizer_of, tiny_bert, train
from torch import nn

import adalora_kernels.peft
from adalora_kernels.adapters import find_adapters
from adalora_kernels.export import export_lora, load_adapter, save_adapter
from adalora_kernels.peft import allocator_of, apply
from adalora_kernels.starts import start_of


@pytest.fixture
def enable():
    yield adalora_kernels.peft.enable
    adalora_kernels.peft.disable()


def adapters_of(model, name="default"):
    return find_adapters(model, name)


def snapshot(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def assert_same(model, before):
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    for name, p in after.items():
        assert torch.equal(p, before[name]), name


@torch.no_grad()
def logits_of(model, **context):
    model.eval()
    logits = model(batch(0)[0]).logits
    model.train()
    return logits


@torch.no_grad()
def base_logits(model):
    with model.disable_adapter():
        return logits_of(model)


def config_of(**options):
    numbers = {"init_r": 6, "target_r": 3, "total_step": STEPS, "lora_alpha": 16}
    return AdaLoraConfig(**{**numbers, "target_modules": ["fc0", "fc1", "fc2"], **options})


class Conv(nn.Module):
    """PEFT's own forward, over a convolution."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.conv(x)).mean((2, 3)))


# apply


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_a_new_adapter_starts_like_lora(kind, dtype):
    model = make(kind, dtype=dtype)
    report = apply(model, start="lora")
    assert report.start == start_of(adapters_of(model)) == "lora"
    assert "starts like LoRA" in str(report)
    for adapter in adapters_of(model):
        A = adapter.lora_A.detach()
        bound = 1 / math.sqrt(A.shape[1])
        # Uniform: its deviation is bound / √3, of 6 × 16 values and more.
        assert A.abs().max() <= bound and 0.4 < float(A.float().std()) / bound < 0.75
        assert A.dtype == adapter.lora_B.dtype == dtype
    x = batch(0, dtype)[0]
    with torch.no_grad(), model.disable_adapter():
        base = model(x).logits
    with torch.no_grad():
        assert torch.equal(model(x).logits, base)


def test_a_convolution_starts_like_lora():
    torch.manual_seed(0)
    config = config_of(target_modules=["conv", "head"], lora_alpha=4)
    model = get_peft_model(Conv(), config)
    report = apply(model, start="lora")
    assert report.start == "lora" and len(report.left) == 1
    A = model.base_model.model.conv.lora_A["default"]
    assert A.shape == (6, 27) and A.abs().max() <= 1 / math.sqrt(27)
    x = torch.randn(2, 3, 8, 8)
    with model.disable_adapter():
        base = model(x)
    assert torch.equal(model(x), base)


def test_by_default_nothing_is_touched_nor_drawn():
    model = make()
    before, state = snapshot(model), torch.get_rng_state()
    assert apply(model).start == "paper"
    apply(model, start="paper")
    assert_same(model, before)
    assert torch.equal(state, torch.get_rng_state())


def test_applying_twice_or_with_the_other_start_afterwards_changes_nothing():
    model = make()
    apply(model, start="lora")
    before, state = snapshot(model), torch.get_rng_state()
    for options in ({"start": "lora"}, {}, {"start": "paper"}, {"start": "lora"}):
        assert apply(model, **options).start == "lora"
    assert_same(model, before)
    assert torch.equal(state, torch.get_rng_state())
    # After the other start it is still new.
    model = make()
    apply(model)
    assert apply(model, start="lora").start == "lora"


def test_equal_seeds_give_equal_starts():
    models = [make() for _ in range(2)]
    for model in models:
        torch.manual_seed(7)
        apply(model, start="lora")
    assert_same(models[1], snapshot(models[0]))


@pytest.mark.parametrize("start", ["LoRA", "", None, 1])
def test_another_start_is_refused_by_name(start, enable):
    model, originals = make(), dict(vars(AdaLoraModel))
    with pytest.raises(ValueError, match="start must be 'paper' or 'lora', got ") as error:
        apply(model, start=start)
    assert str(error.value).endswith(repr(start))
    assert allocator_of(model) is None
    with pytest.raises(ValueError, match="start must be 'paper' or 'lora'"):
        enable(start=start)
    assert dict(vars(AdaLoraModel)) == originals


def trained_by_peft():
    model = make()
    train(model, optimizer_of(model, "adamw"), range(1, 4))
    return model


def trained_by_us(start="paper"):
    model = make()
    apply(model, start=start)
    train(model, optimizer_of(model, "adamw"), range(1, 4))
    return model


def random_from_the_beginning():
    return make(init_lora_weights=False)


@pytest.mark.parametrize(
    "trained",
    [trained_by_peft, trained_by_us, lambda: trained_by_us("lora"), random_from_the_beginning],
    ids=["peft", "paper", "lora", "init_lora_weights"],
)
def test_what_is_trained_is_refused_and_nothing_is_changed(trained):
    model = trained()
    before, state = snapshot(model), torch.get_rng_state()
    kinds = [type(module) for module in model.modules()]
    config = model.peft_config["default"]
    with pytest.raises(ValueError, match=r"fc0\.lora_E\.default has been trained or loaded: leave"):
        apply(model, start="lora")
    assert_same(model, before)
    assert kinds == [type(module) for module in model.modules()]
    assert model.peft_config["default"] is config
    assert torch.equal(state, torch.get_rng_state())
    assert apply(model).start is None


@pytest.mark.parametrize("save", [lambda m, p: m.save_pretrained(p), save_adapter])
def test_what_is_loaded_is_refused(save, tmp_path):
    save(trained_by_us(), tmp_path)
    torch.manual_seed(0)
    model = PeftModel.from_pretrained(Net(), tmp_path, is_trainable=True)
    before = snapshot(model)
    with pytest.raises(ValueError, match="has been trained or loaded"):
        apply(model, start="lora")
    assert_same(model, before)
    for inference in (PeftModel.from_pretrained(Net(), tmp_path), make(inference_mode=True)):
        with pytest.raises(ValueError, match="start='lora' needs a trainable adapter"):
            apply(inference, start="lora")
        assert apply(inference).start is None


def test_what_has_no_values_is_refused():
    model = get_peft_model(Net(), config_of(), low_cpu_mem_usage=True)
    with pytest.raises(ValueError, match="is on the meta device"):
        apply(model, start="lora")


def test_only_the_trainable_adapter_takes_the_start(tmp_path):
    trained_by_us().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(Net(), tmp_path)
    model.add_adapter("second", config_of())
    model.set_adapter("second")
    before = snapshot(model)
    assert apply(model, start="lora").allocator.adapter_name == "second"
    assert start_of(adapters_of(model, "second")) == "lora"
    for name, p in model.named_parameters():
        assert ".second" in name or torch.equal(p, before[name]), name


def test_beside_the_adapter_nothing_is_touched():
    """The trained head, biases, frozen matrices, and a layer of the user's own."""
    model = tiny_bert()
    frozen = model.base_model.model.bert.encoder.layer[0]
    for p in frozen.parameters():
        p.requires_grad_(False)
    before = snapshot(model)
    report = apply(model, start="lora")
    assert report.start == "lora"
    for name, p in model.named_parameters():
        assert "lora_" in name or torch.equal(p, before[name]), name
        assert not ("lora_A" in name and torch.equal(p, before[name])), name


def test_a_matrix_of_rank_0_is_no_obstacle():
    model = make()
    model.base_model.model.fc1.update_layer("default", 0, 16, config=model.peft_config["default"])
    for _ in range(2):
        assert apply(model, start="lora").start == "lora"


@pytest.mark.parametrize("wrap", ["mixed", "injected", "module"])
def test_other_ways_to_a_model(wrap):
    torch.manual_seed(0)
    net = Net()
    if wrap == "injected":
        model = inject_adapter_in_model(config_of(), net)
    else:
        model = get_peft_model(net, config_of(), mixed=wrap == "mixed")
    model = nn.Sequential(model) if wrap == "module" else model
    assert apply(model, start="lora").start == "lora"
    assert start_of(adapters_of(model)) == "lora"


# enable


def test_what_peft_makes_starts_like_lora(enable):
    enable(start="lora")
    for model in (
        make(),
        get_peft_model(Net(), config_of(), mixed=True),
        inject_adapter_in_model(config_of(), Net()),
        AdaLoraModel(Net(), config_of(), "default"),
    ):
        assert start_of(adapters_of(model)) == "lora"
    conv = get_peft_model(Conv(), config_of(target_modules=["conv"]))
    assert start_of(adapters_of(conv)) == "lora"
    assert start_of(adapters_of(make(dtype=torch.bfloat16))) == "lora"
    # An adapter that is added later, too; and PEFT's switch for random weights stays what it is.
    model = get_peft_model(Net(), config_of(inference_mode=True), adapter_name="first")
    model.add_adapter("second", config_of())
    assert start_of(adapters_of(model, "second")) == "lora"
    assert allocator_of(model).adapter_name == "second"
    assert start_of(adapters_of(make(init_lora_weights=False))) is None
    # A callback's or a user's own apply finds what is there.
    assert apply(make()).start == apply(make(), start="lora").start == "lora"


def test_the_latest_start_counts_and_disable_restores_peft(enable):
    before = dict(vars(AdaLoraModel)), dict(vars(AdaLoraLayer))
    enable(start="lora")
    enable()
    assert start_of(adapters_of(make())) == "paper"
    enable(start="lora")
    enable(start="lora")
    assert start_of(adapters_of(make())) == "lora"
    ours = make()
    adalora_kernels.peft.disable()
    assert (dict(vars(AdaLoraModel)), dict(vars(AdaLoraLayer))) == before
    # Models of before stay ours; what PEFT adds to them has PEFT's start again.
    assert allocator_of(ours) is not None
    assert start_of(adapters_of(make())) == "paper"


def test_by_default_enable_draws_as_peft_does(enable):
    expected, state = snapshot(make()), torch.get_rng_state()
    enable()
    assert_same(make(), expected)
    assert torch.equal(state, torch.get_rng_state())


def pruned():
    model = make(tinit=3, tfinal=5)
    apply(model)
    train(model, optimizer_of(model, "adamw"), range(1, STEPS + 1))
    return model


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("save", [lambda m, p: m.save_pretrained(p), save_adapter])
def test_from_pretrained_keeps_what_is_loaded(save, low_cpu_mem_usage, trainable, enable, tmp_path):
    model = pruned()
    save(model, tmp_path)
    enable(start="lora")
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(
        Net(), tmp_path, is_trainable=trainable, low_cpu_mem_usage=low_cpu_mem_usage
    )
    torch.testing.assert_close(logits_of(loaded), logits_of(model))
    for there, kept in zip(adapters_of(model), adapters_of(loaded), strict=True):
        left = there.lora_E.flatten() != 0
        kept_E = kept.lora_E.flatten()
        assert torch.equal(kept_E[kept_E != 0], there.lora_E.flatten()[left])
        assert torch.equal(kept.lora_B[:, kept_E != 0], there.lora_B[:, left])
    assert start_of(adapters_of(loaded)) is None
    if trainable:
        assert allocator_of(loaded).summary()["init_budget"] == 9
        with pytest.raises(ValueError, match="has been trained or loaded"):
            apply(loaded, start="lora")


# Training, and files


@pytest.mark.parametrize("attached", [False, True])
def test_a_training_comes_to_its_budget_and_its_files_to_its_function(attached, tmp_path):
    model = make(tinit=3, tfinal=5, orth_reg_weight=0.0)
    report = apply(model, start="lora")
    optimizer = optimizer_of(model, "adamw")
    if attached:
        report.attach(optimizer)
    train(model, optimizer, range(1, STEPS + 1))
    assert report.allocator.summary()["total_rank"] == 9
    model.save_pretrained(tmp_path / "all")
    assert sum(triplets_in(tmp_path / "all").values()) == 9
    save_adapter(model, tmp_path / "compact")
    expected = logits_of(model)
    for folder in ("all", "compact"):
        torch.manual_seed(0)
        loaded = PeftModel.from_pretrained(Net(), tmp_path / folder)
        torch.testing.assert_close(logits_of(loaded), expected)
    # A second run begins with what is left; one that is initialised again, with all.
    report.allocator.detach()
    report.allocator.restart()
    assert report.allocator.summary()["init_budget"] == 9
    for name, layer in adalora_kernels.peft.adalora_layers(model).items():
        assert name in report.swapped or "base_model" in name
        layer.reset_lora_parameters("default")
    assert apply(model, start="lora").start == "lora"
    report.allocator.restart()
    assert report.allocator.summary()["init_budget"] == 18


def test_an_untouched_start_is_saved_and_loaded(tmp_path):
    model = make()
    apply(model, start="lora")
    base = base_logits(model)
    model.save_pretrained(tmp_path / "peft")
    save_adapter(model, tmp_path / "compact")
    save_adapter(model, tmp_path / "full", full_rank=True)
    export_lora(model, tmp_path / "lora")
    for folder in ("peft", "compact", "full", "lora"):
        torch.manual_seed(0)
        loaded = PeftModel.from_pretrained(Net(), tmp_path / folder, is_trainable=True)
        assert torch.equal(logits_of(loaded), base), folder
        if folder == "lora":
            assert isinstance(loaded.peft_config["default"], LoraConfig)
            weights = loaded.state_dict()
            for adapter in adapters_of(model):
                name = f"{adapter.name.replace('lora_E', 'lora_A')}.weight"
                assert torch.equal(weights[name], adapter.lora_A), name
            continue
        kept = {n: p for n, p in adapter_parameters(loaded).items() if "ranknum" not in n}
        for name, p in adapter_parameters(model).items():
            assert torch.equal(p, kept[name]), name
        # It is still new.
        report = apply(loaded, start="lora")
        assert report.start == "lora" and report.allocator.summary()["init_budget"] == 18
    other = make()
    load_adapter(other, tmp_path / "compact")
    assert start_of(adapters_of(other)) == "lora"


def test_merging_an_untouched_start_changes_nothing():
    model = make()
    apply(model, start="lora")
    weight, base = model.base_model.model.fc0.base_layer.weight.clone(), base_logits(model)
    model.merge_adapter()
    assert torch.equal(model.base_model.model.fc0.base_layer.weight, weight)
    model.unmerge_adapter()
    merged = model.merge_and_unload()
    assert torch.equal(merged.fc0.weight, weight)
    assert torch.equal(logits_of(merged), base)

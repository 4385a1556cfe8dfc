"""`adalora_kernels.peft.apply` beside the real PEFT."""

import copy
import dataclasses
import itertools
import pickle
import warnings

import peft
import pytest
import torch
from helpers import assert_as_good_as_eager, triplets_in
from peft import (
    AdaLoraConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.adalora import AdaLoraModel, SVDQuantLinear
from peft.tuners.adalora import SVDLinear as PeftSVDLinear
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import BertConfig, BertForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.pytorch_utils import Conv1D

import adalora_kernels.peft
from adalora_kernels import RankAllocator, orth_reg
from adalora_kernels.adapters import find_adapters
from adalora_kernels.export import save_adapter

STEPS = 30


class Net(nn.Module):
    """Three layers of one kind; cross entropy as transformers' models give it."""

    def __init__(self, kind="linear", bias=True):
        super().__init__()
        sizes = ((16, 24), (24, 20), (20, 8))
        for i, (n, m) in enumerate(sizes):
            layer = Conv1D(m, n) if kind == "conv1d" else nn.Linear(n, m, bias=bias)
            setattr(self, f"fc{i}", layer)

    def forward(self, x, labels=None):
        logits = self.fc2(torch.tanh(self.fc1(torch.tanh(self.fc0(x)))))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def make(kind="linear", bias=True, dtype=torch.float32, **options):
    """A PEFT AdaLoRA model; the same one for the same arguments."""
    torch.manual_seed(0)
    arguments = {
        "init_r": 6,
        "target_r": 3,
        "lora_alpha": 16,
        "orth_reg_weight": 0.1,
        "total_step": STEPS,
        "target_modules": ["fc0", "fc1", "fc2"],
        "fan_in_fan_out": kind == "conv1d",
        **options,
    }
    model = get_peft_model(Net(kind, bias), AdaLoraConfig(**arguments))
    return model.to(dtype).train()


def batch(step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(32, 16, generator=generator).to(dtype)
    return x, torch.randint(0, 8, (32,), generator=generator)


def adapter_parameters(model):
    return {n: p for n, p in model.named_parameters() if "lora_" in n}


def optimizer_of(model, kind):
    parameters = list(adapter_parameters(model).values())
    if kind == "sgd":
        return torch.optim.SGD(parameters, lr=0.5, momentum=0.9)
    return torch.optim.AdamW(parameters, lr=5e-3)


def train(model, optimizer, steps, dtype=torch.float32):
    """The hand-written PEFT loop. (losses, rank pattern after every step)."""
    losses, patterns = [], []
    for step in steps:
        x, labels = batch(step, dtype)
        # Without a task_type PEFT's own model(...) bypasses the regulariser.
        loss = model.base_model(x, labels=labels).loss
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
        patterns.append(copy.deepcopy(model.peft_config["default"].rank_pattern))
    return losses, patterns


SCHEDULES = [
    {"deltaT": 1, "tinit": 5, "tfinal": 5},
    {"deltaT": 7, "tinit": 3, "tfinal": 4},
    {"deltaT": 1, "tinit": 4, "tfinal": 0},
    {"deltaT": 7, "tinit": 2, "tfinal": 0},
]
LAYERS = [{}, {"bias": False}, {"kind": "conv1d"}]
DTYPES = [torch.float32, torch.float64]
OPTIMIZERS = ["adamw", "sgd"]
full = pytest.mark.full


def runs():
    """All combinations; unmarked are four that have each value at least once."""
    values = [SCHEDULES, LAYERS, DTYPES, OPTIMIZERS]
    for indices in itertools.product(*(range(len(v)) for v in values)):
        i = indices[0]
        marks = () if indices == (i, i % 3, i % 2, i // 2) else full
        yield pytest.param(*(v[j] for v, j in zip(values, indices, strict=True)), marks=marks)


@pytest.mark.parametrize(("schedule", "layers", "dtype", "kind"), list(runs()), ids=str)
def test_thirty_steps_follow_peft(schedule, layers, dtype, kind):
    theirs, ours = (make(dtype=dtype, **layers, **schedule) for _ in range(2))
    assert len(adalora_kernels.peft.apply(ours).swapped) == 3
    expected, their_patterns = train(theirs, optimizer_of(theirs, kind), range(1, 31), dtype)
    losses, our_patterns = train(ours, optimizer_of(ours, kind), range(1, 31), dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-9
    assert losses == pytest.approx(expected, rel=tolerance, abs=0)
    assert our_patterns == their_patterns
    assert our_patterns[-1] is not None
    for factor in ("lora_A", "lora_E", "lora_B"):
        a, b = (
            torch.cat([p.flatten() for n, p in adapter_parameters(m).items() if factor in n])
            for m in (theirs, ours)
        )
        assert (a - b).norm() <= tolerance * a.norm(), factor


def test_what_is_swapped_and_what_stays():
    model = make()
    names, state = list(model.state_dict()), copy.deepcopy(model.state_dict())
    parameters = {id(p) for p in model.parameters()}
    calls = []
    model.base_model.model.fc1.register_forward_hook(lambda *_: calls.append(1))
    report = adalora_kernels.peft.apply(model)
    assert report.swapped == ["fc0", "fc1", "fc2"] and report.left == {}
    assert report.allocator is model.base_model.rankallocator
    assert isinstance(report.allocator, RankAllocator)
    assert "3 AdaLoRA layers swapped" in str(report) and "18 -> 9" in str(report)
    assert "task_type" in str(report)
    assert isinstance(model.base_model.model.fc0, PeftSVDLinear)
    assert {id(p) for p in model.parameters()} == parameters
    assert list(model.state_dict()) == names
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    model(*batch(1))
    assert calls == [1]
    again = adalora_kernels.peft.apply(model)
    assert again.swapped == report.swapped and again.allocator is report.allocator


def test_our_allocator_on_a_plain_peft_model():
    model = make()
    frozen = AdaLoraConfig(init_r=4, target_modules=["fc0"], total_step=5, inference_mode=True)
    model.add_adapter("other", frozen)
    # The trainable adapter is found; another one when it is named.
    names = [f"base_model.model.fc{i}.lora_E.default" for i in range(3)]
    assert [a.name for a in find_adapters(model)] == names
    assert [a.lora_A.shape[0] for a in find_adapters(model, "other")] == [4]
    allocator = RankAllocator(model, target_r=3, total_step=STEPS, tinit=5, tfinal=5)
    optimizer = optimizer_of(model, "adamw")
    for step in range(1, STEPS + 1):
        x, labels = batch(step)
        (model(x, labels=labels).loss + orth_reg(model, 0.1)).backward()
        optimizer.step()
        allocator.step(step)
        optimizer.zero_grad()
    parameters = adapter_parameters(model)
    assert sum(int((parameters[name] != 0).sum()) for name in names) == 9
    y = model(x).logits
    allocator.shrink(optimizer)
    torch.testing.assert_close(model(x).logits, y)
    assert sum(len(parameters[name]) for name in names) == 9


def test_the_base_model_may_be_given():
    model = make()
    assert adalora_kernels.peft.apply(model.base_model).swapped == ["fc0", "fc1", "fc2"]


def test_a_hook_on_the_base_layer_still_runs():
    model = make()
    adalora_kernels.peft.apply(model)
    fused = model(*batch(1)).logits
    calls = []
    model.base_model.model.fc1.base_layer.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(model(*batch(1)).logits, fused)
    assert calls == [1]


def test_layers_that_are_left_are_reported_and_allocated():
    class WithConv(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 4)

        def forward(self, x):
            y = self.fc(self.conv(x).mean(dim=(2, 3)))
            return SequenceClassifierOutput(loss=y.square().mean(), logits=y)

    config = AdaLoraConfig(init_r=3, target_r=1, target_modules=["conv", "fc"], total_step=5)
    model = get_peft_model(WithConv(), config)
    report = adalora_kernels.peft.apply(model)
    assert report.swapped == ["fc"] and list(report.left) == ["conv"]
    assert "SVDConv2d" in report.left["conv"] and "conv" in str(report)
    for step in range(1, 6):
        model(torch.randn(2, 3, 8, 8)).loss.backward()
        model.base_model.update_and_allocate(step)
    assert sum(report.allocator.ranks().values()) == 2


@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_the_regulariser_is_in_the_training_loss_only(weight):
    model = make(orth_reg_weight=weight)
    adalora_kernels.peft.apply(model)
    x, labels = batch(1)
    task = nn.functional.cross_entropy(model(x).logits, labels)
    expected = task + weight * orth_reg(model.base_model.model, 1.0)
    tuner = model.base_model
    torch.testing.assert_close(tuner(x, labels=labels).loss, expected)
    torch.testing.assert_close(tuner(x, labels=labels)["loss"], expected)
    model.eval()
    torch.testing.assert_close(tuner(x, labels=labels).loss, task)


def tiny_bert():
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    model = BertForSequenceClassification(config)
    config = AdaLoraConfig(
        task_type="SEQ_CLS",
        init_r=4,
        target_r=2,
        total_step=20,
        tinit=3,
        tfinal=4,
        deltaT=2,
        target_modules=["query", "key", "value", "dense"],
        modules_to_save=["classifier"],
    )
    return get_peft_model(model, config).train()


def test_a_transformers_model_with_a_task_type_follows_peft():
    results = []
    for apply in (False, True):
        model = tiny_bert()
        if apply:
            report = adalora_kernels.peft.apply(model)
            (note,) = report.notes
            assert "tinit = 3 steps" in note and len(report.swapped) == 13
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
        losses = []
        for step in range(1, 21):
            generator = torch.Generator().manual_seed(step)
            ids = torch.randint(0, 50, (8, 10), generator=generator)
            loss = model(input_ids=ids, labels=ids.sum(dim=1) % 2).loss
            loss.backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
            losses.append(loss.item())
        results.append((losses, model.peft_config["default"].rank_pattern))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-6, abs=0)
    assert results[1][1] == results[0][1]


def test_disabled_merged_and_unmerged_adapters():
    model = make()
    adalora_kernels.peft.apply(model)
    train(model, optimizer_of(model, "sgd"), range(1, 11))
    x, _ = batch(1)
    model.eval()
    y = model(x).logits
    with model.disable_adapter():
        base = model(x).logits
    assert not torch.allclose(base, y)
    model.merge_adapter()
    torch.testing.assert_close(model(x).logits, y)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x).logits, y)
    torch.testing.assert_close(model.merge_and_unload()(x).logits, y)


def test_two_active_adapters_add_up():
    model = make()
    adalora_kernels.peft.apply(model)
    frozen = AdaLoraConfig(
        init_r=4, lora_alpha=8, target_modules=["fc0"], total_step=5, inference_mode=True
    )
    model.add_adapter("other", frozen)
    adalora_kernels.peft.apply(model)
    layer = model.base_model.model.fc0
    for p in layer.lora_E.values():
        nn.init.normal_(p)
    layer._active_adapter = ["default", "other"]
    x, _ = batch(1)
    expected = (
        layer.base_layer(x)
        + x @ (layer.get_delta_weight("default") + layer.get_delta_weight("other")).T
    )
    torch.testing.assert_close(layer(x), expected)


def test_dropout_is_for_training_only():
    model = make(lora_dropout=0.5)
    adalora_kernels.peft.apply(model)
    for layer in ("fc0", "fc1", "fc2"):
        nn.init.normal_(getattr(model.base_model.model, layer).lora_E["default"])
    x, _ = batch(1)
    assert not torch.equal(model(x).logits, model(x).logits)
    model.eval()
    y = model(x).logits
    reference = make(lora_dropout=0.5).eval()
    reference.load_state_dict(model.state_dict())
    torch.testing.assert_close(y, reference(x).logits)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32_adapter", "autocast"])
def test_bfloat16(autocast):
    model = make(dtype=torch.float32 if autocast else torch.bfloat16)
    if not autocast:
        for p in adapter_parameters(model).values():
            p.data = p.data.float()
    for layer in ("fc0", "fc1", "fc2"):
        nn.init.normal_(getattr(model.base_model.model, layer).lora_E["default"])
    exact = copy.deepcopy(model).double()
    x, _ = batch(1, torch.float32 if autocast else torch.bfloat16)
    errors = []
    for apply in (False, True):
        if apply:
            adalora_kernels.peft.apply(model)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            logits = model(x).logits
        assert logits.dtype == torch.bfloat16
        errors.append((logits.double() - exact(x.double()).logits).norm())
    assert errors[1] <= 2 * errors[0]


def test_saved_adapter_loads_in_plain_peft(tmp_path):
    model = make(tinit=3, tfinal=5)
    adalora_kernels.peft.apply(model)
    train(model, optimizer_of(model, "adamw"), range(1, 31))
    model.save_pretrained(tmp_path)
    assert sum(triplets_in(tmp_path).values()) == 9
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Net(), tmp_path).eval()
    assert type(loaded.base_model.model.fc0) is PeftSVDLinear
    x, _ = batch(1)
    torch.testing.assert_close(loaded(x).logits, model.eval()(x).logits)
    # An adapter that is only used, not trained: its layers are swapped, there is no allocator.
    report = adalora_kernels.peft.apply(loaded)
    assert report.allocator is None and len(report.swapped) == 3
    assert "nothing to allocate" in str(report)
    torch.testing.assert_close(loaded(x).logits, model(x).logits)


def test_shrunk_model_saves_and_loads(tmp_path):
    model = make(tinit=3, tfinal=5)
    allocator = adalora_kernels.peft.apply(model).allocator
    optimizer = optimizer_of(model, "adamw")
    train(model, optimizer, range(1, 26))
    allocator.shrink(optimizer)
    layer = model.base_model.model.fc0
    assert (
        layer.r["default"]
        == len(layer.lora_E["default"])
        == allocator.ranks()["fc0.lora_E.default"]
    )
    train(model, optimizer, range(26, 31))
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Net(), tmp_path).eval()
    x, _ = batch(1)
    torch.testing.assert_close(loaded(x).logits, model.eval()(x).logits)


def test_apply_goes_on_from_pefts_averages():
    theirs, ours = make(tinit=3, tfinal=5), make(tinit=3, tfinal=5)
    optimizers = [optimizer_of(m, "sgd") for m in (theirs, ours)]
    train(ours, optimizers[1], range(1, 12))
    averages = vars(ours.base_model.rankallocator)
    state = adalora_kernels.peft.apply(ours).allocator.state_dict()
    for key in ("exp_avg_ipt", "exp_avg_unc"):
        names = (f"fc{i}.lora_{factor}.default" for i in range(3) for factor in "AEB")
        assert all(map(torch.equal, state[key], (averages[key][name] for name in names)))
    expected = train(theirs, optimizers[0], range(1, 31))
    losses, patterns = train(ours, optimizers[1], range(12, 31))
    assert losses == pytest.approx(expected[0][11:], rel=1e-6, abs=0)
    assert patterns == expected[1][11:]


def test_apply_after_pefts_pattern_is_final_is_refused():
    model = make(tinit=3, tfinal=5)
    train(model, optimizer_of(model, "sgd"), range(1, 27))
    with pytest.raises(ValueError, match="final already"):
        adalora_kernels.peft.apply(model)
    assert type(model.base_model.model.fc0) is PeftSVDLinear


def test_a_layer_with_a_new_rank_has_its_new_scaling():
    model = make()
    adalora_kernels.peft.apply(model)
    layer = model.base_model.model.fc0
    layer.update_layer("default", 4, 16, config=model.peft_config["default"])
    nn.init.normal_(layer.lora_E["default"])
    x, _ = batch(1)
    expected = layer.base_layer(x) + x @ layer.get_delta_weight("default").T
    torch.testing.assert_close(layer(x), expected)


def test_total_step_set_on_the_config_is_followed():
    model = make()
    allocator = adalora_kernels.peft.apply(model).allocator
    model.peft_config["default"].total_step = 50
    train(model, optimizer_of(model, "sgd"), [1])
    assert allocator.schedule.total_step == 50
    assert allocator.schedule.target_budget == 9
    model.peft_config["default"].target_r = 2
    assert allocator.schedule.target_budget == 6
    # A schedule that is set goes to the config, and keeps a budget that no target_r gives.
    allocator.schedule = dataclasses.replace(allocator.schedule, target_budget=7, tinit=4)
    assert model.peft_config["default"].tinit == 4
    assert allocator.schedule.target_budget == 7


def test_copies_and_pickles():
    model = make(tinit=3, tfinal=5)
    adalora_kernels.peft.apply(model)
    optimizer = optimizer_of(model, "sgd")
    train(model, optimizer, range(1, 11))
    config = model.peft_config["default"]
    for copied in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert copied.rank_pattern is None  # It may be for another model; this one's copy reads it.
        assert copied.to_dict() == config.to_dict()
    other = copy.deepcopy(model)
    assert other.peft_config["default"].rank_pattern == config.rank_pattern is not None
    x, _ = batch(1)
    assert torch.equal(other(x).logits, model(x).logits)
    other_optimizer = optimizer_of(other, "sgd")
    other_optimizer.load_state_dict(optimizer.state_dict())
    before = copy.deepcopy(model.state_dict())
    assert len(train(other, other_optimizer, range(11, 14))[0]) == 3
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(pickle.loads(pickle.dumps(model))(x).logits, model(x).logits)


def test_compile_fullgraph():
    model = make()
    adalora_kernels.peft.apply(model)
    for layer in ("fc0", "fc1", "fc2"):
        nn.init.normal_(getattr(model.base_model.model, layer).lora_E["default"])
    inner = model.base_model.model
    compiled = torch.compile(inner, fullgraph=True, backend="aot_eager_decomp_partition")
    x, labels = batch(1)
    torch.testing.assert_close(compiled(x, labels=labels).loss, inner(x, labels=labels).loss)


def test_no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = make()
        adalora_kernels.peft.apply(model)
        train(model, optimizer_of(model, "sgd"), range(1, 3))


def test_versions():
    # The comparisons above are with this one; another may differ in what is compared.
    assert peft.__version__ == "0.21.2"


# Where else adapters live: other layers, other ways to make them


def trained(model, steps=30):
    """The model after `steps` steps with our allocator attached; its allocator."""
    allocator = adalora_kernels.peft.allocator_of(model)
    optimizer = optimizer_of(model, "adamw")
    allocator.attach(optimizer)
    for step in range(1, steps + 1):
        x, labels = batch(step)
        model(x, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    allocator.detach()
    return allocator


@pytest.fixture
def enabled():
    adalora_kernels.peft.enable()
    yield
    adalora_kernels.peft.disable()


def test_enable_and_disable_leave_pefts_classes_as_they_were():
    classes = (AdaLoraModel, AdaLoraConfig, PeftSVDLinear)
    before = [dict(vars(cls)) for cls in classes]
    adalora_kernels.peft.enable()
    adalora_kernels.peft.enable()
    try:
        assert [dict(vars(cls)) for cls in classes] != before
        model = make()
        assert isinstance(model.base_model.rankallocator, RankAllocator)
        assert type(model.base_model.model.fc0) is not PeftSVDLinear
    finally:
        adalora_kernels.peft.disable()
    assert [dict(vars(cls)) for cls in classes] == before
    plain = make()
    assert type(plain.base_model) is AdaLoraModel
    assert type(plain.base_model.model.fc0) is PeftSVDLinear
    assert not isinstance(plain.base_model.rankallocator, RankAllocator)
    # What was made in between stays ours, and works.
    assert trained(model).summary()["total_rank"] == 9


def test_an_enabled_model_trains_like_an_applied_one(enabled):
    losses = train(model := make(tinit=3, tfinal=5), optimizer_of(model, "sgd"), range(1, 31))
    adalora_kernels.peft.disable()
    applied = make(tinit=3, tfinal=5)
    adalora_kernels.peft.apply(applied)
    assert train(applied, optimizer_of(applied, "sgd"), range(1, 31)) == losses


def test_total_step_may_come_later():
    model = make()
    model.peft_config["default"].total_step = None
    allocator = adalora_kernels.peft.apply(model).allocator
    x, labels = batch(1)
    model(x, labels=labels).loss.backward()
    with pytest.raises(RuntimeError, match="total_step is not known"):
        allocator.step(1)
    model.peft_config["default"].total_step = STEPS
    assert allocator.schedule.total_step == STEPS
    allocator.set_total_step(40)
    assert model.peft_config["default"].total_step == 40


def inject(name="default", **options):
    torch.manual_seed(0)
    arguments = {"init_r": 6, "target_r": 3, "total_step": STEPS, "tinit": 3, "tfinal": 5}
    config = AdaLoraConfig(**{**arguments, "target_modules": ["fc0", "fc1", "fc2"], **options})
    return inject_adapter_in_model(config, Net(), name).train()


@pytest.mark.parametrize("how", ["apply", "enable"])
def test_injected_adapters_are_allocated(how, tmp_path):
    if how == "enable":
        adalora_kernels.peft.enable()
    try:
        model = inject()
    finally:
        adalora_kernels.peft.disable()
    report = adalora_kernels.peft.apply(model)
    assert report.swapped == ["fc0", "fc1", "fc2"]
    assert adalora_kernels.peft.apply(model).allocator is report.allocator
    assert adalora_kernels.peft.allocator_of(model) is report.allocator
    optimizer = optimizer_of(model, "adamw")
    for step in range(1, 31):
        x, labels = batch(step)
        (model(x, labels=labels).loss + orth_reg(model, 0.5)).backward()
        optimizer.step()
        model.update_and_allocate(step)
        optimizer.zero_grad()
    assert report.allocator.frozen and sum(report.allocator.ranks().values()) == 9
    # PEFT's own functions save it, and load it into another such model and into a PeftModel.
    model.peft_config["default"].save_pretrained(tmp_path)
    state = get_peft_model_state_dict(model)
    assert sum(triplets_in(state).values()) == 9
    save_file(
        {f"base_model.model.{name}": t for name, t in state.items()},
        tmp_path / "adapter_model.safetensors",
    )
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Net(), tmp_path).eval()
    x, _ = batch(1)
    torch.testing.assert_close(loaded(x).logits, model.eval()(x).logits)
    other = inject()
    adalora_kernels.peft.apply(other)
    set_peft_model_state_dict(other, state)
    torch.testing.assert_close(other.eval()(x).logits, model(x).logits)
    copied = copy.deepcopy(model)
    assert adalora_kernels.peft.allocator_of(copied) is not report.allocator
    assert copied.update_and_allocate.__self__ is adalora_kernels.peft.allocator_of(copied)


def test_an_adapter_inside_another_model():
    """sentence-transformers, for instance, adds the adapter to the transformer inside."""
    model = nn.Sequential(inject(), nn.Identity())
    report = adalora_kernels.peft.apply(model)
    assert report.swapped == ["fc0", "fc1", "fc2"]
    assert adalora_kernels.peft.allocator_of(nn.Sequential(model)) is report.allocator


def test_mixed_adapters():
    torch.manual_seed(0)
    config = AdaLoraConfig(
        init_r=4, target_r=2, total_step=20, tfinal=5, target_modules=["fc0", "fc1"]
    )
    model = get_peft_model(Net(), config, "ada", mixed=True)
    model.add_adapter("plain", LoraConfig(r=2, target_modules=["fc1", "fc2"]))
    model.set_adapter(["ada", "plain"])
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
            parameter.requires_grad_(True)
    x, labels = batch(1)
    expected = model(x).logits
    report = adalora_kernels.peft.apply(model)
    assert report.swapped == ["fc0", "fc1.base_layer"]  # under the plain LoRA
    torch.testing.assert_close(model(x).logits, expected)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    report.allocator.attach(optimizer)
    for step in range(1, 21):
        x, labels = batch(step)
        model(x, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sum(report.allocator.ranks().values()) == 4


def test_several_trainable_adapters_are_refused():
    model = get_peft_model(Net(), LoraConfig(target_modules=["fc0"]), "lora", mixed=True)
    for name in ("a", "b"):
        model.add_adapter(name, AdaLoraConfig(total_step=9, target_modules=["fc1"]))
    with pytest.raises(ValueError, match=r"several .*\['a', 'b'\]"):
        adalora_kernels.peft.apply(model)
    assert type(model.base_model.model.fc1) is PeftSVDLinear


@pytest.mark.parametrize(
    "name", ["fc", "lora_E", *(pytest.param(n, marks=full) for n in ("f", "lora", "0", "model"))]
)
def test_an_adapter_named_like_a_module(name, tmp_path):
    torch.manual_seed(0)
    config = AdaLoraConfig(
        init_r=6, target_r=3, total_step=STEPS, tfinal=5, target_modules=["fc0", "fc1", "fc2"]
    )
    model = get_peft_model(Net(), config, name).train()
    adalora_kernels.peft.apply(model)
    assert sum(trained(model).ranks().values()) == 9
    model.save_pretrained(tmp_path)
    x, _ = batch(1)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Net(), tmp_path / name).eval()  # under PEFT's usual name
    torch.testing.assert_close(loaded(x).logits, model.eval()(x).logits)
    ranks = triplets_in(tmp_path / name)
    assert sorted(ranks) == [f"fc{i}" for i in range(3)] and sum(ranks.values()) == 9


@pytest.mark.parametrize("save", [save_adapter, PeftModel.save_pretrained])
def test_a_pruned_adapter_is_trained_further(save, tmp_path, enabled):
    """The second run keeps all that is there, the third prunes it further."""
    x, _ = batch(1)
    model, logits = make(tinit=3, tfinal=5), None
    for run, (target_r, before, after) in enumerate([(3, 18, 9), (3, 9, 9), (2, 9, 6)]):
        folder = tmp_path / str(run)
        if run > 0:
            config = PeftConfig.from_pretrained(tmp_path / str(run - 1))
            config.target_r = target_r
            torch.manual_seed(0)
            model = PeftModel.from_pretrained(
                Net(), tmp_path / str(run - 1), is_trainable=True, config=config
            )
            torch.testing.assert_close(model.eval()(x).logits, logits)
        allocator = adalora_kernels.peft.allocator_of(model)
        trained(model.train())
        assert allocator.schedule.init_budget == before
        assert sum(allocator.ranks().values()) == after
        save(model, folder)
        logits = model.eval()(x).logits
        saved = load_file(folder / "adapter_model.safetensors")
        assert sum(triplets_in(saved).values()) == after
    adalora_kernels.peft.disable()
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Net(), folder).eval()
    assert type(loaded.base_model.model.fc0) is PeftSVDLinear
    torch.testing.assert_close(loaded(x).logits, logits)


def test_a_checkpoint_goes_back_into_the_run_that_wrote_it():
    model = make(tinit=3, tfinal=5)
    allocator = adalora_kernels.peft.apply(model).allocator
    trained(model)
    allocator.saves_all = True
    state = {name: value.clone() for name, value in get_peft_model_state_dict(model).items()}
    assert {len(value) for name, value in state.items() if "lora_E" in name} == {6}
    for parameter in adapter_parameters(model).values():
        nn.init.zeros_(parameter)
    set_peft_model_state_dict(model, state)
    again = get_peft_model_state_dict(model)
    assert all(torch.equal(again[name], value) for name, value in state.items())


def test_rank_zero(tmp_path):
    model = make(tinit=3, tfinal=5, target_r=0)
    adalora_kernels.peft.apply(model)
    allocator = trained(model)
    assert set(allocator.ranks().values()) == {0}
    allocator.shrink()
    x, labels = batch(1)
    with model.disable_adapter():
        base = model(x).logits
    torch.testing.assert_close(model(x).logits, base)
    model.base_model(x, labels=labels)  # the regulariser of nothing
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT takes it for damaged
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(make().unload(), tmp_path)
    assert set(loaded.state_dict()) >= {"base_model.model.fc0.lora_E.default"}


def test_a_trainable_adapter_that_is_not_the_first(enabled):
    options = {"init_r": 4, "total_step": STEPS, "target_modules": ["fc0", "fc1"]}
    first = AdaLoraConfig(inference_mode=True, **options)
    model = get_peft_model(Net(), first, "first").train()
    assert adalora_kernels.peft.allocator_of(model) is None
    x, labels = batch(1)
    assert model.base_model(x, labels=labels).loss is not None  # PEFT: AttributeError
    model.add_adapter("second", AdaLoraConfig(target_r=2, tfinal=4, **options))
    model.set_adapter("second")
    assert sum(trained(model).ranks().values()) == 4
    model.delete_adapter("second")
    assert adalora_kernels.peft.allocator_of(model) is None
    assert not hasattr(model.base_model.model, "update_and_allocate")
    assert model.base_model(x, labels=labels).loss is not None
    model.add_adapter("third", AdaLoraConfig(target_r=2, **options))
    assert adalora_kernels.peft.allocator_of(model).adapters[0].key == "third"


def test_low_cpu_mem_usage(tmp_path, enabled):
    """PEFT itself cannot load a pruned adapter so."""
    saved = make(tinit=3, tfinal=5)
    trained(saved)
    saved.save_pretrained(tmp_path)
    torch.manual_seed(0)
    model = PeftModel.from_pretrained(
        Net(), tmp_path, is_trainable=True, low_cpu_mem_usage=True
    ).train()
    x, _ = batch(1)
    torch.testing.assert_close(model.eval()(x).logits, saved.eval()(x).logits)
    assert sum(trained(model.train()).ranks().values()) == 9


def test_an_empty_model_that_is_filled_later(enabled):
    torch.manual_seed(0)
    config = AdaLoraConfig(init_r=6, target_r=3, total_step=STEPS, target_modules=["fc0", "fc1"])
    model = get_peft_model(Net(), config, low_cpu_mem_usage=True).train()
    assert model.base_model.model.fc0.lora_A["default"].is_meta
    state = {n: torch.randn(p.shape) for n, p in model.named_parameters() if "lora_" in n}
    model.load_state_dict(state, strict=False, assign=True)
    for parameter in adapter_parameters(model).values():
        parameter.requires_grad_(True)
    assert sum(trained(model).ranks().values()) == 6


@pytest.mark.parametrize(
    "reentrant",
    [pytest.param(False, marks=full), True],
    ids=["non_reentrant", "reentrant"],
)
def test_gradient_checkpointing(reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = tiny_bert()
        adalora_kernels.peft.apply(model)
        if checkpointing:
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.base_model.model.enable_input_require_grads()
        for name, parameter in model.named_parameters():
            if "lora_E" in name:
                nn.init.ones_(parameter)
        ids = torch.arange(20).reshape(2, 10)
        model(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()
        gradients.append([p.grad for p in adapter_parameters(model).values() if p.requires_grad])
    assert all(g is not None for g in gradients[0])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("kind", "safe"),
    [
        ("linear", True),
        ("conv1d", False),
        pytest.param("linear", False, marks=full),
        pytest.param("conv1d", True, marks=full),
    ],
)
def test_merging_after_training(kind, safe):
    model = make(kind, tinit=3, tfinal=5)
    adalora_kernels.peft.apply(model)
    trained(model)
    x, _ = batch(1)
    y = model.eval()(x).logits
    model.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(model(x).logits, y)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x).logits, y)
    with torch.no_grad():
        model.base_model.model.fc0.lora_A["default"][0, 0] = torch.nan
        model.base_model.model.fc0.lora_E["default"].fill_(1.0)
    if safe:
        with pytest.raises(ValueError, match="NaNs detected"):
            model.merge_adapter(safe_merge=True)


def test_merge_and_unload_leaves_nothing_of_ours():
    model = make()
    adalora_kernels.peft.apply(model)
    names = set(vars(Net()))
    assert set(vars(model.merge_and_unload())) - names == set()


class Opaque(nn.Module):
    """A base layer of which nothing is known but its output: what a quantised one is to us."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("qweight", (linear.weight.data * 64).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.qweight.to(x.dtype) / 64, self.bias.to(x.dtype))


def gradients(model):
    return [p.grad for p in adapter_parameters(model).values() if p.grad is not None]


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float32, marks=full),
        torch.float16,
        pytest.param(torch.bfloat16, marks=full),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_gptq_layers(dtype):
    """PEFT's layer class over an opaque base: gptqmodel itself needs a GPU."""
    torch.manual_seed(0)
    config = AdaLoraConfig(init_r=4, total_step=9, lora_alpha=8)
    base = Opaque(nn.Linear(16, 24))
    layer = SVDQuantLinear(base, "default", config, r=4, lora_alpha=8)
    nn.init.normal_(layer.lora_E["default"])
    model = nn.ModuleDict({"layer": layer})
    model.peft_config = {"default": config}
    x, g = torch.randn(5, 16).to(dtype), torch.randn(5, 24).to(dtype)
    results = []
    for ours in (False, True):
        if ours:
            assert adalora_kernels.peft.apply(model).swapped == ["layer"]
        model.zero_grad()
        y = layer(x)
        y.backward(g)
        factors = [getattr(layer, f)["default"] for f in ("lora_A", "lora_E", "lora_B")]
        results.append([y, *(p.grad for p in factors)])
    a, e, b = (p.detach().double().requires_grad_() for p in factors)
    oracle = base(x.double()) + 8 / (4 + 1e-5) * (x.double() @ (a * e).T @ b.T)
    oracle.backward(g.double())
    for mine, theirs, exact in zip(*results[::-1], [oracle, a.grad, e.grad, b.grad], strict=True):
        assert_as_good_as_eager(mine, theirs, exact)


@pytest.mark.parametrize(
    ("bits", "dtype"),
    [
        (8, torch.bfloat16),
        (4, torch.float16),
        *(
            pytest.param(bits, dtype, marks=full)
            for bits, dtype in ((8, torch.float32), (8, torch.float16), (4, torch.float32))
        ),
        pytest.param(4, torch.bfloat16, marks=full),
    ],
    ids=str,
)
def test_bitsandbytes_layers(bits, dtype):
    bnb = pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes (extra test)")

    def quantised():
        torch.manual_seed(0)
        net = Net()
        for name in ("fc0", "fc1", "fc2"):
            linear = getattr(net, name)
            sizes = (linear.in_features, linear.out_features)
            if bits == 8:
                layer = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
                layer.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False)
            else:
                layer = bnb.nn.Linear4bit(*sizes, compute_dtype=dtype, quant_type="nf4")
                layer.weight = bnb.nn.Params4bit(linear.weight.data, quant_type="nf4")
            layer.bias = linear.bias
            setattr(net, name, layer.to("cpu"))
        setattr(net, f"is_loaded_in_{bits}bit", True)
        names = ["fc0", "fc1", "fc2"]
        options = {"init_r": 6, "target_r": 3, "lora_alpha": 8, "total_step": STEPS, "tfinal": 5}
        model = get_peft_model(net, AdaLoraConfig(target_modules=names, **options)).train()
        for name in names:
            nn.init.normal_(getattr(model.base_model.model, name).lora_E["default"], std=0.5)
        return model

    results = []
    x, labels = batch(1)
    x = x.to(dtype).requires_grad_()
    for ours in (False, True):
        model = quantised()
        if ours:
            report = adalora_kernels.peft.apply(model)
            assert len(report.swapped) == 3 and report.left == {}
        x.grad = None
        y = model(x).logits
        nn.functional.cross_entropy(y.float(), labels).backward()
        results.append([y, x.grad, *gradients(model)])
    assert len(results[0]) == len(results[1]) == 11
    # PEFT's 8-bit layers return float32 whatever the base layer does; ours the base layer's dtype.
    assert results[1][0].dtype == dtype
    for mine, theirs in zip(*results, strict=True):
        # Both round to dtype here and there, in three layers.
        assert (mine - theirs).norm() <= 16 * torch.finfo(dtype).eps * theirs.norm()
    optimizer = optimizer_of(model, "adamw")
    report.allocator.attach(optimizer)
    for step in range(1, 31):
        x, labels = batch(step)
        nn.functional.cross_entropy(model(x.to(dtype)).logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sum(report.allocator.ranks().values()) == 9


@pytest.mark.parametrize("loop", ["forgotten", "by_hand", "attached"])
def test_a_forgotten_allocator_is_warned_of_once(loop):
    model = make()
    allocator = adalora_kernels.peft.apply(model).allocator
    optimizer = torch.optim.AdamW(adapter_parameters(model).values(), fused=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if loop == "attached":
            allocator.attach(optimizer)
            for _ in range(2):
                optimizer.step()  # without a gradient there is nothing to allocate yet
        for step in range(1, 6):
            x, labels = batch(step)
            model(x, labels=labels).loss.backward()
            optimizer.step()
            if loop == "by_hand":
                model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
    messages = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    expected = ["AdaLoRA is training as plain LoRA"] if loop == "forgotten" else []
    assert [m.split(":")[0] for m in messages] == expected


def test_the_warning_goes_with_other_hooks_on_all_optimizers():
    model = make()
    allocator = adalora_kernels.peft.apply(model).allocator
    calls = []
    handle = register_optimizer_step_post_hook(lambda *_: calls.append(1))
    try:
        trained(model, 3)
    finally:
        handle.remove()
    assert len(calls) == 3 and allocator.global_step == 3

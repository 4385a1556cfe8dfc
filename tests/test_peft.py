"""`adalora_kernels.peft.apply` beside the real PEFT."""

import copy
import json
import pickle
import warnings

import peft
import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.adalora import SVDLinear as PeftSVDLinear
from torch import nn
from transformers import BertConfig, BertForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.pytorch_utils import Conv1D

import adalora_kernels.peft
from adalora_kernels import RankAllocator, orth_reg
from adalora_kernels.adapters import find_adapters

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


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "layers",
    [{}, {"bias": False}, {"kind": "conv1d"}],
    ids=["linear", "linear_no_bias", "conv1d"],
)
@pytest.mark.parametrize(
    "schedule",
    [
        {"deltaT": 1, "tinit": 5, "tfinal": 5},
        {"deltaT": 7, "tinit": 3, "tfinal": 4},
        {"deltaT": 1, "tinit": 4, "tfinal": 0},
        {"deltaT": 7, "tinit": 2, "tfinal": 0},
    ],
    ids=str,
)
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


def test_not_an_adalora_model():
    lora = get_peft_model(Net(), LoraConfig(target_modules=["fc0"]))
    for wrong in (lora, Net(), None):
        with pytest.raises(TypeError, match="AdaLoraConfig"):
            adalora_kernels.peft.apply(wrong)


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
            assert report.notes == [] and len(report.swapped) == 13
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
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert sum(map(sum, config["rank_pattern"].values())) == 9
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
    adalora_kernels.peft.apply(ours)
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


def test_copies_and_pickles():
    model = make(tinit=3, tfinal=5)
    adalora_kernels.peft.apply(model)
    optimizer = optimizer_of(model, "sgd")
    train(model, optimizer, range(1, 11))
    config = model.peft_config["default"]
    for copied in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert copied.rank_pattern == config.rank_pattern
        assert copied.to_dict() == config.to_dict()
    other = copy.deepcopy(model)
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

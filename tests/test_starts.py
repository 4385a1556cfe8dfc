"""What an adapter starts with: the values, the arithmetic behind them, and our own layers."""

import copy
import math
import pickle

import pytest
import torch
from helpers import Mlp, batch, trainable
from torch import nn

import adalora_kernels.loralib as loralib
from adalora_kernels import RankAllocator, SVDLinear, mark_only_lora_as_trainable
from adalora_kernels.adapters import find_adapters
from adalora_kernels.starts import slow_path, start_, start_adapters_, start_of

WRONG = ["LoRA", "", None, 1, ["lora"]]


def factors(r=6, in_features=16, out_features=24, **options):
    return [torch.full(s, 7.0, **options) for s in ((r, in_features), (r, 1), (out_features, r))]


def adapters_of(model):
    return find_adapters(model)


def values_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(model, before):
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_values_are_those_of_lora(dtype):
    A, E, B = factors(dtype=dtype)
    torch.manual_seed(3)
    start_(A, E, B, "lora")
    torch.manual_seed(3)
    assert torch.equal(A, nn.Linear(16, 6, bias=False, dtype=dtype).weight)
    assert A.abs().max() <= 1 / math.sqrt(16)
    assert bool((E == 1).all()) and not B.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_values_are_those_of_the_paper(dtype):
    A, E, B = factors(dtype=dtype)
    torch.manual_seed(3)
    start_(A, E, B, "paper")
    torch.manual_seed(3)
    assert torch.equal(A, torch.empty_like(A).normal_(std=0.02)) and not E.any()
    assert torch.equal(B, torch.empty_like(B).normal_(std=0.02))


def test_an_adapter_of_rank_0_has_any_start():
    for start in ("paper", "lora"):
        start_(*factors(r=0), start)  # pytest makes an error of a warning of torch's


# The layer


@pytest.mark.parametrize("make", [SVDLinear, loralib.SVDLinear])
def test_by_default_a_layer_has_the_papers_start_bit_for_bit(make):
    layers, generators = [], []
    for options in ({}, {"start": "paper"}):
        torch.manual_seed(0)
        layers.append(make(16, 24, r=6, **options))
        generators.append(torch.get_rng_state())
    # As loralib draws: nn.Linear, and then once more nn.Linear, lora_A and lora_B.
    torch.manual_seed(0)
    base = nn.Linear(16, 24)
    base.reset_parameters()
    A, E, B = factors()
    start_(A, E, B, "paper")
    for layer, state in zip(layers, generators, strict=True):
        assert torch.equal(state, torch.get_rng_state())
        pairs = ((layer.lora_A, A), (layer.lora_E, E), (layer.lora_B, B))
        for actual, expected in (*pairs, (layer.weight, base.weight), (layer.bias, base.bias)):
            assert torch.equal(actual, expected)


def from_linear(in_features, out_features, **options):
    return SVDLinear.from_linear(nn.Linear(in_features, out_features), **options)


@pytest.mark.parametrize("start", ["paper", "lora"])
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (SVDLinear, {}),
        (SVDLinear, {"fan_in_fan_out": True, "bias": False}),
        (SVDLinear, {"dtype": torch.bfloat16}),
        (SVDLinear, {"lora_dropout": 0.3}),
        (from_linear, {}),
        (from_linear, {"adapter_dtype": torch.float64}),
    ],
    ids=["plain", "transposed", "bf16", "dropout", "from_linear", "wider"],
)
def test_a_layer_adds_exactly_nothing_before_the_first_step(make, options, start):
    layer = make(16, 24, r=6, start=start, **options)
    assert layer.start == start_of(adapters_of(layer)) == start
    x = torch.randn(5, 16, dtype=layer.weight.dtype)
    weight = layer.weight.T if layer.fan_in_fan_out else layer.weight
    expected = nn.functional.linear(x, weight, layer.bias)
    before = layer.weight.clone()
    assert torch.equal(layer(x), expected) and not layer.delta_weight().any()
    layer.eval()  # merges
    assert torch.equal(layer.weight, before) and torch.equal(layer(x), expected)


def test_from_linear_draws_only_the_adapter():
    linear = nn.Linear(16, 24)
    torch.manual_seed(5)
    layer = SVDLinear.from_linear(linear, 6, start="lora")
    torch.manual_seed(5)
    assert torch.equal(layer.lora_A, nn.Linear(16, 6, bias=False).weight)


@pytest.mark.parametrize("start", WRONG, ids=repr)
@pytest.mark.parametrize("r", [0, 6])
def test_another_start_is_refused_by_name(start, r):
    message = "start must be 'paper' or 'lora', got "
    linear = nn.Linear(3, 4)
    for make in (SVDLinear, loralib.SVDLinear):
        with pytest.raises(ValueError, match=message) as error:
            make(3, 4, r=r, start=start)
        assert str(error.value).endswith(repr(start))
    with pytest.raises(ValueError, match=message):
        SVDLinear.from_linear(linear, r, start=start)
    assert linear.weight.requires_grad


def test_a_layer_from_the_meta_device_is_initialised_with_its_start():
    layer = SVDLinear(16, 24, r=6, device="meta", start="lora")
    assert start_of(adapters_of(layer)) is None  # There are no values.
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert start_of(adapters_of(layer)) == "lora"


def test_copies_and_pickles_keep_the_start_and_those_of_an_earlier_version_have_the_papers():
    layer = SVDLinear(16, 24, r=6, start="lora")
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        other.reset_parameters()
        assert other.start == start_of(adapters_of(other)) == "lora"
    del layer.__dict__["start"]
    layer.reset_parameters()
    assert start_of(adapters_of(layer)) == "paper"


def test_the_state_dict_knows_of_no_start():
    paper, lora = (SVDLinear(16, 24, r=6, start=start) for start in ("paper", "lora"))
    paper.load_state_dict(lora.state_dict())
    assert start_of(adapters_of(paper)) == "lora"


# A model's adapters


def test_start_of_a_model():
    model = Mlp(start="lora")
    assert start_of(adapters_of(model)) == "lora"
    model.layers[1].reset_parameters()
    assert start_of(adapters_of(model)) == "lora"
    start_(*model.layers[1]._factors, "paper")
    assert start_of(adapters_of(model)) == "paper"  # Some at the one, some at the other.
    with torch.no_grad():
        model.layers[0].lora_B[3, 2] = 1e-30
    assert start_of(adapters_of(model)) is None
    with torch.no_grad():
        model.layers[0].lora_B[3, 2] = 0.0
        model.layers[0].lora_E[4] = 0.0  # pruned
    assert start_of(adapters_of(model)) is None


def test_a_start_is_given_once_and_only_where_it_is_missing():
    model = Mlp()
    start_(*model.layers[1]._factors, "lora")
    second = values_of(model.layers[1])
    start_adapters_(adapters_of(model), "lora")
    assert start_of(adapters_of(model)) == "lora"
    assert_same(model.layers[1], second)
    before, state = values_of(model), torch.get_rng_state()
    for start in ("lora", "paper", "lora"):
        start_adapters_(adapters_of(model), start)
    assert_same(model, before)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("value", [0.5, -1.0, float("nan")])
def test_what_is_trained_gets_no_start_and_nothing_is_changed(value):
    model = Mlp()
    with torch.no_grad():
        model.layers[2].lora_E[1] = value
    before, state = values_of(model), torch.get_rng_state()
    with pytest.raises(ValueError, match=r"layers\.2\.lora_E has been trained or loaded"):
        start_adapters_(adapters_of(model), "lora")
    start_adapters_(adapters_of(model), "paper")  # leaves it as it is
    for name, p in model.named_parameters():
        assert torch.equal(p.nan_to_num(), before[name].nan_to_num()), name
    assert torch.equal(state, torch.get_rng_state())


def test_what_has_no_values_gets_no_start():
    adapters = adapters_of(Mlp(device="meta"))
    with pytest.raises(ValueError, match="is on the meta device"):
        start_adapters_(adapters, "lora")
    start_adapters_(adapters, "paper")


def test_tied_adapters():
    model = Mlp()
    model.layers[0] = SVDLinear(16, 16, r=6)
    tied = SVDLinear(16, 16, r=6)
    for name in ("lora_A", "lora_E", "lora_B"):
        setattr(tied, name, getattr(model.layers[0], name))
    model.layers.append(tied)
    start_adapters_(adapters_of(model), "lora")
    assert start_of(adapters_of(model)) == "lora"


# The arithmetic


@pytest.mark.parametrize(("r", "in_features", "out_features"), [(8, 384, 384), (4, 256, 1024)])
def test_adams_first_step_moves_as_far_as_the_arithmetic_says(r, in_features, out_features):
    torch.manual_seed(0)
    rate, moved = 1e-4, {}
    for start in ("paper", "lora"):
        layer = SVDLinear(in_features, out_features, r=r, lora_alpha=16, start=start)
        mark_only_lora_as_trainable(layer)
        optimizer = torch.optim.Adam(trainable(layer), lr=rate)
        x, target = torch.randn(64, in_features), torch.randn(64, out_features)
        (layer(x) - target).square().mean().backward()
        optimizer.step()
        moved[start] = float(layer.delta_weight().norm()) / (layer.scaling * rate * math.sqrt(r))
    assert moved["paper"] == pytest.approx(0.02**2 * math.sqrt(in_features * out_features), rel=0.1)
    assert moved["lora"] == pytest.approx(math.sqrt(out_features / 3), rel=0.1)
    u = slow_path(in_features)
    # After that way the one start has come as far as the other.
    assert (0.02**2 + u**2) * math.sqrt(3 * in_features) == pytest.approx(1.0)
    assert moved["paper"] / moved["lora"] == pytest.approx(
        0.02**2 * math.sqrt(3 * in_features), rel=0.2
    )


# Training


def run(model, allocator, steps=20):
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    allocator.attach(optimizer)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        model.loss(*batch(step)).backward()
        optimizer.step()
    allocator.detach()


def test_a_run_comes_to_its_budget_and_a_second_one_begins_with_what_is_left():
    torch.manual_seed(0)
    model = Mlp(start="lora")
    mark_only_lora_as_trainable(model)
    allocator = RankAllocator(model, target_r=3, tinit=2, tfinal=5, total_step=20)
    assert allocator.summary()["init_budget"] == 18
    run(model, allocator)
    assert allocator.summary()["total_rank"] == 9 and start_of(adapters_of(model)) is None
    allocator.restart()
    assert allocator.summary()["init_budget"] == 9
    # Initialised again, everything is there, lora_B = 0 notwithstanding.
    for layer in model.layers:
        start_(*layer._factors, "lora")
    allocator.restart()
    assert allocator.summary()["init_budget"] == 18
    run(model, allocator)
    assert allocator.summary()["total_rank"] == 9


def test_a_restart_at_the_start_of_lora_is_a_first_run():
    """lora_E is 1 there, which a restart takes for what an earlier run has left."""
    models = []
    for restarts in (False, True):
        torch.manual_seed(0)
        model = Mlp(start="lora")
        mark_only_lora_as_trainable(model)
        allocator = RankAllocator(model, target_r=3, tinit=2, tfinal=5, total_step=20)
        if restarts:
            allocator.restart()
        run(model, allocator)
        models.append(model)
    assert_same(models[1], values_of(models[0]))


def test_equal_seeds_give_equal_starts():
    models = []
    for _ in range(2):  # as the processes of a training with DDP
        torch.manual_seed(1)
        models.append(Mlp(start="lora"))
    assert_same(models[1], values_of(models[0]))

"""`load_adapter` checks everything first: what is damaged or does not fit changes nothing."""

import copy
import json

import pytest
import torch
from export_runs import (
    CONFIG,
    WEIGHTS,
    assert_same,
    fill,
    loaded,
    logits,
    make,
    read,
    snapshot,
    trained,
)
from peft.tuners.adalora import SVDLinear as PeftSVDLinear
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import adalora_kernels.peft
from adalora_kernels.export import STATE_NAME, load_adapter, load_state, save_adapter, save_state


def edit_config(**changes):
    def edit(folder):
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**config, **changes}))

    return edit


def edit_pattern(name, change):
    def edit(folder):
        pattern = read(folder)[0]["rank_pattern"]
        edit_config(rank_pattern={**pattern, name: change(pattern.get(name))})(folder)

    return edit


def edit_tensors(change, file=WEIGHTS):
    def edit(folder):
        tensors = load_file(folder / file)
        change(tensors)
        save_file(tensors, folder / file)

    return edit


def put(key, tensor):
    return edit_tensors(lambda tensors: tensors.update({f"base_model.model.{key}": tensor}))


def truncate(file, size):
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:size])


def drop(key):
    return edit_tensors(lambda tensors: tensors.pop(f"base_model.model.{key}"))


PRUNED = {
    "no_config": (
        lambda f: (f / CONFIG).unlink(),
        FileNotFoundError,
        "adapter_config.json is miss",
    ),
    "no_weights": (lambda f: (f / WEIGHTS).unlink(), FileNotFoundError, "safetensors is missing"),
    "not_json": (lambda f: (f / CONFIG).write_text("{"), ValueError, "is not JSON"),
    "not_text": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe"), ValueError, "is not JSON"),
    "json_list": (lambda f: (f / CONFIG).write_text("[]"), ValueError, "ADALORA"),
    "lora": (edit_config(peft_type="LORA"), ValueError, "ADALORA adapter, is of 'LORA'"),
    "init_r_text": (edit_config(init_r="6"), ValueError, "init_r ≥ 1, has '6'"),
    "alpha_null": (edit_config(lora_alpha=None), ValueError, "lora_alpha, has None"),
    "other_alpha": (edit_config(lora_alpha=32), ValueError, r"\(32.0, 6.0\), the model has"),
    "other_rank": (edit_config(init_r=8), ValueError, r"\(16.0, 8.0\), the model has"),
    "empty": (truncate(WEIGHTS, 0), ValueError, "not a safetensors file, or not all"),
    "header_cut": (truncate(WEIGHTS, 100), ValueError, "not a safetensors file, or not all"),
    "data_cut": (truncate(WEIGHTS, -1), ValueError, "not a safetensors file, or not all"),
    "missing_tensor": (drop("fc0.lora_B"), ValueError, "lacks.*fc0.lora_B"),
    "missing_saved_module": (drop("norm.weight"), ValueError, "lacks.*norm.weight"),
    "extra_tensor": (put("fc9.lora_A", torch.ones(1)), ValueError, "has not: .*fc9.lora_A"),
    "wrong_shape": (put("fc2.lora_E", torch.ones(4)), ValueError, r"fc2.lora_E has shape \(4,\)"),
    "wrong_base": (
        put("fc2.lora_A", torch.ones(4, 21)),
        ValueError,
        r"\(4, 21\), expected \(4, 20",
    ),
    "wrong_saved_module": (put("norm.bias", torch.ones(9)), ValueError, "norm.bias has shape"),
    "integers": (put("fc2.lora_E", torch.ones(4, 1).int()), ValueError, "be floating point"),
    "pattern_list": (edit_config(rank_pattern=[True]), ValueError, "object or null"),
    "pattern_null": (edit_config(rank_pattern=None), ValueError, r"\(4, 16\), expected \(6, 16\)"),
    "pattern_short": (edit_pattern("fc0.lora_E", lambda p: p[:5]), ValueError, "5 entries, not 6"),
    "pattern_sum": (
        edit_pattern("fc0.lora_E", lambda p: [True] * 6),
        ValueError,
        "expected .6, 16",
    ),
    "pattern_ints": (edit_pattern("fc0.lora_E", lambda p: [1] * 6), ValueError, "list of bools"),
    "pattern_other": (edit_pattern("fc9.lora_E", lambda p: [True] * 6), ValueError, "fc9.lora_E"),
}


@pytest.mark.parametrize("case", PRUNED)
def test_a_broken_adapter_changes_nothing(case, tmp_path):
    damage, error, message = PRUNED[case]
    save_adapter(fill(make(modules_to_save=["norm"])), tmp_path)
    model = make(modules_to_save=["norm"])
    load_adapter(copy.deepcopy(model), tmp_path)  # whole, it loads
    damage(tmp_path)
    before = snapshot(model)
    with pytest.raises(error, match=message):
        load_adapter(model, tmp_path)
    assert_same(before, snapshot(model))


def edit_state(change):
    """`change(tensors, the JSON in the metadata)`."""

    def edit(folder):
        with safe_open(folder / STATE_NAME, "pt") as file:
            rest = json.loads(file.metadata()["adalora_state"])
        tensors = load_file(folder / STATE_NAME)
        change(tensors, rest)
        metadata = {"adalora_state": json.dumps(rest)}
        save_file(tensors, folder / STATE_NAME, metadata=metadata)

    return edit


def state_value(**values):
    return edit_state(lambda _, rest: rest["values"].update(values))


def state_tensor(name, change):
    """What `change` makes of it; None to leave it out."""

    def edit(tensors, _):
        value = change(tensors.pop(name))
        if value is not None:
            tensors[name] = value

    return edit_state(edit)


def weights_of_another_rank(folder):
    pruned = [True] * 5 + [False]
    edit_config(rank_pattern={"fc0.lora_E": pruned})(folder)
    for key, dim in (("A", 0), ("E", 0), ("B", 1)):
        tensor = load_file(folder / WEIGHTS)[f"base_model.model.fc0.lora_{key}"]
        put(f"fc0.lora_{key}", tensor.narrow(dim, 0, 5).contiguous())(folder)


STATE = {
    "cut": (truncate(STATE_NAME, -1), "not a safetensors file"),
    "no_metadata": (edit_tensors(lambda t: None, STATE_NAME), "not the state of a RankAllocator"),
    "no_averages": (
        state_tensor("exp_avg_ipt.0", lambda t: None),
        "not the state of a RankAllocator",
    ),
    "no_lists": (edit_state(lambda _, rest: rest.pop("lists")), "not the state of a RankAllocator"),
    "step_text": (state_value(global_step="12"), "has global_step = '12', expected int"),
    "step_bool": (state_value(global_step=True), "has global_step = True, expected int"),
    "shrunk": (state_value(shrunk=True), "pattern is not frozen"),
    "format": (state_value(format=2), "format 2"),
    "names": (state_value(names=["a", "b", "c"]), "other adapters"),
    "ranks": (state_value(ranks=[6, 6]), "for ranks"),
    "ranks_text": (state_value(ranks=["6", "6", "6"]), "ranks"),
    "other_rank": (weights_of_another_rank, "fc0 has 5 triplets, .* for 6"),
    "mask_float": (state_tensor("mask", torch.Tensor.float), "mask, or not as"),
    "no_skipped": (state_tensor("skipped", lambda t: None), "skipped, or not as"),
    "no_scores": (state_tensor("scores", lambda t: None), "lacks .'scores'"),
    "short_mask": (state_tensor("mask", lambda t: t[1:].clone()), "for ranks"),
    "short_scores": (state_tensor("scores", lambda t: t[1:].clone()), "scores of shape"),
}


@pytest.mark.parametrize("case", STATE)
def test_a_broken_state_changes_nothing(case, tmp_path):
    damage, message = STATE[case]
    model, _, _ = trained(12)
    save_adapter(model, tmp_path, full_rank=True)
    damage(tmp_path)
    fresh = make()
    allocator = adalora_kernels.peft.apply(fresh).allocator
    before = snapshot(fresh, allocator)
    with pytest.raises(ValueError, match=message):
        load_adapter(fresh, tmp_path)
    assert_same(before, snapshot(fresh, allocator))


def test_state_file_alone(tmp_path):
    _, allocator, _ = trained(12)
    save_state(allocator, tmp_path / "deep" / "state")
    assert_same([allocator.state_dict()], [load_state(tmp_path / "deep" / "state")])
    other_model = make()
    other = adalora_kernels.peft.apply(other_model).allocator
    other.load_state_dict(load_state(tmp_path / "deep" / "state"))
    assert_same([allocator.state_dict()], [other.state_dict()])
    with pytest.raises(FileNotFoundError, match="nothing is missing"):
        load_state(tmp_path / "nothing")


def test_weights_for_an_allocator_that_is_at_work(tmp_path):
    save_adapter(fill(make()), tmp_path)
    model, allocator, _ = trained(4)
    before = snapshot(model, allocator)
    with pytest.raises(ValueError, match="allocator is at step 4"):
        load_adapter(model, tmp_path)
    assert_same(before, snapshot(model, allocator))


def test_merged_model(tmp_path):
    model = fill(make())
    save_adapter(model, tmp_path)
    expected = logits(model)
    model.merge_adapter()
    with pytest.raises(ValueError, match="fc0 is merged"):
        load_adapter(model, tmp_path)
    save_adapter(model, tmp_path)
    torch.testing.assert_close(logits(loaded(tmp_path)), expected)


def test_adapter_with_more_triplets_than_the_model_has_room_for(tmp_path):
    save_adapter(fill(make()), tmp_path / "a")
    model = loaded(tmp_path / "a")
    assert type(model.base_model.model.fc0) is PeftSVDLinear
    save_adapter(fill(make()), tmp_path / "b", full_rank=True)
    with pytest.raises(ValueError, match="fc0 has 6 triplets in the file, 4 in the model"):
        load_adapter(model, tmp_path / "b")

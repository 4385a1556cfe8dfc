"""Column-wise and row-wise layers on several processes are those of one process."""

import functools
import re
from pathlib import Path

import pytest
import tensor_parallel_runs
import torch
from ranks import on_ranks
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel

from adalora_kernels.distributed import ColwiseAdaLora, RowwiseAdaLora, adalora_plan

LAYERS = {
    "column": ("column", {}, {}, ()),
    "row": ("row", {}, {}, ()),
    "column, no bias": ("column", {"bias": False}, {}, ()),
    "row, no bias": ("row", {"bias": False}, {}, ()),
    "column, the bias learns": ("column", {}, {}, ["bias"]),
    "row, the bias learns": ("row", {}, {}, ["bias"]),
    "column, uneven": ("column", {"in_features": 7, "out_features": 9}, {}, ()),
    "row, uneven": ("row", {"in_features": 9, "out_features": 7}, {}, ()),
    "column, transposed": ("column", {"fan_in_fan_out": True}, {}, ()),
    "row, transposed": ("row", {"fan_in_fan_out": True}, {}, ()),
    "column, y whole": ("column", {}, {"output_layouts": Replicate()}, ()),
    "row, x whole": ("row", {}, {"input_layouts": Replicate()}, ()),
    "column, x by tokens": ("column", {}, {"input_layouts": Shard(1)}, ()),
    "row, y by tokens": ("row", {}, {"output_layouts": Shard(1)}, ()),
    "column, y a DTensor": ("column", {}, {"use_local_output": False}, ()),
    "row, y a DTensor": ("row", {}, {"use_local_output": False}, ()),
    "column, dropout hooked": ("column", {}, {}, "hooked"),
    "row, dropout hooked": ("row", {}, {}, "hooked"),
    "row, dropout hooked, no bias": ("row", {"bias": False}, {}, "hooked"),
    "replicated": ("replicated", {}, {}, ["bias"]),
    "replicated, x and y by tokens": (
        "replicated",
        {},
        {"input_layouts": Shard(1), "output_layouts": Shard(1)},
        (),
    ),
    "column, lora_A frozen": ("column", {}, {}, ["lora_A"]),
    "row, lora_E frozen": ("row", {}, {}, ["lora_E"]),
}


def check_layers(report):
    assert report.keys() == LAYERS.keys()
    for case, result in report.items():
        assert max(result["errors"].values()) < 1e-13, (case, result["errors"])
        assert result["grads"] == result["placements"], case


@functools.cache
def alone(kind):
    """The training of one process."""
    return tensor_parallel_runs.alone(kind)


def check_training(results, kind):
    """All processes have the same, and what one process has."""
    expected = alone(kind)
    assert len({found["hash"] for found in results}) == 1
    for found in results:
        for name, parameter in expected["parameters"].items():
            difference = (found["parameters"][name] - parameter).norm()
            assert difference <= 1e-9 * parameter.norm(), name
        assert found["pattern"] == expected["pattern"]
        ranks = set(expected["ranks"].values())
        assert found["ranks"] == expected["ranks"] and len(ranks) > 1, "it has to tell triplets"
        assert found["orth_reg"] == pytest.approx(expected["orth_reg"], rel=1e-12)


def test_layers_and_a_training_are_those_of_one_process():
    functions = {
        "layers": {"cases": LAYERS},
        "peft_layers": {},
        "refusals": {},
        "sent": {},
        "x_under_way": {},
        "sent_by_steps": {},
        "training": {"kind": "net"},
    }
    reports = on_ranks(2, "tensor_parallel_runs:several", {"functions": functions})
    check_training([report["training"] for report in reports], "net")
    for report in reports:
        check_layers(report["layers"])
        for state, errors in report["peft_layers"].items():
            assert max(errors.values()) < 1e-13, (state, errors)
        # What Colwise- and RowwiseParallel send (x or y), and one for the adapter.
        assert report["sent"] == {
            "column": ([], [("all_reduce", 6 * (10 + 1)), ("all_reduce", 3 * 10)]),
            "row": ([("all_reduce", 3 * 12)], [("all_reduce", 6 * (12 + 1))]),
            "replicated": ([], []),
        }
        assert {prunes for prunes, _ in report["sent_by_steps"]} == {True, False}
        for prunes, collectives in report["sent_by_steps"]:
            # Products of two matrices, the lora_B of `up` and the lora_A of `down`.
            expected = [("all_reduce", 2 * 6 * 6), ("all_reduce", 1)]
            assert collectives == expected + [("_all_gather", 3 * 6)] * prunes
        assert report["x_under_way"] == (["Tensor"], True)
        refused = report["refusals"]
        assert refused["merged"].startswith("ValueError: this SVDLinear is merged")
        assert "DTensor already" in refused["twice"]
        assert "peft.apply(model)" in refused["of PEFT"]
        assert (
            refused["convolution"].startswith("TypeError: ")
            and "SVDConv2d" in (refused["convolution"])
        )


@pytest.mark.full
def test_layers_of_four_processes_some_of_which_have_nothing():
    for report in on_ranks(4, "parallel_layers_runs:layers", {"cases": LAYERS}):
        check_layers(report)


def test_plans():
    plan = {
        "layers.*.q_proj": "colwise",
        "layers.*.o_proj": RowwiseParallel(output_layouts=Shard(1)),
        "layers.*.k_proj": ColwiseParallel(input_layouts=Shard(1), use_local_output=False),
        "lm_head": "colwise_gather_output",
        "split": "rowwise_split_input",
        "norm": (norm := SequenceParallel()),
        "own": (own := ColwiseAdaLora()),
    }
    ours = adalora_plan(plan)
    assert list(ours) == list(plan) and ours["norm"] is norm and ours["own"] is own
    styles = [
        (type(s), s.input_layouts, s.output_layouts, s.use_local_output)
        for s in list(ours.values())[:5]
    ]
    whole, parts, by_tokens = (Replicate(),), (Shard(-1),), (Shard(1),)
    assert styles == [
        (ColwiseAdaLora, whole, parts, True),
        (RowwiseAdaLora, parts, by_tokens, True),
        (ColwiseAdaLora, by_tokens, parts, False),
        (ColwiseAdaLora, whole, whole, True),
        (RowwiseAdaLora, whole, whole, True),
    ]
    with pytest.raises(ValueError, match=r"'moe_tp_experts' for 'mlp'.*'colwise', "):
        adalora_plan({"mlp": "moe_tp_experts"})
    with pytest.raises(TypeError, match="plan has a Linear for 'mlp'"):
        adalora_plan({"mlp": torch.nn.Linear(2, 2)})
    with pytest.raises(TypeError, match="plan must be a dict of parallel styles, got str"):
        adalora_plan("colwise")


@pytest.fixture(scope="module")
def layer_reports():
    """What two processes have found, by function."""
    functions = {"compiled": {}, "narrow": {}, "dropout": {}}
    reports = on_ranks(2, "tensor_parallel_runs:several", {"functions": functions})
    return {name: [report[name] for report in reports] for name in functions}


@pytest.mark.full
def test_compiled_layers(layer_reports):
    for report in layer_reports["compiled"]:
        assert len(report) == 6
        for case, errors in report.items():
            assert max(errors) < 1e-13, (case, errors)


@pytest.mark.full
def test_narrow_dtypes(layer_reports):
    """float32 adapters over a bfloat16 base, and autocast."""
    for report in layer_reports["narrow"]:
        for case, (errors, alike, dtype) in report.items():
            assert alike and dtype == "torch.bfloat16", case
            # Row-wise, y is a sum of two numbers that have been rounded, and is rounded again.
            assert max(errors) < 2**-7, (case, errors)


@pytest.mark.full
def test_dropout_is_one_mask_of_what_is_whole_and_several_of_what_lies_in_parts(layer_reports):
    first, second = layer_reports["dropout"]
    # Column-wise: each column of y is the sum of the entries that are left.
    y = torch.cat([first["column"]["y"], second["column"]["y"]], 1)
    assert torch.equal(y, y[:, :1].expand_as(y)) and torch.equal(
        first["column"]["x"], second["column"]["x"]
    )
    kept = first["column"]["x"] != 0
    assert 0.4 < kept.double().mean() < 0.6
    # Row-wise: y is what is left of ones.
    y, dx = first["row"]["y"], torch.cat([first["row"]["x"], second["row"]["x"]], 1)
    assert torch.equal(y, second["row"]["y"]) and torch.equal(y, dx)
    assert set(y.unique().tolist()) == {0.0, 2.0} and 0.4 < (y != 0).double().mean() < 0.6
    assert not torch.equal(y[:, :4], y[:, 4:])
    for result in (first, second):
        for style in ("column", "row"):
            assert torch.equal(result[style]["again"], result[style]["x"])


@pytest.mark.full
def test_a_llama_has_the_gradients_of_one_process():
    for result in on_ranks(4, "tensor_parallel_runs:llama_gradients"):
        assert len(result["errors"]) == 2 * 7 * 3
        assert max(result["errors"].values()) < 1e-12, result["errors"]
        assert result["losses"][0] == pytest.approx(result["losses"][1], rel=1e-13)


@pytest.mark.full
@pytest.mark.parametrize(
    ("world", "options"),
    [
        (4, {"kind": "net", "dp": 2}),
        (2, {"kind": "llama"}),
        (4, {"kind": "llama", "dp": 2, "micro_batches": 2, "recomputed": True}),
    ],
    ids=lambda value: " ".join(f"{v}" for v in value.values()) if isinstance(value, dict) else None,
)
def test_a_training_is_that_of_one_process(world, options):
    check_training(on_ranks(world, "tensor_parallel_runs:training", options), options["kind"])


@pytest.mark.full
def test_adapters_in_layers_that_have_been_sharded_before_are_refused(tmp_path):
    arguments = {"folder": str(tmp_path)}
    for errors in on_ranks(2, "tensor_parallel_runs:adapters_that_came_late", arguments):
        assert len(errors) == 2
        for error in errors:
            assert "q_proj.lora_E.default is no DTensor" in error and "adalora_plan" in error


@pytest.mark.full
def test_the_example_of_the_documentation():
    page = (Path(__file__).parent.parent / "docs" / "scaling.md").read_text()
    (code,) = re.findall(r"## Tensor parallel\n.*?```\n(.*?)```", page, re.DOTALL)
    first, second = on_ranks(2, "tensor_parallel_runs:example", {"code": code})
    assert first == second
    ranks, step = first
    assert step == 12 and len(ranks) == 14 and sum(ranks.values()) == 3 * 14


@pytest.mark.full
def test_checkpoints_and_files(tmp_path):
    """Saved by two processes, read by one, by two, and by four together with FSDP2."""
    folder = str(tmp_path)
    on_ranks(2, "tensor_parallel_runs:save", {"folder": folder})
    (one,) = on_ranks(1, "tensor_parallel_runs:checkpoints_of_one", {"folder": folder})
    check_training([one["found"]], "llama")
    for world, dp in ((2, 1), (4, 2)):
        arguments = {"folder": folder, "dp": dp}
        found = on_ranks(world, "tensor_parallel_runs:resume", arguments)
        check_training(found, "llama")
    saved, expected = one["files"]
    assert saved.keys() == expected.keys()
    assert {name.partition("/")[0] for name in saved} >= {"compact", "full", "lora"}
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(saved[name], value, rtol=1e-9, atol=1e-12)
        else:
            assert saved[name] == value, name
    torch.testing.assert_close(*one["outputs"], rtol=1e-9, atol=1e-12)

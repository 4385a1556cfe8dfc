"""Column-wise and row-wise layers on several processes are those of one process."""

import pytest
from ranks import on_ranks
from torch.distributed.tensor import Replicate, Shard

LAYERS = {
    "column": ("column", {}, {}, False),
    "row": ("row", {}, {}, False),
    "column, no bias": ("column", {"bias": False}, {}, False),
    "row, no bias": ("row", {"bias": False}, {}, False),
    "column, the bias learns": ("column", {}, {}, True),
    "row, the bias learns": ("row", {}, {}, True),
    "column, uneven": ("column", {"in_features": 7, "out_features": 9}, {}, False),
    "row, uneven": ("row", {"in_features": 9, "out_features": 7}, {}, False),
    "column, transposed": ("column", {"fan_in_fan_out": True}, {}, False),
    "row, transposed": ("row", {"fan_in_fan_out": True}, {}, False),
    "column, y whole": ("column", {}, {"output_layouts": Replicate()}, False),
    "row, x whole": ("row", {}, {"input_layouts": Replicate()}, False),
    "column, x by tokens": ("column", {}, {"input_layouts": Shard(1)}, False),
    "row, y by tokens": ("row", {}, {"output_layouts": Shard(1)}, False),
    "column, y a DTensor": ("column", {}, {"use_local_output": False}, False),
    "row, y a DTensor": ("row", {}, {"use_local_output": False}, False),
}


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.full)])
def test_layers_are_those_of_one_process(world):
    for report in on_ranks(world, "tensor_parallel_runs:layers", {"cases": LAYERS}):
        assert report.keys() == LAYERS.keys()
        for case, result in report.items():
            assert max(result["errors"].values()) < 1e-13, (case, result["errors"])
            assert result["grads"] == result["placements"], case

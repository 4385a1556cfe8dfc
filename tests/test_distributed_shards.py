"""Adapters that FSDP2 shards are trained, pruned and regularised as those of one process."""

import pytest
import shards_runs
from ranks import on_ranks


@pytest.fixture(scope="module")
def alone():
    """The training in one process, which has all the data."""
    return shards_runs.alone()


def assert_same(results, expected, bound=1e-9):
    """All processes have the same bits, and what they have is what one process has."""
    assert len({result["hash"] for result in results}) == 1
    for result in results:
        assert result["pattern"] == expected["pattern"]
        assert result["summary"] == expected["summary"]
        assert result["orth_reg"] == pytest.approx(expected["orth_reg"], rel=bound)
        for name, parameter in expected["parameters"].items():
            error = (result["parameters"][name] - parameter).norm() / parameter.norm().clamp_min(1)
            assert error <= bound, (name, error)
    summary = expected["summary"]
    assert summary["total_rank"] == summary["target_budget"] < summary["init_budget"]


@pytest.mark.parametrize(
    ("world", "options"),
    [
        pytest.param(2, {}, id="2"),
        pytest.param(2, {"placement": "in"}, id="2-in"),
        pytest.param(4, {}, id="4"),
    ],
)
def test_fsdp2_is_one_process(world, options, alone):
    assert_same(on_ranks(world, "shards_runs:sharded", options), alone)

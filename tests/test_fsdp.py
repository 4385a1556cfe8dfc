"""FSDP1 flattens the adapters, which is refused by an error that says so."""

import pytest
from ranks import on_ranks


@pytest.mark.parametrize("which", ["ours", pytest.param("peft", marks=pytest.mark.full)])
def test_flattened_adapters_are_refused(which):
    for report in on_ranks(2, "fsdp1_runs:errors", {"which": which}):
        for kind, errors in report.items():
            for call, error in errors.items():
                assert error.startswith("ValueError: "), (kind, call, error)
                assert "FSDP1" in error and "fully_shard" in error, (kind, call, error)

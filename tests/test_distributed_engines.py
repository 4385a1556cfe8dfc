"""Accelerate and the Trainer with FSDP2: the training of one process, its checkpoints and files."""

import json
from pathlib import Path

import pytest
import shards_runs
import torch
from ranks import on_ranks
from safetensors.torch import load_file
from test_distributed_shards import assert_same


@pytest.fixture(scope="module")
def alone():
    return shards_runs.alone()


@pytest.mark.full
@pytest.mark.parametrize(
    "options",
    [
        {"attach": "before", "cpu_ram_efficient_loading": True},
        {"attach": "after", "activation_checkpointing": True},
    ],
    ids=["before-meta", "after-checkpointing"],
)
def test_accelerate_is_one_process(options, alone):
    assert_same(on_ranks(2, "engines_runs:with_accelerate", options), alone)


@pytest.mark.full
@pytest.mark.parametrize("outputs", [3, 4], ids=["of-other-shapes", "of-the-same-shapes"])
def test_what_accelerate_pickles_of_one_process_is_refused(outputs, tmp_path):
    arguments = {"folder": str(tmp_path), "outputs": outputs}
    for result in on_ranks(2, "engines_runs:registered", arguments):
        assert result["error"] is not None and "save_state" in result["error"]
        assert result["same"] == [True, True]


@pytest.fixture(scope="module")
def trained_alone(tmp_path_factory):
    """The Trainer in one process with twice the accumulation: what it returns, and its folder."""
    out = tmp_path_factory.mktemp("alone")
    return on_ranks(1, "engines_runs:with_trainer", {"out": str(out)})[0], out


def assert_same_files(folder, expected, names):
    for name in names:
        actual, wanted = (
            load_file(Path(each, name, "adapter_model.safetensors")) for each in (folder, expected)
        )
        assert actual.keys() == wanted.keys()
        for key, tensor in wanted.items():
            assert torch.allclose(actual[key], tensor, rtol=1e-9, atol=1e-9), (name, key)
        configs = (Path(each, name, "adapter_config.json") for each in (folder, expected))
        one, other = (json.loads(path.read_text()) for path in configs)
        for config in (one, other):  # PEFT writes a set in the order of its hashes.
            config["target_modules"] = sorted(config["target_modules"])
        assert one == other


def test_trainer_is_one_process_and_exports(trained_alone, tmp_path):
    expected, folder = trained_alone
    arguments = {"out": str(tmp_path), "saves": 4, "saves_whole": True}
    assert_same(on_ranks(2, "engines_runs:with_trainer", arguments), expected)
    assert_same_files(tmp_path, folder, ["saved", "compact", "lora", "full"])


@pytest.mark.full
@pytest.mark.parametrize("saves_whole", [False, True], ids=["sharded", "whole"])
def test_trainer_resumes(saves_whole, trained_alone, tmp_path):
    expected, folder = trained_alone
    arguments = {"out": str(tmp_path / "first"), "saves": 4, "saves_whole": saves_whole}
    uninterrupted = on_ranks(2, "engines_runs:with_trainer", arguments)
    checkpoint = str(tmp_path / "first" / "checkpoint-4")
    arguments |= {"out": str(tmp_path / "second"), "checkpoint": checkpoint}
    resumed = on_ranks(2, "engines_runs:with_trainer", arguments)
    assert {r["hash"] for r in resumed} == {r["hash"] for r in uninterrupted}
    assert_same(resumed, expected)
    assert_same_files(tmp_path / "second", folder, ["compact", "lora", "full"])


@pytest.mark.full
def test_pefts_loop_is_one_process_and_loads(tmp_path):
    arguments = {"out": str(tmp_path / "one"), "is_sharded": False}
    (expected,) = on_ranks(1, "engines_runs:pefts_loop", arguments)
    assert_same(on_ranks(2, "engines_runs:pefts_loop", {"out": str(tmp_path / "two")}), expected)

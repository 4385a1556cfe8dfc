"""The example of several processes: the docs' command lines, on two processes without a GPU."""

import functools
import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from safetensors.torch import load_file

for needed in ("transformers", "peft", "accelerate"):
    pytest.importorskip(needed)

REPO = Path(__file__).resolve().parent.parent
PAGE = (REPO / "docs" / "scaling.md").read_text()
LINES = re.findall(r"^(?:torchrun|accelerate launch) .*several_processes.*$", PAGE, re.MULTILINE)
# By engine: the lines that need no GPU.
COMMANDS = {line.split()[-1]: line for line in LINES if "--config-file" not in line}
MATRICES, TARGET_R = 14, 4


def script():
    """The script as a module: its model and its data."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPO / "examples"))
        return importlib.import_module("several_processes")


@functools.cache
def outcome(engine):
    """Run the docs' line of an engine; return (folder of the adapter, loss before, after)."""
    folder = tempfile.TemporaryDirectory()
    command = shlex.split(COMMANDS[engine])
    if command[0] == "accelerate":
        # Any free port. torchrun has --standalone for it.
        command[2:2] = ["--main-process-port", "0"]
    python = str(Path(sys.executable).parent)
    environment = {
        "PATH": os.pathsep.join([python, os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")]),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        [*command, "--out", folder.name],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPO,
        env=os.environ | environment,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # With the processes that it has started.
        output, errors = process.communicate()
    assert process.returncode == 0, output + errors
    printed = re.findall(
        r"^2 processes on cpu: loss ([\d.]+), after training ([\d.]+)$", output, re.M
    )
    assert len(printed) == 1, output  # By the first process alone.
    before, after = map(float, printed[0])
    assert f"'total_rank': {MATRICES * TARGET_R}," in output
    assert re.search(rf"^loss in plain PEFT, .*: {after:.4f}$", output, re.M)
    return folder, before, after


def ranks_in(folder):
    """The number of triplets in the file, by matrix."""
    saved = load_file(Path(folder) / "adapter_model.safetensors")
    return {name: len(tensor) for name, tensor in saved.items() if "lora_E" in name}


def loss_in_plain_peft(folder):
    from peft import PeftModel

    example = script()
    model = PeftModel.from_pretrained(example.base_model(), folder, torch_device="cpu")
    assert not any("adalora_kernels" in type(m).__module__ for m in model.modules())
    return example.fixed_loss(model, torch.device("cpu"))


ENGINES = ["fsdp2", *(pytest.param(e, marks=pytest.mark.full) for e in ("ddp", "accelerate"))]


# PEFT warns of its own rank_pattern, and of what ends with rank 0.
@pytest.mark.filterwarnings("ignore::Warning:(peft|transformers)")
@pytest.mark.parametrize("engine", ENGINES)
def test_the_line_of_the_docs_trains_and_leaves_an_adapter_for_plain_peft(engine):
    folder, before, after = outcome(engine)
    assert before > 4.0 and after < before / 4
    ranks = ranks_in(folder.name)
    assert sum(ranks.values()) == MATRICES * TARGET_R and len(set(ranks.values())) > 1
    assert loss_in_plain_peft(folder.name) == pytest.approx(after, abs=1e-4)


@pytest.mark.full
@pytest.mark.parametrize("engine", ["ddp", "accelerate"])
def test_all_engines_come_to_the_same(engine):
    (expected, _, loss), (actual, _, other) = outcome("fsdp2"), outcome(engine)
    assert ranks_in(actual.name) == ranks_in(expected.name)
    assert other == pytest.approx(loss, abs=1e-3)


@pytest.mark.full
def test_accelerate_with_the_file_for_fsdp2_comes_to_the_same(tmp_path):
    from accelerate.commands.config.config_args import load_config_from_file

    file = REPO / "examples" / "accelerate_fsdp2.yaml"
    (line,) = [line for line in LINES if "--config-file" in line]
    assert line == file.read_text().splitlines()[0].removeprefix("# ")
    read = load_config_from_file(str(file))
    assert read.distributed_type == "FSDP" and read.num_processes == 2
    told = on_ranks(2, "example_runs:with_fsdp2", {"out": str(tmp_path)})[0]
    assert read.fsdp_config == told and told["fsdp_version"] == 2
    assert ranks_in(tmp_path) == ranks_in(outcome("fsdp2")[0].name)
    pattern = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    assert sum(map(sum, pattern.values())) == MATRICES * TARGET_R

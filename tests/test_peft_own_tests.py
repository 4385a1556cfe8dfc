"""PEFT's own tests about AdaLoRA, unmodified, from PEFT's source archive, with our classes in use.

Offline, on the CPU, in a process of their own; `peft_own_tests_plugin.py` says what is picked.
"""

import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import peft_own_tests_plugin as plugin
import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import nn

import adalora_kernels.peft

HERE = Path(__file__).resolve().parent
ROOT = f"peft-{version('peft')}"
ARCHIVE = HERE.parent / "build" / f"{ROOT}.tar.gz"

# How many tests of each file pass with plain PEFT, on Linux: `outcome(folder)` without "--ours".
PLAIN = {
    "test_config.py": 40,
    "test_custom_models.py": 199,
    "test_decoder_models.py": 133,
    "test_encoder_decoder_models.py": 40,
    "test_feature_extraction_models.py": 45,
    "test_initialization.py": 4,
    "test_low_level_api.py": 4,
    "test_mixed.py": 12,
    "test_seq_classifier.py": 24,
}
# Of these, those that we fail on purpose (`DIFFERENT` in the plugin).
DIFFERENT = {"test_seq_classifier.py": 3}
# The classes that run instead of PEFT's.
OURS = {
    "adalora_kernels.peft.layers.FusedSVDLinear",
    "adalora_kernels.peft.model.AllocatedAdaLoraModel",
    "adalora_kernels.peft.allocator.PeftRankAllocator",
}


def outcome(folder, *options):
    """The plugin's report of a run in the empty `folder`."""
    with tarfile.open(ARCHIVE) as archive:
        tests = [m for m in archive.getmembers() if m.name.startswith(f"{ROOT}/tests/")]
        archive.extractall(folder, tests, filter="data")
    folder /= ROOT
    # As in PEFT's repository; the archive lacks it.
    (folder / "tests" / "__init__.py").touch()
    (folder / "tmp").mkdir()
    environment = {
        "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTEST_ADDOPTS": "",
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_CACHE": str(folder / "hf" / "hub"),
        "HF_HUB_OFFLINE": "1",
        "TMPDIR": str(folder / "tmp"),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", str(folder)]
    command += ["-p", "peft_own_tests_plugin", "-p", "no:cacheprovider", "--report", "report.json"]
    process = subprocess.run(
        [*command, *options, *(f"tests/{name}" for name in PLAIN)],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert process.returncode == 0, process.stdout[-20_000:] + process.stderr[-2_000:]
    return json.loads((folder / "report.json").read_text())


def item(name="test_it", function=lambda: None, **parameters):
    """A test as pytest collects it."""
    found = SimpleNamespace(name=name, originalname=name, function=function)
    if parameters:
        found.callspec = SimpleNamespace(params=parameters)
    return found


def test_what_is_picked():
    config = AdaLoraConfig(total_step=9)
    for picked in (item(config=config), item(config=AdaLoraConfig), item("test_adalora_merges")):
        assert plugin.is_about_adalora(picked)
    assert plugin.is_about_adalora(item(function=lambda: AdaLoraConfig(total_step=9)))
    left_out = next(iter(plugin.LEFT_OUT))
    for other in (item(), item("test_adalora", config=LoraConfig), item(left_out, config=config)):
        assert not plugin.is_about_adalora(other)


def test_a_test_that_needs_the_hub_is_told_from_one_that_fails():
    error = huggingface_hub.errors.LocalEntryNotFoundError("offline")
    outer = OSError("no such model")
    outer.__cause__ = error
    assert plugin.misses_the_hub(error) and plugin.misses_the_hub(outer)
    assert not plugin.misses_the_hub(OSError("no such model"))


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "pefts"])
def test_forwards_are_counted_by_class(ours, monkeypatch):
    monkeypatch.setattr(plugin, "forwards", Counter())
    config = AdaLoraConfig(total_step=9, target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)
    if ours:
        adalora_kernels.peft.apply(model)
    handle = nn.modules.module.register_module_forward_hook(plugin.count_forward)
    try:
        model(torch.ones(1, 4))
        model.base_model(torch.ones(1, 4))
    finally:
        handle.remove()
    classes = {"layer.SVDLinear", "model.AdaLoraModel", "layer.RankAllocator"}
    expected = OURS if ours else {f"peft.tuners.adalora.{name}" for name in classes}
    assert set(plugin.forwards) == expected
    assert max(plugin.forwards.values()) == 2


@pytest.mark.full
@pytest.mark.skipif(
    not ARCHIVE.is_file(),
    reason=f"{ARCHIVE.relative_to(HERE.parent)} is missing: `make install` downloads it",
)
def test_pefts_own_tests_pass_with_our_classes(tmp_path):
    report = outcome(tmp_path, "--ours")
    assert report["passed"] == {
        name: number - DIFFERENT.get(name, 0) for name, number in PLAIN.items()
    }
    assert report["failed_on_purpose"] == DIFFERENT
    # Nothing of PEFT's own classes ran; our convolutions have the forward of PEFT's.
    assert set(report["forwards"]) == OURS | {"adalora_kernels.peft.layers.SVDConv2d"}
    assert report["forwards"]["adalora_kernels.peft.layers.FusedSVDLinear"] > 5000

"""PEFT's own tests about AdaLoRA, unmodified, from PEFT's source archive, with our classes in use.

Offline, on the CPU, in a process of their own; `peft_own_tests_plugin.py` says what is picked.
"""

import json
import os
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

import pytest

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
        "PYTHONPATH": str(HERE),
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
    # Nothing of PEFT's ran but the convolutions, which stay as they are.
    ours = {name for name in report["forwards"] if name.startswith("adalora_kernels.peft.")}
    assert len(ours) == 3, "layer, tuner and allocator"
    assert set(report["forwards"]) - ours == {"peft.tuners.adalora.layer.SVDConv2d"}
    assert report["forwards"]["adalora_kernels.peft.layers.FusedSVDLinear"] > 5000

"""FSDP1 flattens the adapters, which is refused by an error that says so."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("which", ["ours", pytest.param("peft", marks=pytest.mark.full)])
def test_flattened_adapters_are_refused(which, tmp_path):
    script = Path(__file__).with_name("fsdp_training.py")
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(rank), tmp_path / "rendezvous", which],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            out, err = process.communicate(timeout=120)
            assert process.returncode == 0, err
            for kind, errors in json.loads(out).items():
                for call, error in errors.items():
                    assert error.startswith("ValueError: "), (kind, call, error)
                    assert "FSDP1" in error and "fully_shard" in error, (kind, call, error)
    finally:
        for process in processes:
            process.kill()

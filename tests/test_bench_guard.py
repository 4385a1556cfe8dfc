"""Ops, launches and bytes are those of the committed baseline; and what if they were not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import adalora_kernels
from adalora_kernels import ops
from benchmarks import bench_whole_model, guard, whole_models
from benchmarks.harness import Context

SMOKE = Context(torch.device("cpu"), smoke=True)
ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.full
@pytest.mark.skipif("cpu" not in ops.library.device_types, reason="needs the compiled library")
def test_counts_are_those_of_the_baseline():
    # In a process of its own: here memory is poisoned, which takes ops.
    command = [sys.executable, "-m", "benchmarks.guard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    if done.returncode == 2:
        pytest.skip(f"other versions than those of constraints.txt: {done.stdout.strip()}")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_baseline_is_of_the_pinned_versions_and_of_every_bench():
    baseline = json.loads(guard.BASELINE.read_text())
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    for name in ("torch", "peft", "transformers"):
        assert f"{name}=={baseline['versions'][name].partition('+')[0]}" in pins
    benches = {path.stem for path in (ROOT / "benchmarks").glob("bench_*.py")}
    assert benches == {f"bench_{bench}" for bench in guard.BENCHES}
    works = {"one layer, forward", "one layer, forward + backward", "training step"}
    works |= {"importance only", "masking step", "orthogonality"}
    assert {row["work"] for row in baseline["counts"]} == works
    asked = {"dispatched ops", "ops inside those", "host syncs", "peak extra MB"}
    assert asked <= {row["measure"] for row in baseline["counts"]}


def test_one_op_more_is_caught(monkeypatch):
    bench, name = bench_whole_model, whole_models.GRAD_OF_ADAPTERS
    case = next(c for c in bench.cases(SMOKE) if c.work == bench.ORTHOGONALITY)
    monkeypatch.setattr(bench, "guarded", lambda: [case])
    before = guard.counted(["whole_model"])
    assert list(guard.differences(before, guard.counted(["whole_model"]))) == []
    once = adalora_kernels.orth_reg_grad_
    monkeypatch.setattr(adalora_kernels, "orth_reg_grad_", lambda *a: (torch.ones(1), once(*a))[1])
    found = list(guard.differences(before, guard.counted(["whole_model"])))
    assert any(f"{name}: dispatched ops: " in line for line in found)
    gone = [row for row in before if row["provider"] != name]
    assert all(line.endswith(", now not there") for line in guard.differences(before, gone))


def test_other_versions_are_not_compared_nor_a_single_file(tmp_path, capsys):
    path = tmp_path / "baseline.json"
    path.write_text(json.dumps({"versions": {"torch": "1.0"}, "counts": []}))
    assert guard.check_counts(path) == 2
    assert "{'torch': '1.0'}, which are now {'torch': '" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        guard.main(["one.json"])
    assert "give two results files, or none" in capsys.readouterr().err

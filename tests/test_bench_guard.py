"""Ops, launches and bytes are those of the committed baseline; and what if they were not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import adalora_kernels
from adalora_kernels import ops
from benchmarks import bench_orth_reg, guard

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(
    "cpu" not in ops.library.device_types, reason="needs the compiled library, for a CPU at least"
)
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
    assert {path.stem for path in (ROOT / "benchmarks").glob("bench_*.py")} == {
        f"bench_{bench}" for bench in guard.BENCHES
    }
    cases = {group.partition(":")[0] for group in baseline["counts"]}
    assert cases == {
        "svd_linear forward",
        "svd_linear forward + backward",
        "importance only",
        "masking step",
        "orthogonality",
        "training step",
    }
    measures = {
        measure
        for rivals in baseline["counts"].values()
        for counts in rivals.values()
        for measure in counts
    }
    asked = {"dispatched ops", "ops inside those", "host syncs", "peak extra MB"}
    assert asked | {"planned launches", "planned bytes"} <= measures


def test_one_op_more_is_caught(monkeypatch):
    name = "orth_reg_grad_(adapters)"
    monkeypatch.setattr(bench_orth_reg, "MAKE", {name: bench_orth_reg.MAKE[name]})
    before = guard.counted(["orth_reg"])
    assert list(guard.differences(before, guard.counted(["orth_reg"]))) == []

    once = adalora_kernels.orth_reg_grad_

    def twice(*args, **options):
        once(*args, **options)
        return once(*args, **options)

    monkeypatch.setattr(adalora_kernels, "orth_reg_grad_", twice)
    (found, *_) = guard.differences(before, guard.counted(["orth_reg"]))
    assert f"{name}: dispatched ops: 5, now 10" in found


def test_what_is_new_or_gone_is_a_difference():
    before = {"a": {"x": {"ops": 3, "bytes": 8}}, "b": {"x": {"ops": 1}}}
    after = {"a": {"x": {"ops": 4}, "y": {"ops": 2}}}
    assert list(guard.differences(before, after)) == [
        "a: x: bytes: 8, now not there",
        "a: x: ops: 3, now 4",
        "a: y: ops: not there, now 2",
        "b: x: ops: 1, now not there",
    ]
    assert list(guard.differences(before, before)) == []


def test_other_versions_are_not_compared(tmp_path, capsys):
    path = tmp_path / "baseline.json"
    path.write_text(json.dumps({"versions": {"torch": "1.0"}, "counts": {}}))
    assert guard.check_counts(path) == 2
    assert "{'torch': '1.0'}, which are now {'torch': '" in capsys.readouterr().out


def test_two_files_or_none(capsys):
    with pytest.raises(SystemExit):
        guard.main(["one.json"])
    assert "give two results files, or none" in capsys.readouterr().err

"""The round for a GPU: what is started when and for how long, and all of it on a CPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.results import Run

ROOT = Path(__file__).resolve().parent.parent
ROUND = ROOT / "benchmarks" / "gpu_round.sh"
RESULTS = ("allocation", "host", "svd_linear", "svd_linear_tuned", "train_step")


@pytest.fixture
def round_(tmp_path):
    """Runs stages with an interpreter that only says how it was called, on a GPU of sm_103."""
    script = tmp_path / "benchmarks" / "gpu_round.sh"
    script.parent.mkdir()
    script.write_text(ROUND.read_text())
    say = 'echo "arch=$TORCH_CUDA_ARCH_LIST build=$ADALORA_KERNELS_BUILD'
    say += ' cache=$ADALORA_KERNELS_CACHE: $*"; [ "$1" != setup.py ]'
    asked = "*xdist*) exit $NO_XDIST;; *implementations*) exit $OTHER;; esac"
    programs = {
        "python": f'case "$2" in {asked}; {say}',
        "nvidia-smi": 'case "$*" in *compute_cap*) echo 10.3; echo 10.3;; esac',
        "nproc": "echo 16",
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)

    def run(*stages, other=0, no_xdist=0, seconds="575"):
        """Run them with a library for another GPU, or without pytest-xdist."""
        env = {**os.environ, "PYTHON": str(tmp_path / "python"), "OUT": str(tmp_path / "out")}
        env |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "ROUND_SECONDS": seconds}
        env |= {"OTHER": str(other), "NO_XDIST": str(no_xdist)}
        options = {"env": env, "capture_output": True, "text": True, "timeout": 60}
        done = subprocess.run(["bash", script, *stages], **options)
        return done, (tmp_path / "out" / "log.txt").read_text()

    return run


def test_round_builds_a_library_for_the_gpu_unless_there_is_one(round_):
    done, log = round_("build")
    assert done.returncode == 0 and "setup.py" not in log
    done, log = round_("build", "allocation", other=1)
    assert "arch=10.3 build=cuda cache=" in log and ": setup.py build_ext --inplace" in log
    # That it failed does not end the round.
    assert done.returncode == 1 and "build" in done.stdout and "bench_whole_model.py" in log


@pytest.mark.parametrize("no_xdist", [0, 1], ids=["with xdist", "without xdist"])
def test_round_does_first_what_is_wanted_most(round_, tmp_path, no_xdist):
    done, log = round_(other=1, no_xdist=no_xdist)
    begun = re.findall(r"^== (.*?), at most (\d+) s", log, re.MULTILINE)
    names, limits = [name for name, _ in begun], dict(begun)
    timings = ["numerics", "allocation", "host", "train_step", "svd_linear"]
    assert names[:7] == ["environment", "build", *timings]
    assert names[7:11] == ["tune (optional)", "svd_linear_tuned", "report", "tests"]
    optional = [name for name in names[11:] if name.endswith(" (optional)")]
    assert optional == names[13:] and all("svd_linear_kernels" in name for name in optional)
    # No stage takes what those after it need.
    assert sum(map(int, limits.values())) - int(limits["build"]) >= 523
    assert int(limits["train_step"]) <= 575 - 115 - 55 - 70 - 12 - 55
    # The command, and what the interpreter says of it.
    processes = [] if no_xdist else ["6", "6", "14", "14"]
    assert re.findall(r" -n (\d+)", log.replace("tail -n", "")) == processes
    # All benches are run, and what is tuned is looked for where it was written.
    benches = {path.name for path in (ROOT / "benchmarks").glob("bench_*.py")}
    assert set(re.findall(r"benchmarks/(bench_\w+\.py)", log)) == benches
    assert set(re.findall(r" cache=(\S+): ", log)) == {str(tmp_path / "out")}
    written = re.findall(rf"--out {tmp_path}/out/results/(\w+)\.json --seconds (\d+)", log)
    assert {name for name, _ in written} == {*RESULTS}
    assert all(int(limits[name]) > int(seconds) > 14 for name, seconds in written[::2])
    assert "whole round" in done.stdout.splitlines()[-1]


def test_what_there_is_no_time_for_fails_unless_it_comes_last(round_):
    done, _ = round_("sanitizers", seconds="10")
    assert done.returncode == 0 and done.stdout.count("no time for it") == 4
    assert round_("everything")[0].returncode == 2


STAGES = [
    pytest.param(("host", "tune", "report"), id="some"),
    pytest.param((), id="all", marks=pytest.mark.full),
]


@pytest.mark.parametrize("stages", STAGES)
def test_the_round_can_be_rehearsed_on_a_cpu(stages, tmp_path):
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    env |= {"PYTHON": sys.executable, "OUT": str(tmp_path / "out")}
    options = {"env": env, "capture_output": True, "text": True, "timeout": 600}
    done = subprocess.run(["bash", ROUND, "--rehearse", *stages], **options)
    assert done.returncode == 0 and "FAILED" not in done.stdout, done.stdout
    assert "no time for it" not in done.stdout and "tune (optional)" in done.stdout
    written = {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*.*")}
    names = ["host"] if stages else RESULTS
    expected = {Path("results", f"{name}.json") for name in names}
    assert written == expected | {Path(n) for n in ("log.txt", "summary.txt", "launch_table.json")}
    assert len(written) <= 8
    for path in expected:
        run = Run.read(tmp_path / "out" / path)
        assert run.wrong == [] and any("rounds" in row for row in run.rows)

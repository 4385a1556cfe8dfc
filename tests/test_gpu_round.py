"""The round for a GPU, as far as it runs without one: what is started when, and for how long."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BENCH = "-m pytest benchmarks/bench_whole_model.py"


@pytest.fixture
def round_(tmp_path):
    """Runs stages with an interpreter that only says how it was called."""
    script, python = tmp_path / "benchmarks" / "gpu_round.sh", tmp_path / "python"
    script.parent.mkdir()
    script.write_text((ROOT / "benchmarks" / "gpu_round.sh").read_text())
    say = 'echo "library=$ADALORA_KERNELS_LIBRARY build=$ADALORA_KERNELS_BUILD: $*"'
    no_library = '[ "$1" = -c ] && exit $NO_LIBRARY'
    python.write_text(f'#!/bin/sh\n{no_library}\n{say}\n[ "$1" != setup.py ]\n')
    python.chmod(0o755)

    def run(*stages, no_library=0, seconds="520"):
        env = {**os.environ, "PYTHON": str(python), "OUT": str(tmp_path / "out")}
        env |= {"NO_LIBRARY": str(no_library), "ROUND_SECONDS": seconds}
        options = {"env": env, "capture_output": True, "text": True, "timeout": 60}
        done = subprocess.run(["bash", script, *stages], **options)
        return done, (tmp_path / "out" / "log.txt").read_text()

    return run


def test_round_builds_the_library_or_uses_one_that_was_brought_along(round_, tmp_path):
    done, log = round_("carried", "build", "allocation")
    assert done.returncode == 0 and "build=cuda" not in log and f"library= build=: {BENCH}" in log
    library = tmp_path / "build" / "carried" / "_C.abi3.so"
    library.parent.mkdir(parents=True)
    library.touch()
    done, log = round_("carried", "build", "allocation", no_library=1)
    assert done.returncode == 1 and "FAILED" in done.stdout
    assert f"library={library} build=: -m adalora_kernels" in log
    assert "library= build=cuda: setup.py build_ext --inplace" in log
    assert f"library={library} build=: {BENCH}" in log  # The build failed.


def test_round_runs_every_bench_within_its_time_and_ends_with_the_report(round_, tmp_path):
    stages = ("build", "tune", "allocation", "host", "train_step", "svd_linear", "report")
    done, log = round_(*stages, no_library=1, seconds="475")
    limits = dict(re.findall(r"^== (\w+), at most (\d+) s", log, re.MULTILINE))
    assert (limits["build"], limits["allocation"], limits["report"]) == ("120", "80", "15")
    # Each gets what is left but for those after it.
    assert limits["train_step"] == "300" and 300 >= int(limits["svd_linear"]) > 285
    results = tmp_path / "out" / "results"
    seconds = dict(re.findall(rf"--out {results}/(\w+)\.json --seconds (\d+)", log))
    assert seconds.keys() == {*stages[2:6]} and seconds["allocation"] == "60"
    benches = {path.name for path in (ROOT / "benchmarks").glob("bench_*.py")}
    assert set(re.findall(r"benchmarks/(bench_\w+\.py)", log)) == benches
    # What it prints is the end of the output, but for the line about the whole round.
    report = f"-m benchmarks.report --results {results} --out build/gpu_report/RESULTS.md"
    assert report in log and report in done.stdout.splitlines()[-2]
    done, log = round_("tune", "allocation", "report", seconds="92")
    assert "tune (optional)                no time for it" in done.stdout and "== tune" not in log
    assert round_("everything")[0].returncode == 2

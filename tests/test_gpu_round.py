"""The round for a GPU, as far as it runs without one: what is started when, and for how long."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BENCHES = ("allocation", "train_step", "svd_linear")
BENCH = "-m pytest benchmarks/bench_whole_model.py"


@pytest.fixture
def round_(tmp_path):
    """Runs stages with an interpreter that only says how it was called."""
    script, python = tmp_path / "benchmarks" / "gpu_round.sh", tmp_path / "python"
    script.parent.mkdir()
    script.write_text((ROOT / "benchmarks" / "gpu_round.sh").read_text())
    python.write_text(
        '#!/bin/sh\n[ "$1" = -c ] && exit ${NO_LIBRARY:-0}\n'
        'echo "library=$ADALORA_KERNELS_LIBRARY build=$ADALORA_KERNELS_BUILD: $*"\n'
        '[ "$1" != setup.py ]\n'
    )
    python.chmod(0o755)

    def run(*stages, **environment):
        env = {**os.environ, "PYTHON": str(python), "OUT": str(tmp_path / "out"), **environment}
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
    done, log = round_("carried", "build", "allocation", NO_LIBRARY="1")
    assert done.returncode == 1 and "FAILED" in done.stdout
    assert f"library={library} build=: -m adalora_kernels" in log
    assert "library= build=cuda: setup.py build_ext --inplace" in log
    # The build failed.
    assert f"library={library} build=: {BENCH}" in log


def test_round_runs_every_bench_within_its_time_and_ends_with_the_report(round_, tmp_path):
    stages = ("build", "tune", *BENCHES, "report")
    done, log = round_(*stages, NO_LIBRARY="1", ROUND_SECONDS="475")
    results = tmp_path / "out" / "results"
    limits = dict(re.findall(r"^== (\w+), at most (\d+) s", log, re.MULTILINE))
    assert (limits["build"], limits["allocation"], limits["report"]) == ("120", "80", "15")
    # Each gets what is left but for those after it.
    assert limits["train_step"] == "300" and 300 >= int(limits["svd_linear"]) > 285
    seconds = dict(re.findall(rf"--device cuda --out {results}/(\w+)\.json --seconds (\d+)", log))
    assert seconds.keys() == set(BENCHES) and seconds["allocation"] == "60"
    benches = {path.name for path in (ROOT / "benchmarks").glob("bench_*.py")}
    assert set(re.findall(r"benchmarks/(bench_\w+\.py)", log)) == benches
    # What it prints is the end of the output, but for the line about the whole round.
    report = f"-m benchmarks.report --results {results} --out build/gpu_report/RESULTS.md"
    assert report in log and report in done.stdout.splitlines()[-2]
    done, log = round_("tune", "allocation", "report", ROUND_SECONDS="92")
    assert "tune (optional)                no time for it" in done.stdout and "== tune" not in log
    done, _ = round_("everything")
    assert done.returncode == 2 and "no stage everything" in done.stderr

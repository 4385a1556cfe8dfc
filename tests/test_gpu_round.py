"""The round for a GPU, as far as it runs without one: what is started when, and for how long."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BENCHES = ("allocation", "train_step", "svd_linear")


@pytest.fixture
def round_(tmp_path):
    """Runs stages with an interpreter that only says how it was called."""
    script = tmp_path / "benchmarks" / "gpu_round.sh"
    script.parent.mkdir()
    script.write_text((ROOT / "benchmarks" / "gpu_round.sh").read_text())
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\n[ "$1" = -c ] && exit ${NO_LIBRARY:-0}\n'
        'echo "library=$ADALORA_KERNELS_LIBRARY build=$ADALORA_KERNELS_BUILD: $*"\n'
        '[ "$1" != setup.py ]\n'
    )
    python.chmod(0o755)

    def run(*stages, **environment):
        env = {**os.environ, "PYTHON": str(python), "OUT": str(tmp_path / "out"), **environment}
        done = subprocess.run(
            ["bash", script, *stages], env=env, capture_output=True, text=True, timeout=60
        )
        return done, (tmp_path / "out" / "log.txt").read_text()

    return run


def limit(log, stage):
    return int(re.search(rf"^== {stage}, at most (\d+) s", log, re.MULTILINE)[1])


def test_round_builds_the_library_unless_there_is_one(round_):
    done, log = round_("carried", "build", "allocation")
    assert done.returncode == 0 and "build=cuda" not in log
    assert "library= build=: -m pytest benchmarks/bench_importance.py" in log
    done, log = round_("carried", "build", "allocation", NO_LIBRARY="1")
    assert done.returncode == 1 and "FAILED" in done.stdout
    assert "library= build=cuda: setup.py build_ext --inplace" in log
    assert "library= build=: -m pytest benchmarks/bench_importance.py" in log


def test_round_tries_a_library_that_was_brought_along(round_, tmp_path):
    library = tmp_path / "build" / "carried" / "_C.abi3.so"
    library.parent.mkdir(parents=True)
    library.touch()
    _, log = round_("carried", "build", "allocation", NO_LIBRARY="1")
    assert f"library={library} build=: -m adalora_kernels" in log
    # The build failed.
    assert f"library={library} build=: -m pytest benchmarks/bench_importance.py" in log


def test_round_runs_every_bench_and_ends_with_the_report(round_, tmp_path):
    done, log = round_(*BENCHES, "report")
    assert done.returncode == 0
    results = tmp_path / "out" / "results"
    for name in BENCHES:
        assert f"--device cuda --out {results}/{name}.json --seconds " in log
    benches = {path.name for path in (ROOT / "benchmarks").glob("bench_*.py")}
    assert set(re.findall(r"benchmarks/(bench_\w+\.py)", log)) == benches
    report = f"-m benchmarks.report --results {results} --out build/gpu_report/RESULTS.md"
    assert report in log
    # What it prints is the end of the output, but for the line about the whole round.
    assert report in done.stdout.splitlines()[-2]


def test_round_keeps_time_for_the_benchmarks_and_the_report(round_):
    _, log = round_("build", "tune", *BENCHES, "report", NO_LIBRARY="1", ROUND_SECONDS="475")
    assert limit(log, "build") == 120 and limit(log, "allocation") == 80
    # Each gets what is left but for those after it.
    assert limit(log, "train_step") == 300
    assert 300 >= limit(log, "svd_linear") > 290 and limit(log, "report") == 15
    seconds = dict(re.findall(r"/(\w+)\.json --seconds (\d+)", log))
    assert seconds["allocation"] == "60" and seconds["train_step"] == "280"
    done, log = round_("build", "tune", "allocation", "report", NO_LIBRARY="1", ROUND_SECONDS="92")
    assert "tune (optional)                no time for it" in done.stdout
    assert "== tune" not in log
    assert 80 >= limit(log, "allocation") > 65


def test_round_knows_its_stages(round_):
    done, _ = round_("everything")
    assert done.returncode == 2 and "no stage everything" in done.stderr


def test_the_script_is_valid_bash():
    script = ROOT / "benchmarks" / "gpu_round.sh"
    subprocess.run(["bash", "-n", script], check=True)

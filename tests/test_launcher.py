"""The compiled launcher against Triton's own launch, over a GPU that is none (see CONTRIBUTING).

All of it runs in one fresh process, for what makes the fake GPU is decided on import.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from adalora_kernels import _extension, ops

ROOT = Path(__file__).parent.parent
SCENARIOS = [
    *("paths", "few", "overlapping", "accumulated", "tf32", "dropout_rates", "buckets"),
    *("random_60", "threads", "fork", "captured_first", "captured_later", "captured_frozen"),
    *("devices", "seeds", "refused", "forgotten", "none_served", "errors"),
]
LONG = ["all_combinations", "random_1000"]

NEEDED = {
    f"no compiled library: {ops.library.why_not}": ops.library.path,
    "needs a C compiler (cc or gcc)": shutil.which("cc") or shutil.which("gcc"),
    "needs triton": importlib.util.find_spec("triton"),
}
MISSING = [reason for reason, there in NEEDED.items() if not there]
pytestmark = pytest.mark.skipif(bool(MISSING), reason="; ".join(MISSING))


def run(folder, scenarios):
    """What each scenario raised, and what there was to read besides."""
    file = folder / "outcomes.json"
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    environment[_extension.VARIABLE] = str(ops.library.path)
    # Set by conftest.py where there is no GPU.
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, ROOT / "tests" / "launcher_scenarios.py", file, *scenarios]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    outcomes = json.loads(file.read_text()) if file.exists() else {}
    return outcomes, (done.stdout + done.stderr)[-4000:]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, request):
    items = (i for i in request.session.items if i.path == request.path)
    chosen = {i.callspec.params["scenario"] for i in items if "scenario" in i.fixturenames}
    return run(tmp_path_factory.mktemp("launcher"), [s for s in SCENARIOS if s in chosen])


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_launcher_does_what_triton_does(outcomes, scenario):
    raised, output = outcomes
    assert raised.get(scenario, output) == ""


@pytest.mark.full
@pytest.mark.parametrize("scenario", LONG)
def test_the_launcher_does_what_triton_does_for_all(tmp_path, scenario):
    raised, output = run(tmp_path, [scenario])
    assert raised.get(scenario, output) == ""

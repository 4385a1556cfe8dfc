import importlib.util
import os

import pytest
import torch

# Triton's kernels run on the GPU if there is one, else interpreted. Read when they are imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Whole files that stand on one library, which a machine for other tests need not have.
NEEDED = {"test_lightning*.py": "lightning", "test_trl.py": "trl"}
MISSING = {files: name for files, name in NEEDED.items() if importlib.util.find_spec(name) is None}
collect_ignore_glob = list(MISSING)


def pytest_terminal_summary(terminalreporter):
    for files, name in MISSING.items():
        terminalreporter.write_line(f"{files} left out: {name} is not installed")


# Small tensors: a second thread only waits at barriers, for ever on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """`torch.empty` gives NaN, so that a read of memory that nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def allow_tf32():
    """Return what sets torch's TF32 setting. monkeypatch could not put it back."""
    before = torch.backends.cuda.matmul.allow_tf32
    yield lambda allowed: setattr(torch.backends.cuda.matmul, "allow_tf32", allowed)
    torch.backends.cuda.matmul.allow_tf32 = before

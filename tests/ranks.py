"""Runs a function in several real processes of torch.distributed, over gloo.

    results = on_ranks(2, "fsdp2_runs:train", {"steps": 30})

The function gets the keyword arguments in each process, and what it returns comes back in the order
of the ranks. It stands in a file of its own, which imports what it needs: a fresh Python imports it
once and forks the processes, because the imports take most of the time.
"""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

TESTS = Path(__file__).parent


class Ended(NamedTuple):
    """How a process ended that returned nothing: its exit code (-9 if killed), and its error."""

    code: int
    error: str


def on_ranks(
    world: int,
    function: str,
    arguments: dict[str, Any] | None = None,
    *,
    seconds: float = 120.0,
    may_fail: bool = False,
    backend: str = "gloo",
) -> list[Any]:
    """Call `"module:function"` on `world` processes; RuntimeError with their output if one fails.

    Args:
        world: how many processes.
        function: a module below tests/, and the name of a function in it.
        arguments: its keyword arguments.
        seconds: after which all are killed, which is a RuntimeError.
        may_fail: leave the others alone when one fails; what a process does not return is an
            `Ended` then.
        backend: of the processes. With "nccl" each has the GPU of its own rank.
    """
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "arguments").write_bytes(pickle.dumps(arguments or {}))
        paths = [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
        failing = "may fail" if may_fail else "all or none"
        command = [sys.executable, __file__, str(world), function, folder, backend, failing]
        process = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            raise RuntimeError(f"{function} hung for {seconds} s:\n{output}") from None
        if process.returncode and not may_fail:
            raise RuntimeError(f"{function} failed:\n{output}")
        return [_result(Path(folder, str(rank)), output) for rank in range(world)]


def gpus_for_nccl() -> int:
    """How many processes can talk over NCCL here, 1 or 2; skips the test where none can.

    A single one makes all calls, too.
    """
    import pytest
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    if not torch.distributed.is_nccl_available():
        pytest.skip("needs a torch with NCCL")
    return min(torch.cuda.device_count(), 2)


def _result(path: Path, output: str) -> Any:
    """What a process has returned, or how it ended."""
    if path.exists():
        return pickle.loads(path.read_bytes())
    code, error = path.with_suffix(".code"), path.with_suffix(".error")
    if not code.exists():
        raise RuntimeError(f"nothing is known of rank {path.name}:\n{output}")
    return Ended(int(code.read_text()), error.read_text() if error.exists() else "")


def _on_rank(rank: int, world: int, name: str, folder: str, backend: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend,
        f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    result = _function(name)(**pickle.loads(Path(folder, "arguments").read_bytes()))
    Path(folder, str(rank)).write_bytes(pickle.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def _function(name: str) -> Any:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def _main(world: int, name: str, folder: str, backend: str, may_fail: bool) -> int:
    if backend == "gloo":
        _function(name)  # Each process that is forked has it then; but CUDA outlives no fork.
    children: dict[int, int] = {}
    for rank in range(world):
        child = os.fork()
        if child == 0:
            # torchrun's variables, which libraries read.
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
            try:
                _on_rank(rank, world, name, folder, backend)
            except BaseException as error:
                traceback.print_exc()
                sys.stderr.flush()
                Path(folder, f"{rank}.error").write_text(f"{type(error).__name__}: {error}")
                time.sleep(0.2)  # Let the others say what they have to say before they are killed.
                os._exit(1)
            # Without the interpreter's shutdown: there gloo's threads have been seen to race with
            # it ("terminate called without an active exception"), after everything was done.
            os._exit(0)
        children[child] = rank
    failed = 0
    while children:
        child, status = os.wait()
        rank = children.pop(child)
        code = os.waitstatus_to_exitcode(status)
        Path(folder, f"{rank}.code").write_text(str(code))
        if code and not failed:
            print(f"rank {rank} of {world} ended with {code}", flush=True)
            failed = 1
            for other in () if may_fail else children:
                os.kill(other, signal.SIGTERM)
    return failed


if __name__ == "__main__":
    _world, _name, _folder, _backend, _may_fail = sys.argv[1:]
    sys.exit(_main(int(_world), _name, _folder, _backend, _may_fail == "may fail"))

"""Runs a function in several real processes of torch.distributed, over gloo.

    results = on_ranks(2, "fsdp2_runs:train", {"steps": 30})

The function gets the keyword arguments in each process, and what it returns comes back in the order
of the ranks. It stands in a file of its own, which imports what it needs: a fresh Python imports it
and forks the processes, because the imports take most of the time. It stays, and serves the calls
of functions in the same file that follow.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, NamedTuple

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
        # Each process that is forked has the module then; but CUDA outlives no fork.
        server = _server_for(function.partition(":")[0] if backend == "gloo" else "")
        server.ask([world, function, folder, backend, may_fail])
        process = server.answer(seconds)
        if process is None:
            _stop_server()
            raise RuntimeError(f"{function} was not started:\n{server.said()}")
        code = server.answer(seconds)
        if code is None:
            os.killpg(process, signal.SIGKILL)
            _stop_server()
        output = Path(folder, "output").read_text(errors="replace")
        if code is None:
            raise RuntimeError(f"{function} hung for {seconds} s:\n{output}")
        if code and not may_fail:
            raise RuntimeError(f"{function} failed:\n{output}")
        return [_result(Path(folder, str(rank)), output) for rank in range(world)]


class _Server(NamedTuple):
    """A Python that has imported a module, and forks itself for each call.

    Of each call it says two numbers: the process that does it, and how that has ended.
    """

    module: str
    environment: dict[str, str]
    process: subprocess.Popen[bytes]
    errors: IO[str]

    def ask(self, call: list[Any]) -> None:
        self.process.stdin.write(json.dumps(call).encode() + b"\n")

    def answer(self, seconds: float) -> int | None:
        """The next number; None if there is none in time, or never."""
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            return None
        line = self.process.stdout.readline()
        return int(line) if line else None

    def said(self) -> str:
        self.errors.seek(0)
        return self.errors.read()


_server: _Server | None = None


def _server_for(module: str) -> _Server:
    """The server that is there, or another one where that has another module or environment."""
    global _server
    paths = [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_CURRENT_TEST", None)
    if _server is None or (_server.module, _server.environment) != (module, environment):
        _stop_server()
        errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        process = subprocess.Popen(
            [sys.executable, __file__, module],
            bufsize=0,  # What `select` says is true then.
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
        _server = _Server(module, environment, process, errors)
    return _server


@atexit.register
def _stop_server() -> None:
    global _server
    if _server is not None:
        _server.process.kill()
        _server.process.communicate()
        _server = None


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


def _serve(module: str) -> None:
    answers = os.dup(1)
    os.dup2(2, 1)  # Libraries print when they are imported.
    if module:
        importlib.import_module(module)
    for line in sys.stdin:
        call = json.loads(line)
        process = os.fork()
        if process == 0:
            os.setsid()
            os.close(answers)
            output = os.open(Path(call[2], "output"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for descriptor, file in enumerate((os.open(os.devnull, os.O_RDONLY), output, output)):
                os.dup2(file, descriptor)
            os._exit(_fork_ranks(*call))
        os.write(answers, b"%d\n" % process)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        os.write(answers, b"%d\n" % code)


def _fork_ranks(world: int, name: str, folder: str, backend: str, may_fail: bool) -> int:
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
    _serve(*sys.argv[1:])

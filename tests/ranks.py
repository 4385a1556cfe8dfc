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
from typing import Any

TESTS = Path(__file__).parent


def on_ranks(
    world: int, function: str, arguments: dict[str, Any] | None = None, *, seconds: float = 120.0
) -> list[Any]:
    """Call `"module:function"` on `world` processes; RuntimeError with their output if one fails.

    Args:
        world: how many processes.
        function: a module below tests/, and the name of a function in it.
        arguments: its keyword arguments.
        seconds: after which all are killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "arguments").write_bytes(pickle.dumps(arguments or {}))
        paths = [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
        command = [sys.executable, __file__, str(world), function, folder]
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
        if process.returncode:
            raise RuntimeError(f"{function} failed:\n{output}")
        return [pickle.loads(Path(folder, str(rank)).read_bytes()) for rank in range(world)]


def _on_rank(rank: int, world: int, function: Any, folder: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    result = function(**pickle.loads(Path(folder, "arguments").read_bytes()))
    Path(folder, str(rank)).write_bytes(pickle.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def _main(world: int, name: str, folder: str) -> int:
    module, _, function = name.partition(":")
    called = getattr(importlib.import_module(module), function)
    children: dict[int, int] = {}
    for rank in range(world):
        child = os.fork()
        if child == 0:
            # torchrun's variables, which libraries read.
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
            try:
                _on_rank(rank, world, called, folder)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                time.sleep(0.2)  # Let the others say what they have to say before they are killed.
                os._exit(1)
            os._exit(0)
        children[child] = rank
    failed = 0
    while children:
        child, status = os.wait()
        rank = children.pop(child)
        if status and not failed:
            print(f"rank {rank} of {world} ended with status {status}", flush=True)
            failed = 1
            for other in children:
                os.kill(other, signal.SIGTERM)
    return failed


if __name__ == "__main__":
    sys.exit(_main(int(sys.argv[1]), sys.argv[2], sys.argv[3]))

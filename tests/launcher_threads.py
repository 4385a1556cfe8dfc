"""Scenarios of tests/test_launcher.py: threads, a fork, and more than one GPU."""

import os
import signal
import threading
from typing import Any

from launcher_runs import (
    DROPOUT,
    PLAIN,
    backward,
    compare,
    compare_launches,
    fake_gpu,
    forget,
    forward,
    launched,
    library,
    named,
    tensors_of,
    torch,
)


def threads() -> None:
    """Eight threads of different shapes, all at first without a plan, and without a context."""
    problems = [DROPOUT._replace(leading=(16 * i,), R=4 * i) for i in range(1, 9)]
    expected = [launched(problem) for problem in problems]
    # What a call gets is there before any workspace is, and so has an address of its own.
    given = [[tensors_of(problem) for _ in range(20)] for problem in problems]
    raised: list[BaseException] = []
    start = threading.Barrier(len(problems))

    def work(number: int) -> None:
        try:
            start.wait()
            for t in given[number]:
                y = Layer.apply(t["x"].requires_grad_(), t, problems[number].p)
                y.backward(t["grad_y"])
        except BaseException as error:
            raised.append(error)

    forget()
    with fake_gpu.recorded() as launches:
        workers = [threading.Thread(target=work, args=(i,)) for i in range(len(problems))]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert not raised, raised
    flat = [(number, t) for number, of_thread in enumerate(given) for t in of_thread]
    own: list[list[Any]] = [[] for _ in flat]
    owners = {t[name].data_ptr(): i for i, (_, t) in enumerate(flat) for name in Layer.given(t)}
    for launch in launches:
        words = [int.from_bytes(p[:8], "little") for p in launch.parameters if len(p) > 4]
        (owner,) = {owners[word] for word in words if word in owners}
        own[owner].append(launch)
    for (number, t), of_call in zip(flat, own, strict=True):
        forwards, backwards = expected[number]
        count = len(forwards) - 1
        results = t.pop("results")
        compare_launches(problems[number], named(of_call[:count], t | results[0]), forwards)
        compare_launches(problems[number], named(of_call[count:], t | results[1]), backwards)


class Layer(torch.autograd.Function):
    """A `Layer` is a forward and a backward, which torch calls on a thread of its choice."""

    @staticmethod
    def given(t: dict[str, Any]) -> list[str]:
        return [name for name, value in t.items() if isinstance(value, torch.Tensor)]

    @staticmethod
    def forward(ctx: Any, x: Any, t: dict[str, Any], p: float) -> Any:
        ctx.t, ctx.p = t, p
        t["results"] = [{name: r for name, r in forward(t, p).items() if name != "seed"}]
        return t["results"][0]["y"]

    @staticmethod
    def backward(ctx: Any, grad_y: Any) -> Any:
        ctx.t["results"].append(backward(ctx.t, ctx.p, True))
        return ctx.t["results"][1]["dx"], None, None


def fork() -> None:
    """A child that is forked while other threads launch can launch."""
    stop = threading.Event()
    t = tensors_of(PLAIN)

    def work() -> None:
        while not stop.is_set():
            forward(t, 0.0)
            library().adalora_forget_plans()

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    try:
        for _ in range(10):
            child = os.fork()
            if child == 0:
                code = 1
                signal.alarm(60)  # Waiting for a lock for ever is a failure, too.
                try:
                    compare(PLAIN)
                    code = 0
                finally:
                    os._exit(code)
            _, status = os.waitpid(child, 0)
            assert status == 0, status
    finally:
        stop.set()
        for worker in workers:
            worker.join()


def devices() -> None:
    """Each of two GPUs has plans of its own, and kernels."""
    seen = []
    try:
        for device in (0, 1, 0, 1):
            fake_gpu.set_device(device)
            before = library().adalora_plan_misses()
            compare(PLAIN)
            with fake_gpu.recorded() as launches:
                forward(tensors_of(PLAIN), 0.0)
            functions = [launch.function for launch in launches]
            seen.append((functions, library().adalora_plan_misses() - before))
    finally:
        fake_gpu.set_device(0)
    assert not set(seen[0][0]) & set(seen[1][0])
    assert seen[0][0] == seen[2][0] and seen[1][0] == seen[3][0]
    assert seen[1][1] == 2 and seen[2][1] == seen[3][1] == 0

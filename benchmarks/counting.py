"""What a call asks of the machine, other than time: ops, host syncs, memory."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.harness import Call, Outcome


class CountOps(TorchDispatchMode):
    """Counts dispatched ops by name: `calls` from outside, `inner` those inside ops of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.inner: Counter[str] = Counter()
        self._inside = False

    @property
    def host_syncs(self) -> int:
        """How often a value was read from the device, wherever that was."""
        return sum(c["aten::_local_scalar_dense"] for c in (self.calls, self.inner))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "adalora":
            self.calls[func._schema.name] += 1
            return self._look_inside(func, args, kwargs)
        if self._inside:
            # Below autograd nobody has split up the composite ops (matmul, to, …) yet.
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        (self.inner if self._inside else self.calls)[func._schema.name] += 1
        return func(*args, **kwargs)

    def _look_inside(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an op's kernel with the mode on, which sees nothing but the call otherwise."""
        first = args[0] if isinstance(args[0], Tensor) else args[0][0]
        key = getattr(torch._C.DispatchKey, first.device.type.upper())
        self._inside = True
        try:
            with self:
                return func.redispatch(torch._C.DispatchKeySet(key), *args, **kwargs)
        finally:
            self._inside = False


def count_ops(call: Call) -> CountOps:
    """Count the ops that one call dispatches."""
    with CountOps() as ops:
        call()
    return ops


def add_counts(outcome: Outcome, name: str, call: Call, device: torch.device) -> int:
    """Add how many ops one call dispatches, and how many of ours do inside; return host syncs."""
    ops = count_ops(call)
    syncs = waits(call) if device.type == "cuda" else ops.host_syncs
    outcome.add(name, "dispatched ops", ops.calls.total())
    if any(op.startswith("adalora::") for op in ops.calls):
        outcome.add(name, "ops inside those", ops.inner.total())
    outcome.add(name, "host syncs", syncs)
    return syncs


def waits(call: Call) -> int:
    """Count how often a call waits for a GPU, by what torch says of itself."""
    call()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    # Turning it on warns, too.
    what = "called a synchronizing CUDA operation"
    return sum(what in str(warning.message) for warning in caught)


def peak_extra_megabytes(call: Call, device: torch.device) -> float:
    """Measure the most that a call holds at a time, beside what there was before it.

    On a GPU the caching allocator's statistics say it, on a CPU its reports of every allocation to
    the profiler: whoever allocates, compiled code and C++ too.
    """
    if device.type != "cuda":
        return _peak_on_cpu(call) / 1e6
    call()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 1e6


def _peak_on_cpu(call: Call) -> int:
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as trace:
        # The profiler doesn't see the end of what it hasn't seen the beginning of: state that the
        # next call replaces is to be allocated here.
        call()
        with torch.profiler.record_function("measured call"):
            # Kept until the end, as a training loop keeps a loss.
            result = call()
    del result
    events = sorted(trace.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    begin = next(event.start_ns() for event in events if event.name() == "measured call")
    held = before = peak = 0
    for event in (event for event in events if event.name() == "[memory]"):
        held += event.nbytes()
        before = held if event.start_ns() < begin else before
        peak = max(peak, held - before)
    return peak

"""What a call asks of the machine, other than time: ops, launches, host syncs, memory."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Call: TypeAlias = Callable[[], object]

# What the profiler is to call the call that counts.
_MEASURED = "measured call"


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

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
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

    def _look_inside(self, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
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
    """The ops that one call dispatches."""
    with CountOps() as ops:
        call()
    return ops


def peak_extra_memory(call: Call, device: torch.device) -> int:
    """The most bytes that a call holds at a time, beside what there was before it.

    On a GPU by the caching allocator's statistics, on a CPU by its reports of every allocation to
    the profiler: whoever allocates, compiled code and C++ too.
    """
    if device.type == "cuda":
        call()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as trace:
        # The profiler doesn't see the end of what it hasn't seen the beginning of: state that the
        # next call replaces is to be allocated here.
        call()
        with torch.profiler.record_function(_MEASURED):
            # Kept until the end, as a training loop keeps a loss.
            result = call()
    del result
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    begin = next(event["ts"] for event in events if event.get("name") == _MEASURED)
    held = before = peak = 0
    of_memory = (event for event in events if event.get("name") == "[memory]")
    for event in sorted(of_memory, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        if event["ts"] < begin:
            before = held
        else:
            peak = max(peak, held - before)
    return peak


@dataclass(frozen=True)
class KernelUse:
    """What one call launches of one kernel (or copy, or memset)."""

    name: str
    launches: float
    microseconds: float  # of all its launches together

    @property
    def is_kernel(self) -> bool:
        return not self.name.startswith(("Memcpy", "Memset"))

    @property
    def short_name(self) -> str:
        """Without namespaces, template arguments and parameters."""
        name = self.name.removeprefix("void ").replace("(anonymous namespace)::", "")
        return name.partition("<")[0].partition("(")[0].rpartition("::")[2].strip()


def kernels_of(call: Call, device: torch.device, calls: int = 5) -> list[KernelUse]:
    """What the profiler sees on the GPU in a call, the most time first."""
    call()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    # The first of a process starts up and may miss what comes early.
    with torch.profiler.profile(activities=activities):
        call()
        torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=activities) as trace:
        for _ in range(calls):
            call()
        torch.cuda.synchronize(device)
    found: dict[str, list[float]] = {}
    for event in trace.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found.setdefault(event.name, []).append(event.time_range.elapsed_us())
    uses = [KernelUse(name, len(us) / calls, sum(us) / calls) for name, us in found.items()]
    return sorted(uses, key=lambda use: -use.microseconds)


def host_syncs(call: Call, device: torch.device) -> int:
    """How often a call waits for the device.

    On a GPU what torch says of itself; on a CPU, which never waits, how often a value is read.
    """
    if device.type != "cuda":
        return count_ops(call).host_syncs
    call()
    torch.cuda.synchronize(device)
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

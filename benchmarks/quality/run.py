"""One run: an adapter trained on a task, and the few figures that are kept of it."""

from __future__ import annotations

import functools
import json
import math
import os
import resource
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality import methods, tasks
from benchmarks.quality.plan import Spec, config_of
from benchmarks.quality.tasks import DEVICE, Task
from benchmarks.results import environment

POINTS = 25  # of a loss curve, each a mean over the steps up to it
LOOKS = 12  # at which triplets would stay, before the pattern is fixed
_environment = functools.cache(environment)  # It takes a second.


def seconds() -> float:
    """A clock: of this process on a CPU, which others may share; with a GPU, of the wall."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def forget_peak() -> None:
    """Let the peak of memory begin anew, where the system can: CUDA's, or Linux's of a process."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif (file := Path("/proc/self/clear_refs")).exists():
        file.write_text("5")


def peak_bytes() -> int:
    """The most memory since: CUDA's allocations, or what the process had in RAM."""
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Training:
    """A model with its head and its optimizer, one step at a time."""

    def __init__(self, task: Task, method: dict[str, Any], spec: Spec, steps: int) -> None:
        torch.manual_seed(spec["seed"])
        self.task, self.spec, self.steps = task, spec, steps
        self.head = task.head()  # Before the adapter: that of a seed is the same in all methods.
        self.model, report = methods.adapt(task, method, spec["rank"], spec["init_r"], steps)
        self.allocator = report.allocator if report else None
        own = [p for p in self.model.parameters() if p.requires_grad]
        of_head = list(self.head.parameters())
        self.parameters = sum(p.numel() for p in own)
        self.groups = [(own, spec["rate"])] if own else []
        if of_head:
            self.groups.append((of_head, task.config["head_rate"] if own else spec["rate"]))
        groups = [{"params": params, "lr": rate} for params, rate in self.groups]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        if report:
            report.attach(self.optimizer)
        self.plain = None if report else getattr(self.model, "base_model", None)

    def step(self, step: int, rows: list[int]) -> Tensor:
        """Take step number `step`, from 1, over these rows; returns the loss before it."""
        warmup = max(1, self.steps // 10)
        decay = (self.steps + 1 - step) / (self.steps + 1 - warmup)
        for group, (_, rate) in zip(self.optimizer.param_groups, self.groups, strict=True):
            group["lr"] = rate * min(step / warmup, decay)
        loss = self.task.loss(self.model, self.head, "train", rows)
        loss.backward()
        self.optimizer.step()
        if hasattr(self.plain, "update_and_allocate"):
            self.plain.update_and_allocate(step)
        self.optimizer.zero_grad()
        return loss.detach()


def train(spec: Spec, config: dict[str, Any]) -> dict[str, Any]:
    """Carry out one run.

    Args:
        spec: which: `task`, `method`, `rank` and `init_r` (0 for methods without), `rate`, `seed`,
            and `phase`: "tune" looks at the dev split only, "test" at both.
        config: the entries of study.json for the task and the method; `plan.config_of`.

    Returns:
        What is kept of it; see the files below benchmarks/results/quality.
    """
    entry, method = config["task"], config["method"]
    task = tasks.load(json.dumps(entry, sort_keys=True))
    steps = entry["steps"]
    forget_peak()
    training = Training(task, method, spec, steps)
    allocator, batches = training.allocator, task.parts["train"].shuffled
    losses, times, looks = [], [], []
    begun = time.perf_counter()
    for step, rows in zip(range(1, steps + 1), batches(spec["seed"], entry["batch"]), strict=False):
        start = seconds()
        losses.append(training.step(step, rows).item())
        times.append(seconds() - start)
        if not math.isfinite(losses[-1]):
            break
        if allocator and not allocator.frozen and step % max(1, steps // (2 * LOOKS)) == 0:
            looks.append((step, best(allocator)))
    training.model.eval()
    metrics = {"dev": None, "test": None}
    if math.isfinite(losses[-1]):
        for name in ("dev", "test")[: 1 + (spec["phase"] == "test")]:
            metrics[name] = task.evaluate(training.model, training.head, name)
    size = max(1, steps // POINTS)
    curve = [[i + size, sum(losses[i : i + size]) / size] for i in range(0, len(losses), size)]
    result = {
        "spec": spec,
        "config": config,
        **rounded({**metrics, "curve": [p for p in curve if p[0] <= len(losses)]}),
        "trainable_parameters": training.parameters,
        "seconds_per_step": rounded(statistics.median(times)),
        "peak_bytes": peak_bytes(),
        "wall_seconds": round(time.perf_counter() - begun, 1),
        "environment": _environment(DEVICE),
    }
    if allocator and allocator.frozen:
        result |= pattern_of(allocator, looks)
        if hasattr(task, "planted"):
            result["planted"] = task.planted
    return result


def best(allocator: Any) -> set[int]:
    """The triplets that would stay if the pattern were fixed now. Reads the device."""
    scores = torch.cat(list(allocator.scores().values()))
    budget = allocator.summary()["target_budget"]
    return set(torch.topk(scores, budget).indices.tolist())


def pattern_of(allocator: Any, looks: list[tuple[int, set[int]]]) -> dict[str, Any]:
    """The final ranks, and at some steps which share of the final pattern was ahead already."""
    alive = [flag for flags in allocator.rank_pattern.values() for flag in flags]
    final = {i for i, flag in enumerate(alive) if flag}
    settled = [[step, len(ahead & final) / len(final)] for step, ahead in looks]
    ranks = {_short(name): rank for name, rank in allocator.ranks().items()}
    return {"ranks": ranks, **rounded({"settled": settled})}


def _short(name: str) -> str:
    return name.removeprefix("base_model.model.").split(".lora_E")[0]


def rounded(value: Any) -> Any:
    """The same with five digits to every float, and None for what is not finite."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


def cost(spec: Spec, config: dict[str, Any]) -> dict[str, Any]:
    """Time some steps of a method in a process that has done nothing else.

    The schedule of AdaLoRA is one that prunes at every other step. Returns the median of the
    seconds of a step, and by how much the process grew over what it was with the model loaded.
    """
    entry, method = config["task"], config["method"]
    task = tasks.load(json.dumps(entry, sort_keys=True))
    rows = next(task.parts["train"].shuffled(0, entry["batch"]))
    steps, fractions = 1000, {"tinit": 1e-3, "tfinal": 1e-3, "deltaT": 2e-3}
    forget_peak()
    before, times = peak_bytes(), []
    training = Training(task, {**method, **fractions}, spec, steps)
    for step in range(1, spec["timed"] + 4):
        start = seconds()
        training.step(step, rows).item()
        times.append(seconds() - start)
    return {
        "spec": spec,
        "config": config,
        "trainable_parameters": training.parameters,
        "seconds_per_step": rounded(statistics.median(times[3:])),
        "grown_bytes": peak_bytes() - before,
        "environment": _environment(DEVICE),
    }


def begin_worker() -> None:
    """Let this process have one thread, and stand behind everybody else."""
    torch.set_num_threads(1)
    os.nice(2)
    warnings.filterwarnings("ignore", module=r"(peft|transformers|torch)\b")


def work(spec: Spec, study: dict[str, Any]) -> dict[str, Any]:
    """Carry out a run of a study, or measure a cost."""
    config = config_of(spec, study)
    return (cost if spec["phase"] == "cost" else train)(spec, config)

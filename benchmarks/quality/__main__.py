"""Quality of AdaLoRA beside LoRA: runs what is missing of a study, and writes its page.

    python -m benchmarks.quality             # goes on where it was stopped
    python -m benchmarks.quality --report    # docs/quality.md and its pictures, from the results
    python -m benchmarks.quality --cost      # seconds and memory of a step, a process each

What is to be done stands in study.json. There is a process per core, of one thread, or one process
with a GPU. Each run leaves a file; deleting it makes the run be done again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from benchmarks.results import FOLDER

STUDY = Path(__file__).with_name("study.json")
Spec = dict[str, Any]
Results = dict[str, dict[str, Any]]


def cells(entry: dict[str, Any], study: dict[str, Any]) -> Iterator[tuple[Spec, list[float]]]:
    """Each method of an entry of the plan, with the rates to choose from."""
    for name in entry["methods"]:
        method = study["methods"][name]
        is_adalora = method["kind"] == "adalora"
        has_rank = is_adalora or method["kind"] == "lora"
        spec = {
            "task": entry["task"],
            "method": name,
            "rank": entry["rank"] if has_rank else 0,
            "init_r": entry["init_r"] if is_adalora else 0,
        }
        yield spec, study["tasks"][entry["task"]]["rates"][method["rates"]]


def best_rate(spec: Spec, rates: list[float], results: Results) -> float | None:
    """The rate with the least loss on the dev split, or None while there are some to try."""
    losses = {}
    for rate in rates:
        done = results.get(file_of({**spec, "rate": rate, "seed": 0, "phase": "tune"}))
        if done is None:
            return None
        if done["dev"] is not None:
            losses[rate] = done["dev"]["loss"]
    return min(losses, key=losses.__getitem__) if losses else None


def jobs(study: dict[str, Any], results: Results) -> Iterator[Spec]:
    """All runs of the plan that can be told by now, in its order, done or not.

    Of each entry first all rates of all methods with seed 0, then the fresh seeds, one after the
    other over all methods, so that complete comparisons come early.
    """
    for entry in study["plan"]:
        found = list(cells(entry, study))
        for spec, rates in found:
            yield from ({**spec, "rate": rate, "seed": 0, "phase": "tune"} for rate in rates)
        chosen = [(spec, best_rate(spec, rates, results)) for spec, rates in found]
        for seed in range(1, entry["seeds"] + 1):
            for spec, rate in chosen:
                if rate is not None:
                    yield {**spec, "rate": rate, "seed": seed, "phase": "test"}


def file_of(spec: Spec) -> str:
    from benchmarks.quality.run import file_of

    return file_of(spec)


def read(folder: Path) -> Results:
    """Every run that is kept below a folder, by its file."""
    return {
        path.relative_to(folder).as_posix(): json.loads(path.read_text())
        for path in sorted(folder.glob("*/*.json"))
    }


def begin_worker() -> None:
    """One thread, and behind everybody else."""
    import torch

    torch.set_num_threads(1)
    os.nice(10)
    warnings.filterwarnings("ignore", module=r"(peft|transformers|torch)\b")


def work(spec: Spec, study: dict[str, Any]) -> dict[str, Any]:
    from benchmarks.quality import run

    call = run.cost if spec["phase"] == "cost" else run.train
    return call(spec, study["tasks"][spec["task"]], study["methods"][spec["method"]])


def keep(folder: Path, name: str, result: dict[str, Any]) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result) + "\n")
    partial.replace(path)


def run_missing(study: dict[str, Any], folder: Path, processes: int, until: float) -> None:
    """Carry out what is missing, and begin nothing after the time `until`."""
    results, running = read(folder), dict[Future, Spec]()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, begin_worker) as pool:
        while True:
            claimed = {file_of(spec) for spec in running.values()}
            for spec in jobs(study, results):
                if len(running) == processes or time.time() > until:
                    break
                if (name := file_of(spec)) not in results and name not in claimed:
                    claimed.add(name)
                    running[pool.submit(work, spec, study)] = spec
            if not running:
                return
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                name = file_of(running.pop(done))
                results[name] = done.result()
                keep(folder, name, results[name])
                told = results[name]["test"] or results[name]["dev"]
                print(time.strftime("%H:%M:%S"), name, told, flush=True)


def measure_cost(study: dict[str, Any], folder: Path) -> None:
    """Measure every method of the plan's costs in a process each, in turn, round after round."""
    context = multiprocessing.get_context("spawn")
    for entry in study["costs"]:
        for seed in range(entry["rounds"]):
            for spec, _ in cells(entry, study):
                spec |= {"rate": 1e-4, "seed": seed, "phase": "cost", "timed": entry["timed"]}
                with ProcessPoolExecutor(1, context, begin_worker) as pool:
                    result = pool.submit(work, spec, study).result()
                keep(folder, file_of(spec), result)
                print(file_of(spec), result["seconds_per_step"], result["grown_bytes"], flush=True)


def quick(study: dict[str, Any]) -> dict[str, Any]:
    """The same study in seconds, for the tests: a few steps over a few texts, two rates, a seed."""
    small = {"steps": 10, "batch": 4, "train": 64, "dev": 12, "test": 12, "longest": 16}
    tasks = {
        name: {**task, **small, "rates": {k: v[:2] for k, v in task["rates"].items()}}
        for name, task in study["tasks"].items()
    }
    plan = [{**entry, "seeds": 1} for entry in study["plan"]]
    return {**study, "tasks": tasks, "plan": plan}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--study", type=Path, default=STUDY, help="what is to be done")
    parser.add_argument("--results", type=Path, default=FOLDER / "quality", metavar="FOLDER")
    parser.add_argument("--processes", type=int, help="one per core, or one with a GPU")
    parser.add_argument("--minutes", type=float, default=1e6, help="begin no run after these")
    parser.add_argument("--quick", action="store_true", help="small, for the tests")
    parser.add_argument("--cost", action="store_true", help="measure seconds and memory")
    parser.add_argument("--report", action="store_true", help="write the page and its pictures")
    parser.add_argument("--page", type=Path, help="default: docs/quality.md")
    args = parser.parse_args(argv)
    study = json.loads(args.study.read_text())
    if args.report:
        from benchmarks.quality.report import write

        return write(study, read(args.results), args.page)
    if args.quick:
        study = quick(study)
    if args.cost:
        measure_cost(study, args.results)
        return 0
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    processes = args.processes or (1 if torch.cuda.is_available() else os.cpu_count() or 1)
    run_missing(study, args.results, processes, time.time() + 60 * args.minutes)
    return 0


if __name__ == "__main__":
    sys.exit(main())

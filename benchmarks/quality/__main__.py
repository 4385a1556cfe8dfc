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
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from benchmarks.quality import run
from benchmarks.quality.plan import Spec, cells, file_of, jobs, keep, quick, read

STUDY = Path(__file__).with_name("study.json")
RESULTS = Path(__file__).parents[1] / "results" / "quality"


def pool_of(processes: int) -> ProcessPoolExecutor:
    """Processes that begin anew, of one thread each."""
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(processes, context, run.begin_worker)


def run_missing(study: dict[str, Any], folder: Path, processes: int, until: float) -> None:
    """Carry out what is missing, and begin nothing after the time `until`."""
    results, running = read(folder, study), dict[Future, Spec]()
    with pool_of(processes) as pool:
        while True:
            claimed = {file_of(spec) for spec in running.values()}
            for spec in jobs(study, results):
                if len(running) == processes or time.time() > until:
                    break
                if (name := file_of(spec)) not in results and name not in claimed:
                    claimed.add(name)
                    running[pool.submit(run.work, spec, study)] = spec
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
    for entry in study["costs"]:
        for seed in range(entry["rounds"]):
            for spec, *_ in cells(entry, study):
                spec |= {"rate": 1e-4, "seed": seed, "phase": "cost", "timed": entry["timed"]}
                with pool_of(1) as pool:
                    result = pool.submit(run.work, spec, study).result()
                keep(folder, file_of(spec), result)
                print(file_of(spec), result["seconds_per_step"], result["grown_bytes"], flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--study", type=Path, default=STUDY, help="what is to be done")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--processes", type=int, help="one per core, or one with a GPU")
    parser.add_argument("--minutes", type=float, default=1e6, help="begin no run after these")
    parser.add_argument("--quick", action="store_true", help="small, for the tests")
    parser.add_argument("--cost", action="store_true", help="measure seconds and memory")
    parser.add_argument("--report", action="store_true", help="write the page and its pictures")
    parser.add_argument("--check", action="store_true", help="with --report: write nothing")
    parser.add_argument("--page", type=Path, help="default: docs/quality.md")
    args = parser.parse_args(argv)
    study = json.loads(args.study.read_text())
    if args.report:
        from benchmarks.quality.report import write

        return write(study, read(args.results, study), args.page, args.check)
    if args.quick:
        study = quick(study)
    if args.cost:
        measure_cost(study, args.results)
        return 0
    import torch

    processes = args.processes or (1 if torch.cuda.is_available() else os.cpu_count() or 1)
    run_missing(study, args.results, processes, time.time() + 60 * args.minutes)
    return 0


if __name__ == "__main__":
    sys.exit(main())

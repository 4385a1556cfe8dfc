"""What has become worse: counts against the committed baseline, ratios between two results files.

    python -m benchmarks.guard                      # dispatched ops, launches, bytes: exact
    python -m benchmarks.guard --update             # the baseline is now what is counted
    python -m benchmarks.guard BEFORE.json AFTER.json   # times, as ratios, beyond their spread

The exit status is 1 if anything differs (counts; also where they became better: the baseline is to
be updated on purpose) or became slower (ratios), 2 if there is nothing to compare with.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import torch

from adalora_kernels import ops
from benchmarks.contest import Context
from benchmarks.results import HERE, Row, Run, Spread, environment

BASELINE = HERE / "baseline.json"
BENCHES = ("svd_linear", "importance", "allocation", "orth_reg", "train_step")
# A ratio that is worse by less than that is not worth a word, however narrow its quartiles.
LEAST = 0.1

# By what is done, who does it, and what was counted.
Counts: TypeAlias = dict[str, dict[str, dict[str, float]]]


def counted(benches: Sequence[str] = BENCHES) -> Counts:
    """What the benches say can be counted exactly, on a CPU, with one thread."""
    torch.set_num_threads(1)
    context = Context(torch.device("cpu"), timed=False)
    counts: Counts = {}
    for bench in benches:
        torch.manual_seed(0)
        module = importlib.import_module(f"benchmarks.bench_{bench}")
        for row in module.guarded(context):
            rivals = counts.setdefault(_group(row), {})
            rivals.setdefault(row.rival, {})[row.measure] = row.number
    return counts


def _group(row: Row) -> str:
    settings = (f"{k} {v}" for k, v in row.settings.items() if not isinstance(v, Mapping))
    return f"{row.case}: {', '.join(settings)}"


def differences(before: Counts, after: Counts) -> Iterator[str]:
    """A line for every count that is not the same."""
    for group in sorted(before.keys() | after.keys()):
        rivals, others = before.get(group, {}), after.get(group, {})
        for rival in sorted(rivals.keys() | others.keys()):
            old, new = rivals.get(rival, {}), others.get(rival, {})
            for measure in sorted(old.keys() | new.keys()):
                if old.get(measure) != new.get(measure):
                    was, is_ = _number(old.get(measure)), _number(new.get(measure))
                    yield f"{group}: {rival}: {measure}: {was}, now {is_}"


def _number(count: float | None) -> str:
    return "not there" if count is None else str(count)


def slower(before: Run, after: Run) -> Iterator[str]:
    """A line for every ratio that is worse beyond its spread, and by a tenth at least."""
    old = {(_group(row), row.rival, row.measure): row.value for row in before.rows}
    for row in after.rows:
        was, is_ = old.get((_group(row), row.rival, row.measure)), row.value
        timed = isinstance(was, Spread) and isinstance(is_, Spread)
        if not timed or row.measure.startswith("GB/s"):  # That is no ratio.
            continue
        if row.measure.startswith("time / "):
            worse = is_.p25 > was.p75 and is_.median > (1 + LEAST) * was.median
        else:  # Of a speed, or a time over ours.
            worse = is_.p75 < was.p25 and is_.median < was.median / (1 + LEAST)
        if worse:
            yield (
                f"{_group(row)}: {row.rival}: {row.measure}: "
                f"{was.median:.3f} ({was.p25:.3f}-{was.p75:.3f}), "
                f"now {is_.median:.3f} ({is_.p25:.3f}-{is_.p75:.3f})"
            )


def versions() -> dict[str, str]:
    """Of what the counts depend on, apart from our own code."""
    packages: dict[str, str] = environment(torch.device("cpu"))["packages"]
    found = {name: packages[name] for name in ("torch", "peft", "transformers")}
    return {**found, "compiled library": "yes" if "cpu" in ops.library.device_types else "no"}


def check_counts(path: Path) -> int:
    """Print how the counts differ from a baseline; the exit status."""
    baseline = json.loads(path.read_text())
    if baseline["versions"] != versions():
        print(f"{path.name} is of {baseline['versions']}, which are now {versions()}")
        return 2
    found = list(differences(baseline["counts"], counted()))
    print("\n".join(found) or "all counts are those of the baseline")
    if found:
        print(f"{len(found)} differ. If that is meant: python -m benchmarks.guard --update")
    return int(bool(found))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--update", action="store_true", help="write the baseline")
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="two results files")
    args = parser.parse_args(argv)
    if args.files:
        if args.update or len(args.files) != 2:
            parser.error("give two results files, or none")
        found = list(slower(*map(Run.read, args.files)))
        print("\n".join(found) or "nothing became slower")
        return int(bool(found))
    if args.update:
        contents = {"versions": versions(), "counts": counted()}
        BASELINE.write_text(json.dumps(contents, indent=1, ensure_ascii=False) + "\n")
        print(f"written to {BASELINE}")
        return 0
    return check_counts(BASELINE)


if __name__ == "__main__":
    sys.exit(main())

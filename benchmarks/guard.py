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
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pandas as pd
import torch

from adalora_kernels import ops
from benchmarks.harness import Context
from benchmarks.results import HERE, Row, Run, environment

BASELINE = HERE / "baseline.json"
BENCHES = ("svd_linear", "whole_model", "train_step")
# A ratio that is worse by less than that is not worth a word, however narrow its quartiles.
LEAST = 0.1
_KEY = ["work", "case", "point", "provider", "measure"]


def counted(benches: Sequence[str] = BENCHES) -> list[Row]:
    """Count what can be counted exactly, on a CPU, with one thread."""
    torch.set_num_threads(1)
    context, rows = Context(torch.device("cpu"), timed=False), []
    for bench in benches:
        torch.manual_seed(0)
        module = importlib.import_module(f"benchmarks.bench_{bench}")
        rows += [row for case in module.guarded() for row in module.measure(case, context).rows]
    shown = ("work", "case", "provider", "measure", "value")
    return [{key: row[key] for key in shown} for row in rows]


def _table(rows: Iterable[Row]) -> pd.DataFrame:
    frame = pd.DataFrame(rows).reindex(columns=[*_KEY, "value", "p25", "p75"])
    point = ["" if pd.isna(each) else str(each) for each in frame.point]
    return frame.assign(point=point).set_index(_KEY)


def differences(before: Iterable[Row], after: Iterable[Row]) -> Iterator[str]:
    """Yield a line for every count that is not the same."""
    both = _table(before).join(_table(after), how="outer", suffixes=("", "_now"))
    for key, was, now in zip(both.index, both.value, both.value_now, strict=True):
        if was != now:
            old, new = ("not there" if pd.isna(v) else f"{v:g}" for v in (was, now))
            yield f"{': '.join(filter(None, key))}: {old}, now {new}"


def slower(before: Run, after: Run) -> Iterator[str]:
    """Yield a line for every ratio that is worse beyond its spread, and by a tenth at least."""
    both = _table(before.rows).join(_table(after.rows), how="inner", suffixes=("", "_now"))
    both = both[both.p25.notna() & both.p25_now.notna()]
    costs = both.index.get_level_values("measure").str.startswith("time / ")
    dearer = (both.p25_now > both.p75) & (both.value_now > (1 + LEAST) * both.value)
    # Of a speed, or another one's time over ours.
    less = (both.p75_now < both.p25) & (both.value_now < both.value / (1 + LEAST))
    for key, row in both[(costs & dearer) | (~costs & less)].iterrows():
        yield (
            f"{': '.join(filter(None, key))}: {row.value:.3f} ({row.p25:.3f}-{row.p75:.3f}), "
            f"now {row.value_now:.3f} ({row.p25_now:.3f}-{row.p75_now:.3f})"
        )


def versions() -> dict[str, str]:
    """What the counts depend on, apart from our own code."""
    packages: dict[str, str] = environment(torch.device("cpu"))["packages"]
    found = {name: packages[name] for name in ("torch", "peft", "transformers")}
    return {**found, "compiled library": "yes" if "cpu" in ops.library.device_types else "no"}


def check_counts(path: Path) -> int:
    """Print how the counts differ from a baseline, and return the exit status."""
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
        counts = ",\n".join(f"  {json.dumps(row, ensure_ascii=False)}" for row in counted())
        head = json.dumps(versions(), ensure_ascii=False)
        BASELINE.write_text(f'{{\n "versions": {head},\n "counts": [\n{counts}\n ]\n}}\n')
        print(f"written to {BASELINE}")
        return 0
    return check_counts(BASELINE)


if __name__ == "__main__":
    sys.exit(main())

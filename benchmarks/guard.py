"""What has become worse: counts against the committed baseline, ratios between two results files.

    python -m benchmarks.guard                      # dispatched ops, launches, bytes: exact
    python -m benchmarks.guard --update             # the baseline is now what is counted
    python -m benchmarks.guard BEFORE.json AFTER.json   # times, as ratios, beyond their spread

The exit status is 1 if a count differs, for the better, too, or a ratio became worse; 2 if there is
nothing to compare with.
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
from benchmarks import fake_gpu
from benchmarks.harness import Context
from benchmarks.results import HERE, Row, Run, as_json, environment

BASELINE = HERE / "baseline.json"
BENCHES = ("host", "svd_linear", "whole_model", "train_step")
# A ratio that is worse by less than that is not worth a word, however narrow its quartiles.
LEAST = 0.1
_KEY = ["work", "case", "point", "provider", "measure"]


def counted() -> list[Row]:
    """Count what can be counted exactly, on a CPU, with one thread."""
    torch.set_num_threads(1)
    context, rows = Context(torch.device("cpu"), timed=False), []
    for bench in BENCHES:
        torch.manual_seed(0)
        module = importlib.import_module(f"benchmarks.bench_{bench}")
        rows += [row for case in module.guarded() for row in module.measure(case, context).rows]
    return [{key: row[key] for key in (*_KEY, "value") if key in row} for row in rows]


def _both(before: Iterable[Row], after: Iterable[Row]) -> pd.DataFrame:
    """Put figures of the same, by a text that names it, beside each other."""
    tables = []
    for rows in (before, after):
        frame = pd.DataFrame(rows).reindex(columns=[*_KEY, "value", "p25", "p75"])
        names = frame[_KEY].astype(object).fillna("").astype(str).agg(": ".join, axis=1)
        tables.append(frame.set_index(names.str.replace(": : ", ": "))[["value", "p25", "p75"]])
    return tables[0].join(tables[1], how="outer", suffixes=("", "_now"))


def differences(before: Iterable[Row], after: Iterable[Row]) -> Iterator[str]:
    """Yield a line for every count that is not the same."""
    for row in _both(before, after).itertuples():
        if row.value != row.value_now:
            was, now = ("not there" if pd.isna(v) else f"{v:g}" for v in (row.value, row.value_now))
            yield f"{row.Index}: {was}, now {now}"


def slower(before: Run, after: Run) -> Iterator[str]:
    """Yield a line for every ratio that is worse beyond its spread, and by a tenth at least."""
    both = _both(before.rows, after.rows)
    costs = both.index.str.contains("time / (?!time$)")
    dearer = (both.p25_now > both.p75) & (both.value_now > (1 + LEAST) * both.value)
    # Of a speed, or another one's time over ours.
    less = (both.p75_now < both.p25) & (both.value_now < both.value / (1 + LEAST))
    for row in both[(costs & dearer) | (~costs & less)].itertuples():
        yield (
            f"{row.Index}: {row.value:.3f} ({row.p25:.3f}-{row.p75:.3f}), "
            f"now {row.value_now:.3f} ({row.p25_now:.3f}-{row.p75_now:.3f})"
        )


def versions() -> dict[str, str]:
    """What the counts depend on, apart from our own code."""
    packages: dict[str, str] = environment(torch.device("cpu"))["packages"]
    found = {name: packages[name] for name in ("torch", "peft", "transformers")}
    found["compiled library"] = "yes" if "cpu" in ops.library.device_types else "no"
    return {**found, "fake GPU": fake_gpu.why_not() or "yes"}


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
        BASELINE.write_text(as_json(versions=versions(), rows=counted()))
        print(f"written to {BASELINE}")
        return 0
    baseline = json.loads(BASELINE.read_text())
    if baseline["versions"] != versions():
        print(f"{BASELINE.name} is of {baseline['versions']}, which are now {versions()}")
        return 2
    found = list(differences(baseline["rows"], counted()))
    print("\n".join(found) or "all counts are those of the baseline")
    if found:
        print(f"{len(found)} differ. If that is meant: python -m benchmarks.guard --update")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())

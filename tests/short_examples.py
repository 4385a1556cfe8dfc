"""What the tests of llama_sft.py and deberta_glue.py share: tiny models, and a run of a script."""

import importlib
import json
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Trainer

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
WORDS = ["<pad>", "<s>", "</s>", "<unk>", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz"]


def module(name):
    """Import a module of the examples, as the scripts do: by its bare name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        return importlib.import_module(name)


def write_model(folder, cls, config):
    """Write a random model, and a tokenizer of letters, to a folder for `--model`."""
    tokens = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokens, **special).save_pretrained(folder)
    torch.manual_seed(0)
    cls(config).save_pretrained(folder)


def letters(n, seed=0):
    """Return texts of eight letters."""
    numbers = torch.randint(6, len(WORDS), (n, 8), generator=torch.Generator().manual_seed(seed))
    return [" ".join(WORDS[i] for i in row) for row in numbers.tolist()]


def run(name, *options, ctrl_c_at=None):
    """Run a script's main, with Ctrl-C in a training step. Returns (exit status, steps taken)."""
    steps, training_step = [], Trainer.training_step

    def counted(*args, **kwargs):
        steps.append(None)
        if len(steps) == ctrl_c_at:
            signal.raise_signal(signal.SIGINT)
        return training_step(*args, **kwargs)

    script, handler = module(name), signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, options)])
        patch.setattr(Trainer, "training_step", counted)
        try:
            script.main()
        except SystemExit as leaving:
            return leaving.code, len(steps)
        finally:
            signal.signal(signal.SIGINT, handler)
    return 0, len(steps)


def refusal(name, *options, capsys):
    """Return what argparse says of these options; nothing is loaded for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module(name), "trainer_of", lambda *_: pytest.fail("the model was loaded"))
        assert run(name, *options) == (2, 0)
    return capsys.readouterr().err.splitlines()[-1].partition("error: ")[2]


def saved(folder):
    """Return the tensors of an adapter."""
    return load_file(folder / "adapter_model.safetensors")


def assert_same_runs(one, other):
    """Two folders have the same adapter, bit for bit, and tell the same of it."""
    assert_same_tensors(saved(one / "adapter"), saved(other / "adapter"))
    one, other = told(one), told(other)
    assert one["results"] == other["results"] and one["ranks"] == other["ranks"]


def told(folder):
    """Return what a run has written down of itself."""
    return json.loads((folder / "results.json").read_text())


def assert_leaves(folder, *adapters):
    """A folder has these adapters, pictures, and nothing of an unfinished run."""
    files = {*adapters, "ranks.png", "curves.png", "results.json"}
    assert {path.name for path in folder.iterdir()} == files
    assert all((folder / f"{n}.png").read_bytes()[1:4] == b"PNG" for n in ("ranks", "curves"))


def assert_same_tensors(left, right):
    """The same names, and bit for bit the same values."""
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name

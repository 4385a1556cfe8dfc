"""Movie-review snippets, rated by people, read straight out of the vaderSentiment source archive.

Nothing is unpacked to disk: the inner archive is opened in memory.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

INNER_ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
RATINGS = "movieReviewSnippets_GroundTruth.txt"
TEST_SIZE, DEV_SIZE = 2114, 1528
# The splits belong to the data, not to a run: --seed must not move texts between them.
SPLIT_SEED = 0


@dataclass(frozen=True)
class Snippet:
    """One text and its class: 1 if people rated it positive on average, 0 if negative."""

    text: str
    label: int


def _member(archive: tarfile.TarFile, suffix: str) -> bytes:
    for member in archive:
        if member.isfile() and member.name.endswith("/" + suffix):
            handle = archive.extractfile(member)
            if handle is not None:
                return handle.read()
    raise ValueError(
        f"no {suffix!r} in the archive; is it the vaderSentiment 3.3.2 source archive?"
    )


def parse_ratings(text: str) -> list[Snippet]:
    """Lines of `id <tab> mean rating <tab> text`; neutral means and repeated texts are dropped."""
    snippets: dict[str, Snippet] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        fields = line.split("\t")
        if len(fields) != 3:
            raise ValueError(f"{RATINGS}, line {number}: {len(fields)} fields instead of 3")
        rating, snippet = float(fields[1]), fields[2].strip()
        # The same words twice could end up in the training and the test split.
        key = re.sub(r"\W+", " ", snippet.lower()).strip()
        if rating != 0 and key not in snippets:
            snippets[key] = Snippet(snippet, int(rating > 0))
    return list(snippets.values())


def load_snippets(path: Path) -> list[Snippet]:
    """All usable snippets of the vaderSentiment source archive at `path`.

    Raises FileNotFoundError if it is not there and ValueError if it is something else.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing. `make demo` fetches it; by hand: pip download --no-deps "
            "--no-build-isolation --no-binary :all: vaderSentiment==3.3.2"
        )
    try:
        with tarfile.open(path) as outer:
            inner_bytes = _member(outer, INNER_ARCHIVE)
        with tarfile.open(fileobj=io.BytesIO(inner_bytes)) as inner:
            return parse_ratings(_member(inner, RATINGS).decode("utf-8"))
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{path} is not a readable tar archive: {error}") from error


def split(snippets: Sequence[Snippet]) -> dict[str, list[Snippet]]:
    """A fixed random split: "test", "dev" and, for training, the rest as "train"."""
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    shuffled = [snippets[i] for i in torch.randperm(len(snippets), generator=generator).tolist()]
    held_out = TEST_SIZE + DEV_SIZE
    return {
        "train": shuffled[held_out:],
        "dev": shuffled[TEST_SIZE:held_out],
        "test": shuffled[:TEST_SIZE],
    }


class Batches:
    """Token ids and labels of one split, in batches padded to their own longest text."""

    def __init__(self, snippets: Sequence[Snippet], tokenizer: Any, device: torch.device):
        self.ids: list[list[int]] = tokenizer(
            [s.text for s in snippets], truncation=True, max_length=64
        )["input_ids"]
        self.labels = torch.tensor([s.label for s in snippets])
        self.pad_id: int = tokenizer.pad_token_id
        self.device = device
        # At every step the order of the same epoch is asked for.
        self._epoch = lru_cache(maxsize=1)(self._epoch_order)

    def gather(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """The model's inputs for these rows: ids, attention mask and labels."""
        ids = [torch.tensor(self.ids[i]) for i in rows]
        padded = torch.nn.utils.rnn.pad_sequence(ids, True, self.pad_id)
        batch = {
            "input_ids": padded,
            "attention_mask": (padded != self.pad_id).long(),
            "labels": self.labels[list(rows)],
        }
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def in_order(self, size: int) -> list[list[int]]:
        """Every row once, short texts first, so that little is padded."""
        rows = sorted(range(len(self.ids)), key=lambda i: len(self.ids[i]))
        return [rows[i : i + size] for i in range(0, len(rows), size)]

    def at_step(self, step: int, seed: int, size: int = 32) -> dict[str, Tensor]:
        """The batch of a training step, counted from 1: a function of (seed, step) alone."""
        per_epoch = len(self.ids) // size
        epoch, index = divmod(step - 1, per_epoch)
        return self.gather(self._epoch(seed, epoch, size)[index])

    def _epoch_order(self, seed: int, epoch: int, size: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(1000 * seed + epoch)
        rows = torch.randperm(len(self.ids), generator=generator).tolist()
        # Sorting by length within a window of 16 batches keeps batches random and padding small.
        window = 16 * size
        batches = []
        for start in range(0, len(rows), window):
            part = sorted(rows[start : start + window], key=lambda i: len(self.ids[i]))
            batches += [part[i : i + size] for i in range(0, len(part), size)]
        batches = [batch for batch in batches if len(batch) == size]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]

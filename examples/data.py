"""The data of the demo: movie-review snippets that people have rated, read from an archive."""

import itertools
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
RATINGS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
TEST_SIZE, DEV_SIZE = 2114, 1528


def parse_ratings(text: str) -> list[tuple[str, int]]:
    """Read `id <tab> mean rating <tab> text` as (text, 1 if the mean is positive else 0), for means
    that are not 0. Repeated texts are dropped."""
    snippets: dict[str, tuple[str, int]] = {}
    for _, rating, snippet in (line.split("\t") for line in text.splitlines()):
        # The same words twice could end up in the training and the test split.
        words = re.sub(r"\W+", " ", snippet.lower()).strip()
        if float(rating) != 0:
            snippets.setdefault(words, (snippet.strip(), int(float(rating) > 0)))
    return list(snippets.values())


def load_splits(archive: Path) -> dict[str, list[tuple[str, int]]]:
    """Read the source archive of vaderSentiment, and split it at random, but alike in every run."""
    with tarfile.open(archive) as outer, tarfile.open(fileobj=outer.extractfile(INNER)) as inner:
        snippets = parse_ratings(inner.extractfile(RATINGS).read().decode("utf-8"))
    order = torch.randperm(len(snippets), generator=torch.Generator().manual_seed(0)).tolist()
    texts, held_out = [snippets[i] for i in order], TEST_SIZE + DEV_SIZE
    return {"train": texts[held_out:], "dev": texts[TEST_SIZE:held_out], "test": texts[:TEST_SIZE]}


class Batches:
    """The token ids and labels of one split, in batches padded to their own longest text."""

    def __init__(
        self,
        snippets: Sequence[tuple[str, int]],
        tokenizer: Any,
        device: torch.device,
        longest: int = 64,
    ):
        texts, labels = map(list, zip(*snippets, strict=True))
        options = {"padding": True, "truncation": True, "return_tensors": "pt"}
        tokens = tokenizer(texts, max_length=longest, **options)
        self.ids, self.mask = tokens["input_ids"].to(device), tokens["attention_mask"].to(device)
        self.labels, self.lengths = torch.tensor(labels, device=device), self.mask.sum(1).tolist()

    def gather(self, rows: list[int]) -> dict[str, Tensor]:
        """Return the model's inputs for these rows: ids, attention mask and labels."""
        longest = max(self.lengths[i] for i in rows)
        ids, mask = self.ids[rows, :longest], self.mask[rows, :longest]
        return {"input_ids": ids, "attention_mask": mask, "labels": self.labels[rows]}

    def by_length(self, rows: Sequence[int], size: int) -> list[list[int]]:
        """Return these rows in batches, short texts first, so that little is padded."""
        rows = sorted(rows, key=self.lengths.__getitem__)
        return [rows[i : i + size] for i in range(0, len(rows), size)]

    def shuffled(self, seed: int, size: int) -> Iterator[list[int]]:
        """Yield the rows of one training batch after another, epoch after epoch."""
        for epoch in itertools.count():
            generator = torch.Generator().manual_seed(1000 * seed + epoch)
            rows = torch.randperm(len(self.lengths), generator=generator).tolist()
            # Sorting within windows of 16 batches keeps batches random and padding small.
            windows = (rows[i : i + 16 * size] for i in range(0, len(rows), 16 * size))
            batches = [b for w in windows for b in self.by_length(w, size) if len(b) == size]
            for i in torch.randperm(len(batches), generator=generator).tolist():
                yield batches[i]

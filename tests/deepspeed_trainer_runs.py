"""What runs in the processes of test_distributed_deepspeed.py: Trainers with DeepSpeed.

They are compared with plain PEFT, trained by hand in one process.
"""

import os

import deepspeed
import torch.distributed as dist
from deepspeed_runs import report, values_of
from trainer_runs import (
    BATCH,
    STEPS,
    in_plain_peft,
    logits_of,
    make,
    rows,
    train_by_hand,
    trainer_of,
)

from adalora_kernels.peft import allocator_of


def config_of(stage):
    """As HF's documentation has it; "auto" is what the TrainingArguments say."""
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }


def prepare(folder, stage, accumulation=1, **options):
    world = dist.get_world_size()
    # What torchrun sets beside RANK and its like.
    os.environ["LOCAL_WORLD_SIZE"] = str(world)
    data = rows(STEPS * BATCH * accumulation * world)
    return trainer_of(
        make(total_step=None),
        folder,
        accumulation=accumulation,
        data=data,
        deepspeed=config_of(stage),
        **options,
    ), data


def train(stage, folder, accumulation):
    """A training with checkpoints, beside one by hand; what is saved is read by plain PEFT."""
    world = dist.get_world_size()
    trainer, data = prepare(folder, stage, accumulation, save_strategy="steps", save_steps=5)
    trainer.train()
    trainer.save_model(f"{folder}/final")
    model, allocator = trainer.model, allocator_of(trainer.model)
    expected = make()
    _, patterns = train_by_hand(expected, data, accumulation * world)
    values, theirs = values_of(model), values_of(expected)
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        logits = logits_of(model)
    dist.barrier()  # The first process writes the file.
    return report(model, allocator) | {
        "difference": ((values - theirs).norm() / theirs.norm()).item(),
        "pattern": allocator.rank_pattern,
        "expected": patterns[-1],
        "saved": (in_plain_peft(f"{folder}/final"), logits),
        "logs": [log for log in trainer.state.log_history if "loss" in log],
    }


def resume(stage, folder, accumulation, step=5):
    """What `train` has written at `step` goes on to the same end."""
    trainer, _ = prepare(folder, stage, accumulation)
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-{step}")
    return report(trainer.model, allocator_of(trainer.model))

"""Two processes that test_lightning.py starts, the second by Lightning: DDP over gloo.

Argument: a folder, in which each process writes rank<n>.json: its ranks, those of the same training
in one process, the last step, and a checksum of the adapters.
"""

import json
import os
import sys
from pathlib import Path

import torch
from lightning_runs import Loader, Module, data, fit, lightning_trainer
from trainer_runs import STEPS, make, rows, snapshot

from adalora_kernels.peft import allocator_of


def main(folder):
    torch.set_num_threads(1)
    # Each process gets every other example, so that a step sees the two of the whole batch.
    half = rows(2 * STEPS)[int(os.environ.get("LOCAL_RANK", 0)) :: 2]
    model = make(dtype=torch.float64)
    trainer = lightning_trainer(strategy="ddp", devices=2, use_distributed_sampler=False)
    fit(trainer, Module(model), Loader(half, batch_size=1))
    alone = make(dtype=torch.float64)
    fit(lightning_trainer(), Module(alone), data(2 * STEPS, size=2))
    ours, theirs = (torch.cat([p.flatten() for p in snapshot(m).values()]) for m in (model, alone))
    report = {
        "ranks": allocator_of(model).ranks(),
        "expected": allocator_of(alone).ranks(),
        "step": allocator_of(model).global_step,
        "difference": ((ours - theirs).norm() / theirs.norm()).item(),
        "checksum": ours.sum().item(),
    }
    (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    os._exit(0)  # See ranks.py.

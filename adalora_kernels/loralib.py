"""Has the names and signatures of the authors' loralib.

A script changes one line: `import adalora_kernels.loralib as loralib`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import functional
from .allocator import RankAllocator as _RankAllocator
from .checks import as_int
from .modules import SVDLinear, lora_state_dict, mark_only_lora_as_trainable

__all__ = [
    "RankAllocator",
    "SVDLinear",
    "compute_orth_regu",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
]


class RankAllocator:
    """loralib's allocator, carried out by `adalora_kernels.RankAllocator`.

    It differs where loralib is wrong (docs/migration.md): exactly the budget is kept, equal
    scores don't prune everything, gradients with inf or NaN are skipped, the last budgeting step
    always prunes, and a parameter without a gradient is no error.

    Args:
        model: the model whose adapters are allocated.
        lora_r: the initial rank; it is only remembered, the adapters' own ranks are what counts.
        target_rank: the average rank per matrix at the end.
        init_warmup, final_warmup, mask_interval: the paper's t_i, t_f and ΔT, in steps.
        beta1, beta2: the decay of the averages of sensitivity and uncertainty, in (0, 1).
        total_step: the steps of the training; `set_total_step` may set it later.
        target_total_rank: the rank at the end over all matrices, in place of the average.
        tb_writter: a TensorBoard SummaryWriter, or anything with its `add_scalar`.
        tb_writter_loginterval: the steps between two logs. Only logging reads the device.

    Raises:
        TypeError, ValueError: as `adalora_kernels.RankAllocator`.
    """

    def __init__(
        self,
        model: nn.Module,
        lora_r: int,
        target_rank: int,
        init_warmup: int,
        final_warmup: int,
        mask_interval: int,
        beta1: float,
        beta2: float,
        total_step: int | None = None,
        target_total_rank: int | None = None,
        tb_writter: Any = None,
        tb_writter_loginterval: int = 500,
    ) -> None:
        self.model = model
        self.lora_init_rank = as_int("lora_r", lora_r, 0)
        self.tb_writter = tb_writter
        self.log_interval = as_int("tb_writter_loginterval", tb_writter_loginterval, 1)
        self.allocator = _RankAllocator(
            model,
            target_r=as_int("target_rank", target_rank, 0),
            total_step=total_step,
            tinit=as_int("init_warmup", init_warmup, 0),
            tfinal=as_int("final_warmup", final_warmup, 0),
            deltaT=as_int("mask_interval", mask_interval, 1),
            beta1=beta1,
            beta2=beta2,
            target_total_rank=target_total_rank,
        )
        self.total_step = self.allocator.schedule.total_step

    def set_total_step(self, total_step: int) -> None:
        """Set the number of training steps.

        Raises:
            TypeError, ValueError: as `BudgetSchedule`.
        """
        self.allocator.set_total_step(total_step)
        self.total_step = self.allocator.schedule.total_step

    def get_rank_pattern(self) -> dict[str, int]:
        """Return the rank of each matrix by the name of its lora_E. This reads the device."""
        return self.allocator.ranks()

    def update_and_mask(self, model: nn.Module, global_step: int) -> tuple[int, Tensor | None]:
        """Update the importance, and prune where the schedule says so.

        Args:
            model: the model given to the constructor.
            global_step: the number of this optimizer step.

        Returns:
            The budget, and the highest score that was pruned: a scalar on the device, or None if
            this step was not to prune.

        Raises:
            ValueError: model is another one than the constructor's.
            RuntimeError: there is no total_step yet, or as `adalora_kernels.RankAllocator.step`.
        """
        if model is not self.model:
            raise ValueError("model must be the one that this allocator was made for")
        if self.total_step is None:
            raise RuntimeError("total_step is not set: call set_total_step() first")
        allocator = self.allocator
        global_step = as_int("global_step", global_step, 0)
        budget = allocator.step(global_step)
        threshold = None
        if allocator.schedule.masks_at(global_step):
            threshold = allocator.highest_pruned_score()
        if self.tb_writter is not None and global_step % self.log_interval == 0:
            self._log(threshold, global_step)
        return budget, threshold

    def _log(self, threshold: Tensor | None, step: int) -> None:
        allocator, add_scalar = self.allocator, self.tb_writter.add_scalar
        if threshold is not None:
            ranks = allocator.ranks()
            for name, rank in ranks.items():
                add_scalar(f"Ranknum/{name}", rank, step)
            sizes = (a.lora_A.shape[1] + a.lora_B.shape[0] for a in allocator.adapters)
            live = sum(r * size for r, size in zip(ranks.values(), sizes, strict=True))
            add_scalar("Budget/total_rank", sum(ranks.values()), step)
            add_scalar("Budget/mask_threshold", threshold.item(), step)
            add_scalar("Budget/sum_param", live, step)
        with torch.no_grad():
            loss = functional.orth_reg(self.model, 1.0)
        add_scalar("train/orth_regu_loss", loss.item(), step)


def compute_orth_regu(model: nn.Module, regu_weight: float = 0.1) -> Tensor:
    """Return regu_weight · mean ‖G - I‖_F over the model's lora_A and lora_B, differentiable.

    Args:
        model: the model with the adapters; G is A·Aᵀ for lora_A and Bᵀ·B for lora_B.
        regu_weight: the coefficient, ≥ 0.

    Returns:
        A scalar on the adapters' device, float32 (float64 for float64 adapters).

    Raises:
        TypeError, ValueError: as `adalora_kernels.orth_reg`.
    """
    return functional.orth_reg(model, regu_weight)

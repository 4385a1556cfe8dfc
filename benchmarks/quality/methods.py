"""What is trained of a model: nothing, LoRA with some pattern, AdaLoRA in some variant, or all."""

from __future__ import annotations

import math
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import Tensor, nn

import adalora_kernels.peft
from adalora_kernels import RankAllocator
from benchmarks.quality.tasks import Task

# Of all steps: when pruning begins, how many follow the last one, and how far apart they are.
SCHEDULE = {"tinit": 0.1, "tfinal": 0.4, "deltaT": 0.025}


def adapt(
    task: Task, method: dict[str, Any], rank: int, init_r: int, steps: int
) -> tuple[nn.Module, Any]:
    """Put the method's adapter into a copy of the task's model.

    Args:
        method: its entry in study.json. `kind` is "frozen", "full", "lora" or "adalora". Of LoRA,
            `pattern` is "uniform" (the default), "random" or "planted"; all have `rank` triplets
            per matrix on average. Of AdaLoRA: `start`, `regulariser`, `importance`, `reviving`,
            `plain` (PEFT's own code, to compare the cost), `loras_alpha` (the lora_alpha that LoRA
            of the final rank has, not its scaling), `even_steps` (such a lora_alpha that its first
            steps are as large as LoRA's, docs/recipe.md), and other fractions than SCHEDULE's.
        rank, init_r: target_r, and for AdaLoRA init_r.
        steps: those of the whole training.

    Returns:
        The model in training mode, and what `adalora_kernels.peft.apply` reports, or None.
    """
    model, scaling = task.pretrained(), task.config["scaling"]
    if method["kind"] in ("frozen", "full"):
        return model.requires_grad_(method["kind"] == "full").train(), None
    if method["kind"] == "lora":
        ranks = _pattern(task, model, method.get("pattern", "uniform"), rank)
        config = LoraConfig(
            r=rank,
            lora_alpha=scaling * rank,
            target_modules=list(ranks),
            rank_pattern=ranks,
            alpha_pattern={name: scaling * r for name, r in ranks.items()},
        )
        return get_peft_model(model, config).train(), None
    fractions = {key: method.get(key, part) for key, part in SCHEDULE.items()}
    schedule = {key: max(1, round(part * steps)) for key, part in fractions.items()}
    config = AdaLoraConfig(
        init_r=init_r,
        target_r=rank,
        lora_alpha=scaling * _alpha_per_scaling(method, rank, init_r),
        target_modules=task.kinds,
        orth_reg_weight=method["regulariser"],
        total_step=steps,
        **schedule,
    )
    adapted = get_peft_model(model, config).train()
    if method.get("plain"):
        return adapted, None
    report = adalora_kernels.peft.apply(adapted, start=method["start"])
    score_by(report.allocator, method.get("importance", "paper"), method.get("reviving", True))
    return adapted, report


def _alpha_per_scaling(method: dict[str, Any], rank: int, init_r: int) -> float:
    """What a method's lora_alpha is, divided by LoRA's scaling."""
    if method.get("even_steps"):
        return math.sqrt(rank * init_r)
    return rank if method.get("loras_alpha") else init_r


def _pattern(task: Task, model: nn.Module, pattern: str, rank: int) -> dict[str, int]:
    """The rank of each matrix that has one, by name."""
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(tuple(task.kinds))
    ]
    budget = rank * len(names)
    if pattern == "uniform":
        return dict.fromkeys(names, rank)
    if pattern == "planted":
        return dict.fromkeys(task.planted, budget // len(task.planted))
    # Every triplet falls on any matrix; drawn from torch's seed, so each run has another pattern.
    counts = torch.bincount(torch.randint(len(names), (budget,)), minlength=len(names)).tolist()
    return {name: count for name, count in zip(names, counts, strict=True) if count}


def score_by(allocator: RankAllocator, importance: str, reviving: bool) -> None:
    """Let the allocator score otherwise; these variants are the study's, not the package's.

    Args:
        importance: "paper"; "abs_E" (|lora_E|); "norm" (that of the triplet's ΔW); "sensitivity"
            (the averages of |w ∂L/∂w| alone, without those of their uncertainty). And what shows
            whether the pattern matters, at the same schedule: "uniform" (the paper's, but each
            matrix keeps equally many), "random" (a number drawn once for each triplet).
        reviving: whether a triplet that has been pruned may come back.
    """
    state = allocator._state
    learn = state.learn
    known = ("paper", "abs_E", "norm", "sensitivity", "uniform", "random")
    if importance not in known:
        raise ValueError(f"importance must be one of {', '.join(known)}, got {importance!r}")
    drawn = torch.rand_like(state.scores)

    def learn_and_score(parameters: list[Tensor], *arguments: Any) -> None:
        learn(parameters, *arguments)
        if importance == "abs_E":
            scores = [lora_E.detach().abs().squeeze(1) for lora_E in parameters[1::3]]
            state.scores.copy_(torch.cat(scores))
        elif importance == "norm":
            parts = zip(parameters[::3], parameters[1::3], parameters[2::3], strict=True)
            norms = [A.norm(dim=1) * E.abs().squeeze(1) * B.norm(dim=0) for A, E, B in parts]
            state.scores.copy_(torch.cat(norms))
        elif importance == "sensitivity":
            ipt = state._averages()[0]
            parts = zip(ipt[::3], ipt[1::3], ipt[2::3], strict=True)
            scores = [A.mean(1) + E.squeeze(1) + B.mean(0) for A, E, B in parts]
            state.scores.copy_(torch.cat(scores))
        elif importance == "uniform":
            better = (s.argsort(descending=True).argsort() for s in state.split(state.scores))
            state.scores.copy_(-torch.cat(list(better)))
        elif importance == "random":
            state.scores.copy_(drawn)
        if not reviving:
            state.scores.masked_fill_(~state.mask, -math.inf)

    if importance != "paper" or not reviving:
        state.learn = learn_and_score

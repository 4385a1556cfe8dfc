"""What an allocator has learnt and decided, as tensors on the device of the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .. import ops
from ..adapters import triplets_there
from ..distributed.shards import any_dtensor, local_grads, whole_tensor
from ..distributed.stages import Stages
from ..importance import (
    at_least_float32,
    grad_scale_or_1,
    not_finite,
    scale_unless,
    triplet_norms,
)
from ..reference import flat_averages, flat_views
from .devices import Devices, are_apart, check_devices, layout_of
from .members import Members
from .shards import Shards

FORMAT = 1
# What states of an earlier version don't have.
_NEWER = {"had_gradient", "there", "restarted", "importance"}
# What triplets are compared by: eq. 7 to 11, or the norm of what each adds to the weight.
IMPORTANCES = ("paper", "norm")


def check_importance(importance: object) -> str:
    """Return `importance`; ValueError if it is neither "paper" nor "norm"."""
    if not isinstance(importance, str) or importance not in IMPORTANCES:
        raise ValueError(f"importance must be 'paper' or 'norm', got {importance!r}")
    return importance


class AllocatorState:
    """The averages and scores of all triplets, and which of them live.

    Captured graphs hold the addresses of these tensors: while the model stays where it is and the
    averages are needed, they are only written in place.

    Of sharded parameters the averages are those of what this process holds. Everything else is the
    same on all processes; the scores are so in steps that prune.

    Args:
        parameters: lora_A, lora_E and lora_B of each adapter in turn.
        narrow_dtype: that of the averages, float32 or bfloat16. For float64 parameters they are
            float64.
        importance: one of IMPORTANCES. By "norm" there are no averages.

    Attributes:
        ranks: the number of triplets that each adapter starts with; n is their sum.
        exp_avg_ipt, exp_avg_unc: the averages (eq. 9, 10) of all parameters, each in one flat
            tensor, or in one for each dtype (`reference.flat_views`); empty once the pattern is
            frozen.
        scores: the importance of each triplet, (n,) float32, or float64 for float64 parameters.
        mask: which triplets live, (n,) bool. One that is not there never does.
        skipped: how many steps had inf or NaN gradients, (1,) int64.
        budget: how many triplets may live at the current step, (1,) int64.
        prunes: whether the current step prunes, (1,) bool.
        members: which triplets compete.
        shards: where the parts of sharded parameters lie, or the adapters of a model that is on
            several devices; None where none is a DTensor and all are on one device.
        stages: the processes whose adapters have the same budget, if there are such.

    Raises:
        ValueError: the parameters lie on different devices, or narrow_dtype is another one.
    """

    exp_avg_ipt: list[Tensor]
    exp_avg_unc: list[Tensor]
    # The parameters that they are of, on the meta device: what shape and dtype they have there.
    _averaged: list[Tensor]
    # The scores of the parts that this process holds, and whether `scores` lack what is in them.
    _own_scores: Tensor
    _are_apart: bool
    # A process that holds no entry of a sharded adapter has averages as well, of nothing.
    _has_averages: bool
    _views: tuple[list[Tensor], list[Tensor]] | None

    def __init__(
        self, parameters: Sequence[Tensor], narrow_dtype: torch.dtype, importance: str = "paper"
    ) -> None:
        check_devices(parameters)
        if narrow_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"state_dtype must be float32 or bfloat16, got {narrow_dtype}")
        self.ranks = [lora_E.shape[0] for lora_E in parameters[1::3]]
        self._narrow_dtype, self.importance = narrow_dtype, importance
        self.shards = layout_of(parameters)
        self.stages: Stages | None = None
        self._make(parameters)

    def _make(self, parameters: Sequence[Tensor]) -> None:
        n, device = sum(self.ranks), parameters[0].device
        self.scores = torch.zeros(n, dtype=at_least_float32(parameters[0].dtype), device=device)
        self.make_averages(parameters)
        self.mask = torch.ones(n, dtype=torch.bool, device=device)
        self.skipped = torch.zeros(1, dtype=torch.int64, device=device)
        self.budget = torch.full((1,), n, dtype=torch.int64, device=device)
        self.prunes = torch.zeros(1, dtype=torch.bool, device=device)
        self.members = Members(self.ranks, device)
        self.members.look(parameters[1::3])

    def begin(self, parameters: Sequence[Tensor]) -> None:
        """Let everything be as at the start of a run."""
        if self._has_averages:
            for average in self.exp_avg_ipt + self.exp_avg_unc:
                average.zero_()
        else:
            self.make_averages(parameters)
        self.scores.zero_()
        if self.shards is not None:
            self._own_scores.copy_(self.shards.scores_of(*self._averages()))
        self._are_apart = False
        self.skipped.zero_()
        self.prunes.zero_()
        self.members.begin()
        self.members.look(parameters[1::3])

    def count_triplets(self, parameters: Sequence[Tensor], *, restarted: bool) -> None:
        """Find out which triplets are there, and let these live. Reads the device.

        Args:
            restarted: count what an earlier run has left: the triplets whose lora_E is not 0, and
                those that it has not touched. If every lora_E is 0, the adapters have been
                initialised again, and it counts as a first run.
        """
        if self.scores.is_meta or parameters[0].is_meta:
            return
        if self.shards is not None:
            there, nonzero = self.shards.there(parameters)
        else:
            nonzero = (torch.cat(list(parameters[1::3])) != 0).squeeze(1)
            triples = zip(parameters[::3], parameters[1::3], parameters[2::3], strict=True)
            there = torch.cat([triplets_there(A, E, B) for A, E, B in triples])
        leaves = restarted and bool(nonzero.any())
        if leaves:
            there &= nonzero | self.members.untouched
        if not there.any():
            there = torch.ones_like(there)  # Values are to come: no run is about nothing.
        self.members.count(there, restarted=leaves)
        self.mask.copy_(there)

    def split(self, flat: Tensor) -> tuple[Tensor, ...]:
        """The parts (r,) of each adapter of a tensor (n,) over all triplets."""
        return flat.split_with_sizes(self.ranks)

    def make_averages(self, parameters: Sequence[Tensor]) -> None:
        """Let both averages begin at 0, where the importance is made of them."""
        if self.importance != "paper":
            self.drop_averages()
            return
        parts = parameters if self.shards is None else self.shards.parts(parameters)
        make = self.shards.new_averages if isinstance(self.shards, Devices) else flat_averages
        self.exp_avg_ipt, self.exp_avg_unc = (make(parts, self._narrow_dtype) for _ in range(2))
        self._averaged = [torch.empty_like(p.detach(), device="meta") for p in parts]
        self._has_averages = True
        self._own_scores = self.scores.new_zeros(0 if self.shards is None else self.shards.count)
        self._are_apart = False
        self._keep_views()

    def drop_averages(self) -> None:
        """Free the averages: nothing is learnt any more."""
        self.exp_avg_ipt, self.exp_avg_unc = [], []
        self._averaged, self._views = [], None
        self._own_scores = self.scores.new_zeros(0)
        self._has_averages, self._are_apart = False, False

    def _averages(self) -> tuple[list[Tensor], list[Tensor]]:
        """Both averages of each parameter (each part) in its shape, as views."""
        if self._views is not None:
            return self._views
        ipt, unc = (flat_views(a, self._averaged) for a in (self.exp_avg_ipt, self.exp_avg_unc))
        return ipt, unc

    def _keep_views(self) -> None:
        """Keep them where there is no compiled code: to make them in every step costs the host."""
        self._views = None
        device = self.exp_avg_ipt[0].device if self.exp_avg_ipt else None
        if device is not None and ops.library.why_not_on(device) is not None:
            self._views = self._averages()

    def __getstate__(self) -> dict[str, Any]:
        # Pickled, views would be tensors of their own.
        # A copy has no processes to share a budget with.
        return {**self.__dict__, "_views": None, "stages": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._keep_views()

    def _set_averages(self, exp_avg_ipt: list[Tensor], exp_avg_unc: list[Tensor]) -> None:
        for own, values in zip(self._averages(), (exp_avg_ipt, exp_avg_unc), strict=True):
            if self.shards is None:
                torch._foreach_copy_(own, [whole_tensor(value) for value in values])
            else:
                self.shards.fill_(own, values)
        if self.shards is not None:
            self._own_scores.copy_(self.shards.scores_of(*self._averages()))

    def _averages_of_parameters(self) -> tuple[list[Tensor], list[Tensor]]:
        """As `_averages`, as DTensors where the parameters are such."""
        ipt, unc = self._averages()
        if self.shards is None or not self._has_averages:
            return ipt, unc
        ipt, unc = (self.shards.placed(parts, self._narrow_dtype) for parts in (ipt, unc))
        return ipt, unc

    def _shard(self, parameters: Sequence[Tensor]) -> None:
        """Divide the averages as the parameters are now. Processes talk if they were divided."""
        shards = layout_of(parameters)
        former = self.shards
        if isinstance(shards, Shards) and isinstance(former, Shards) and shards.lies_as(former):
            self.shards = shards
            return
        self.bring_scores_together()
        before = self._averages_of_parameters()
        self.shards = shards
        if self._has_averages:
            self.make_averages(parameters)
            self._set_averages(*before)

    def follow(self, parameters: Sequence[Tensor]) -> bool:
        """Go to the device and dtype of the parameters, which may have been moved or sharded since.

        Returns:
            Whether they have been sharded since.
        """
        shards = self.shards
        is_whole = shards is None and not any_dtensor(parameters)
        if is_whole and self.scores.is_meta and not parameters[0].is_meta:
            self.shards = layout_of(parameters)
            self._make(parameters)
            return False
        if is_whole:
            if are_apart(parameters):
                self._shard(parameters)
        elif shards is None or not shards.holds(parameters):
            self._shard(parameters)
        device, dtype = parameters[0].device, at_least_float32(parameters[0].dtype)
        is_there = self.scores.device == device and self.scores.dtype == dtype
        is_new = shards is None and isinstance(self.shards, Shards)
        if is_there and not self._lie_elsewhere(parameters):
            return is_new
        if self.scores.is_meta:
            self._make(parameters)
            return is_new
        self.bring_scores_together()
        before = self._averages_of_parameters()
        if self.shards is not None:
            self.shards = layout_of(parameters)  # which has tensors of its own on the device
        self.scores = self.scores.to(device, dtype)
        if self._has_averages:
            self.make_averages(parameters)
            self._set_averages(*before)
        for name in ("mask", "skipped", "budget", "prunes"):
            setattr(self, name, getattr(self, name).to(device))
        self.members.move(device)
        return is_new

    def _lie_elsewhere(self, parameters: Sequence[Tensor]) -> bool:
        """Whether averages have two dtypes, and a parameter has changed from one to the other."""
        if len(self.exp_avg_ipt) < 2:
            return False
        parts = parameters if self.shards is None else self.shards.parts(parameters)
        return any(p.dtype != before.dtype for p, before in zip(parts, self._averaged, strict=True))

    def learn(
        self, parameters: Sequence[Tensor], beta1: float, beta2: float, grad_scale: Tensor | None
    ) -> None:
        """Update the averages, if there are any, and the scores from the parameters' gradients."""
        if self.importance != "paper":
            return
        if self.stages is not None:
            scale = grad_scale_or_1(grad_scale, self.scores.device)
            bad = self.stages.maximum(not_finite(local_grads(parameters), scale))
            grad_scale = scale_unless(bad, scale)
        exp_avg_ipt, exp_avg_unc = self._views or (self.exp_avg_ipt, self.exp_avg_unc)
        if self.shards is not None:
            own = (exp_avg_ipt, exp_avg_unc, self._own_scores, self.skipped)
            self.shards.importance_update_(parameters, *own, beta1, beta2, grad_scale)
            self._are_apart = True
            return
        torch.ops.adalora.importance_update_(
            parameters,
            # What is frozen may still hold a gradient of before.
            [p.grad if p.requires_grad else None for p in parameters],
            exp_avg_ipt,
            exp_avg_unc,
            self.scores,
            self.skipped,
            beta1,
            beta2,
            grad_scale,
        )

    def score(self, parameters: Sequence[Tensor]) -> None:
        """Let `scores` be the norms of what each triplet adds to the weight, but for scaling."""
        if self.shards is not None:
            self.scores.copy_(self.shards.norms(parameters, self.scores.dtype))
            return
        self.scores.copy_(triplet_norms(list(parameters)))

    def bring_scores_together(self) -> None:
        """Let `scores` be those of whole triplets. Processes talk where they are not yet."""
        if self.shards is not None and self._are_apart:
            self.scores.copy_(self.shards.together(self._own_scores))
            self._are_apart = False

    def prune(self, lora_E: Sequence[Tensor], again: bool = False) -> None:
        """If the step prunes, keep the `budget` best triplets, and write 0 to the other lora_E.

        Only what is in play is compared and changed. Whether the step prunes and how many stay is
        for the device to see, so that one captured call serves steps of all kinds. `again` only
        writes the zeros of the mask that is there.
        """
        members = self.members
        written = lora_E
        if self.shards is not None:
            if not again:
                self.bring_scores_together()
            written = [self.scores.new_ones(len(self.scores), 1)]
        torch.ops.adalora.prune_(
            self.scores,
            self.budget,
            self.prunes,
            members.in_play,
            members.kept_at_0 if members.restarted else None,
            self.mask,
            written,
            again,
        )
        if self.shards is not None:
            self.shards.write_zeros_(lora_E, written[0].squeeze(1) == 0)
            return
        # Compiled code doesn't tell autograd, which may have saved them for a backward to come.
        increment_version(lora_E)

    def prune_with_others(self, lora_E: Sequence[Tensor]) -> None:
        """As `prune`, of the triplets of all stages together. All processes call this."""
        stages, own = self.stages, self.members.in_play
        if stages is None:
            self.prune(lora_E)
            return
        self.bring_scores_together()
        scores, in_play = stages.gather_triplets(self.scores, own)
        mask = torch.ones_like(in_play)
        unused = [torch.zeros_like(scores).unsqueeze(1)]
        prunes = torch.ones_like(self.prunes)
        torch.ops.adalora.prune_(scores, self.budget, prunes, in_play, None, mask, unused, False)
        torch.where(own, stages.own_part(mask), self.mask, out=self.mask)
        self.prune(lora_E, again=True)

    def keep(self, mask: Tensor) -> None:
        """Let exactly these triplets live, (n,) bool, wherever they come from."""
        self.mask.copy_(mask)
        members = self.members
        members.count(members.there | mask, restarted=members.restarted)

    def total_rank(self) -> int:
        """The number of triplets alive in adapters that take part. Reads the device."""
        return int((self.mask & self.members.in_play).sum())

    def highest_pruned_score(self) -> Tensor:
        """A scalar on the device, -inf where nothing is pruned."""
        pruned = self.members.in_play > self.mask
        return self.scores.masked_fill(~pruned, -torch.inf).amax()

    def tensors(self) -> dict[str, Any]:
        """Copies of what a resumed run needs. Processes talk where the parameters are sharded."""
        self.bring_scores_together()
        exp_avg_ipt, exp_avg_unc = self._averages_of_parameters()
        return {
            "exp_avg_ipt": [t.clone() for t in exp_avg_ipt],
            "exp_avg_unc": [t.clone() for t in exp_avg_unc],
            "scores": self.scores.clone(),
            "mask": self.mask.clone(),
            "skipped": self.skipped.clone(),
            # Without it, a state is one of "paper", as those of earlier versions are.
            **({} if self.importance == "paper" else {"importance": self.importance}),
            **self.members.state(),
        }

    def check(self, saved: dict[str, Any], like: dict[str, Any], params: Sequence[Tensor]) -> None:
        """Raise ValueError if a saved state is not one of the adapters whose state is `like`."""
        _check_format(saved, like)
        if saved["names"] != like["names"]:
            difference = _first_difference(saved["names"], like["names"])
            raise ValueError(f"state is for other adapters: {difference}")
        if saved["ranks"] != self.ranks:
            raise ValueError(f"state is for ranks {saved['ranks']}, the model has {self.ranks}")
        by = saved.get("importance", "paper")
        if by != self.importance and not saved["frozen"]:
            raise ValueError(
                f"state is of a run with importance {by!r}, this one has {self.importance!r}"
            )
        if saved["shrunk"] and not like["shrunk"] and isinstance(self.shards, Shards):
            raise ValueError(
                "state is of a model that was shrunk, and these adapters are sharded: load it into "
                "the model before that is sharded"
            )
        # Only the triplets of the mask are left of adapters that are shrunk.
        patterns = [state["mask"].tolist() for state in (saved, like)]
        if like["shrunk"] and not (saved["shrunk"] and patterns[0] == patterns[1]):
            raise ValueError("state is for other triplets than those that shrink() left here")
        shapes = [p.shape for p in params] if self.importance == "paper" else []
        averages = {} if saved["frozen"] else {"exp_avg_ipt": shapes, "exp_avg_unc": shapes}
        expected: dict[str, Any] = {
            **averages,
            "scores": self.scores.shape,
            "mask": self.mask.shape,
            "skipped": self.skipped.shape,
            "there": self.mask.shape,
        }
        for key, shape in expected.items():
            value = saved.get(key, self.mask)
            actual = [t.shape for t in value] if isinstance(value, list) else value.shape
            if actual != shape:
                raise ValueError(f"state has {key} of shape {actual}, expected {shape}")
        if isinstance(self.shards, Shards) and not saved["frozen"]:
            named = ("exp_avg_ipt", "exp_avg_unc", "scores")
            if self.shards.are_parts_of_others(*(saved[name] for name in named)):
                raise ValueError(
                    "state has DTensors with the shards of another process: what torch.save "
                    "(Accelerate's register_for_checkpointing) writes of sharded adapters is one "
                    "process's only. Use torch.distributed.checkpoint or export.save_state"
                )
        had = saved.get("had_gradient", self.ranks)
        if len(had) != len(self.ranks):
            raise ValueError(f"state has had_gradient of length {len(had)}, not {len(self.ranks)}")

    def load(self, saved: dict[str, Any], parameters: Sequence[Tensor]) -> None:
        """Take over what `check` has found to fit."""
        self.follow(parameters)
        if not saved["frozen"] and self.importance == "paper":
            if not self._has_averages:
                self.make_averages(parameters)
            self._set_averages(saved["exp_avg_ipt"], saved["exp_avg_unc"])
        self._are_apart = False
        for name in ("scores", "mask", "skipped"):
            getattr(self, name).copy_(whole_tensor(saved[name]))
        self.members.load(saved)
        self.members.look(parameters[1::3])


def _check_format(saved: dict[str, Any], like: dict[str, Any]) -> None:
    """Raise ValueError if a saved state has another format, or not all entries, of one like it."""
    missing = like.keys() - saved.keys() - _NEWER
    if missing:
        raise ValueError(f"state is not from a RankAllocator: it lacks {sorted(missing)}")
    if saved["format"] != FORMAT:
        raise ValueError(f"state has format {saved['format']}, this version reads {FORMAT}")


def _first_difference(theirs: list[str], mine: list[str]) -> str:
    for a, b in zip(theirs, mine, strict=False):
        if a != b:
            return f"{a!r} where the model has {b!r}"
    return f"{len(theirs)} of them where the model has {len(mine)}"

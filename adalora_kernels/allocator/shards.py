"""What an allocator learns from the parts of sharded adapters that one process holds."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..distributed.layout import Layout
from ..distributed.shards import is_dtensor, local_grads, local_tensors, whole_tensor
from ..importance import grad_scale_or_1, not_finite, scale_unless, triplet_squares
from ..reference import triplet_scores

# In which dimension lora_A, lora_E and lora_B count their triplets.
_RANK_DIMS = (0, 0, 1)


class Shards(Layout):
    """The parts of all adapters that this process holds, as adapters of their own.

    The importance update knows adapters (lora_A, lora_E, lora_B) of one rank; of a sharded one a
    process may hold other triplets of each factor. So every part is an adapter of its own here,
    whose other two factors are a few zeros without a gradient: its scores are the part's alone.
    What each of them adds to which triplet of which whole adapter, this knows.

    Args:
        parameters: lora_A, lora_E and lora_B of each adapter in turn; some are DTensors.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__(parameters)
        self._others: dict[tuple[int, ...], Tensor] = {}
        # The parts that have entries at all, and for each parameter which of them is its own.
        self._held = [i for i, piece in enumerate(self.pieces) if piece.numel > 0]
        self._number = {i: number for number, i in enumerate(self._held)}
        device = local_tensors(parameters[:1])[0].device
        places: list[int] = []
        taken: list[int] = []
        weights: list[float] = []
        # Where the triplets of each adapter begin.
        ranks = (lora_E.shape[0] for lora_E in parameters[1::3])
        *self._firsts, self._n = itertools.accumulate(ranks, initial=0)
        start = 0
        for i in self._held:
            piece, factor = self.pieces[i], i % 3
            dim = _RANK_DIMS[factor]
            count = piece.size[dim]
            if piece.counted:
                first = factor * self._n + self._firsts[i // 3] + piece.offset[dim]
                places += range(first, first + count)
                taken += range(start, start + count)
                # The kernel takes the mean over what is here.
                weights += [piece.size[1 - dim] / piece.shape[1 - dim]] * count
            start += count
        self.count = start
        self._places = torch.tensor(places, dtype=torch.int64, device=device)
        self._taken = torch.tensor(taken, dtype=torch.int64, device=device)
        self._weights = torch.tensor(weights, dtype=torch.float64, device=device)
        rows = [
            range(first + piece.offset[0], first + piece.offset[0] + piece.size[0])
            for first, piece in zip(self._firsts, self.pieces[1::3], strict=True)
        ]
        self._rows = torch.tensor([i for r in rows for i in r], dtype=torch.int64, device=device)

    def parts(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """lora_A, lora_E and lora_B of each part that is here, as an adapter of its own."""
        return self._as_adapters(local_tensors([parameters[i] for i in self._held]))

    def _as_adapters(self, parts: Sequence[Tensor]) -> list[Tensor]:
        result = []
        for i, part in zip(self._held, parts, strict=True):
            rank = part.shape[_RANK_DIMS[i % 3]]
            column, row = self._zeros((rank, 1), part), self._zeros((1, rank), part)
            adapter = [column, column, row]
            adapter[i % 3] = part
            result += adapter
        return result

    def _zeros(self, shape: tuple[int, int], like: Tensor) -> Tensor:
        # Nothing writes to it, so that one serves all.
        zeros = self._others.get(shape)
        if zeros is None or zeros.dtype != like.dtype or zeros.device != like.device:
            zeros = self._others[shape] = like.new_zeros(shape)
        return zeros

    def grads(self, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        """The gradients of `parts`."""
        grads, result = local_grads(parameters), []
        for i in self._held:
            adapter: list[Tensor | None] = [None, None, None]
            adapter[i % 3] = grads[i]
            result += adapter
        return result

    def importance_update_(
        self,
        parameters: Sequence[Tensor],
        exp_avg_ipt: list[Tensor],
        exp_avg_unc: list[Tensor],
        scores: Tensor,
        skipped: Tensor,
        beta1: float,
        beta2: float,
        grad_scale: Tensor | None,
    ) -> None:
        """The op of that name for `parts`, unless any process has a gradient of inf or NaN.

        Args: those of the op, and `scores` (count,) those of the parts.
        """
        grads = self.grads(parameters)
        # One number crosses processes.
        scale = grad_scale_or_1(grad_scale, self._places.device)
        scale = scale_unless(self.maximum(not_finite(grads, scale)), scale)
        skipped.add_(~scale.isfinite())
        if not any(grad is not None for grad in grads):
            return
        torch.ops.adalora.importance_update_(
            self.parts(parameters),
            grads,
            exp_avg_ipt,
            exp_avg_unc,
            scores,
            torch.zeros_like(skipped),  # A process that holds nothing would not have counted.
            beta1,
            beta2,
            scale,
        )

    def scores_of(self, exp_avg_ipt: list[Tensor], exp_avg_unc: list[Tensor]) -> Tensor:
        """The scores (count,) of `parts`, from the averages of each."""
        if not exp_avg_ipt:
            return self._weights.new_zeros(0)
        return triplet_scores(exp_avg_ipt, exp_avg_unc)

    def together(self, scores: Tensor) -> Tensor:
        """The scores (n,) of whole triplets, the same bits for all processes.

        Args:
            scores: those of `parts`, (count,).
        """
        # One slot for each factor of each triplet: a sum at one place would have no fixed order.
        slots = scores.new_zeros(3 * self._n)
        slots[self._places] = scores[self._taken] * self._weights.to(scores.dtype)
        return self.sum_in_order(slots.view(3, self._n).sum(0))

    def norms(self, parameters: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """`reference.triplet_norms` (n,) of whole triplets; the same bits for all processes."""
        squares = triplet_squares(self.parts(parameters))
        own = [squares[3 * k + i % 3].to(dtype) for k, i in enumerate(self._held)]
        slots = self._weights.new_zeros(3 * self._n, dtype=dtype)
        if own:
            slots[self._places] = torch.cat(own)[self._taken]
        return self.sum_in_order(slots).view(3, self._n).sqrt().prod(0)

    def placed(self, parts: Sequence[Tensor], narrow_dtype: torch.dtype) -> list[Tensor]:
        """Averages that lie as `parts` do, as a tensor for each parameter, placed as that is."""
        result = []
        for i, (piece, parameter) in enumerate(zip(self.pieces, self.tensors, strict=True)):
            if i in self._number:
                local = parts[3 * self._number[i] + i % 3]
            else:
                is_double = parameter.dtype == torch.float64
                dtype = torch.float64 if is_double else narrow_dtype
                local = self._places.new_empty(piece.size, dtype=dtype)
            result.append(self.like(local, i))
        return result

    def fill_(self, parts: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Copy a value of each parameter, in whatever way it is placed, to where `parts` lie."""
        for i, value in enumerate(values):
            if self._is_placed_alike(value, i):
                (part,) = local_tensors([value])
            else:
                part = self.part(whole_tensor(value), i)
            if i in self._number:
                parts[3 * self._number[i] + i % 3].copy_(part)

    def _is_placed_alike(self, value: Any, i: int) -> bool:
        parameter: Any = self.tensors[i]
        return (
            is_dtensor(value)
            and is_dtensor(parameter)
            and value.device_mesh == parameter.device_mesh
            and value.placements == parameter.placements
        )

    def are_parts_of_others(
        self, exp_avg_ipt: Sequence[Tensor], exp_avg_unc: Sequence[Tensor], scores: Tensor
    ) -> bool:
        """Whether saved DTensors hold what another process held, and not what this one holds.

        They do where one process has pickled its own, and all have read that. The scores (n,) are
        those of the whole then, and those that all processes find together are others.
        """
        both = (exp_avg_ipt, exp_avg_unc)
        if not all(self._is_placed_alike(a, i) for each in both for i, a in enumerate(each)):
            return False
        held = [local_tensors(each) for each in both]
        fits = all(a.shape == self.pieces[i].size for each in held for i, a in enumerate(each))
        own = scores.new_zeros(self.count).to(self._places.device)
        if fits:
            parts = [self._as_adapters([each[i] for i in self._held]) for each in held]
            own.copy_(self.scores_of(*parts))
        together, scores = self.together(own), scores.to(own.device)
        is_other = bool(scores.any()) and bool((together - scores).norm() > 0.01 * scores.norm())
        flag = torch.tensor([is_other or not fits], dtype=torch.int32, device=own.device)
        return bool(self.maximum(flag))

    def lies_as(self, other: Shards) -> bool:
        """Whether all processes hold the same of each parameter as by another one."""
        return self.pieces == other.pieces and self.axes == other.axes

    def write_zeros_(self, lora_E: Sequence[Tensor], dead: Tensor) -> None:
        """Write 0 into the lora_E of what is dead, (n,) bool, where this process holds it."""
        held = [part for part in local_tensors(lora_E) if part.numel() > 0]
        if held:
            flat = torch.cat(held).masked_fill_(dead[self._rows].unsqueeze(1), 0.0)
            torch._foreach_copy_(held, flat.split_with_sizes([len(part) for part in held]))

    def there(self, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Which whole triplets have any value that is not 0, and which a lora_E; both (n,) bool."""
        flags = torch.zeros(2, self._n, dtype=torch.int32, device=self._places.device)
        for i in self._held:
            piece, factor = self.pieces[i], i % 3
            dim = _RANK_DIMS[factor]
            first = self._firsts[i // 3] + piece.offset[dim]
            own = (local_tensors([parameters[i]])[0] != 0).any(1 - dim).to(torch.int32)
            for row in flags if factor == 1 else flags[:1]:
                row[first : first + len(own)] |= own
        whole = self.maximum(flags.view(-1)).view(2, self._n).bool()
        return whole[0], whole[1]

    def recall(self, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
        """The parameters themselves, where the model has a whole copy in their place.

        FSDP2 leaves such copies where it has not resharded after a forward, for instance that of an
        evaluation. They have no gradient; whatever else is put into a model gets one.
        """
        return [
            cast(nn.Parameter, before) if self._is_copy(now, before) else now
            for now, before in zip(parameters, self.tensors, strict=True)
        ]

    @staticmethod
    def _is_copy(now: Tensor, before: Tensor) -> bool:
        return (
            now is not before
            and not is_dtensor(now)
            and is_dtensor(before)
            and now.grad is None
            and now.shape == before.shape
        )

"""What an allocator does where several processes train: it keeps, compares and refuses."""

from __future__ import annotations

import weakref
from dataclasses import replace

import torch
from torch import nn

from ..adapters import refuse_flattened
from ..distributed import engines, replicas, stages
from ..distributed.groups import Group, check_group, group_of
from .begin import BeginsRuns

# So often are replicas compared, in steps; and at the first step, and when the pattern is final.
_COMPARED_EVERY = 100
# After so many steps without a gradient an optimizer can't be the one that trains the adapters.
_STEPS_WITHOUT_GRADIENTS = 3


class AmongProcesses(BeginsRuns):
    """The part of a `RankAllocator` that looks at other processes, and at who runs them."""

    # The target for each matrix, where it was given so.
    _target_r: int | None
    # What can't be copied. A copy compares nothing, until it is told to.
    _NOT_AMONG_COPIES = ("_model", "_syncs", "_unseen", "_check_replicas")
    # Weak: who keeps an allocator does not keep the model. None in a copy.
    _model: weakref.ref[nn.Module] | None = None
    _check_replicas: bool | Group = False

    def _start_among_processes(self) -> None:
        self._syncs: weakref.WeakKeyDictionary[torch.optim.Optimizer, replicas.GradientSync]
        self._syncs = weakref.WeakKeyDictionary()
        # Optimizers that this has been attached to, and that have not stepped since.
        self._unseen: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        # Steps of optimizers without a gradient, until there has been one.
        self._without_gradients: int | None = 0
        self._has_compared = False

    def share_budget(self, process_group: Group) -> None:
        """Have one budget with other processes, which have other adapters.

        The scores of all are brought together in each step that prunes, and the best triplets of
        all stay; so the names of the adapters have to be different ones. target_r, or
        target_total_rank, counts for the matrices of all, and so do the mean of the regulariser
        and a gradient that is not finite. `orth_reg` is this process's part of the regulariser's
        sum. What is reported of ranks, scores and masks is of this process's adapters, and so is
        the state.

        All processes of the group have to call this together, before the first step; and every
        `optimizer.step()` of each of them has to be one of all.

        Args:
            process_group: the processes. One that has none but this process stands for a training
                of its own among others.

        Raises:
            TypeError: it is no process group.
            ValueError: this process is not in it, two have an adapter of the same name, or
                check_replicas is True, which would compare them.
            RuntimeError: there has been a step.
        """
        check_group("process_group", process_group)
        if isinstance(process_group, bool | None):
            raise TypeError(f"process_group must be a process group, got {process_group}")
        if self.begun:
            raise RuntimeError("share_budget() has to come before the first step")
        if self.check_replicas is True:
            raise ValueError(
                "check_replicas=True would compare the stages of process_group: give the group of "
                "those processes that have the same adapters"
            )
        own, target = self.matrices, self.schedule.target_budget
        names = [adapter.name for adapter in self.adapters]
        self._state.stages = stages.Stages(process_group, names, self._state.ranks)
        if self._target_r is not None and target == self._target_r * own:
            target = self._target_r * self.matrices
        init = self._count_everywhere()
        self.schedule = replace(self.schedule, init_budget=init, target_budget=target)

    def _brings_together(self, global_step: int) -> bool:
        """Whether the scores of all stages are compared in a step."""
        if self._state.stages is None or self.frozen:
            return False
        return self.schedule.masks_at(global_step)

    def _asks_who_takes_part(self, global_step: int) -> bool:
        """Whether the stages tell each other in a step: where it counts, and in the first one."""
        known = self._everywhere
        is_new = known is not None and not known.any_had_gradient and not self.frozen
        return self._state.stages is not None and (is_new or self._brings_together(global_step))

    def _weight_here(self, weight: float) -> float:
        """The weight of the regulariser with which a mean over these adapters is one over all."""
        return weight * len(self.adapters) / self.matrices

    def _check_sync(self, sync_gradients: bool | Group) -> Group | None:
        """The processes to sync with.

        Raises:
            TypeError, ValueError, RuntimeError: as `attach`.
        """
        if sync_gradients is True and self._state.stages is not None:
            raise ValueError(
                "sync_gradients=True would average over the stages of process_group: give the "
                "group of those processes that have the same adapters"
            )
        return replicas.group_to_sync(sync_gradients)

    @property
    def is_of_engine(self) -> bool:
        """Whether this has been attached to an engine that keeps the parameters in parts."""
        return self._copies is not None

    @property
    def check_replicas(self) -> bool | Group:
        """Whether all processes, or those of a group, are compared now and then; may be set."""
        return self._check_replicas

    @check_replicas.setter
    def check_replicas(self, value: bool | Group) -> None:
        check_group("check_replicas", value)
        self._check_replicas = value
        self._has_compared = False

    def sync_gradients(self) -> None:
        """Average the gradients over the processes, where `attach` was told `sync_gradients`.

        Call it in every process after the last `backward()` of an optimizer step, and before what
        looks at the gradients: clipping, `GradScaler.unscale_`. Where nobody does, the optimizer's
        step does it when it begins, which is soon enough where nothing has looked at them. In
        both cases it is done once per optimizer step, however many micro-batches there are.

        Raises:
            RuntimeError: not attached with `sync_gradients`.
        """
        if not self._syncs:
            raise RuntimeError("sync_gradients() needs attach(optimizer, sync_gradients=True)")
        for optimizer, sync in self._syncs.items():
            sync.average(optimizer)

    def _adapters_with_parameters(self) -> engines.Triples:
        """Those that the model still has."""
        parameters = self._parameters()
        triples = zip(parameters[::3], parameters[1::3], parameters[2::3], strict=True)
        left = set(map(id, self.adapters_left))
        pairs = zip(self.adapters, triples, strict=True)
        return [(adapter, triple) for adapter, triple in pairs if id(adapter) in left]

    def _refuse_engines(self, is_synced: bool) -> None:
        """Refuse what is wrong already.

        Raises:
            ValueError: as `attach`.
        """
        refuse_flattened(self.adapters_left)
        adapters = self._adapters_with_parameters()
        engines.refuse_deepspeed(adapters)
        if not is_synced:
            engines.refuse_unreduced(self._model_of_adapters(), adapters)

    def _begin_to_watch(self, optimizer: torch.optim.Optimizer) -> None:
        self._unseen.add(optimizer)
        self._without_gradients = 0
        if self._state.stages is None:
            stages.announce([adapter.name for adapter in self.adapters])

    def _look_at_engine(self, optimizer: torch.optim.Optimizer) -> None:
        """What an engine may have done since `attach`; at the first step of each optimizer.

        Raises:
            ValueError: as `attach`.
        """
        self._refuse_engines(optimizer in self._syncs)
        if self._state.stages is None:
            stages.refuse_stages([adapter.name for adapter in self.adapters])
        self._unseen.discard(optimizer)

    def _model_of_adapters(self) -> nn.Module | None:
        return None if self._model is None else self._model()

    def _stepped_without_gradients(self) -> None:
        """Count a step of an optimizer that had none for the adapters.

        Raises:
            RuntimeError: there have been some, and never one with a gradient.
        """
        if self._without_gradients is None:
            return
        adapters = self.adapters_left
        trained = [a.name for a in adapters if any(p.requires_grad for p in a.parameters)]
        if not trained:
            return
        self._without_gradients += 1
        if self._without_gradients >= _STEPS_WITHOUT_GRADIENTS:
            self._without_gradients = 0
            raise RuntimeError(
                f"the optimizer has stepped {_STEPS_WITHOUT_GRADIENTS} times, and no adapter has "
                f"had a gradient (such as {trained[0]}, one of {len(trained)} that need one). "
                "Either an engine keeps the gradients elsewhere (DeepSpeed: "
                "allocator.attach(engine) after deepspeed.initialize), or the forward does not use "
                "the adapters (disable_adapter, torch.no_grad), or a closure drops them. If "
                "another part of the model is trained first, attach when the adapters are, or "
                "freeze them until then"
            )

    def _compare_replicas(self, was_frozen: bool) -> None:
        """Now and then, compare what the processes have come to. Reads the device then.

        Raises:
            RuntimeError: they have not come to the same.
        """
        if not self._check_replicas:
            return
        group = group_of(self._check_replicas)
        if group is None:
            return
        is_new = not self._has_compared or self.frozen != was_frozen
        if is_new or self.global_step % _COMPARED_EVERY == 0:
            names = [adapter.name for adapter in self.adapters]
            masks = self._state.split(self._state.mask)
            lora_E = self._parameters()[1::3]
            replicas.compare(names, masks, lora_E, self.global_step, group)
            self._has_compared = True

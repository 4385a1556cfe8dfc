"""What an allocator does where several processes train: it keeps, compares and refuses."""

from __future__ import annotations

import weakref

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

    @property
    def is_of_engine(self) -> bool:
        """Whether this has been attached to an engine that keeps the parameters in parts."""
        return getattr(self, "_copies", None) is not None

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
        stages.announce([adapter.name for adapter in self.adapters])

    def _look_at_engine(self, optimizer: torch.optim.Optimizer) -> None:
        """What an engine may have done since `attach`; at the first step of each optimizer.

        Raises:
            ValueError: as `attach`.
        """
        self._refuse_engines(optimizer in self._syncs)
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

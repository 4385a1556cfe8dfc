"""What a layer remembers of a merge: enough to undo it, and to see when it is out of date."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Merge(NamedTuple):
    """What a merged weight was made from.

    Attributes:
        original: what the weight held before.
        parameters: weight, which now holds the sum; lora_A, lora_E and lora_B.
        values: copies of what the latter three held.
        states: the versions and addresses of all four.
    """

    original: Tensor
    parameters: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    states: tuple[tuple[object, int], ...]

    @classmethod
    def of(cls, original: Tensor, *parameters: Tensor) -> Merge:
        """Remember a merge that has just been made."""
        values = tuple(p.detach().clone() for p in parameters[1:])
        return cls(original, parameters, values, tuple(map(_state, parameters)))

    def is_current(self, *parameters: Tensor) -> bool:
        """Whether nothing was written to `parameters`, those of the merge, since it was made.

        On a CPU the adapter's values are compared. Elsewhere that would wait for the device, so
        versions and addresses have to do, as they do for the weight.
        """
        if any(p is not mine for p, mine in zip(parameters, self.parameters, strict=True)):
            return False
        if parameters[0].is_cpu:
            return self.states[0] == _state(parameters[0]) and self.has_values_of(*parameters)
        return self.states == tuple(map(_state, parameters))

    def has_values_of(self, *parameters: Tensor) -> bool:
        """Whether the adapter holds the values of the merge. Reads the device."""
        pairs = zip(parameters[1:], self.values, strict=True)
        return parameters[0].is_meta or all(torch.equal(p, value) for p, value in pairs)


def _state(t: Tensor) -> tuple[object, int]:
    # A tensor that was made in inference mode has no version: its state is equal to none.
    return object() if t.is_inference() else t._version, t.data_ptr()
